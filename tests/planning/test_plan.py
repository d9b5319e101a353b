"""plan() says what rank() would do, without a look at any weight, and predicts the time from what it measured."""

from __future__ import annotations

import json
import re
import struct
import sys
import time
from dataclasses import replace

import families
import pytest
import torch
from models import weights
from safetensors.torch import save_file

import kappa_fast
from kappa_fast.cli.demo import find_weights
from kappa_fast.execution import executor as execution
from kappa_fast.options import Options
from kappa_fast.planning import calibration, engine, plan, prediction
from kappa_fast.planning.calibration import Costs, Kind, Sample
from kappa_fast.planning.prediction import PROBES

F32, BF16 = torch.float32, torch.bfloat16


def no_reading(*_, **__):
    pytest.fail("a weight was looked at")


def groups_of(ranking: kappa_fast.Ranking) -> dict[tuple[str, tuple[int, int], str], int]:
    found: dict[tuple[str, tuple[int, int], str], int] = {}
    for e in ranking:
        key = (e.group, e.shape, e.dtype)
        found[key] = found.get(key, 0) + 1
    return found


def planned_groups(found: engine.Plan) -> dict[tuple[str, tuple[int, int], str], int]:
    return {(g.group, g.shape, g.dtype): g.count for g in found.groups}


@pytest.mark.parametrize("options", [{}, {"embeddings": True, "routers": True, "min_dim": 1}, {"fused": "stored"}])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phi3", "bert"])
def test_what_is_planned_is_what_is_ranked_and_what_is_skipped_is_skipped_for_the_same_reasons(family, options):
    model = families.build(family)
    ranking = kappa_fast.rank(model, progress=False, **options)
    found = plan(model, measure=False, **options)
    assert planned_groups(found) == groups_of(ranking)
    assert found.skipped == ranking.skipped
    assert (found.count, found.numel) == (len(ranking), sum(e.numel for e in ranking))
    assert found.num_parameters == ranking.metadata["num_parameters"]
    assert dict(found.source) == engine._as_json(dict(ranking.metadata["source"])) | {
        "layouts": found.source["layouts"]
    }
    assert found.prediction is None
    assert found.reading is None


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_model_on_the_meta_device_is_planned_as_the_one_with_weights(family):
    real = plan(families.build(family), measure=False)
    with torch.device("meta"):
        model = families.build(family)
    found = plan(model, measure=False)
    assert found.groups == real.groups
    assert found.skipped == real.skipped
    assert (found.waves, found.peak, found.devices) == (real.waves, real.peak, real.devices)
    # Tied or not, rank() has nothing to rank there.
    with pytest.warns(UserWarning, match="have no values to read and are not ranked"):
        skipped = kappa_fast.rank(model, progress=False).skipped
    assert {s.reason for s in skipped if "meta" in s.reason} == {
        "on the meta device, without values: rank from the checkpoint"
    }


@pytest.fixture
def unreadable(monkeypatch):
    """Matrices whose values nobody can get at."""
    original = engine.open_source

    def opened(*arguments, **options):
        found = original(*arguments, **options)
        return replace(found, matrices=tuple(replace(matrix, load=no_reading) for matrix in found.matrices))

    monkeypatch.setattr(engine, "open_source", opened)


@pytest.mark.usefixtures("unreadable")
def test_no_weight_of_a_checkpoint_is_read_though_the_time_is_predicted(tmp_path):
    save_file(weights(a=(64, 32), b=(48, 48)), tmp_path / "model.safetensors")
    found = plan(tmp_path)
    assert found.count == 2
    assert found.prediction is not None
    assert found.reading is not None
    assert found.reading.nbytes == found.nbytes == 4 * (64 * 32 + 48 * 48)


@pytest.mark.usefixtures("unreadable")
def test_no_weight_in_memory_is_looked_at():
    assert plan(weights(a=(64, 32), b=(48, 48))).count == 2
    assert plan(torch.nn.Linear(32, 64)).count == 1


