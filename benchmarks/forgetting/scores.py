"""What else is known of a matrix besides kappa: the scores that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import kappa_fast
from kappa_fast import Ranking, TensorKappa

from .bases import hash_of

Score = Callable[[TensorKappa, torch.Tensor], float]


def scored(ranking: Ranking, model: nn.Module, name: str) -> Ranking:
    """The same matrices in the order of another score ("kappa" is their own)."""
    if name == "kappa":
        return ranking
    parameters = dict(model.named_parameters())
    score = SCORES[name]
    entries = []
    for entry in ranking:
        weight = parameters[entry.name].detach()[entry.index].double()
        entries.append(replace(entry, score=score(entry, weight)))
    return Ranking(entries, ranking.skipped, dict(ranking.metadata) | {"settings": {"score": name}})


def stable_rank(entry: TensorKappa, weight: torch.Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm."""
    sigma = torch.linalg.svdvals(weight)
    return float(sigma.square().sum() / sigma[0].square())


def signal_to_noise(entry: TensorKappa, weight: torch.Tensor) -> float:
    """Spectrum's: singular values above the edge of Marchenko and Pastur over those below, over the largest.

    The scale of the noise is the interquartile range over 1.349, as in Spectrum's own program.
    """
    sigma = torch.linalg.svdvals(weight)
    low, high = torch.quantile(sigma, torch.tensor([0.25, 0.75], dtype=sigma.dtype)).tolist()
    beta = min(weight.shape) / max(weight.shape)
    edge = (high - low) / 1.349 * (1 + math.sqrt(beta))
    above, below = sigma[sigma > edge].sum(), sigma[sigma <= edge].sum()
    ratio = float(above / below) if below > 0 else math.inf
    return min(ratio / float(sigma[0]), 1e300)


def flatness(entry: TensorKappa, weight: torch.Tensor) -> float:
    """Log of the geometric over the arithmetic mean of squared singular values, less what a Gaussian of the shape has.

    For a Gaussian of m x n, m >= n, the expected log-determinant of the Gram matrix is the sum over i < n of
    psi((m - i) / 2) + log 2 (Goodman 1963), and the arithmetic mean is m.
    """
    squares = torch.linalg.svdvals(weight).square().clamp_min(1e-300)
    rows, columns = max(weight.shape), min(weight.shape)
    halves = (rows - torch.arange(columns, dtype=torch.float64)) / 2
    expected = float(torch.digamma(halves).mean()) + math.log(2) - math.log(rows)
    return float(squares.log().mean() - squares.mean().log()) - expected


def depth(entry: TensorKappa, weight: torch.Tensor) -> float:
    """The number of the layer; what is in none comes last."""
    return math.inf if entry.layer is None else float(entry.layer)


def planted(entry: TensorKappa, weight: torch.Tensor) -> float:
    """For constructed bases, where the norm says what an expert carries."""
    return float(weight.norm())


def shuffled(entry: TensorKappa, weight: torch.Tensor) -> float:
    """A number that has nothing to do with the matrix but that it is always the same."""
    return float(hash_of("shuffled", entry.key, float(weight.sum())))


SCORES: dict[str, Score] = {
    "stable_rank": stable_rank,
    "snr": signal_to_noise,
    "flatness": flatness,
    "depth": depth,
    "planted": planted,
    "shuffled": shuffled,
}


def rank(model: nn.Module) -> Ranking:
    """By kappa, without a bar."""
    return kappa_fast.rank(model, progress=False)
