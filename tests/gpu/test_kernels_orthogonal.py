"""Under the interpreter, packed blocks are orthonormalized whatever their condition."""

import math

import pytest
import torch
from spectra import gaussian

from kappa_fast.kernels.orthogonal import identities, one_pass, orthonormalized
from kappa_fast.kernels.panel import Rows

CPU = torch.device("cpu")
U = 2.0**-53


def graded(rows, decades):
    """Singular values from 1 down to 10^-decades, turned so that no column shows them."""
    left, right = torch.linalg.qr(gaussian(rows, 16, rows)).Q, torch.linalg.qr(gaussian(16, 16, 1)).Q
    return left @ torch.diag(10.0 ** torch.linspace(0, -decades, 16, dtype=torch.float64)) @ right


def hard_blocks():
    """Blocks (rows, 16) with the number of directions that they hold."""
    twins = gaussian(64, 16, 2)
    twins[:, 5] = twins[:, 3] + 1e-9 * twins[:, 5]
    several = gaussian(130, 16, 3)
    several[:, 4] = 0
    several[:, 7] = 3 * several[:, 1]
    steep = gaussian(17, 16, 4) @ torch.diag(10.0 ** -torch.tensor([*range(13), 18, 19, 20], dtype=torch.float64))
    return {
        "plain": (gaussian(40, 16, 1), 16),
        "twins": (twins, 16),
        "dependent": (several, 14),
        "steep columns": (steep, 13),
        "graded": (graded(600, 14), 16),
    }


def run(blocks, limits):
    rows = Rows.of([len(b) for b in blocks], CPU)
    q, coupling = orthonormalized(rows, torch.cat(blocks), torch.tensor(limits, dtype=torch.float64))
    return q.split([len(b) for b in blocks]), coupling


def test_hard_blocks_become_orthonormal_and_are_reproduced():
    cases = hard_blocks()
    blocks = [block for block, _ in cases.values()]
    bases, couplings = run(blocks, [16 * U * float(b.norm()) / 4 for b in blocks])
    for (name, (block, kept)), q, coupling in zip(cases.items(), bases, couplings, strict=True):
        alive = q.norm(dim=0) > 0.5
        assert int(alive.sum()) == kept, name
        assert float((q.T @ q - torch.diag(alive.double())).abs().max()) < 20 * U, name
        assert float((block - q @ coupling).abs().max()) < 40 * U * float(block.norm()), name
        assert not coupling[~alive].any(), name


def test_one_pass_alone_would_not_be_orthonormal():
    block = hard_blocks()["graded"][0]
    rows = Rows.of([len(block)], CPU)
    q, _ = one_pass(rows, block, torch.zeros(1, dtype=torch.float64), identities(1, CPU))
    assert float((q.T @ q - torch.eye(16)).abs().max()) > 1e-3


@pytest.mark.parametrize("limit", [1e-3, 1e-6])
def test_directions_at_or_below_the_limit_are_left_out_and_cost_no_more_than_that(limit):
    block = graded(200, 9)
    (q,), (coupling,) = run([block], [limit])
    kept = int((q.norm(dim=0) > 0.5).sum())
    singular = 10.0 ** torch.linspace(0, -9, 16, dtype=torch.float64)
    assert int((singular > 30 * limit).sum()) <= kept <= int((singular > limit / 30).sum())
    assert float((block - q @ coupling).norm()) <= 16 * limit


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
def test_a_block_that_is_not_finite_is_left_out_and_harms_no_other():
    good = gaussian(50, 16, 7)
    for bad in (math.nan, math.inf):
        broken = gaussian(30, 16, 8)
        broken[3, 2] = bad
        (_, q), couplings = run([broken, good], [math.nan, 0.0])
        assert not couplings[0].any()
        (alone,), coupling = run([good], [0.0])
        assert torch.equal(q, alone)
        assert torch.equal(couplings[1:], coupling)


def test_a_member_gets_the_same_in_any_wave():
    blocks = [block for block, _ in hard_blocks().values()][:3]
    together, couplings = run(blocks, [0.0] * 3)
    for i, block in enumerate(blocks):
        (alone,), coupling = run([block], [0.0])
        assert torch.equal(together[i], alone)
        assert torch.equal(couplings[i], coupling[0])