def test_shards_of_a_hundred_gigabytes_that_are_all_hole_are_planned_at_once(tmp_path):
    side, count = 1 << 15, 12
    size = 4 * side * side * 2
    for i in range(count):
        entry = {"dtype": "BF16", "shape": [4, side, side], "data_offsets": [0, size]}
        header = json.dumps({f"layers.{i}.experts.down_proj": entry}).encode()
        with open(tmp_path / f"model-{i + 1:05}-of-{count:05}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            try:
                file.truncate(8 + len(header) + size)
            except OSError as error:
                pytest.skip(f"the file system has no files of that size: {error}")
    found = plan(tmp_path, measure=False, memory_budget="2GB", device_model="rtx4090")
    assert (found.count, found.nbytes, found.waves) == (4 * count, count * size, 4 * count)
    assert found.operations == pytest.approx(4 * count * 4 / 3 * side**3)
    assert found.peak > found.budget == 2_000_000_000
    assert not found.floor.weights_fit
    assert "The weights do not fit into its 24.0 GB" in str(found)


@pytest.mark.parametrize("budget", ["1", "100KB", "1MB", None])
def test_the_waves_are_those_that_rank_works_on(budget, monkeypatch):
    model = families.build("mixtral")
    into_waves, seen = execution.into_waves, []

    def recording(*arguments):
        for wave in into_waves(*arguments):
            seen.append(len(wave))
            yield wave

    monkeypatch.setattr(execution, "into_waves", recording)
    found = plan(model, measure=False, memory_budget=budget)
    planned, seen[:] = list(seen), []
    kappa_fast.rank(model, memory_budget=budget, progress=False)
    assert planned == seen
    assert found.waves == len(seen)
    assert found.peak <= found.budget or 1 in seen


def test_planning_leaves_threads_generators_and_the_model_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Linear(300, 40))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    plan(model, certify=True)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    assert torch.is_grad_enabled()


def kind(shape, dtype=F32, certify=False) -> Kind:
    backend = kappa_fast.backends.get_backend("torch", torch.device("cpu"))
    return calibration.kind_of(backend, shape, dtype, calibration.Goal(1e-2, certify))


@pytest.fixture
def fixed_costs(monkeypatch):
    """Every matrix takes one second for each 16 of its columns, ten times that with proofs; low half, high twice."""

    def calibrate(counts, name, device, goal, seconds):
        backend = kappa_fast.backends.get_backend(name, device)
        factor = 10 if goal.certify else 1
        samples = []
        for shape, dtype in counts:
            t = factor * min(shape) / 16
            samples.append(Sample(calibration.kind_of(backend, shape, dtype, goal), shape, (t / 2, t, 2 * t)))
        return Costs(tuple(samples), 3.0, 0.0, backend, goal)

    monkeypatch.setattr(prediction, "calibrate", calibrate)


def test_threads_share_the_small_matrices_and_proofs_and_waves_add_up(fixed_costs):
    found = plan(weights(a=(32, 16), b=(32, 16), c=(64, 32))).prediction  # 2 threads: 2 s beside 1 + 1
    assert found.seconds - found.opening == pytest.approx(2)
    assert found.low - found.opening == pytest.approx(1)
    assert found.high - found.opening == pytest.approx(4)
    assert found.hard == found.high  # nothing climbs: small ones are left to the SVD
    alone = plan(weights(a=(32, 16), b=(32, 16), c=(64, 32)), memory_budget=1).prediction
    assert alone.seconds - alone.opening == pytest.approx(1 + 1 + 2)
    proven = plan(weights(a=(32, 16), b=(32, 16), c=(64, 32)), certify=True).prediction
    assert proven.seconds - proven.opening == pytest.approx(20)
    assert proven.exact == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_a_backend_that_works_on_whole_waves_is_timed_in_waves_and_adds_them_up(fixed_costs):
    found = plan(weights(a=(32, 16), b=(32, 16), c=(64, 32)), backend="triton")
    assert found.backend == "triton"
    assert found.prediction.seconds - found.prediction.opening == pytest.approx(1 + 1 + 2)
    backend = kappa_fast.backends.get_backend("triton", torch.device("cpu"))
    times = calibration._resolve_timed(backend, torch.randn(40, 20), calibration.Goal(1e-2), 4, 1)
    assert len(times) == 4
    assert len(set(times)) == 1


