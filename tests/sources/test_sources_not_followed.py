"""Layers whose forward() multiplies with no single matrix are refused by name; following one changes nothing."""

from __future__ import annotations

import copy
import random
import re
import types
from collections import defaultdict, namedtuple

import numpy as np
import pytest
import torch
from test_sources_followed import Masked, Multiplied, Stack, exact, masked
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import kappa_fast
from kappa_fast.sources.base import Stored
from kappa_fast.sources.called import as_computed

SEEN: list[str] = []
Pair = namedtuple("Pair", "count log")


class TwoMatrices(Masked):
    def forward(self, x):
        return functional.linear(x, self.made()).sin() + functional.linear(x, self.weight)


class OfInput(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * (1 + x[0]))


class Steered(Masked):
    def forward(self, x):
        return functional.linear(x, self.made() if float(x.sum()) > 0 else self.weight)


class OfTask(Masked):
    def forward(self, x, task):
        return functional.linear(x, self.made() * task)


class ChosenByTask(Masked):
    def forward(self, x, task):
        return functional.linear(x, self.weight * [self.kept, ~self.kept][task])


class OfPython(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * torch.tensor([random.random() for _ in range(24)]))


class OfNumpy(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * torch.from_numpy(np.random.rand(24)).to(self.weight))


class InPart(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight[:30])


class Overlapping(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight[:30]).sum() + functional.linear(x, self.weight[5:32]).sum()


class OverlappingColumns(nn.Linear):
    def forward(self, x):
        return functional.linear(x[:, :14], self.weight[:, :14]) + functional.linear(x[:, 6:20], self.weight[:, 6:20])


class ThroughEachOther(nn.Linear):
    """Rows and columns together: as many entries as the weight has, but not all of it."""

    def forward(self, x):
        columns = functional.linear(x[:, :12], self.weight[:, :12])
        return columns.sum() + functional.linear(x, self.weight[:20]).sum()


class InPieces(nn.Linear):
    def forward(self, x):
        return functional.linear(x, (2 * self.weight)[:30])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (TwoMatrices, "several matrices"),
        (lambda: OfInput(24, 40), "it depends on the input"),
        (Steered, "it depends on the input"),
        (OfTask, "it depends on the input"),
        (ChosenByTask, "it depends on the input"),
        (lambda: OfPython(24, 40), "random numbers"),
        (lambda: OfNumpy(24, 40), "random numbers"),
        (Stack, r"multiplies with a matrix of shape \(1, 60, 24\) instead of \(3, 20, 24\)"),
        (lambda: InPart(24, 40), r"multiplies with a part of shape \(30, 24\) of \(40, 24\)"),
        (lambda: Overlapping(24, 40), r"multiplies with a part of shape \(30, 24\) of \(40, 24\)"),
        (lambda: OverlappingColumns(24, 40), r"multiplies with a part of shape \(40, 14\) of \(40, 24\)"),
        (lambda: ThroughEachOther(24, 40), r"multiplies with a part of shape \(40, 12\) of \(40, 24\)"),
        (lambda: InPieces(24, 40), r"multiplies with a matrix of shape \(30, 24\) instead of \(40, 24\)"),
    ],
)
def test_what_is_no_single_matrix_is_refused_by_name(layer, reason):
    states = random.getstate(), np.random.get_state()[2]
    (skipped,) = kappa_fast.rank(nn.Sequential(layer(), nn.Linear(24, 40)), progress=False).skipped
    assert skipped.name == "0.weight"
    assert re.search(reason, skipped.reason)
    assert (random.getstate(), np.random.get_state()[2]) == states


class Grouped(nn.Linear):
    """As DeepSeek-V4 does: each of the groups has rows, and an input, of its own."""

    def __init__(self):
        super().__init__(24, 40)
        self.count = 4

    def forward(self, x):
        groups = self.weight.view(self.count, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.reshape(-1, self.count, x.shape[-1]).transpose(0, 1), groups).transpose(0, 1)


class Columns(nn.Linear):
    """Views with gaps: two columns in three, and the rest."""

    def forward(self, x):
        return functional.linear(x[:, :16], self.weight[:, :16]) + functional.linear(x[:, 16:], self.weight[:, 16:])


class OverlappingWhole(nn.Linear):
    """Columns that overlap, and together are all."""

    def forward(self, x):
        return functional.linear(x[:, :16], self.weight[:, :16]) + functional.linear(x[:, 10:], self.weight[:, 10:])


class Interleaved(nn.Linear):
    """Every second column, and the others."""

    def forward(self, x):
        return functional.linear(x[:, ::2], self.weight[:, ::2]) + functional.linear(x[:, 1::2], self.weight[:, 1::2])


class Halves(nn.Linear):
    """Multiplies with all of its parameter, in two products."""

    def forward(self, x):
        first, second = self.weight.chunk(2)
        return functional.linear(x, first) * functional.linear(x, second).sigmoid()


