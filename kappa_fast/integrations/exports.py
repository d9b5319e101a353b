"""The formats of Selection.export(): a selection in the formats of other programs, or an error with advice."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..matching.gguf_names import is_from_gguf
from ..results.entries import Index
from ..results.names import LEADING, group_of, layer_of, unwrapped
from ..results.units import expert_of
from ..texts import printable, warn

if TYPE_CHECKING:
    from torch import nn

    from ..results.selection import Selection

TRAINERS = ("axolotl", "ms-swift", "spectrum", "esft")  # whose models have the names of transformers
FORMATS = (*TRAINERS, "names", "regex")
# All parts of a fused projection, which together are the whole tensor.
_COMPLETE = ({"gate", "up"}, {"q", "k", "v"})
_DATA_PARALLEL = re.compile("DataParallel$")  # classes that put a module "module." around a model
_PEFT = "base_model.model."
_KV = re.compile(r"(?:^|[._])kv")


def export(selection: Selection, kind: str, model: nn.Module | None = None) -> str:
    """The text of a selection in one of FORMATS.

    Raises:
        OptionError: the format is unknown or cannot express the selection, or ``including`` patterns or the names of a
            GGUF file need a model.
    """
    if kind == "llama-factory":
        raise OptionError(
            "LLaMA-Factory's freeze tuning takes ranges of layers only, which no selection of matrices is: train "
            "with kappa_fast.wrap, or use another format"
        )
    if kind not in _WRITERS:
        raise OptionError(f"format {kind!r} is unknown; choose one of {', '.join(FORMATS)}")
    if not selection.entries and not selection.include:
        raise OptionError("the selection is empty, so there is nothing to export")
    if kind in TRAINERS and model is None:
        refuse_names_of_gguf(selection)
    text = _WRITERS[kind](selection, model)
    if model is None and kind != "esft":
        _check_names(list(_pieces(selection, None)), selection)
    return text


def _check_names(names: list[str], selection: Selection) -> None:
    """Check that the model that a checkpoint's config describes has parameters with these names.

    Raises:
        OptionError: it has none of them.

    Warns:
        UserWarning: it lacks some of them.
    """
    from ..matching.checkpoint_names import described_by

    model = described_by(selection.settings.get("source"))
    if model is None or is_from_gguf(selection):
        return
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    strange = [name for name in names if name not in known]
    if not strange:
        return
    close = difflib.get_close_matches(strange[0], known, 1, 0.5)
    but = f" (but {close[0]!r})" if close else ""
    about = f"{type(model).__name__}, which config.json names, has no parameter {strange[0]!r}{but}"
    if len(strange) == len(names):
        raise OptionError(
            f"{about}, so that this would train nothing: give the model that is to be trained as model= (in Python), "
            "or correct architectures in config.json and rank the checkpoint again"
        )
    warn(
        f"{about}, and so for {len(strange)} of the {len(names)} names: these will not train. Give the model that "
        "is to be trained as model= (in Python)",
    )


def refuse_names_of_gguf(selection: Selection) -> None:
    """Raises OptionError for names of a GGUF file, which no trainer knows and which only a model can translate."""
    if is_from_gguf(selection):
        raise OptionError(
            "the names of this selection are llama.cpp's, since a GGUF file was ranked: give the model that is to be "
            "trained as model= (in Python), which has them under its own"
        )


def _axolotl(selection: Selection, model: nn.Module | None) -> str:
    """``unfrozen_parameters`` of an Axolotl configuration, YAML.

    Axolotl escapes every dot itself, and reads an optional range of the first dimension after the ``$``.
    """
    lines = ["# kappa_fast: " + _origin(selection), "unfrozen_parameters:"]
    ranged = False
    for name, indices in _pieces(selection, model).items():
        if re.search(r"[^\w.\-]", name):
            raise OptionError(f"Axolotl reads names as patterns, and {name!r} has characters that it would misread")
        spans = [_rows(name, index) for index in indices]
        ranged |= any(span is not None for span in spans)
        for span in dict.fromkeys(spans):
            lines.append(f"  - '^{name}$" + ("'" if span is None else f"[{span[0]}:{span[1]}]'"))
    if ranged:
        lines[1:1] = [
            "# Ranges: Axolotl zeroes gradients outside of them, no more: weight decay still moves the other experts",
            "# of these tensors. Set weight_decay: 0.0, or train with kappa_fast.wrap, which leaves them as they are.",
        ]
    return "\n".join(lines) + "\n"


def _ms_swift(selection: Selection, model: nn.Module | None) -> str:
    """Arguments of ``swift sft`` for a POSIX shell: a pattern, since a name would match all longer names too."""
    pattern = shlex.quote(_pattern(selection, model, "ms-swift"))
    return f"--freeze_parameters_ratio 1.0 --trainable_parameters_regex {pattern}\n"


def _names(selection: Selection, model: nn.Module | None) -> str:
    """The names of parameters, a line each."""
    return "".join(f"{name}\n" for name in _unwrapped(_whole(selection, model, "a list of names")))


def _regex(selection: Selection, model: nn.Module | None) -> str:
    """One regular expression that matches the names of the selected parameters and no others."""
    return _pattern(selection, model, "a regular expression") + "\n"


def _pattern(selection: Selection, model: nn.Module | None, what: str) -> str:
    return "^(?:" + "|".join(re.escape(name) for name in _unwrapped(_whole(selection, model, what))) + ")$"


def _unwrapped(names: list[str]) -> list[str]:
    """The same names, after a check that each can be a line of text.

    Raises:
        OptionError: a name is empty, begins or ends with a space, or holds a line break or an invisible character, so
            that readers of lines would read another name.
    """
    for name in names:
        if not name or name != name.strip() or not name.isprintable():
            raise OptionError(
                f"{name!r} has characters that a line of text cannot hold: rename the parameter in the checkpoint, or "
                "leave it out with rank(exclude=...)"
            )
    return names


def _spectrum(selection: Selection, model: nn.Module | None) -> str:
    """Spectrum's results with 1 / kappa as ``snr``: Spectrum takes the highest, and so the lowest kappa."""
    found = {}
    kappas = _kappas(selection, model)
    for name in _whole(selection, model, "Spectrum's JSON"):
        layer = name.removesuffix(".weight")
        kind = group_of(layer).rpartition("*.")[2]
        highest = max(kappas.get(name, ()), default=math.inf)
        found[layer] = {"snr": 1 / highest if highest > 0 else 0.0, "type": kind}
    return json.dumps(found, indent=2) + "\n"


