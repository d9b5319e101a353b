"""Statistics of all singular values, held to the formulas of those who use them, written out one value at a time."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from packing import minilm
from spectra import gaussian, trained_like

import kappa_fast
from kappa_fast import OptionError, Ranking
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.results.scores import NamedScore
from kappa_fast.results.statistics import OF_SPECTRUM, REQUESTED
from kappa_fast.spectrum.measures import median_of_noise, power_law, singular_values

BOTH = tuple(REQUESTED)
BACKEND = TorchBackend(torch.device("cpu"))


def snr_by_spectrum(weight: torch.Tensor) -> float:
    """The lines of Spectrum's program (QuixiAI/spectrum), on a float64 SVD."""
    singular = torch.linalg.svdvals(weight.double())
    q75, q25 = torch.quantile(singular, 0.75), torch.quantile(singular, 0.25)
    sigma = (q75 - q25) / 1.349
    n, m = weight.shape
    beta = n / m if n < m else m / n
    threshold = sigma * math.sqrt((1 + math.sqrt(beta)) ** 2)
    signal, noise = singular[singular > threshold].sum(), singular[singular <= threshold].sum()
    return float(signal / noise / singular.max())


def alpha_by_weightwatcher(weight: torch.Tensor) -> float:
    """The loop of WeightWatcher's own fit (WWFit.fit_power_law) over eigenvalues of a float64 SVD."""
    data = np.sort(torch.linalg.svdvals(weight.double()).square().numpy())
    alphas, distances = [], []
    for i, xmin in enumerate(data[:-1]):
        n = float(len(data) - i)
        alpha = 1 + n / (np.sum(np.log(data[i:])) - n * math.log(xmin))
        alphas.append(alpha)
        distances.append(np.max(np.abs(1 - (data[i:] / xmin) ** (1 - alpha) - np.arange(n) / n)))
    return float(alphas[int(np.argmin(distances))])


def entropy(weight: torch.Tensor) -> float:
    squares = torch.linalg.svdvals(weight.double()).square().tolist()
    shares = [x / math.fsum(squares) for x in squares]
    return -math.fsum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def trained() -> dict[str, torch.Tensor]:
    every = {k: w for k, w in minilm().items() if ".layer." in k and w.ndim == 2}
    return dict(list(every.items())[:12])


def test_on_a_trained_model_they_are_those_of_spectrum_and_weightwatcher():
    weights = trained()
    for entry in kappa_fast.rank(weights, statistics=BOTH, progress=False):
        weight = weights[entry.name]
        assert entry.status == "ok"
        assert entry.snr == pytest.approx(snr_by_spectrum(weight), rel=1e-6)
        assert entry.alpha == pytest.approx(alpha_by_weightwatcher(weight), rel=1e-6)
        assert entry.spectral_entropy == pytest.approx(entropy(weight), rel=1e-8)


