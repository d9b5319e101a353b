"""What comes of damaged files: an error of kappa_fast, or a number that an independent reading and an SVD confirm."""

import shutil

import pytest
from mutants import CHECKS, outcome


def outcomes(kind, seeds, tmp_path):
    found = []
    for seed in seeds:
        folder = tmp_path / f"{kind}{seed}"
        folder.mkdir()
        found.append((seed, outcome(kind, seed, folder)))
        shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("kind", CHECKS)
def test_some_mutants_are_refused_or_ranked_right(kind, tmp_path):
    found = outcomes(kind, range(15), tmp_path)
    assert not [(seed, o.wrong) for seed, o in found if o.wrong]
    assert any(o.ranked for _, o in found)  # or nothing would be checked


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_thousands_of_mutants_are_refused_or_ranked_right(kind, tmp_path):
    found = outcomes(kind, range(1000, 1600), tmp_path)
    assert not [(seed, o.wrong) for seed, o in found if o.wrong]
    assert sum(o.ranked > 0 for _, o in found) >= 10  # most mutants of results contradict themselves
