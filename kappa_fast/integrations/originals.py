"""The condition numbers of the candidates of PEFT's selector and of the reference implementation, in exact order.

Both compute S[0] / S[-1] of stored tensors. Here rank() gives the numbers, and a float64 SVD those whose intervals
overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..pipeline import rank
from ..results.entries import TensorKappa

RTOL = 1e-4  # tight enough that few neighbours overlap; a float64 SVD of one costs more than tightening all


@dataclass
class _Number:
    """A number and the interval that holds the exact one."""

    low: float
    value: float
    high: float


def condition_numbers(
    tensors: Mapping[str, torch.Tensor],
    *,
    max_dim: int | None,
    epsilon: float,
    mean: Callable[[Sequence[float]], float],
    progress: bool | None,
) -> dict[str, float]:
    """sigma_max / (sigma_min + epsilon) for 2-D tensors, and its ``mean`` over the matrices of stacks (ndim 3).

    Tensors of more dimensions are flattened to (rows, all other dimensions). Values whose order is not certain at RTOL
    are exact to float64, so sorting the result gives the order of the exact values. The result has the order of
    ``tensors``, without those that have a side above ``max_dim``; a nan or inf in a tensor makes its number nan.
    """
    # Numbers as names, so that rank() does not filter embeddings, routers and adapters by their names.
    matrices = {
        f"tensor{i}": t.detach() if t.ndim <= 3 else t.detach().flatten(1) for i, t in enumerate(tensors.values())
    }
    ranking = rank(
        matrices,
        rtol=RTOL,
        min_dim=1,
        max_dim=max_dim,
        embeddings=True,
        routers=True,
        fused="stored",
        progress=progress,
    )
    members: dict[str, list[TensorKappa]] = {}
    for entry in ranking:
        for name in (entry.name, *entry.aliases):
            members.setdefault(name, []).append(entry)
    found = {key: _mean([_number(e, epsilon) for e in members[key]], mean) for key in matrices if key in members}
    for key in _uncertain(found):
        exact = mean([_exact(matrices[key], e, epsilon) for e in members[key]])
        found[key] = _Number(exact, exact, exact)
    return {name: found[key].value for name, key in zip(tensors, matrices, strict=True) if key in found}


def _number(entry: TensorKappa, epsilon: float) -> _Number:
    if entry.status == "non_finite":
        return _Number(-math.inf, math.nan, math.inf)
    if entry.sigma_max == 0:
        return _Number(0.0, 0.0 if epsilon else math.inf, math.inf)

    def value(kappa: float, sigma_max: float) -> float:
        inverse = (0.0 if math.isinf(kappa) else 1 / kappa) + epsilon / sigma_max
        return 1 / inverse if inverse else math.inf

    # sigma_max is a lower bound within RTOL.
    lower, upper = max(entry.lower, 1.0), entry.upper
    return _Number(
        value(lower, entry.sigma_max), value(entry.kappa, entry.sigma_max), value(upper, entry.sigma_max * (1 + RTOL))
    )


def _mean(numbers: Sequence[_Number], mean: Callable[[Sequence[float]], float]) -> _Number:
    if any(math.isnan(n.value) for n in numbers):
        return _Number(-math.inf, math.nan, math.inf)
    if len(numbers) == 1:
        return numbers[0]
    low, value, high = (mean([getattr(n, end) for n in numbers]) for end in ("low", "value", "high"))
    return _Number(low, value, high)


def _uncertain(found: Mapping[str, _Number]) -> list[str]:
    """The names whose interval overlaps another one."""
    order = sorted((key for key, n in found.items() if not math.isnan(n.value)), key=lambda key: found[key].low)
    uncertain: dict[str, None] = {}
    reach, holder = -math.inf, ""
    for key in order:
        if found[key].low <= reach:
            uncertain |= {holder: None, key: None}
        if found[key].high > reach:
            reach, holder = found[key].high, key
    return list(uncertain)


def _exact(tensor: torch.Tensor, entry: TensorKappa, epsilon: float) -> float:
    values = torch.linalg.svdvals(tensor[entry.index].to(torch.float64))
    denominator = float(values[-1]) + epsilon
    return float(values[0]) / denominator if denominator else math.inf
