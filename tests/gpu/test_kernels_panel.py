"""Under the interpreter, inner products and combinations of packed blocks are those of every member alone."""

import math

import pytest
import torch
from launches import counted
from spectra import gaussian

from kappa_fast.kernels import panel as module
from kappa_fast.kernels import twins
from kappa_fast.kernels.panel import Rows, combine, inner, subtract

COUNTS = [1, 16, 63, 64, 65, 511, 512, 513, 1300]
CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["dot", "outer products"])
def products(request, monkeypatch):
    monkeypatch.setattr(module, "WITH_DOT", ("sm_90",) if request.param else ())


def packed(counts, width, seed=0):
    return torch.cat([gaussian(n, width, seed + n) for n in counts])


def inside_of(wider, columns, before=3, after=2):
    """The same values as columns of a wider array full of NaN."""
    holder = torch.full((wider.shape[0], before + columns + after), math.nan, dtype=torch.float64)
    holder[:, before : before + columns] = wider
    return holder[:, before : before + columns]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("k", "b"), [(1, 1), (16, 16), (70, 3), (144, 16)])
def test_inner_products_are_those_of_every_member(k, b):
    counts = COUNTS if module.WITH_DOT else COUNTS[:6]
    v, w = inside_of(packed(counts, k), k), inside_of(packed(counts, b, 99), b)
    rows = Rows.of(counts, CPU)
    for got, wanted, length in zip(inner(rows, v, w), twins.inner(rows, v, w), counts, strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12 * math.sqrt(length))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("k", "b"), [(1, 1), (16, 16), (70, 3), pytest.param(144, 16, marks=pytest.mark.slow)])
def test_combinations_are_those_of_every_member(k, b):
    counts = COUNTS[:7]
    v, w = inside_of(packed(counts, k), k), inside_of(packed(counts, b, 99), b)
    c = gaussian(len(counts) * k, b).reshape(len(counts), k, b)
    rows = Rows.of(counts, CPU)
    assert torch.allclose(combine(rows, v, c), twins.combine(rows, v, c), rtol=0, atol=1e-12 * k)
    assert torch.allclose(subtract(rows, v, c, w), twins.subtract(rows, v, c, w), rtol=0, atol=1e-12 * k)


def test_a_member_gets_the_same_in_any_wave():
    counts = [65, 1300, 20]
    v, w = packed(counts, 40), packed(counts, 16, 9)
    together = inner(Rows.of(counts, CPU), v, w)
    for i, (x, y) in enumerate(zip(v.split(counts), w.split(counts), strict=True)):
        alone = inner(Rows.of(counts[i : i + 1], CPU), x, y)
        assert torch.equal(alone[0], together[i])


def test_blocks_that_do_not_fit_are_refused():
    rows = Rows.of([5, 7], CPU)
    v, w = gaussian(12, 8), gaussian(12, 4)
    for wrong in (gaussian(11, 4), gaussian(12, 4).float(), gaussian(4, 12).T):
        with pytest.raises(ValueError, match="a block must have 12 rows of float64, row-major"):
            inner(rows, v, wrong)
    with pytest.raises(ValueError, match="a block of 17 columns: at most 16"):
        inner(rows, v, gaussian(12, 17))
    with pytest.raises(ValueError, match=r"coefficients \(2, 7, 4\) do not fit 2 bases of 8"):
        subtract(rows, v, gaussian(14, 4).reshape(2, 7, 4), w)


def test_launches_do_not_depend_on_the_number_of_members():
    for members in (3, 300):
        rows = Rows.of([70] * members, CPU)
        v, w = torch.zeros(70 * members, 32).double(), torch.zeros(70 * members, 16).double()
        with counted(run=False) as launches:
            inner(rows, v, w)
            combine(rows, v, torch.zeros(members, 32, 16).double())
            subtract(rows, v, torch.zeros(members, 32, 16).double(), w)
        assert launches == ["inner", "add_chunks", "combine", "combine"]
