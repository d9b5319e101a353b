"""The numbers of an update, against full SVDs of numpy with projections written out, and against what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kappa_fast.spectrum.updates import looks_transposed, measure_update

SHAPES = [(48, 32), (32, 48), (40, 40)]


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def separated(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors (m, r), singular values and right vectors (n, r) of a matrix whose values are 3, 2.9, 2.8, ..."""
    r = min(m, n)
    return orthonormal(m, r, seed), 3 - 2.9 * np.arange(r) / r, orthonormal(n, r, seed + 1)


def product(u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u * s) @ v.T


def measured(before: np.ndarray, after: np.ndarray, k: int):
    return measure_update(torch.from_numpy(before), torch.from_numpy(after), k)


def truth(before: np.ndarray, after: np.ndarray, k: int) -> dict[str, object]:
    """By the definitions: projectors on both sides, full SVDs, one cosine after the other."""
    d = after - before
    left, _, right = np.linalg.svd(before, full_matrices=True)
    new = np.linalg.svd(after, full_matrices=True)[0]
    p, q = left[:, :k] @ left[:, :k].T, right[:k].T @ right[:k]
    total = np.sum(d * d)
    r = min(before.shape)
    return {
        "norm": math.sqrt(total),
        "norm_before": math.sqrt(np.sum(before * before)),
        "spectral_norm": np.linalg.svd(d)[1][0],
        "share_left": np.sum((p @ d) ** 2) / total,
        "share_right": np.sum((d @ q) ** 2) / total,
        "share": np.sum((p @ d @ q) ** 2) / total,
        "similarities": tuple(max(abs(left[:, i] @ new[:, j]) for i in range(r)) for j in range(min(k, r))),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_every_number_is_that_of_full_svds(shape, k, size):
    drawn = np.random.default_rng(k)
    before = product(*separated(*shape))
    after = before + size * drawn.standard_normal((shape[0], 3)) @ drawn.standard_normal((3, shape[1]))
    found = measured(before, after, k)
    expected = truth(before, after, k)
    for name, value in expected.items():
        # A difference of 1e-6 has lost six digits to the entries that it is a difference of; only its truth has, too.
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert found.changed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("side", "expected"), [("within", (1, 1, 1)), ("outside", (0, 0, 0)), ("left", (1, 0, 0))])
def test_an_update_of_known_rank_and_place_is_found_there(shape, side, expected):
    u, s, v = separated(*shape)
    k, r = 8, 4
    inner, outer = slice(2, 2 + r), slice(k, k + r)
    left, right = {"within": (inner, inner), "outside": (outer, outer), "left": (inner, outer)}[side]
    update = 0.01 * u[:, left] @ v[:, right].T
    found = measured(product(u, s, v), product(u, s, v) + update, k)
    shares = (found.share_left, found.share_right, found.share)
    assert shares == pytest.approx(expected, abs=1e-12)
    assert (found.norm / found.spectral_norm) ** 2 == pytest.approx(r, rel=1e-9)
    assert found.norm == pytest.approx(0.01 * math.sqrt(r), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scaling_moves_no_direction(shape):
    u, s, v = separated(*shape)
    before = product(u, s, v)
    found = measured(before, 2 * before, 6)
    part = np.sum(s[:6] ** 2) / np.sum(s**2)
    assert (found.share_left, found.share_right, found.share) == pytest.approx((part,) * 3, rel=1e-10)
    assert found.norm == found.norm_before
    assert found.spectral_norm == pytest.approx(3, rel=1e-12)
    assert found.similarities == pytest.approx((1,) * 6, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_direction_is_unlike_every_old_one_and_no_other_is_touched(shape):
    u, s, v = separated(*shape)
    mixed = 16
    x = u[:, -mixed:].sum(axis=1) / math.sqrt(mixed)  # at a cosine of 1/4 with each of sixteen, 0 with the others
    y = v[:, -mixed:].sum(axis=1) / math.sqrt(mixed)
    found = measured(product(u, s, v), product(u, s, v) + 100 * np.outer(x, y), 5)
    assert found.similarities[0] == pytest.approx(0.25, abs=0.01)
    assert found.similarities[1:] == pytest.approx((1,) * 4, abs=1e-9)
    assert found.share == pytest.approx(0, abs=1e-12)


def test_nothing_changed_where_all_bits_are_equal():
    before = product(*separated(48, 32))
    found = measured(before, before.copy(), 5)
    assert (found.changed, found.norm, found.spectral_norm, found.share, found.similarities) == (
        False,
        0.0,
        0.0,
        None,
        None,
    )
    assert found.norm_before == pytest.approx(np.linalg.norm(before), rel=1e-14)


def test_one_bit_is_a_change():
    before = product(*separated(48, 32))
    after = before.copy()
    after[3, 4] = np.nextafter(after[3, 4], 10)
    found = measured(before, after, 5)
    assert found.changed
    assert found.norm == found.spectral_norm == after[3, 4] - before[3, 4] > 0


@pytest.mark.parametrize("power", [-1040, -600, 600, 1010])
def test_the_scale_of_the_weights_does_not_matter(power):
    u, s, v = separated(48, 32)
    # Entries of few digits, so that a power of two changes none of them, subnormal ones included.
    before = np.round(product(u, s, v) * 64)
    after = before + np.round(np.random.default_rng(0).standard_normal(before.shape) * 8)
    usual, scaled = measured(before, after, 5), measured(np.ldexp(before, power), np.ldexp(after, power), 5)
    assert (scaled.share_left, scaled.share_right, scaled.share) == pytest.approx(
        (usual.share_left, usual.share_right, usual.share), rel=1e-12
    )
    assert scaled.similarities == pytest.approx(usual.similarities, rel=1e-12)
    assert scaled.norm == pytest.approx(np.ldexp(usual.norm, power), rel=1e-9)
    assert scaled.spectral_norm == pytest.approx(np.ldexp(usual.spectral_norm, power), rel=1e-9)


def test_a_difference_that_overflows_is_measured_all_the_same():
    drawn = np.random.default_rng(0).standard_normal((48, 32))
    most = np.ldexp(drawn / np.abs(drawn).max(), 1023)
    found, usual = measured(most, -most, 5), measured(drawn, -drawn, 5)
    assert found.share == pytest.approx(usual.share, rel=1e-12)
    assert found.similarities == pytest.approx((1,) * 5)
    assert found.norm == math.inf  # it has no float64


@pytest.mark.parametrize("k", [1, 5])
def test_where_leading_directions_are_a_matter_of_choice_no_share_is_given(k):
    before = orthonormal(48, 32, 0)
    assert measured(before, before + 0.1, k).share is None
    degenerate = product(orthonormal(48, 3, 0), np.array([3.0, 2.0, 1.0]), orthonormal(32, 3, 1))
    found = measured(degenerate, degenerate + 0.1, k)
    assert (found.share is None) == (k == 5)  # there are three directions, and any others


def test_a_small_gap_behind_the_leading_directions_is_one():
    u, s, v = separated(48, 32)
    s[5] = s[4] * (1 - 1e-9)
    found = measured(product(u, s, v), product(u, s, v) + np.outer(u[:, 4], v[:, 4]), 5)
    assert (found.share_left, found.share_right, found.share) == pytest.approx((1, 1, 1), abs=1e-9)


def test_weights_of_zeros_have_a_norm_and_no_directions():
    something, zeros = product(*separated(48, 32)), np.zeros((48, 32))
    found = measured(zeros, something, 5)
    assert (found.norm_before, found.share, found.similarities) == (0.0, None, None)
    assert found.norm == pytest.approx(np.linalg.norm(something))
    gone = measured(something, zeros, 5)
    assert gone.similarities is None
    assert gone.share == pytest.approx(truth(something, zeros, 5)["share"], rel=1e-12)


def test_without_directions_there_is_no_svd(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", None)
    before = product(*separated(48, 32))
    found = measured(before, before + 0.1, 0)
    assert (found.share, found.similarities) == (None, None)
    assert found.spectral_norm == pytest.approx(0.1 * math.sqrt(48 * 32), rel=1e-9)


def test_a_transposed_matrix_is_told_from_an_update_and_from_another_matrix():
    drawn = torch.Generator().manual_seed(0)
    old, other, small = (torch.randn(40, 40, generator=drawn, dtype=torch.float64) for _ in range(3))
    assert looks_transposed(old, old.T + 0.1 * small)
    assert not looks_transposed(old, old + 0.1 * small)
    assert not looks_transposed(old, other)
    symmetric = old + old.T
    assert not looks_transposed(symmetric, symmetric + small)
    assert not looks_transposed(symmetric, symmetric)
