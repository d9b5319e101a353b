"""Layers that make their weight in unusual ways: what they multiply with is found."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import kappa_fast

GRID = torch.linspace(1, 2, 9).view(3, 3)


def exact(weight: torch.Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.detach().double().flatten(1))
    return float(sigma[0] / sigma[-1])


def kept(columns: int = 24, rows: int = 40) -> torch.Tensor:
    return (torch.arange(rows)[:, None] + torch.arange(columns)) % 3 != 0


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(24, 40)
        self.register_buffer("kept", kept())

    def made(self):
        return self.weight * self.kept


class Sequences(Masked):
    def forward(self, x):
        batch, _, width = x.shape
        return functional.linear(x.reshape(batch, -1, width), self.made())


class AsksForValues(Masked):
    def forward(self, x):
        return functional.linear(x, self.made() if bool(self.kept.any()) else self.weight)


class ByIndex(Masked):
    def forward(self, x):
        weight = self.weight.clone()
        weight[~self.kept] = 0
        return functional.linear(x, weight)


class Multiplied(Masked):
    def forward(self, x):
        return x @ self.made().T + self.bias


class Einsum(Masked):
    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.made())


class OtherSide(Masked):
    def forward(self, x):
        return (self.made() @ x.T).T


class BesideAChild(Masked):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 40)

    def forward(self, x):
        return self.inner(x) + functional.linear(x, self.made())


class InPlace(Masked):
    def forward(self, x):
        self.weight.data.mul_(self.kept)
        return functional.linear(x, self.weight)


class Swapped(Masked):
    def forward(self, x):
        weight = self.weight
        self.weight = nn.Parameter(self.made())
        result = super().forward(x)
        self.weight = weight
        return result


class Warns(Masked):
    def forward(self, x):
        warnings.warn("old", DeprecationWarning, stacklevel=2)
        return functional.linear(x, self.made())


class OfBuffer(Masked):
    def __init__(self) -> None:
        super().__init__()
        weight = self.weight.data
        del self.weight
        self.register_buffer("weight", weight)

    def forward(self, x):
        return functional.linear(x, self.made())


class WithArguments(Masked):
    def __new__(cls, kind: str):
        return super().__new__(cls)

    def __init__(self, kind: str) -> None:
        super().__init__()

    def forward(self, x):
        return functional.linear(x, self.made())


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(40, 24))
        self.register_buffer("kept", kept())

    def forward(self, x):
        return functional.linear(x, self.kernel * self.kept)


class NoConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 16, 3, 3))

    def forward(self, x):
        return functional.conv2d(x, self.weight * GRID.to(self.weight), padding=1)


class Transposed(nn.ConvTranspose2d):
    def forward(self, x):
        return functional.conv_transpose2d(x, self.weight * GRID.to(self.weight), stride=self.stride)


class Points(nn.Conv2d):
    def forward(self, x):
        return functional.linear(x.flatten(1), self.weight.flatten(1) * kept(16, 20).to(self.weight))


class Unfolded(nn.Conv2d):
    def forward(self, x):
        columns = functional.unfold(x, self.kernel_size)
        return torch.einsum("bcl,oc->bol", columns, (self.weight * GRID.to(self.weight)).flatten(1))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 20, 24))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight * kept(24, 20).to(self.weight))


class Halved(nn.Linear):
    def forward(self, x):
        return functional.linear(x.bfloat16(), self.weight.bfloat16())


class LoRA(nn.Linear):
    def __init__(self) -> None:
        super().__init__(24, 40)
        self.a, self.b = nn.Parameter(torch.randn(4, 24)), nn.Parameter(torch.randn(40, 4))

    def forward(self, x):
        return functional.linear(x, self.weight + self.b @ self.a)


class Doubly(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * kept().to(self.weight))


def replaced() -> nn.Linear:
    layer = nn.Linear(24, 40)
    layer.register_buffer("kept", kept())
    layer.forward = types.MethodType(lambda self, x: functional.linear(x, self.weight * self.kept), layer)
    return layer


def while_rounding() -> nn.Module:
    import torch.ao.nn.qat as qat
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = qat.Linear(24, 40, qconfig=quantization.get_default_qat_qconfig("fbgemm"))
        layer(torch.randn(3, 24))
        layer.apply(quantization.disable_observer)
    return layer


def masked(layer):
    return layer.weight * layer.kept


FOLLOWED = {
    **{kind.__name__: (kind, masked) for kind in (Sequences, AsksForValues, ByIndex, Multiplied, Einsum, OtherSide)},
    **{kind.__name__: (kind, masked) for kind in (BesideAChild, InPlace, Swapped, Warns, OfBuffer)},
    "WithArguments": (lambda: WithArguments("a"), masked),
    "NoLinear": (NoLinear, lambda m: m.kernel * m.kept),
    "NoConvolution": (NoConvolution, lambda m: m.weight * GRID),
    "Transposed": (lambda: Transposed(20, 16, 3, stride=2), lambda m: m.weight * GRID),
    "Points": (lambda: Points(16, 20, 1), lambda m: m.weight.flatten(1) * kept(16, 20)),
    "Unfolded": (lambda: Unfolded(16, 20, 3), lambda m: m.weight * GRID),
    "halved in float32": (lambda: Halved(24, 40), lambda m: m.weight.bfloat16()),
    "halved in bfloat16": (lambda: Halved(24, 40).bfloat16(), lambda m: m.weight),
    "LoRA": (LoRA, lambda m: m.weight + m.b @ m.a),
    "replaced": (replaced, masked),
    "parametrized": (lambda: parametrizations.weight_norm(Doubly(24, 40)), lambda m: m.weight * kept()),
    "pruned": (lambda: prune.random_unstructured(Doubly(24, 40), "weight", 0.3), lambda m: m.weight * kept()),
    "while rounding": (while_rounding, lambda m: m.weight_fake_quant(m.weight)),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_the_input_is_multiplied_with_is_found(case):
    torch.manual_seed(0)
    make, effective = FOLLOWED[case]
    model = nn.Sequential(make()).eval()
    with torch.no_grad():
        truth = exact(effective(model[0]))
    entry = next(e for e in kappa_fast.rank(model, progress=False) if e.name in ("0.weight", "0.kernel"))
    assert entry.lower * (1 - 1e-5) <= truth <= entry.upper * (1 + 1e-5)
