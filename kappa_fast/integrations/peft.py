"""PEFT: a LoraConfig for a selection, and replacements of PEFT's own selector."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import OptionError, missing_extra
from ..matching.names import holds_codes
from ..results.entries import Index, TensorKappa
from ..results.names import group_of, plain_name
from ..results.selection import Selection
from .exports import refuse_names_of_gguf
from .lora_ranks import RankBy, patterns
from .originals import condition_numbers

if TYPE_CHECKING:
    from peft import LoraConfig

# PEFT treats modules of these names as projections of experts, which transformers has fused since.
_UNCALLED = "NonDynamicallyQuantizableLinear"  # torch's own word for the out_proj of nn.MultiheadAttention
RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def lora_config(
    selection: Selection,
    *,
    partial: Literal["error", "widen"] = "error",
    model: nn.Module | None = None,
    rank: RankBy | None = None,
    budget: int | None = None,
    **options: Any,
) -> LoraConfig:
    """A ``peft.LoraConfig`` that adapts exactly the selected matrices.

    Weights of modules become ``target_modules`` (one expression that matches only their full names), stacks of experts
    become ``target_parameters``, which adapt every expert of a tensor.

    Args:
        partial: "error" refuses a tensor that is selected in part, "widen" adapts all of it.
        model: the model whose names are used, if they differ from those of the ranking; ``including`` needs the model,
            and puts the modules that it names into ``modules_to_save``.
        rank: a statistic of docs/scores.md, such as "stable_rank", or a callable that takes a TensorKappa: each module
            gets a rank in proportion to it, from 1 on, and an alpha by which all are scaled alike. None: r for all.
        budget: with ``rank``, how many parameters all adapters together take at most; None is what rank r takes.
        options: options of LoraConfig, such as r, lora_alpha, rank_pattern.

    Raises:
        OptionError: the selection is empty or finer than PEFT can adapt, or an option contradicts it.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing_extra("peft", "peft", "lora_config()") from error
    clash = {"target_modules", "target_parameters"} & set(options)
    if clash:
        raise OptionError(f"the selection decides {sorted(clash)[0]}: leave this option out")
    if partial not in ("error", "widen"):
        raise OptionError(f"partial={partial!r}: give 'error' or 'widen'")
    modules, parameters, saved = _targets(selection, model, partial)
    if not modules and not parameters:
        raise OptionError("the selection has no matrix that LoRA could adapt: select something")
    _refuse_uncalled(selection, model, modules)
    modules, moved = _apart(selection, model, modules)
    parameters += moved
    if saved:
        options["modules_to_save"] = [*(options.get("modules_to_save") or []), *saved]
    if parameters and options.get("lora_dropout"):
        raise OptionError(
            f"PEFT has no dropout for target_parameters, such as {parameters[0]!r}: leave lora_dropout out"
        )
    # For models that it converts PEFT splits an expression, so they get a list; for others it reads names as endings.
    converted = _is_converted(selection, model)
    options["target_modules"] = modules if converted else "|".join(re.escape(name) for name in modules) or []
    if parameters:
        options["target_parameters"] = parameters
    if rank is not None:
        options |= patterns(_entries_of(selection, model, modules, parameters), rank, budget, options)
    elif budget is not None:
        raise OptionError("budget= is shared out by rank=: give rank='stable_rank', or leave budget out")
    return LoraConfig(**options)


