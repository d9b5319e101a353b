"""Selections of small models, and what may have moved after training: for the tests of training and integrations."""

from __future__ import annotations

import torch

import kappa_fast
from kappa_fast import Selection
from kappa_fast.matching.names import match


def selection_of(model: torch.nn.Module, *, experts: bool = True) -> Selection:
    """Every third matrix of every group, so that experts and halves are selected in part."""
    ranking = kappa_fast.rank(model, progress=False)
    keys = sorted(entry.key for entry in ranking)
    chosen = set(keys[::3]) if experts else {key for key in keys[::3] if "[" not in key}
    entries = tuple(entry for entry in ranking if entry.key in chosen)
    return Selection(entries=entries, boundary_certain=True, settings={})


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_only_the_selected_moved(
    model: torch.nn.Module, selection: Selection, before: dict[str, torch.Tensor], *, all_moved: bool = True
) -> None:
    targets = {target.name: target for target in match(selection, model)}
    for name, parameter in model.named_parameters():
        now, then = parameter.detach().clone(), before[name].clone()
        if name in targets:
            for index in targets[name].indices:
                if all_moved:
                    assert not torch.equal(now[index], then[index]), f"{name}{list(index)} did not move"
                now[index], then[index] = 0, 0
        assert torch.equal(now, then), f"{name} moved where it is frozen"