def test_matrices_that_may_need_another_rung_take_as_much_longer_as_was_measured(fixed_costs):
    found = plan(weights(a=(1024, 256))).prediction
    assert found.hard - found.opening == pytest.approx(3 * 32)
    assert found.high - found.opening == pytest.approx(32)


def test_top_is_a_range_from_the_likeliest_alone_to_everything_and_the_search(fixed_costs):
    source = weights(a=(64, 16), b=(48, 48), c=(48, 48), d=(48, 48))  # the first is the likeliest
    found = plan(source, top=1).prediction
    assert found.seconds is None
    assert found.low - found.opening == pytest.approx(0.5)
    typical = 3 + 3  # two threads: 3 + 1 beside 3 + 3
    assert found.high - found.opening == pytest.approx(2 * typical + PROBES * typical)
    selected = plan(source, top=1, certify="selection").prediction
    assert selected.low - selected.opening == pytest.approx(0.5 + 5)
    assert plan(source, top=1.0).prediction.seconds is not None


def test_what_no_thread_takes_alone_is_worked_on_one_after_the_other(fixed_costs):
    with torch.device("meta"):
        found = plan({"a": torch.empty(8192, 2048), "b": torch.empty(8192, 2048)}).prediction
    assert found.seconds - found.opening == pytest.approx(2 * 128)


def test_costs_are_what_was_measured_or_between_what_was_or_within_the_bounds_of_growth():
    backend = kappa_fast.backends.get_backend("torch", torch.device("cpu"))
    small, big = (512, 256), (4096, 1024)
    samples = (Sample(kind(small), small, (1.0, 2.0, 9.0)), Sample(kind(big), big, (64.0,)))
    costs = Costs(samples, 1.5, 0.0, backend, calibration.Goal(1e-2))
    exact = costs.of(small, F32)
    assert (exact.typical, exact.low, exact.high, exact.hard) == (2, 1, 9, 13.5)
    assert costs.of(small[::-1], F32) == exact
    between = costs.of((1024, 512), F32)
    assert 2 < between.typical < 64
    assert 1 < between.low < between.typical < between.high
    growth = 8.0
    beyond = costs.of((8192, 2048), BF16)  # of another kind: the nearest there is
    assert 64 * growth ** (2 / 3) < beyond.typical < 64 * growth
    assert beyond.low <= beyond.typical <= beyond.high == 64 * growth
    below = costs.of((256, 128), F32)
    assert 0 < below.low < below.typical < 2


def test_a_calibration_measures_every_kind_with_the_shape_that_has_most_of_the_work(monkeypatch):
    monkeypatch.setattr(calibration, "clock", time.process_time)  # what else the machine does has no say
    counts = {((384, 384), F32): 4, ((320, 320), F32): 1, ((512, 256), BF16): 2, ((64, 64), F32): 3}
    costs = calibration.calibrate(counts, "torch", torch.device("cpu"), calibration.Goal(1e-2), 0.5)
    measured = {(s.kind, s.shape) for s in costs.samples}
    assert {(kind(s, d), s) for s, d in counts if s != (320, 320)} <= measured
    assert all(t > 0 for s in costs.samples for t in s.seconds)
    assert costs.climb >= 1
    assert costs.of((320, 320), F32).typical > 0


