"""kappa_fast.rank against PEFT's selector, LAPACK's SVD, the eigenvalues of the Gram matrix, and the bare minimum.

Every contender sees the same weights with the same number of threads in the same run. What kappa_fast answers is
checked against the float64 SVD before its time counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import workloads

import kappa_fast

pytest.importorskip("peft", reason="the peer to compare with: pip install 'kappa_fast[bench]'")

ROUNDS = 3
MODELS = {
    "MiniLM": workloads.minilm,
    "TinyLlama-1.1B, 2 layers, trained-like": lambda: workloads.tinyllama("trained"),
    "TinyLlama-1.1B, 2 layers, random": lambda: workloads.tinyllama("random"),
}
SHAPES = ((2048, 2048), (2048, 5632), (256, 2048))
SINGLES = {
    f"{m} x {n}, {label}": (lambda m=m, n=n, kind=kind: workloads.single(m, n, kind))
    for m, n in SHAPES
    for kind, label in (("trained", "trained-like"), ("random", "random"))
}


@cache
def source(name: str) -> Any:
    return {**MODELS, **SINGLES}[name]()


@cache
def matrices(name: str) -> Mapping[str, torch.Tensor]:
    """What rank() ranks by default: the same for every contender."""
    found = source(name)
    tensors = dict(found.named_parameters()) if isinstance(found, torch.nn.Module) else found
    return {entry.name: tensors[entry.name].detach() for entry in kappa_fast.rank(found)}


@cache
def truth(name: str) -> dict[str, float]:
    sigmas = {key: torch.linalg.svdvals(w.double()) for key, w in matrices(name).items()}
    return {key: float(s[0] / s[-1]) for key, s in sigmas.items()}


def measure(benchmark: Any, name: str, run: Callable[[], Any]) -> Any:
    benchmark.group = name
    return benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("name", [*MODELS, *SINGLES])
def test_kappa_fast(benchmark: Any, name: str) -> None:
    ranking = measure(benchmark, name, lambda: kappa_fast.rank(source(name), progress=False))
    exact = truth(name)
    assert {e.name for e in ranking} == set(exact)
    assert all(e.lower <= exact[e.name] * (1 + 1e-9) and exact[e.name] * (1 - 1e-9) <= e.upper for e in ranking)
    benchmark.extra_info["kappa"] = [ranking[0].kappa, ranking[-1].kappa]
    benchmark.extra_info["methods"] = sorted({e.method for e in ranking})


@pytest.mark.parametrize("name", list(MODELS))
def test_kappa_fast_certified(benchmark: Any, name: str) -> None:
    ranking = measure(benchmark, name, lambda: kappa_fast.rank(source(name), certify=True, progress=False))
    exact = truth(name)
    assert all(e.lower <= exact[e.name] * (1 + 1e-9) and exact[e.name] * (1 - 1e-9) <= e.upper for e in ranking)
    benchmark.extra_info["certified"] = sum(e.certified for e in ranking) / len(ranking)


@pytest.mark.parametrize("top", [0.2, 0.5], ids=["between_types", "inside_a_type"])
@pytest.mark.parametrize("name", [n for n in MODELS if "trained" in n])
def test_kappa_fast_top(benchmark: Any, name: str, top: float) -> None:
    """The cut at 0.2 falls among k_proj and v_proj, far below every other type; at 0.5 among the tall matrices."""
    benchmark.name = f"test_kappa_fast_top_{top}[{name}]"
    ranking = measure(benchmark, name, lambda: kappa_fast.rank(source(name), top=top, progress=False))
    exact = truth(name)
    count = max(1, int(len(exact) * top))
    assert {e.name for e in ranking[:count]} == set(sorted(exact, key=exact.__getitem__)[:count])
    benchmark.extra_info["bounded"] = sum(e.status == "bounded" for e in ranking)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "MiniLM"])
def test_peft_selector(benchmark: Any, name: str) -> None:
    from peft import helpers

    model = source(name)

    def run() -> None:
        helpers.KappaTuneSelector(model, show_progress=False)._compute_kappas()

    measure(benchmark, name, run)


def svdvals(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.linalg.svdvals(w.to(dtype)) for w in matrices(name).values()]


@pytest.mark.parametrize("name", [*MODELS, *SINGLES])
def test_svdvals_float32(benchmark: Any, name: str) -> None:
    measure(benchmark, name, lambda: svdvals(name, torch.float32))


@pytest.mark.parametrize("name", [*MODELS, *SINGLES])
def test_svdvals_float64(benchmark: Any, name: str) -> None:
    measure(benchmark, name, lambda: svdvals(name, torch.float64))


def tall(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight if weight.shape[0] >= weight.shape[1] else weight.T).to(dtype)


@pytest.mark.parametrize("name", [*MODELS, *SINGLES])
def test_eigvalsh_of_gram_float64(benchmark: Any, name: str) -> None:
    def run() -> None:
        for weight in matrices(name).values():
            a = tall(weight, torch.float64)
            torch.linalg.eigvalsh(a.T @ a)

    measure(benchmark, name, run)


@pytest.mark.parametrize("name", [*MODELS, *SINGLES])
def test_gram_and_cholesky_alone(benchmark: Any, name: str) -> None:
    """The least that any method of this kind costs: torch's product and factorization, in a dtype that serves.

    float32 where kappa is below 300, the most that a float32 Gram matrix resolves to 1%, else float64.
    """
    exact = truth(name)

    def run() -> None:
        for key, weight in matrices(name).items():
            a = tall(weight, torch.float32 if exact[key] < 300 else torch.float64)
            torch.linalg.cholesky_ex(a.T @ a)

    measure(benchmark, name, run)
