"""Start blocks on a device: digests that see every bit and no stride, and Gaussian blocks drawn from them."""

import sys

import pytest
import torch

if not sys.platform.startswith("linux"):
    pytest.skip("Triton is for Linux", allow_module_level=True)

from launches import counted

from kappa_fast.backends.triton_backend import TritonBackend
from kappa_fast.kernels.panel import Rows
from kappa_fast.kernels.problems import Problems
from kappa_fast.kernels.start import BN, STRIPE, column_digests, gaussian_blocks

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def numbers(m, n, dtype=torch.float32, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts(a):
    spread = torch.zeros(a.shape[0], 3 * a.shape[1], dtype=a.dtype)
    spread[:, ::3] = a
    shifted = torch.zeros(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape)
    return [a, a.T.contiguous().T, spread[:, ::3], shifted.copy_(a)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_depend_on_values_and_not_on_strides_addresses_or_the_wave(dtype):
    a = numbers(70, 37, dtype)
    alone = column_digests(Problems.of([a]))
    together = column_digests(Problems.of([numbers(90, 5, dtype, 1), *layouts(a), numbers(41, 40, torch.float32, 2)]))
    for found in together[5 : 5 + 4 * 37].split(37):
        assert torch.equal(found, alone)


def flipped(a, row, column, bit):
    bits = a.clone().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[a.itemsize])
    bits[row, column] ^= 1 << bit
    return bits.view(a.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_an_entry_changes_the_digest_of_its_column_alone(dtype):
    a, last = numbers(70, 3, dtype), 8 * dtype.itemsize - 2
    changes = [(0, 0, 0), (0, 0, last), (17, 1, 0), (69, 2, last)]
    before, *found = column_digests(Problems.of([a, *(flipped(a, *change) for change in changes)])).split(3)
    for (_, column, _), after in zip(changes, found, strict=True):
        assert (after != before).nonzero().flatten().tolist() == [column]
    assert len({tuple(after.tolist()) for after in found}) == len(changes)


def test_long_columns_are_seen_to_their_end():
    a = numbers(STRIPE.value + 3, 2, torch.bfloat16)
    changes = [(STRIPE.value - 1, 0, 0), (STRIPE.value, 1, 0), (STRIPE.value + 2, 0, 0)]
    before, *found = column_digests(Problems.of([a, *(flipped(a, *change) for change in changes)])).split(2)
    for (_, column, _), after in zip(changes, found, strict=True):
        assert (after != before).nonzero().flatten().tolist() == [column]


def test_equal_columns_and_exchanged_rows_are_told_apart():
    wide = column_digests(Problems.of([torch.ones(300, 2 * BN.value + 4)]))
    assert len(set(wide.tolist())) == len(wide)
    a = numbers(40, 1)
    orders = [a, a.flip(0), a.roll(1, 0), a.roll(16, 0)]
    assert len(set(column_digests(Problems.of(orders)).tolist())) == len(orders)


def test_the_backend_hashes_shape_and_dtype_with_the_columns():
    backend = TritonBackend(CPU)
    given = [torch.zeros(40, 20), torch.zeros(44, 20), torch.zeros(40, 20).bfloat16(), torch.zeros(40, 20).double()]
    found = backend.digests(backend.prepare([*given, torch.zeros(20, 40).T]))
    assert len(set(found[:4])) == 4
    assert found[4] == found[0]
    assert all(len(digest) == 32 for digest in found)


def test_blocks_are_gaussian_and_no_two_keys_give_the_same():
    rows = Rows.of([70, 4000, 4000], CPU)
    short, first, second = gaussian_blocks(rows, [5, 5, -(2**62) - 1]).split([70, 4000, 4000])
    assert torch.equal(short, first[:70])
    for block in (first, second):
        assert abs(float(block.mean())) < 5 / 64000**0.5
        assert abs(float(block.var()) - 1) < 5 * (2 / 64000) ** 0.5
        assert abs(float((block**4).mean()) - 3) < 5 * (96 / 64000) ** 0.5
        inner = block.T @ block / 4000 - torch.eye(16, dtype=torch.float64)
        assert float(inner.abs().max()) < 0.1
    assert abs(float((first * second).mean())) < 5 / 64000**0.5
    assert torch.unique(first).numel() == first.numel()


def test_launches_do_not_depend_on_the_number_of_matrices():
    found = []
    for count in (3, 200):
        with counted(run=False) as names:
            column_digests(Problems.of([torch.zeros(20, 20)] * count))
            gaussian_blocks(Rows.of([20] * count, CPU), range(count))
        found.append(names)
    assert found[0] == found[1] == ["chain", "fold", "gaussian"]