def test_what_would_take_too_long_is_measured_on_a_smaller_matrix_of_the_same_kind(monkeypatch):
    asked = []

    def resolve_timed(backend, weight, goal, at_once, rounds):
        asked.append(tuple(weight.shape))
        return [1e-12 * execution.operations(weight.shape) ** 1.2] * at_once * rounds  # a slow machine

    monkeypatch.setattr(calibration, "_resolve_timed", resolve_timed)
    counts = {((16384, 2048), F32): 3, ((1024, 512), F32): 1, ((1024, 1024), F32): 5}
    costs = calibration.calibrate(counts, "torch", torch.device("cpu"), calibration.Goal(1e-2), 0.3)
    assert all(s.kind in {kind(shape) for shape, _ in counts} for s in costs.samples)
    large = next(s for s in costs.samples if s.kind.large)
    assert execution.operations(large.shape) < 0.6 * execution.operations((16384, 2048))
    assert large.shape[0] / large.shape[1] == pytest.approx(8, rel=0.05)
    assert costs.of((16384, 2048), F32).typical > large.median


def test_weights_that_are_measured_resolve_on_the_first_rung_and_hard_ones_do_not():
    easy, hard = (
        kappa_fast.rank({"w": calibration._trained_like((2048, 640), F32, torch.device("cpu"), hard)})[0]
        for hard in (False, True)
    )
    assert easy.method == "cholesky32"
    assert hard.method == "cholesky64"
    assert calibration._trained_like((64, 32), BF16, torch.device("cpu"), False).dtype == BF16