def _entries_of(
    selection: Selection, model: nn.Module | None, modules: list[str], parameters: list[str]
) -> dict[str, TensorKappa]:
    """The entry of each module.

    Raises:
        OptionError: a module or parameter has several, which would share one rank, or only a part of it is selected,
            which is smaller than what PEFT adapts, or it is a grouped convolution, whose adapters are larger.
    """
    found: dict[str, list[TensorKappa]] = {}
    if model is None:
        for entry in selection.entries:
            found.setdefault(entry.name, []).append(entry)
    else:
        from ..matching.names import match

        found = {plain_name(target.name): list(target.entries) for target in match(selection, model)}
        _refuse_grouped(model, modules)
    several = parameters[0] if parameters else next((m for m in modules if not _is_one(found[f"{m}.weight"])), None)
    if several is not None:
        raise OptionError(
            f"rank= gives a module the rank of its one matrix, and {several!r} is a stack, has several or is "
            "selected in part: rank with fused='stored', or leave it out with excluding()"
        )
    return {module: found[f"{module}.weight"][0] for module in modules}


def _refuse_grouped(model: nn.Module, modules: list[str]) -> None:
    """Raises OptionError for convolutions with groups, whose adapters do not have r (rows + columns) parameters."""
    grouped = {plain_name(name) for name, module in model.named_modules() if getattr(module, "groups", 1) != 1}
    named = next((module for module in modules if plain_name(module) in grouped), None)
    if named is not None:
        raise OptionError(
            f"{named!r} is a convolution with groups, for which PEFT's adapter has one column for each input of all "
            "groups, and the rank has to be a multiple of the groups: leave it out with excluding(), or use one r"
        )


def _is_one(entries: Sequence[TensorKappa]) -> bool:
    return len(entries) == 1 and not entries[0].index


def _refuse_uncalled(selection: Selection, model: nn.Module | None, modules: list[str]) -> None:
    """Raises OptionError for layers that the model never calls, since adapters of these never train."""
    source: Mapping[str, Any] = selection.settings.get("source") or {}
    uncalled = {plain_name(name).removesuffix(".weight") for name in source.get("read_directly", ())}
    if model is not None:
        found = (name for name, module in model.named_modules() if type(module).__name__ == _UNCALLED)
        uncalled |= {plain_name(name) for name in found}
    dead = [name for name in modules if plain_name(name) in uncalled]
    if dead:
        patterns = dict.fromkeys(re.escape(group_of(name)).replace(r"\*", r"\d+") for name in dead)
        raise OptionError(
            f"the model reads the weight of {dead[0]!r} and never calls the layer, as nn.MultiheadAttention does with "
            "its out_proj: an adapter there would get no gradient. Leave such layers out with "
            f"excluding({', '.join(map(repr, patterns))}), train the weights themselves with kappa_fast.wrap(), or "
            "adapt the whole nn.MultiheadAttention with a LoraConfig of your own"
        )


def _is_converted(selection: Selection, model: nn.Module | None) -> bool:
    """Whether PEFT rewrites configurations for this kind of model, since transformers has fused its experts."""
    source: Mapping[str, Any] = selection.settings.get("source") or {}
    kind = getattr(getattr(model, "config", None), "model_type", None) or source.get("model_type")
    if not isinstance(kind, str):
        return any("expert" in entry.name for entry in selection.entries)
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return True
    return get_checkpoint_conversion_mapping(kind) is not None


def _apart(selection: Selection, model: nn.Module | None, modules: list[str]) -> tuple[list[str], list[str]]:
    """Split modules into those for target_modules, and those whose weights PEFT must get as target_parameters.

    For models with fused experts PEFT takes every module called ``down_proj`` for the fused tensor of that name, and
    would adapt all experts of all layers.
    """
    if not _is_converted(selection, model):
        return modules, []
    misread = [name for name in modules if name.rpartition(".")[2] in RENAMED]
    return [name for name in modules if name not in misread], [f"{name}.weight" for name in misread]


def _targets(selection: Selection, model: nn.Module | None, partial: str) -> tuple[list[str], list[str], list[str]]:
    """Names of modules, names of parameters, and names of modules to train whole."""
    found, included = _parameters(selection, model)
    modules, parameters = [], []
    for name, (indices, is_stack) in found.items():
        if indices != ((),) and partial == "error":
            raise OptionError(
                f"{name!r} is selected in part, and PEFT adapts all of it: select with unit='parameter', or widen the "
                "selection with partial='widen'"
            )
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and not is_stack:
            modules.append(owner)
        else:
            parameters.append(name)
    return modules, parameters, list(dict.fromkeys(name.rpartition(".")[0] for name in included))


