"""Graphs of torch.fx, torch.export and TorchScript: what they compute from a weight is noticed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import kappa_fast

GIVEN = torch.ones(2, 24)


class Masked(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.register_buffer("kept", (torch.arange(rows)[:, None] + torch.arange(columns)) % 3 != 0)

    def forward(self, x):
        return functional.linear(x, self.weight * self.kept, self.bias)


class ByHand(nn.Linear):
    """Views and casts of a weight have its singular values."""

    def forward(self, x):
        return x @ self.weight.unsqueeze(0).squeeze(0).to(torch.float32).t() + self.bias


class Fused(nn.Linear):
    def forward(self, x):
        first, second = self.weight.chunk(2)
        return functional.linear(x, first) * functional.linear(x, second)


def made(kind, model):
    model = model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "fx":
            return torch.fx.symbolic_trace(model)
        if kind == "export":
            return torch.export.export(model, (GIVEN,)).module()
        return torch.jit.script(model) if kind == "script" else torch.jit.trace(model, GIVEN)


KINDS = ["fx", "export", "script", "trace"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_computes_with_a_weight_is_warned_of(kind):
    graph = made(kind, nn.Sequential(Masked(24, 40), nn.ReLU(), ByHand(40, 30), nn.Linear(30, 20)))
    with pytest.warns(UserWarning, match="1 weights are ranked as they are held, '0.weight' among them"):
        ranking = kappa_fast.rank(graph, progress=False)
    assert {entry.name for entry in ranking} == {"0.weight", "2.weight", "3.weight"}
    (doubtful,) = (
        names for how, names in ranking.metadata["source"]["evidence"].items() if "its graph applies mul" in how
    )
    assert doubtful == ("0.weight",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [ByHand(24, 40), nn.LayerNorm(40), Fused(40, 30)],
        lambda: [nn.Unflatten(1, (24, 1)), nn.Conv1d(24, 32, 1), nn.Flatten(), nn.Linear(32, 20)],
        lambda: [nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)],
    ],
    ids=["views", "convolution", "attention"],
)
def test_what_graphs_multiply_with_as_it_is_needs_no_warning(kind, layers):
    graph = made(kind, nn.Sequential(*layers()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking = kappa_fast.rank(graph, progress=False, min_dim=1)
    assert len(ranking) >= 2


@pytest.mark.parametrize("kind", ["export", "trace"])
def test_parts_of_a_weight_that_a_graph_puts_together_are_skipped(kind):
    layers = (
        parametrizations.weight_norm(nn.Linear(24, 40)),
        prune.random_unstructured(nn.Linear(40, 30), "weight", 0.3),
    )
    model = nn.Sequential(*layers, nn.Linear(30, 24))
    ranking = kappa_fast.rank(made(kind, model), progress=False)
    assert [entry.name for entry in ranking] == ["2.weight"]
    reasons = {s.name: s.reason for s in ranking.skipped}
    for part in ("0.parametrizations.weight.original1", "1.weight_orig"):
        assert "rank the model that the graph was made from" in reasons[part]


class Rounds(nn.Module):
    def forward(self, weight):
        return weight.round(decimals=1)


class Rounded(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.rounds = Rounds()

    def forward(self, x):
        return functional.linear(x, self.rounds(self.weight))


def test_a_module_that_a_graph_gives_a_weight_to_is_something_done_to_it():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Rounds)

    model = nn.Sequential(Rounded(24, 40))
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    with pytest.warns(UserWarning, match="'0.weight' among them"):
        assert len(kappa_fast.rank(graph, progress=False)) == 1


def test_a_graph_inside_of_a_model_is_looked_at_too():
    model = nn.Sequential(nn.Linear(24, 24), made("fx", nn.Sequential(Masked(24, 40))), made("script", Masked(40, 30)))
    with pytest.warns(UserWarning, match="2 weights are ranked as they are held"):
        ranking = kappa_fast.rank(model, progress=False)
    assert {entry.name for entry in ranking} == {"0.weight", "1.0.weight", "2.weight"}