def test_everything_skipped_is_a_plan_of_nothing():
    found = plan(weights(a=(8, 4)))
    assert (found.count, found.waves, found.peak, found.prediction, found.operations) == (0, 0, 0, None, 0)
    assert found.skipped[0].reason.startswith("too small")
    assert "0 matrices to be ranked, 1 parameters skipped" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, r"top=0: give a count"),
        ({"rtol": 2}, r"rtol=2: give a relative half-width"),
        ({"certify": "selection"}, r"give top= as well"),
        ({"device": "meta"}, r"has no float64 arithmetic"),
        ({"memory_budget": "lots"}, r"memory_budget='lots' is no size"),
        ({"include": "("}, r"is not a regular expression"),
        ({"measure": "no"}, r"measure='no': give True or False"),
        ({"device_model": 3}, r"device_model=3 has no published figures here"),
        ({"device_model": "tpu"}, r"device_model='tpu' has no published figures here: choose one of h200, h100"),
    ],
)
def test_options_that_rank_refuses_are_refused(options, message):
    with pytest.raises(kappa_fast.OptionError, match=message):
        plan(weights(a=(64, 32)), **{"measure": False, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_every_dtype_that_is_ranked_can_be_timed(dtype):
    found = plan({"a": torch.ones(300, 200, dtype=dtype), "b": torch.ones(200, 200, dtype=dtype)}).prediction
    assert 0 < found.low <= found.seconds <= found.high


def test_shapes_without_room_for_outliers_can_be_timed():
    found = plan(weights(a=(700, 1), b=(1, 1), c=(3, 9000)), min_dim=1).prediction
    assert 0 < found.low <= found.seconds <= found.high


def test_a_default_device_or_dtype_of_the_caller_does_not_matter():
    source = weights(a=(300, 200))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = plan(source).prediction
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.seconds > 0


@pytest.mark.filterwarnings("ignore:.*is shard 1 of 2")
@pytest.mark.parametrize("what", [".", "model.safetensors.index.json", "parts/model-00001-of-00002.safetensors"])
def test_the_files_of_every_kind_of_path_are_found_for_reading(what, tmp_path, monkeypatch):
    index = {f"l{i}": f"parts/model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "parts").mkdir()
    for name, shard in index.items():
        save_file(weights(**{name: (64, 32)}), tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    monkeypatch.chdir(tmp_path)
    for path in (what, tmp_path / what):
        found = plan(path)
        sizes = [(tmp_path / shard).stat().st_size for shard in index.values()][: found.count]
        assert found.reading.sampled == sum(sizes)


def test_a_real_model_is_planned_with_a_time_and_kept_as_json(tmp_path):
    found = plan(find_weights(), device_model="H200")
    assert found.count == 37
    assert found.prediction.low <= found.prediction.seconds <= found.prediction.high <= found.prediction.hard
    assert found.prediction.exact == 1
    assert found.reading.seconds > 0
    low, high = found.seconds
    assert found.prediction.low <= low <= found.prediction.seconds <= high
    found.to_json(tmp_path / "plan.json")
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["format"] == "kappa_fast plan"
    assert (read["count"], read["operations"], read["floor"]["measured"]) == (37, found.operations, False)
    assert read["settings"]["embeddings"] is False
    assert len(read["skipped"]) == len(found.skipped)
    text = str(found)
    assert "h200" in text
    assert "a floor model, NOT a measurement" in text
    assert "encoder.layer.*.intermediate.dense.weight" in text


def test_the_examples_in_the_document_run_as_written(root, run_python, tmp_path):
    example, compared = re.findall(
        r"^```python\n(.+?)^```", (root / "docs" / "planning.md").read_text(), re.DOTALL | re.M
    )
    said = run_python(example, cwd=tmp_path, env={"PYTHONPATH": str(root)})
    assert "linear1.weight" in said
    count, operations, seconds = map(float, said.splitlines()[-1].split())
    assert count == 6  # q, k, v, the output of attention, two of the feed-forward network
    assert operations == pytest.approx(4 * 4 / 3 * 1024**3 + 2 * (4 + 1 / 3) * 1024**3)
    assert seconds > 0
    assert run_python(compared, cwd=tmp_path, env={"PYTHONPATH": str(root)})


def test_settings_are_those_that_a_ranking_records():
    """Two copies of the list of options had come apart."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 20))
    options = {"include": "0", "exclude": ["3", "4"], "top": 0.5, "rtol": 1e-3, "min_dim": 4}
    ranked = kappa_fast.rank(model, progress=False, **options)
    planned = plan(model, measure=False, **options)
    assert dict(planned.document()["settings"]) == ranked.document()["metadata"]["settings"]


@pytest.mark.parametrize(
    ("options", "ends", "methods"),
    [
        ({}, True, {"gram64", "cholesky64"}),
        ({"score": "-flatness"}, False, {"gram64", "cholesky64"}),
        ({"score": "stable_rank"}, True, {"gram64", "cholesky64"}),
        ({"score": "snr"}, False, {"cholesky32", "cholesky64"}),
        ({"statistics": "spectrum"}, True, {"cholesky32", "cholesky64"}),
        ({"score": "flatness", "certify": True}, True, {"gram64"}),
    ],
)
def test_what_is_measured_is_what_the_score_takes(options, ends, methods, monkeypatch):
    asked = []

    def resolve_timed(backend, weight, goal, at_once, rounds):
        asked.append((tuple(weight.shape), goal))
        return [1e-4] * at_once * rounds

    monkeypatch.setattr(calibration, "_resolve_timed", resolve_timed)
    weights = {"a": torch.zeros(400, 200), "b": torch.zeros(720, 700), "c": torch.zeros(720, 700)}
    found = kappa_fast.plan(weights, **options)
    assert found.settings["score"] == options.get("score", "kappa")
    goals = [goal for shape, goal in asked if shape in ((400, 200), (720, 700))]
    assert goals
    assert {goal.ends for goal in goals} == {ends}
    assert {goal.statistics for goal in goals} == {Options(**options).goal.statistics}
    backend = kappa_fast.backends.get_backend("torch", torch.device("cpu"))
    assert {calibration.kind_of(backend, s, F32, goals[0]).method for s in ((400, 200), (720, 700))} == methods


def test_flatness_alone_is_predicted_to_take_less_than_kappa(monkeypatch):
    monkeypatch.setattr(calibration, "clock", time.process_time)
    weights = {f"layers.{i}": torch.zeros(1100, 900) for i in range(3)}
    kappa, flatness = (kappa_fast.plan(weights, score=score).prediction for score in ("kappa", "-flatness"))
    assert flatness.seconds - flatness.opening < 0.9 * (kappa.seconds - kappa.opening)
