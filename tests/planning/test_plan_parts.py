"""The disk's rate, the floor for a device that is named, and the text of a plan."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace

import pytest
import torch
from models import weights
from safetensors.torch import save_file

import kappa_fast
from kappa_fast.planning import disk, engine, plan
from kappa_fast.planning.devices import DEVICES, device_model, first_products, floor_of
from kappa_fast.planning.disk import Reading, measure_reading
from kappa_fast.report.plan import format_amount, format_bytes, format_seconds

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def files(tmp_path, *sizes):
    made = []
    for i, size in enumerate(sizes):
        made.append(tmp_path / f"{i}.safetensors")
        made[-1].write_bytes(os.urandom(size))
    return made


def test_small_files_are_read_once_from_end_to_end(tmp_path, monkeypatch):
    sizes = [(file, file.stat().st_size) for file in files(tmp_path, 10_000, 0, 70_000, 1)]
    runs = list(disk._runs(sizes, 80_001))
    assert runs == [(sizes[0][0], 0, 10_000), (sizes[2][0], 0, 70_000), (sizes[3][0], 0, 1)]
    found = measure_reading([file for file, _ in sizes], 1000)
    assert (found.sampled, found.nbytes) == (80_001, 1000)
    assert found.rate > 0
    assert found.seconds == 1000 / found.rate


def test_of_large_files_evenly_spread_parts_are_read_that_do_not_overlap(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "MOST", 400)
    monkeypatch.setattr(disk, "RUN", 100)
    sizes = list(zip(files(tmp_path, 1000, 50, 2000), (1000, 50, 2000), strict=True))
    runs = list(disk._runs(sizes, 3050))
    assert sum(length for *_, length in runs) == 400
    starts = {sizes[0][0]: 0, sizes[1][0]: 1000, sizes[2][0]: 1050}
    flat = sorted((starts[file] + offset, starts[file] + offset + length) for file, offset, length in runs)
    assert flat[0][0] == 0
    assert flat[-1][1] == 3050
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(flat))
    assert measure_reading([file for file, _ in sizes], 1).sampled == 400


def test_files_just_written_lie_in_memory_and_where_nobody_can_tell_nothing_is_said(tmp_path, monkeypatch):
    made = files(tmp_path, 300_000)
    found = measure_reading(made, 10)
    assert found.cached in (None, 1.0)  # not every file system tells
    monkeypatch.delattr(os, "preadv", raising=False)
    assert measure_reading(made, 10).cached is None


def test_nothing_to_read_has_no_rate(tmp_path):
    assert measure_reading(files(tmp_path, 0), 10) is None
    assert measure_reading(files(tmp_path, 10), 0) is None
    assert measure_reading([], 10) is None


def test_a_disk_that_fails_is_an_error_with_the_path(tmp_path, monkeypatch):
    save_file(weights(a=(64, 32)), tmp_path / "model.safetensors")

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine, "measure_reading", fails)
    with pytest.raises(
        kappa_fast.SourceError, match=rf"{tmp_path}/model.safetensors cannot be read \(Input/output error\): check"
    ):
        plan(tmp_path)


def test_no_more_is_read_than_the_files_hold_and_nothing_of_what_lies_in_memory(tmp_path, monkeypatch):
    given = weights(a=(64, 32), b=(48, 48))
    save_file(given, tmp_path / "model.safetensors")
    found = plan(tmp_path, measure=False)
    assert found.to_read == found.nbytes == 4 * (64 * 32 + 48 * 48)
    assert plan(tmp_path, include="a", measure=False).to_read == 4 * 64 * 32
    assert plan(given, measure=False).to_read == 0
    original = engine.open_source

    def dequantized(*arguments, **options):  # as if every matrix came from codes of a quarter of its size
        found = original(*arguments, **options)
        return replace(
            found, matrices=tuple(replace(m, shape=(2 * m.shape[0], 2 * m.shape[1])) for m in found.matrices)
        )

    monkeypatch.setattr(engine, "open_source", dequantized)
    found = plan(tmp_path)
    assert found.to_read == found.reading.nbytes == (tmp_path / "model.safetensors").stat().st_size < found.nbytes


def test_the_floor_is_operations_over_published_rates():
    item = ((14336, 4096), BF16)
    h200 = device_model("H200")
    found = floor_of(h200, {item: 3}, {item: 1}, {})
    gram, cholesky = 14336 * 4096**2 / 989.5e12, 4096**3 / 3 / 67e12
    assert found.gram == pytest.approx(3 * gram)
    assert found.cholesky == pytest.approx(3 * cholesky)
    assert found.reading == pytest.approx(3 * 14336 * 4096 * 2 / 4.8e12)
    assert found.seconds == pytest.approx(3 * (gram + cholesky))
    assert found.low == pytest.approx(gram + cholesky)
    assert found.weights_fit
    assert found.proofs == 0
    proven = floor_of(h200, {item: 3}, {item: 1}, {item: 1})
    assert proven.proofs == pytest.approx((14336 * 4096**2 + 4 * 4096**3 / 3) / 67e12)
    assert proven.seconds == pytest.approx(found.seconds + proven.proofs)


def test_no_floor_is_below_one_pass_over_the_weights():
    found = floor_of(device_model("rtx4090"), {((100_000, 16), BF16): 1}, {}, {})
    assert found.seconds == found.reading == pytest.approx(100_000 * 16 * 2 / 1.008e12)


def test_the_floor_of_mixtral_on_an_h200_is_of_the_order_that_is_known_from_the_operations():
    """Gram 1.9e14 at the rate of one bfloat16 product, Cholesky 1.9e13 at that of float64, experts split."""
    counts = {((14336, 4096), BF16): 32 * 8 * 3, ((4096, 4096), BF16): 64, ((1024, 4096), BF16): 64}
    found = floor_of(device_model("h200"), counts, counts, {})
    slender = 1.9e14 / 989.5e12
    assert 0.9 * slender < found.gram < 1.5 * slender  # square matrices take six int8 products
    assert found.cholesky == pytest.approx(1.9e13 / 67e12, rel=0.1)


@pytest.mark.parametrize("spelled", ["rtx4090", "RTX 4090", "rtx-4090", "RTX_4090"])
def test_a_device_may_be_spelled_in_several_ways(spelled):
    assert device_model(spelled) is DEVICES["rtx4090"]


def test_every_device_names_its_source_and_has_figures_that_make_sense():
    for name, d in DEVICES.items():
        assert name == d.name
        assert d.source
        assert 1e12 < d.float64 < d.bfloat16 < d.int8 < 1e16
        assert 10**10 < d.memory < 10**12
        assert 1e11 < d.bandwidth < 1e13


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096), (1024, 1024), (1000, 900)])
def test_the_floor_counts_the_products_of_the_first_rung_of_the_triton_backend(shape, dtype):
    backend = kappa_fast.backends.get_backend("triton", torch.device("cpu"))
    first = backend.rungs((max(shape), min(shape)), dtype)[0].name
    expected = {"weights16": ("bfloat16", 1), "slices2": ("int8", 3), "slices3": ("int8", 6)}
    assert first_products(shape, dtype) == expected.get(first, ("float64", 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (999_600, "1.00 M"), (21_300_000, "21.3 M"), (4.83e9, "4.83 G")],
)
def test_amounts_have_three_digits(value, text):
    assert format_amount(value) == text
    assert format_bytes(value) == (f"{text}B" if " " in text else f"{text} B")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2e-5, "20 us"),
        (0.0042, "4.20 ms"),
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (185, "3.08 min"),
        (9000, "2.50 h"),
        (864000, "10.0 days"),
    ],
)
def test_times_have_the_unit_that_fits(seconds, text):
    assert format_seconds(seconds) == text


def test_rows_are_limited_and_the_rest_is_counted():
    found = plan(weights(**{f"{name}__weight": (16 + i, 16) for i, name in enumerate("abcde")}), measure=False)
    text = found.to_text(limit=2)
    assert "e.weight" in text
    assert "d.weight" in text
    assert "a.weight" not in text
    assert "... 3 more kinds, 3 matrices" in text
    assert "a.weight" in found.to_text(limit=None)
    with pytest.raises(kappa_fast.OptionError, match="limit=-1: give a count of rows"):
        found.to_text(limit=-1)
    with pytest.raises(kappa_fast.OptionError, match="width=10: the table needs at least 60"):
        found.to_text(width=10)


def test_names_of_strangers_are_escaped():
    assert "evil\\x1b[31m\\nname" in plan({"evil\x1b[31m\nname": torch.zeros(32, 32)}, measure=False).to_text()


@pytest.mark.parametrize(
    ("cached", "words"),
    [
        (None, "which may have been in memory already"),
        (0.5, "50% was in memory, so the disk is slower"),
        (0.0, "the disk"),
    ],
)
def test_the_text_says_what_the_rate_of_reading_is_worth(cached, words, tmp_path):
    save_file(weights(a=(64, 32)), tmp_path / "model.safetensors")
    found = replace(plan(tmp_path), reading=Reading(10**9, 1e8, 10**7, cached))
    text = found.to_text(width=1000)
    assert "reading     about 10.0 s at 100 MB/s, measured on 10.0 MB" in text
    assert words in text
    assert found.seconds[0] == 10.0