Found = Mapping[str, tuple[tuple[Index, ...], bool]]


def _parameters(selection: Selection, model: nn.Module | None) -> tuple[Found, list[str]]:
    """By name of a parameter the selected parts and whether it is a stack of matrices; and names that patterns add."""
    if model is not None:
        from ..matching.names import match

        targets = match(selection, model)
        return (
            {plain_name(t.name): (t.indices, _is_stack(t.entries)) for t in targets if t.entries},
            [plain_name(t.name) for t in targets if not t.entries],
        )
    refuse_names_of_gguf(selection)
    if selection.include:
        raise OptionError(f"including({selection.include[0]!r}) names parameters of a model: give it as model=")
    complete = selection.settings.get("unit") == "parameter" and not selection.exclude
    entries: dict[str, list[TensorKappa]] = {}
    for entry in selection.entries:
        entries.setdefault(entry.name, []).append(entry)
    found = {}
    for name, members in entries.items():
        whole = complete or any(not entry.index for entry in members)
        found[name] = (((),) if whole else tuple(entry.index for entry in members), _is_stack(members))
    return found, []


def _is_stack(entries: Sequence[TensorKappa]) -> bool:
    """Whether the entries are matrices of a stack, in which the index of an expert is its number."""
    return any(entry.index and isinstance(entry.index[0], int) for entry in entries)


class KappaTuneSelector:
    """``peft.helpers.KappaTuneSelector`` by rank(), with the same candidates, arguments and results.

    Candidates are the weights of nn.Linear modules, and 3-D parameters with a known suffix, whose number is the mean
    over their matrices. Numbers that are too close to each other are computed exactly, so that the order is that of the
    exact values; PEFT uses float32, which cannot order nearly singular matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or SUFFIXES
        self.show_progress = show_progress
        self._found: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of nn.Linear modules, lowest first: ``num_modules``, else a share, else up to a threshold, else all."""
        return _best(self._numbers()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of fused expert parameters, lowest first, by the same budgets."""
        return _best(self._numbers()[1], top_p, num_modules, threshold)

    def _numbers(self) -> tuple[dict[str, float], dict[str, float]]:
        if self._found is None:
            linear = {n: m.weight for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
            stacks = {
                name: parameter
                for name, parameter in self.model.named_parameters()
                if parameter.ndim == 3 and name.endswith(self.moe_param_suffixes)
            }
            for name, weight in {**linear, **stacks}.items():
                if holds_codes(weight):
                    raise OptionError(
                        f"{name!r} is quantized ({weight.dtype}), which only rank() can read: use "
                        "lora_config(kappa_fast.rank(model).select(...)), or rank the model before it is quantized"
                    )
            self._found = self._of(linear), self._of(stacks)
        return self._found

    def _of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
        limit = self.max_dim_size_to_analyze
        kept = {n: t for n, t in tensors.items() if max(t.shape[-2:]) <= limit}
        if not kept:
            return {}
        return condition_numbers(
            kept, max_dim=None, epsilon=1e-8, mean=_average, progress=None if self.show_progress else False
        )


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _best(
    numbers: Mapping[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    ordered = sorted(numbers, key=lambda name: (numbers[name] != numbers[name], numbers[name]))  # nan last
    if num_modules is not None:
        return ordered[: min(num_modules, len(ordered))]
    if top_p is not None:
        return ordered[: max(1, int(len(ordered) * top_p))]
    if threshold is not None:
        return [name for name in ordered if numbers[name] <= threshold]
    return ordered


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """``peft.helpers.find_kappa_target_modules``: target_modules and target_parameters (None without fused experts)."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": parameters or None}
