"""What plan() says of ranks that divide the work."""

from __future__ import annotations

import pytest
import torch
from models import weights

from kappa_fast import OptionError
from kappa_fast.execution.cost import relative_cost
from kappa_fast.planning import plan

EQUAL = weights(**{f"layers__{i}__weight": (64, 48) for i in range(60)})


def test_equal_matrices_are_divided_evenly():
    found = plan(EQUAL, measure=False, ranks=3).division
    assert (found.ranks, found.matrices) == (3, (20, 20))
    assert found.share == pytest.approx(1 / 3)
    assert found.imbalance == pytest.approx(1.0)
    assert found.nbytes == 20 * 64 * 48 * 4


def test_one_large_matrix_is_all_that_its_rank_does():
    model = {**EQUAL, "large.weight": torch.zeros(1024, 512)}
    large, small = relative_cost((1024, 512), False), relative_cost((64, 48), False)
    assert large > 60 * small
    found = plan(model, measure=False, ranks=2).division
    assert found.matrices == (1, 60)
    assert found.share == pytest.approx(large / (large + 60 * small))
    assert found.nbytes == max(1024 * 512 * 4, 60 * 64 * 48 * 4)


def test_more_ranks_than_matrices_leave_some_without_work():
    found = plan({"a": EQUAL["layers.0.weight"]}, measure=False, ranks=4).division
    assert (found.matrices, found.share, found.imbalance) == ((0, 1), 1.0, 4.0)


def test_the_time_is_what_the_busiest_rank_would_take():
    found = plan(EQUAL, ranks=4)
    low, high = found.seconds_of_ranks
    opening = found.prediction.opening
    assert low - opening == pytest.approx((found.prediction.low - opening) / 4)
    assert high - opening == pytest.approx((found.prediction.high - opening) / 4)
    text = " ".join(str(found).split())
    assert "ranks 4, with 15 matrices each; the busiest has 25% of the predicted cost (1.00 times the mean)" in text
    assert "of computing if it is as fast as this one" in text
    assert plan(EQUAL, measure=False).division is plan(EQUAL, measure=False).seconds_of_ranks is None


@pytest.mark.parametrize("ranks", [0, -1, True, 1.5, "2", 1 << 40])
def test_what_is_no_number_of_processes_is_refused(ranks):
    with pytest.raises(OptionError, match=r"ranks=.*give a number of processes"):
        plan(EQUAL, measure=False, ranks=ranks)
