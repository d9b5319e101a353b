"""The first rung follows the rates of a device: as kept, as measured once, or as published."""

import json
import logging

import pytest
import torch

from kappa_fast.backends import rates
from kappa_fast.backends.rates import PUBLISHED, Rates, published_rates

T = 1e12
FAST = Rates(1 * T, 2 * T, 3 * T, 4 * T)
SLOW = Rates(1.0, 1.0, 1.0, 1.0)


def refuse() -> Rates:
    raise AssertionError("nothing was to be measured")


def test_what_was_measured_is_kept_for_later_runs(tmp_path):
    directory = tmp_path / "cache"
    assert rates._kept_or_measured("one", SLOW, lambda: FAST, directory) == FAST
    assert rates._kept_or_measured("one", SLOW, refuse, directory) == FAST
    other = Rates(5.0, 6.0, 7.0, 8.0)
    assert rates._kept_or_measured("another", SLOW, lambda: other, directory) == other
    assert rates._kept_or_measured("one", SLOW, refuse, directory) == FAST
    assert [path.name for path in directory.iterdir()] == [rates.FILE]


@pytest.mark.parametrize("content", ["", "[]", '{"one": 3}', '{"one": {"int8": 1}}', '{"one": null}'])
def test_a_damaged_file_is_written_anew(content, tmp_path):
    (tmp_path / rates.FILE).write_text(content)
    assert rates._kept_or_measured("one", SLOW, lambda: FAST, tmp_path) == FAST
    assert rates._kept_or_measured("one", SLOW, refuse, tmp_path) == FAST


def test_rates_that_cannot_be_are_not_believed(tmp_path):
    numbers = {"float64": 0.0, "float32": 1.0, "float16": 1.0, "int8": 1.0}
    (tmp_path / rates.FILE).write_text(json.dumps({"one": numbers}))
    assert rates._kept_or_measured("one", SLOW, lambda: FAST, tmp_path) == FAST


def test_where_nothing_can_be_kept_the_published_rates_count(tmp_path):
    # A choice that changed from run to run would change results.
    (tmp_path / "file").write_text("")
    assert rates._kept_or_measured("one", SLOW, refuse, tmp_path / "file" / "below") == SLOW


def test_a_device_that_cannot_be_measured_has_the_published_rates(tmp_path, caplog):
    def fail() -> Rates:
        raise RuntimeError("no such product")

    with caplog.at_level(logging.INFO, logger="kappa_fast"):
        assert rates._kept_or_measured("one", SLOW, fail, tmp_path) == SLOW
    assert "rates of one are taken as published (no such product)" in caplog.text


@pytest.mark.parametrize(
    ("capability", "known"),
    [((9, 0), (9, 0)), ((8, 7), (8, 6)), ((10, 1), (10, 0)), ((13, 0), (12, 0)), ((7, 5), (8, 0))],
)
def test_a_capability_that_is_not_listed_has_the_rates_of_the_one_below(capability, known):
    assert published_rates(capability) == PUBLISHED[known]


def test_without_a_gpu_the_directory_is_not_even_asked_for(monkeypatch):
    monkeypatch.setattr(rates, "_directory", refuse)
    assert rates.rates_of(torch.device("cpu")) == PUBLISHED[9, 0]
