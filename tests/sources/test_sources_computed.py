"""Weights that a module computes from others: what it multiplies with is ranked, and asking for it changes nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from models import EVERYTHING, matrices, reasons
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import kappa_fast
from kappa_fast.sources import Filters, open_source


class LowRank(nn.Module):
    """The product of two factors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u * s, v


class Adapted(nn.Module):
    """A low-rank correction whose factors belong to the parametrization, which counts how often it is asked."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, 16)), nn.Parameter(torch.randn(16, columns))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1)
        return weight + self.left @ self.right


class Dropped(nn.Module):
    """Drops weights while training: in eval mode the weight is one."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return self.drop(weight)


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class DependsOnValues(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm() if weight.norm() > 1 else weight


def linear() -> nn.Linear:
    """Rows of very different length, so that normalizing them changes kappa."""
    layer = nn.Linear(24, 20)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(0, 2, 20)[:, None])
    return layer


def parametrized(*steps: nn.Module) -> nn.Module:
    layer = linear()
    for step in steps:
        parametrize.register_parametrization(layer, "weight", step)
    return layer


def scaled(layer: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        gains = layer.get_parameter(name)
        gains.mul_(torch.logspace(0, 2, gains.numel()).view(gains.shape))
    return layer


def masked() -> nn.Module:
    layer = linear()
    prune.l1_unstructured(layer, "weight", amount=0.3)
    prune.random_unstructured(layer, "weight", amount=0.2)
    return layer


def normalized_and_masked() -> nn.Module:
    layer = nn.utils.weight_norm(linear())
    prune.random_unstructured(layer, "weight_v", amount=0.3)
    return layer


class Equalized:
    """The hook of StyleGAN's layers, which many copied: built like torch's own, and none of its classes."""

    name = "weight"

    def compute_weight(self, module: nn.Module) -> Tensor:
        return module.weight_orig * torch.logspace(0, 1, 20)[:, None]

    def __call__(self, module: nn.Module, inputs: object) -> None:
        module.weight = self.compute_weight(module)


def equalized() -> nn.Module:
    layer, hook = linear(), Equalized()
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.weight = weight.detach()
    layer.register_forward_pre_hook(hook)
    return layer


MADE = {
    "weight_norm": lambda: scaled(parametrizations.weight_norm(linear()), "parametrizations.weight.original0"),
    "weight_norm over columns": lambda: parametrizations.weight_norm(linear(), dim=1),
    "spectral_norm": lambda: parametrizations.spectral_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "low rank": lambda: parametrized(LowRank()),
    "mask": lambda: parametrized(torch.ao.pruning.sparsifier.utils.FakeSparsity((torch.rand(20, 24) > 0.3).float())),
    "adapted": lambda: parametrized(Adapted(20, 24)),
    "dropped": lambda: parametrized(Dropped()),
    "two steps": lambda: parametrized(Adapted(20, 24), DependsOnValues()),
    "old weight_norm": lambda: scaled(nn.utils.weight_norm(linear()), "weight_g"),
    "old spectral_norm": lambda: nn.utils.spectral_norm(linear()),
    "pruned": masked,
    "normalized, then pruned": normalized_and_masked,
    "equalized": equalized,
}


def used(layer: nn.Module) -> Tensor:
    """What the layer multiplies its input by, seen from outside: its answers to the unit vectors."""
    layer = layer.eval()
    layer(torch.zeros(1, 24))  # a pruning hook that runs after another one is one pass behind
    return (layer(torch.eye(24)) - layer(torch.zeros(1, 24))).T.detach().double()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_the_weight_that_a_layer_multiplies_with_is_what_is_ranked(kind):
    layer = MADE[kind]()
    sigma = torch.linalg.svdvals(used(layer))
    ranking = kappa_fast.rank(nn.ModuleDict({"layer": layer}), rtol=1e-4, progress=False)
    assert [(entry.name, entry.shape) for entry in ranking] == [("layer.weight", (20, 24))]
    if kind == "orthogonal":
        assert ranking[0].kappa == pytest.approx(1, abs=1e-5)
    else:
        assert ranking[0].lower <= sigma[0] / sigma[-1] * (1 + 1e-5)
        assert sigma[0] / sigma[-1] <= ranking[0].upper * (1 + 1e-5)
    assert ranking.metadata["num_parameters"] == sum(p.numel() for p in layer.parameters())
    named = {f"layer.{n}" for n, p in layer.named_parameters() if p.ndim >= 2}
    assert named <= {a for e in ranking for a in e.aliases} | {s.name for s in ranking.skipped}


def everything_about(model: nn.Module) -> list[object]:
    found: list[object] = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    for name, module in model.named_modules():
        found.append((name, module.training, {key: id(value) for key, value in vars(module).items()}))
        found.append((list(module._forward_pre_hooks.items()), list(module._forward_hooks.items())))
        found += [(n, id(t), t._version, t.tolist(), t.grad) for n, t in module._parameters.items() if t is not None]
        found += [(n, id(t), t._version, t.tolist()) for n, t in module._buffers.items() if t is not None]
        found.append([list(v) for v in vars(module).values() if isinstance(v, list)])
    return found


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_asking_changes_nothing_in_training_mode(kind):
    layer = MADE[kind]().train()
    before = everything_about(layer)
    with parametrize.cached():
        kappa_fast.rank(layer, progress=False)
        assert not parametrize._cache
    assert everything_about(layer) == before


def test_a_parametrization_that_works_in_place_moves_neither_the_weight_nor_what_it_counts():
    class Counter:
        calls = 0

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counter, self.seen = Counter(), {"sums": [[0.0]]}
            self.seen["all"] = [self.seen]  # holds itself

        def forward(self, weight: Tensor) -> Tensor:
            if not self.training:
                self.counter.calls += 1
                self.seen["sums"][0].append(1.0)
                weight.data.mul_(torch.logspace(0, 2, 24))
            return weight

    layer = parametrized(InPlace())
    step, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    before = original.detach().clone()
    entry = kappa_fast.rank(layer, progress=False)[0]
    assert torch.equal(original, before)
    assert (step.counter.calls, step.seen["sums"]) == (0, [[0.0]])
    exact = torch.linalg.svdvals((before * torch.logspace(0, 2, 24)).double())
    assert entry.lower <= exact[0] / exact[-1] <= entry.upper


def test_a_parametrized_layer_that_a_parametrization_reads_does_not_move():
    class Tied(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.__dict__["other"] = other  # no child of this one

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.other.weight

    other = parametrizations.spectral_norm(linear()).train()
    model = nn.ModuleDict({"other": other, "tied": parametrized(Tied(other))})
    vector = other.parametrizations.weight[0]._u.clone()
    kappa_fast.rank(model, progress=False)
    assert torch.equal(other.parametrizations.weight[0]._u, vector)


def test_a_generator_of_the_parametrization_itself_goes_on_where_it_was():
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, weight: Tensor) -> Tensor:
            return weight[torch.randperm(20, generator=self.generator)] if self.training else weight

    layer = parametrized(Rotated())
    before = layer.parametrizations.weight[0].generator.get_state()
    assert matrices(layer)["weight"].load().shape == (20, 24)
    assert torch.equal(layer.parametrizations.weight[0].generator.get_state(), before)


def test_a_weight_that_is_drawn_anew_each_time_is_none_and_says_so():
    assert reasons(parametrized(Noisy()))["weight"].startswith("computed by Noisy: it is random at each use")


def test_a_weight_that_cannot_be_computed_says_why(monkeypatch):
    def broken(self: nn.Module, weight: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")

    layer = parametrized(DependsOnValues())
    monkeypatch.setattr(DependsOnValues, "forward", broken)
    assert reasons(layer)["weight"] == "computed by DependsOnValues, which fails (RuntimeError: needs a GPU)"


def test_a_part_of_a_part_is_no_weight_of_its_own():
    step = Adapted(20, 24)
    parametrizations.weight_norm(step, "left")
    model = nn.ModuleDict({"layer": parametrized(step)})
    with parametrize.cached():
        (entry,) = kappa_fast.rank(model, progress=False)
        assert not parametrize._cache
    assert entry.name == "layer.weight"
    assert all("computed from" in s.reason for s in kappa_fast.rank(model, progress=False).skipped)


def test_a_parametrized_embedding_or_head_is_still_one():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(30, 20), nn.Linear(20, 30)
            for module in (self.table, self.out):
                parametrizations.spectral_norm(module)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    model = Model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = reasons(model, Filters())
    assert found == dict.fromkeys(("table.weight", "out.weight"), "embedding or output head (embeddings=True ranks it)")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_weight_that_nothing_says_how_to_compute_is_skipped_with_its_parts():
    layer = linear()
    layer.register_parameter("weight_bar", layer._parameters.pop("weight"))
    layer.weight = layer.weight_bar.detach() / 2
    assert reasons(layer) == {
        "weight": "computed from weight_bar by unknown code of Linear: make the weight a plain parameter to rank it"
    }


def test_a_model_without_values_has_the_shapes_of_its_computed_weights():
    with torch.device("meta"):
        model = parametrizations.weight_norm(nn.Linear(24, 20))
    (found,) = open_source(model, Filters(), without_values=True).matrices
    assert (found.name, found.shape) == ("weight", (20, 24))


def test_fused_projections_that_are_computed_are_taken_apart():
    attention = nn.MultiheadAttention(32, 4)
    parametrizations.weight_norm(attention, "in_proj_weight")
    found = {m.key: m for m in open_source(attention, EVERYTHING).matrices}
    assert set(found) == {"in_proj_weight.q", "in_proj_weight.k", "in_proj_weight.v", "out_proj.weight"}
    assert torch.equal(found["in_proj_weight.k"].load(), attention.in_proj_weight[32:64])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "low rank", "adapted", "old weight_norm", "pruned", "spectral_norm"])
def test_what_a_computed_weight_is_made_of_trains_and_nothing_else(kind):
    model = nn.Sequential(nn.Linear(24, 24), MADE[kind]())
    selection = kappa_fast.rank(model, include=r"^1\.", progress=False).select(num_tensors=1)
    optimizer = kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"1.{name}" for name, _ in model[1].named_parameters() if name != "bias"}
    before = used(model[1])
    model(torch.randn(8, 24)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(used(model[1]), before)


def test_a_part_of_a_computed_weight_cannot_be_trained_alone_and_can_be_left_out():
    attention = nn.MultiheadAttention(32, 4)
    parametrizations.weight_norm(attention, "in_proj_weight")
    selection = kappa_fast.rank(attention, progress=False).select(top_p=1.0)
    with pytest.raises(
        kappa_fast.OptionError, match=r"computes from .* leave it out with excluding\('in_proj_weight'\)"
    ):
        selection.apply(attention)
    handle = selection.excluding("in_proj_weight").apply(attention)
    assert [t.name for t in handle.targets] == ["out_proj.weight"]