@pytest.mark.parametrize("shape", [(40, 24), (24, 120), (400, 200), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_any_shape_and_dtype(shape, dtype):
    weight = trained_like(*shape, 3).to(dtype)
    (entry,) = kappa_fast.rank({"w": weight}, statistics="spectrum", progress=False)
    assert entry.snr == pytest.approx(snr_by_spectrum(weight), rel=1e-6)
    assert entry.alpha == pytest.approx(alpha_by_weightwatcher(weight), rel=1e-6)
    assert entry.spectral_entropy == pytest.approx(entropy(weight), rel=1e-8)


@pytest.mark.parametrize("ratio", [1.0, 0.99, 0.5, 0.05, 1e-3])
def test_the_median_of_noise_is_that_of_marchenko_and_pastur(ratio):
    with mp.workdps(30):
        assert median_of_noise(ratio) == pytest.approx(float(exact_median_of_noise(ratio)), rel=1e-14)


def with_a_value_at_an_edge(shape: tuple[int, int], sign: int, relative: float) -> tuple[torch.Tensor, int]:
    """A matrix (m, n), m > n, with an edge of noise times 1 + relative among its singular values, and how many lie
    beyond this edge: a diagonal matrix with permuted columns, so that all of them are known."""
    m, n = shape
    values = sorted(torch.linalg.svdvals(gaussian(m, n, 11)).tolist())[1:]  # of an odd number the median is one of them
    values = values if len(values) % 2 else values[1:]
    with mp.workdps(30):
        scale = mp.mpf(values[len(values) // 2]) / mp.sqrt(m * mp.mpf(exact_median_of_noise(len(values) / m)))
        edge = scale * (mp.sqrt(m) + sign * mp.sqrt(len(values)))
        place = 0 if sign < 0 else -1
        values[place] = float(edge * (1 + mp.mpf(relative)))
        beyond = sum(sign * x > sign * edge for x in values)
    weight = torch.zeros(m, len(values), dtype=torch.float64)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    weight[torch.arange(len(values)), order] = torch.tensor(values, dtype=torch.float64)
    return weight, beyond


def exact_median_of_noise(ratio: float) -> mp.mpf:
    ratio = mp.mpf(ratio)
    low, high = (1 - mp.sqrt(ratio)) ** 2, (1 + mp.sqrt(ratio)) ** 2

    def density(angle: mp.mpf) -> mp.mpf:
        """Over the angle for which x is low + (high - low) sin(angle)^2."""
        x = low + (high - low) * mp.sin(angle) ** 2
        return (high - low) ** 2 * (mp.sin(angle) * mp.cos(angle)) ** 2 / (mp.pi * ratio * x)

    start = mp.mpf(10) ** -25  # where the density of a square shape is not 0 / 0
    mass = lambda angle: mp.quad(density, [start, angle / 30, angle / 5, angle])  # noqa: E731
    median = mp.findroot(lambda angle: mass(angle) - 0.5, (0.3, 1.2), solver="anderson")
    return low + (high - low) * mp.sin(median) ** 2


@pytest.mark.parametrize("shape", [(300, 200), (240, 120)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_count_is_exact_but_where_a_value_lies_at_an_edge_to_rounding(shape, sign):
    name = "outliers_above" if sign > 0 else "outliers_below"
    for relative in (1e-7, -1e-7):
        weight, beyond = with_a_value_at_an_edge(shape, sign, relative)
        (entry,) = kappa_fast.rank({"w": weight}, statistics="outliers", progress=False)
        assert (getattr(entry, name), entry.outliers_undecided) == (beyond, 0)
        (scored,) = kappa_fast.rank({"w": weight}, score=name, progress=False)
        assert NamedScore(name).interval(scored) == (beyond, beyond)
    weight, beyond = with_a_value_at_an_edge(shape, sign, 0.0)
    (entry,) = kappa_fast.rank({"w": weight}, statistics="outliers", progress=False)
    assert entry.outliers_undecided == 1
    assert abs(getattr(entry, name) - beyond) <= 1
    low, high = NamedScore(name).interval(entry)
    assert low <= beyond <= high


def test_bounds_of_all_singular_values_hold():
    for shape in ((400, 170), (170, 170), (300, 40)):
        weight = trained_like(*shape, 4)
        found = singular_values(BACKEND, BACKEND.prepare([weight])[0])
        exact = torch.linalg.svdvals(weight).flip(0).numpy()
        slack = 1e-13 * exact.max()  # of the SVD
        assert (found.low <= exact + slack).all()
        assert (exact - slack <= found.high).all()
        assert (found.high - found.low)[len(exact) // 2 :].max() < 1e-7 * exact.max()


@pytest.mark.parametrize("shape", [(300, 200), (200, 800), (256, 256)])
def test_planted_outliers_are_counted_and_noise_has_hardly_any(shape):
    noise = gaussian(*shape, 5)
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    left, right = torch.linalg.qr(gaussian(shape[0], 7, 6)).Q, torch.linalg.qr(gaussian(shape[1], 7, 7)).Q
    planted = noise + 3 * edge * left @ right.T
    found = {
        e.name: e for e in kappa_fast.rank({"noise": noise, "planted": planted}, statistics="outliers", progress=False)
    }
    assert found["noise"].outliers_above + found["noise"].outliers_below <= 2
    assert found["planted"].outliers_above in (7, 8)
    assert found["planted"].outliers_below <= 1
    if shape[0] != shape[1]:
        flat = noise.clone() if shape[0] > shape[1] else noise.T.clone()
        flat[:, :4] = flat[:, 4:8] * (1 + 1e-3 * gaussian(len(flat), 4, 8))  # four directions of nearly nothing
        (entry,) = kappa_fast.rank({"w": flat}, statistics="outliers", progress=False)
        assert 4 <= entry.outliers_below <= 5


def test_a_singular_matrix_has_them_too_and_equal_values_have_no_power_law():
    weight = gaussian(300, 170, 1)
    weight[:, 3] = 0
    (entry,) = kappa_fast.rank({"w": weight}, statistics=BOTH, progress=False)
    assert entry.status == "rank_deficient"
    assert entry.spectral_entropy == pytest.approx(entropy(weight), rel=1e-8)
    assert entry.outliers_below >= 1
    assert power_law(np.ones(8)) is None


def test_they_are_none_unless_asked_for_and_sort_where_they_are_the_score(tmp_path):
    weights = {f"layers.{i}.w": trained_like(200, 170 + 10 * i, i).float() for i in range(3)}
    plain = kappa_fast.rank(weights, cache=tmp_path, progress=False)
    assert all(getattr(entry, name) is None for entry in plain for name in OF_SPECTRUM)
    by_snr = kappa_fast.rank(weights, score="-snr", cache=tmp_path, progress=False)
    exact = {name: snr_by_spectrum(weight) for name, weight in weights.items()}
    assert [entry.name for entry in by_snr] == sorted(exact, key=exact.__getitem__, reverse=True)
    asked = kappa_fast.rank(weights, statistics=BOTH, cache=tmp_path, progress=False)
    again = kappa_fast.rank(weights, statistics=BOTH, cache=tmp_path, progress=False)
    assert again.metadata["cache"]["computed"] == 0
    assert again.entries == asked.entries
    asked.to_json(tmp_path / "r.json")
    read = Ranking.from_json(tmp_path / "r.json")
    assert read == asked
    assert {type(entry.outliers_above) for entry in (*again, *read)} == {int}
    with pytest.raises(OptionError, match=r"'snr' of .* is not known"):
        plain.by("snr")


def test_what_cannot_be_measured_is_refused():
    weights = {"w": gaussian(40, 30)}
    with pytest.raises(OptionError, match=r"statistics='outlier': give one or several of 'outliers', 'spectrum'"):
        kappa_fast.rank(weights, statistics="outlier", progress=False)
    with pytest.raises(OptionError, match=r"statistics=3: give one or several of 'outliers', 'spectrum'"):
        kappa_fast.rank(weights, statistics=3, progress=False)
    with pytest.raises(OptionError, match="statistics= takes every matrix, and top= leaves some"):
        kappa_fast.rank(weights, statistics="outliers", top=1, progress=False)
