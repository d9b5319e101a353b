"""Weights that a layer computes in its own forward(): what it multiplies with is ranked, of modules and files."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

import kappa_fast


class Masked(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.register_buffer("kept", (torch.arange(rows)[:, None] + torch.arange(columns)) % 3 != 0)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return functional.linear(x, self.weight * self.kept, self.bias)


class Standardized(nn.Conv2d):
    """As in BiT and NFNets: every filter has mean 0 and variance 1."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) / (spread + 1e-6).sqrt(), self.bias)


class InConvForward(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.tril(), bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


class Cast(nn.Linear):
    def forward(self, x):
        return functional.linear(x.float(), self.weight.to(torch.float32))


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Noisy(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight + torch.randn_like(self.weight))


class Fails(nn.Linear):
    def forward(self, x):
        raise RuntimeError("not without a process group")


def failing() -> nn.Module:
    return Fails(24, 40)


def exact(weight: torch.Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.detach().double().flatten(1))
    return float(sigma[0] / sigma[-1])


def standardized(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().flatten(1)
    return (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()


@pytest.mark.parametrize(
    ("layer", "effective"),
    [
        (lambda: Masked(24, 40), lambda m: m.weight * m.kept),
        (lambda: Standardized(8, 20, 3), lambda m: standardized(m.weight)),
        (lambda: InConvForward(24, 20, 1), lambda m: m.weight.tril()),
        (lambda: Padded(8, 20, 3), lambda m: m.weight),
        (lambda: Cast(24, 40).bfloat16(), lambda m: m.weight),
        (lambda: ByHand(24, 40), lambda m: m.weight),
        (failing, lambda m: m.weight),
    ],
    ids=["mask", "standardized", "conv_forward", "padded", "cast", "by hand", "fails"],
)
def test_what_a_layer_multiplies_with_is_ranked(layer, effective):
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    follows = contextlib.nullcontext()
    with pytest.warns(UserWarning, match="ranked as they are held") if layer is failing else follows:
        ranking = kappa_fast.rank(model, progress=False)
    (entry,) = ranking
    assert entry.name == "0.weight"
    assert entry.lower * (1 - 1e-6) <= exact(effective(model[0])) <= entry.upper * (1 + 1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ranking.metadata["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert getattr(model[0], "calls", 0) == 0
    selection = ranking.select(top_p=1.0)
    assert selection.export("names") == "0.weight\n"
    with selection.apply(model) as handle:
        assert [(t.name, t.whole) for t in handle.targets] == [("0.weight", True)]


def test_a_weight_with_noise_has_no_condition_number():
    (skipped,) = kappa_fast.rank(nn.Sequential(Noisy(24, 40), nn.Linear(24, 40)), progress=False).skipped
    assert skipped.name == "0.weight"
    assert "forward() of Noisy" in skipped.reason
    assert "random at each use" in skipped.reason


def test_bit_of_transformers_has_the_same_entries_from_module_and_file(tmp_path):
    from transformers import BitConfig, BitModel

    torch.manual_seed(0)
    config = BitConfig(embedding_size=32, hidden_sizes=[128], depths=[1], num_groups=8)
    model = BitModel(config).eval()
    live = kappa_fast.rank(model, progress=False)
    for entry in live:
        kappa = exact(standardized(model.get_parameter(entry.name)))
        # Rows of mean 0 are singular if there are as many as columns: what is left is rounding.
        singular = entry.shape[0] >= entry.shape[1]
        assert (entry.lower > 1e5) if singular else (entry.lower * 0.99 <= kappa <= entry.upper * 1.01), entry.key
    assert any(e.shape[0] < e.shape[1] for e in live)
    model.save_pretrained(tmp_path)
    saved = kappa_fast.rank(tmp_path, progress=False)
    assert {e.key: e.kappa for e in saved} == {e.key: e.kappa for e in live}