@pytest.mark.parametrize(
    "layer", [*(lambda kind=kind: kind(24, 40) for kind in (Halves, Columns, OverlappingWhole, Interleaved)), Grouped]
)
def test_a_parameter_whose_pieces_are_all_used_stands_as_it_is(layer):
    model = nn.Sequential(layer())
    ranking = kappa_fast.rank(model, progress=False)
    assert ranking["0.weight"].lower <= exact(model[0].weight) <= ranking["0.weight"].upper


def test_a_forward_that_cannot_be_followed_says_so_in_a_warning_and_what_it_advises_works(recwarn):
    layer = nn.Linear(24, 40)
    layer.forward = lambda x: functional.linear(x, layer.weight * 2)
    model = nn.Sequential(layer, nn.Linear(40, 24))
    with pytest.warns(UserWarning, match=r"1 weights are ranked as they are held, '0.weight' among them") as caught:
        ranking = kappa_fast.rank(model, progress=False)
    assert caught[0].filename == __file__
    assert ranking["0.weight"].lower <= exact(layer.weight) <= ranking["0.weight"].upper
    unclear = [names for text, names in ranking.metadata["source"]["evidence"].items() if "cannot be followed" in text]
    assert unclear == [("0.weight",)]
    recwarn.clear()
    assert [entry.name for entry in kappa_fast.rank(model, progress=False, exclude="0.*")] == ["1.weight"]
    assert not recwarn


def test_of_a_file_the_class_in_config_json_says_so_too():
    def elementwise(self, x):
        return (x.unsqueeze(-2) * self.weight).sum(-1)

    layer = type("Elementwise", (nn.Linear,), {"forward": elementwise})(24, 40)
    stored = Stored(("a.weight",), (40, 24), torch.float32, torch.device("cpu"), lambda index: layer.weight.detach())
    known = as_computed(stored, layer.to("meta"))
    assert known.unfollowed
    assert "forward() of Elementwise cannot be followed" in known.evidence


class Keeps(Masked):
    """Writes to everything that it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = types.SimpleNamespace(log=[], count=torch.zeros(1))
        self.history, self.pair, self.deep = defaultdict(list), Pair(torch.zeros(1), []), [[[[[[[[]]]]]]]]
        self.helpers = [nn.BatchNorm1d(24)]
        self.calls, self.method = 0, self.called
        self.act = nn.ReLU()
        self.act.register_forward_hook(lambda *_: SEEN.append("hook"))

    def called(self):
        self.calls += 1
        return self.made()

    def forward(self, x):
        self.stats.log.append(1)
        self.stats.count.add_(1)
        self.history["x"].append(x)
        self.pair.count.add_(1)
        self.pair.log.append(1)
        self.deep[0][0][0][0][0][0][0].append(1)
        self.helpers[0](torch.cat([x, x]))
        torch.rand(1)
        return functional.linear(self.act(x), self.method())


def test_nothing_that_a_layer_can_reach_is_changed():
    torch.manual_seed(0)
    model = nn.Sequential(Keeps())
    layer, state = model[0], [random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()]
    (entry,) = kappa_fast.rank(model, progress=False)
    assert entry.lower <= exact(masked(layer)) <= entry.upper
    assert [random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()] == state
    assert not layer.stats.log
    assert not layer.history
    assert not layer.pair.log
    assert layer.deep == [[[[[[[[]]]]]]]]
    assert layer.calls == layer.stats.count == layer.pair.count == layer.helpers[0].num_batches_tracked == 0
    assert not SEEN


def test_modes_of_the_caller_see_nothing_of_it():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        kappa_fast.rank(nn.Sequential(Multiplied()), progress=False)
    assert counter.get_total_flops() == 0


def test_a_parameter_that_layers_multiply_with_in_two_ways_is_refused_once():
    model = nn.ModuleDict({"a": Multiplied(), "b": nn.Linear(24, 40), "c": nn.Linear(24, 40)})
    model["b"].weight = model["a"].weight
    ranking = kappa_fast.rank(model, progress=False)
    assert [e.name for e in ranking] == ["c.weight"]
    (skipped,) = ranking.skipped
    assert "shared with layers that use it differently" in skipped.reason
    assert ranking.metadata["num_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layer", [Multiplied, lambda: parametrizations.spectral_norm(nn.Linear(24, 40))])
def test_adapters_beside_a_computed_weight_are_not_merged_and_nothing_moves(layer):
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = layer()

        def forward(self, x):
            return self.q(x)

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)).train()
    before = copy.deepcopy(model.state_dict())
    (entry,) = kappa_fast.rank(model, progress=False, adapters="base")
    assert entry.name.endswith("q.weight")
    merged = kappa_fast.rank(model, progress=False, adapters="merged")
    assert "cannot be merged" in next(s.reason for s in merged.skipped if s.name.endswith("q.weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