def _kappas(selection: Selection, model: nn.Module | None) -> dict[str, list[float]]:
    """By name of a parameter the kappas of its selected matrices; a parameter that a pattern added has none."""
    if model is not None:
        from ..matching.names import match

        return {target.name: [entry.kappa for entry in target.entries] for target in match(selection, model)}
    found: dict[str, list[float]] = {}
    called = _called(selection)
    for entry in selection.entries:
        found.setdefault(called[entry.name], []).append(entry.kappa)
    return found


def _called(selection: Selection) -> dict[str, str]:
    """By names of the ranking the names that trainers use: without the words of compile, DDP and PEFT."""
    source = selection.settings.get("source")
    wrapper = source.get("class") if isinstance(source, Mapping) else None
    leading = (*LEADING, _PEFT) if _DATA_PARALLEL.search(str(wrapper)) else (_PEFT,)
    return unwrapped([entry.name for entry in selection.entries], leading)


def _esft(selection: Selection, model: nn.Module | None) -> str:
    """ESFT's expert configuration: whole routed experts by layer, and nothing else."""
    if selection.settings.get("unit") not in ("expert", "parameter") or selection.exclude:
        raise OptionError("ESFT trains whole experts: select with unit='expert', and leave out with rank(exclude=...)")
    experts: dict[str, set[int]] = {}
    for entry in selection.entries:
        expert, layer = expert_of(entry), layer_of(entry.name)
        if expert is None or layer is None or selection.include:
            advice = r"rank with include=r'\.experts\b', and select with unit='expert'"
            if selection.include:
                advice = f"select without including({selection.include[0]!r})"
            raise OptionError(f"ESFT's configuration names experts only, and {entry.key!r} is not in one: {advice}")
        experts.setdefault(str(layer), set()).add(int(expert.rpartition("[")[2].rstrip("]")))
    # ESFT looks up every layer that has experts, also those of which none is trained.
    layers = {layer_of(name) for name, _ in model.named_parameters()} if model is not None else set(map(int, experts))
    last = max(layer for layer in layers if layer is not None)
    if model is None:
        warn(
            f"ESFT needs every layer of the model, and the last selected one is {last}: give model= if it has more",
        )
    listed = {str(layer): sorted(experts.get(str(layer), ())) for layer in range(last + 1)}
    return json.dumps({"experts": listed, "shared_experts": False, "non_expert_modules": False}, indent=2) + "\n"


