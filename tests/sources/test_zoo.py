"""Architectures of transformers, built small: every parameter is ranked or skipped, and file and module agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kappa_fast

pytest.importorskip("transformers")
import zoo

# A usual model, experts, fused rows; convolutions and tables that only the class tells.
FAST = ("LlamaForCausalLM", "MixtralForCausalLM", "GPTNeoXForCausalLM", "SqueezeBertForMaskedLM", "CTRLLMHeadModel")


# Loading permutes rows of these, which the singular values do not depend on.
PERMUTED = ("Kimi_K25ForConditionalGeneration",)


def attribute(model: Any, name: str) -> torch.Tensor:
    """The weight as the model itself has it, computed where it is computed."""
    for word in name.split("."):
        model = getattr(model, word)
    return model.detach()


def evidence_of(ranking: kappa_fast.Ranking, group: str) -> str:
    """What made weights of this group weights."""
    found = ranking.metadata["source"]["evidence"].items()
    return "".join(evidence for evidence, groups in found if group in groups)


def in_file(model: Any, saved: kappa_fast.Ranking) -> Callable[[str], str | None]:
    """How the file calls what the model calls by this name: a tied weight has one name there, some have none."""
    there = {n for e in saved for n in (e.name, *e.aliases)} | {re.sub(r"\[.*", "", s.name) for s in saved.skipped}
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    tied = {name: min(group & there, default=None) for group in names.values() for name in group}
    return lambda name: tied.get(name, name)


def about(ranking: kappa_fast.Ranking, held: Callable[[str], str | None]) -> set[tuple[str, str]]:
    """What was skipped and why, but for buffers, which only files hold, and parts of weights that are ranked whole.

    ``held``: by its name, what a tensor is called in the file; None for what the file does not hold.
    """
    found = {(held(re.sub(r"\[.*", "", s.name)), s.reason) for s in ranking.skipped}
    kept = {(name, why) for name, why in found if not re.search("^buffer|buffer of|^(?:one of the )?parts? ", why)}
    return {(re.sub(r"\.\d+\.", ".*.", name), why) for name, why in kept if name is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES])
def test_a_model_and_what_it_saves_have_the_same_entries_and_every_interval_holds_the_true_kappa(name, tmp_path):
    model = zoo.small(name)
    live = kappa_fast.rank(model, progress=False)
    computed = live.metadata["source"].get("computed", {})
    ranked = {n for e in live for n in (e.name, *e.aliases)} | {re.sub(r"\[.*", "", s.name) for s in live.skipped}
    ranked |= {part for parts in computed.values() for part in parts}
    assert {n for n, p in model.named_parameters() if p.ndim >= 2} <= ranked
    for entry in live:
        if "forward()" in evidence_of(live, entry.group):
            continue  # no attribute of the model: tests/sources/test_sources_called.py has its values
        weight = attribute(model, entry.name)[entry.index]
        sigma = torch.linalg.svdvals(weight.double().flatten(1))
        # A norm over a weight in float32, of which another is computed, depends on the number of threads.
        slack = 1e-6 if entry.name in computed else 1e-9
        if entry.status == "ok":
            assert entry.lower * (1 - slack) <= sigma[0] / sigma[-1] <= entry.upper * (1 + slack), entry.key
    model.save_pretrained(tmp_path)
    saved = kappa_fast.rank(tmp_path, progress=False)
    assert {e.key: e.shape for e in saved} == {e.key: e.shape for e in live}
    kappas = {e.key: e.kappa for e in live}
    permuted = 1e-9 if name in PERMUTED else 0
    assert {e.key: e.kappa for e in saved} == pytest.approx(kappas, rel=permuted, abs=0, nan_ok=True)
    assert about(saved, str) == about(live, in_file(model, saved))
