"""The selection that KappaTuneCallback keeps in the checkpoints of a Trainer, and finds again in a resumed run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import KappaError, OptionError
from ..matching.names import match
from ..results.names import plain_name
from ..results.selection import Selection
from ..results.serialize import write_text
from ..training.handle import Handle
from ..training.masks import is_sharded
from ..training.states import check_names, check_shapes

KEPT = "kappa_selection.json"  # in a checkpoint of the Trainer: what was selected, and a mark of the weights


@dataclass(frozen=True)
class Kept:
    """The content of the file in a checkpoint: the selection, the step, and kappa by key at the start of training."""

    selection: Selection
    step: int | None
    start: dict[str, float]


def keep(folder: Path, selection: Selection, step: int, mark: str | None, start: Mapping[str, float]) -> None:
    """Write the file beside the optimizer's state. It is a file of ``Selection.to_json`` with more fields."""
    selection.to_json(folder / KEPT)
    document = json.loads((folder / KEPT).read_text())
    kappas = {key: value if abs(value) < float("inf") else str(value) for key, value in start.items()}
    document |= {"step": step, "mark": mark, "start": kappas}
    write_text(folder / KEPT, json.dumps(document))


def find(args: Any, model: nn.Module) -> Kept | None:
    """The content of the file in the checkpoint whose weights the model has now; None if no checkpoint fits."""
    for file in _files(args):
        try:
            document, kept = json.loads(file.read_text()), Selection.from_json(file)
        except (OSError, ValueError, KappaError):
            continue
        if document.get("mark") is None or document["mark"] != mark_of(model, kept):
            continue
        start = document.get("start")
        kappas = {str(k): float(v) for k, v in start.items()} if isinstance(start, dict) else {}
        return Kept(kept, document.get("step"), kappas)
    return None


def _files(args: Any) -> Iterator[Path]:
    given = getattr(args, "resume_from_checkpoint", None)
    if isinstance(given, str):
        yield Path(given) / KEPT
    for folder in sorted(Path(args.output_dir).glob("checkpoint-*")):
        yield folder / KEPT


def mark_of(model: nn.Module, selection: Selection) -> str | None:
    """A hash of the selected weights, by which checkpoints are told apart."""
    try:
        targets = match(selection, model)
    except OptionError:
        return None
    if any(is_sharded(target.parameter) for target in targets):
        return None
    found = hashlib.sha256()
    for target in targets:
        found.update(str(target.parameter.dtype).encode())
        found.update(target.parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def names_of(handle: Handle) -> list[Any]:
    """The names of trained parameters as a list, whose order the Trainer's state keeps (it sorts keys of objects)."""
    return [[plain_name(target.name), *map(str, target.indices)] for target in handle.targets]


def check_resumed(kept: Mapping[str, Any], handle: Handle, options: Mapping[str, Any]) -> None:
    """Compare a selection with ``kept``, the callback's part of the Trainer's state in the checkpoint.

    Raises:
        OptionError: the checkpoint was made with another selection, or with options that select otherwise.
    """
    names = kept.get("names")
    if isinstance(names, list):
        saved, own = ({name: parts for name, *parts in found} for found in (names, names_of(handle)))
        check_names(saved, own)
    before = kept.get("options")
    if isinstance(before, Mapping) and dict(before) != dict(options):
        changed = [name for name in {**before, **options} if before.get(name) != options.get(name)]
        words = ", ".join(f"{name} was {before.get(name)!r} and is {options.get(name)!r}" for name in changed)
        raise OptionError(
            f"the run that is resumed was begun with other options of KappaTuneCallback: {words}. Give the same "
            "options; or train from the weights of the checkpoint, without resume_from_checkpoint"
        )


def check_weights(kept: Mapping[str, Any], model: nn.Module, selection: Selection) -> None:
    """Raises OptionError unless the selected weights are those of the checkpoint in its dtypes."""
    dtypes = {str(target.parameter.dtype) for target in match(selection, model)}
    now = mark_of(model, selection)
    if kept.get("mark") is None or now is None or dtypes != set(kept.get("dtypes", ())) or kept["mark"] == now:
        return
    raise OptionError(
        "the Trainer has not loaded the weights of the checkpoint: those of the model are different. transformers does "
        "not load them if it renames or fuses tensors of the model (ViT, mixtures of experts): load the "
        "model with from_pretrained(checkpoint), and resume from the same checkpoint"
    )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raises OptionError if the state of the Trainer's optimizer belongs to parameters of other shapes."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, Optimizer):
        names = {id(p): name for name, p in model.named_parameters()}
        here = [p for group in inner.param_groups for p in group["params"] if p in inner.state]
        check_shapes((names.get(id(p), "a parameter"), inner.state[p], [tuple(p.shape)]) for p in here)