_WRITERS: dict[str, Callable[[Any, Any], str]] = {
    "axolotl": _axolotl,
    "ms-swift": _ms_swift,
    "spectrum": _spectrum,
    "esft": _esft,
    "names": _names,
    "regex": _regex,
}


def _pieces(selection: Selection, model: nn.Module | None) -> Mapping[str, tuple[Index, ...]]:
    """By name of a parameter the indices of its selected parts; ``((),)`` for the whole."""
    if model is not None:
        from ..matching.names import match

        return {target.name: target.indices for target in match(selection, model)}
    if selection.include:
        raise OptionError(f"including({selection.include[0]!r}) names parameters of a model: give it as model=")
    whole_parameters = selection.settings.get("unit") == "parameter" and not selection.exclude
    called = _called(selection)
    computed = (selection.settings.get("source") or {}).get("computed") or {}
    if parts := next((computed[entry.name] for entry in selection.entries if entry.name in computed), None):
        raise OptionError(
            f"the model computes a selected weight from {', '.join(map(repr, parts))}, and these train: give the model "
            "as model= (in Python), to export their names"
        )
    found: dict[str, dict[Index, set[str]]] = {}
    for entry in selection.entries:
        # Parts by the expert or fused projection that they belong to, which is selected if all of its parts are.
        home: Index = entry.index[:1] if entry.index and isinstance(entry.index[0], int) else ()
        part = entry.part.rpartition(".")[2] if len(entry.index) > len(home) else ""
        found.setdefault(called[entry.name], {}).setdefault(home, set()).add(part)
    for name, homes in found.items():
        for home, parts in homes.items():
            complete = "" in parts or parts in _COMPLETE or (parts == {"k", "v"} and _KV.search(name))
            if not (complete or whole_parameters):
                number = f" of expert {home[0]}" if home else ""
                raise OptionError(
                    f"only {' and '.join(sorted(parts))}{number} of {name!r} is selected, which no export can express: "
                    f"select with unit={'expert' if home else 'parameter'!r}"
                )
    return {
        name: ((),) if whole_parameters or () in homes else tuple(sorted(homes, key=lambda home: home[0]))  # type: ignore[arg-type, return-value]
        for name, homes in found.items()
    }


def _whole(selection: Selection, model: nn.Module | None, what: str) -> list[str]:
    """The names of the selected parameters, all of which must be selected as a whole."""
    pieces = _pieces(selection, model)
    partial = next((name for name, indices in pieces.items() if indices != ((),)), None)
    if partial is not None:
        raise OptionError(f"{partial!r} is selected in part, which {what} cannot express: select with unit='parameter'")
    return list(pieces)


def _rows(name: str, index: Index) -> tuple[int, int] | None:
    """The range [first, stop) along the first dimension that an index selects; None for the whole."""
    if not index:
        return None
    first = index[0]
    rows = (first, first + 1) if isinstance(first, int) else (first.start or 0, first.stop)
    step = None if isinstance(first, int) else first.step
    if len(index) > 1 or step not in (None, 1):
        raise OptionError(
            f"the selected part of {name!r} is not a range of its first dimension, as Axolotl needs it: "
            "select with unit='expert'"
        )
    return rows


def _origin(selection: Selection) -> str:
    low, high = selection.kappa_range
    settings = selection.settings
    budget = f", {settings['budget']}={settings.get('value')}" if "budget" in settings else ""
    return printable(
        f"{len(selection)} matrices, kappa {low:.4g} to {high:.4g}{budget}"
    )  # a comment ends with its line
