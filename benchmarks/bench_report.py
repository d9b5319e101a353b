"""A report of 44,544 experts (the shape of DeepSeek-V3): how long to write, to open in a browser, and to work with."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, View, chromium, find_chromium

from kappa_fast.results.entries import Skipped, TensorKappa
from kappa_fast.results.ranking import Ranking

LAYERS, EXPERTS = range(3, 61), range(256)
PROJECTIONS = {"gate_proj": 8.0, "up_proj": 7.0, "down_proj": 9.0}
ROUNDS = 5

# Milliseconds from doing something to the page until the frame after the next is drawn.
UNTIL_DRAWN = """(act) => new Promise((done) => {
  const started = performance.now();
  eval(act);
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - started)));
})"""
ACTIONS = {
    "sort by kappa, descending": """document.querySelector('th[data-name="kappa"] button').click()""",
    "sort by name": """document.querySelector('th[data-name="key"] button').click()""",
    "search": """const s = document.getElementById("search"); s.value = "layers.7. experts.13.";
                 s.dispatchEvent(new Event("input"))""",
    "end of the search": """const e = document.getElementById("search"); e.value = "";
                 e.dispatchEvent(new Event("input"))""",
    "move the cut": """const c = document.getElementById("cut-slider"); c.value = 300;
                       c.dispatchEvent(new Event("input"))""",
    "another statistic": """const c = document.getElementById("shown"); c.value = "flatness";
                            c.dispatchEvent(new Event("change"))""",
    "unfold a layer": "document.querySelector('.cell[aria-expanded]').click()",
}


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    """Names and shapes of DeepSeek-V3's experts, kappas drawn at random."""
    rng = random.Random(0)
    entries = []
    for layer in LAYERS:
        for expert in EXPERTS:
            for projection, typical in PROJECTIONS.items():
                kappa = typical * math.exp(rng.gauss(layer / 60, 0.4))
                entries.append(_entry(layer, expert, projection, kappa, rng))
    skipped = [Skipped(f"model.layers.{layer}.mlp.gate.weight", (256, 7168), "router") for layer in LAYERS]
    return Ranking(entries, skipped, {"source": {"path": "DeepSeek-V3"}, "num_parameters": 671_026_419_200})


def _entry(layer: int, expert: int, projection: str, kappa: float, rng: random.Random) -> TensorKappa:
    shape = (7168, 2048) if projection == "down_proj" else (2048, 7168)
    sigma_min = 0.3 + rng.random()
    return TensorKappa(
        name=f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight",
        aliases=(),
        part="",
        index=(),
        layer=layer,
        group=f"model.layers.*.mlp.experts.*.{projection}.weight",
        shape=shape,
        dtype="bfloat16",
        numel=shape[0] * shape[1],
        kappa=kappa,
        lower=kappa * (1 - 0.004 * rng.random()),
        upper=kappa * (1 + 0.008 * rng.random()),
        sigma_max=kappa * sigma_min,
        sigma_min=sigma_min,
        score=kappa,
        certified=False,
        method="cholesky32",
        sensitivity=0.01 * rng.random(),
        status="ok",
        frobenius=sigma_min * (norm := 45 * (1 + rng.random())),
        stable_rank=1 + 1000 * rng.random(),
        demmel=norm,
        participation_ratio=1 + 2000 * rng.random(),
        flatness=(flatness := -rng.random()),
        flatness_lower=flatness - 1e-5,
        flatness_upper=flatness,
        flatness_by_shape=-100 * rng.random(),
    )


@pytest.fixture(scope="module")
def page(ranking: Ranking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "page.html"
    ranking.to_html(file)
    return file


def test_write(benchmark: Any, ranking: Ranking, tmp_path: Path) -> None:
    benchmark.group = "report of 44,544 matrices"
    benchmark.pedantic(ranking.to_html, args=(tmp_path / "page.html",), rounds=3)
    size = (tmp_path / "page.html").stat().st_size
    benchmark.extra_info["bytes"] = size
    print(f"\n{len(ranking):,} matrices, {size / 1e6:.1f} MB")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_chromium() is None:
        pytest.skip(MISSING)
    with chromium() as found:
        yield found


def test_open(benchmark: Any, page: Path, browser: Any) -> None:
    """From the start of the navigation until everything is drawn, as the page itself measures it."""
    times = []

    def opened() -> None:
        view = View(browser, page)
        view.page.wait_for_function("performance.getEntriesByName('kappa-fast-ready').length")
        times.append(view.page.evaluate("performance.getEntriesByName('kappa-fast-ready')[0].startTime"))
        view.close()

    benchmark.group = "report of 44,544 matrices"
    benchmark.pedantic(opened, rounds=ROUNDS)
    benchmark.extra_info["milliseconds"] = sorted(times)
    print(f"\nopen: {sorted(times)[ROUNDS // 2]:.0f} ms, at most {max(times):.0f}")


def test_use(benchmark: Any, page: Path, browser: Any) -> None:
    """Each action on a page of its own, until the frame after the next is drawn."""
    times: dict[str, list[float]] = {action: [] for action in ACTIONS}

    def used() -> None:
        # The page's own policy forbids eval(), which this needs: bypassed for the measurement only.
        context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        view = View(context, page)
        for action, code in ACTIONS.items():
            times[action].append(view.page.evaluate(UNTIL_DRAWN, code))
        context.close()

    benchmark.group = "report of 44,544 matrices"
    benchmark.pedantic(used, rounds=ROUNDS)
    benchmark.extra_info["milliseconds"] = {action: sorted(found) for action, found in times.items()}
    print()
    for action, found in times.items():
        print(f"{action}: {sorted(found)[ROUNDS // 2]:.0f} ms, at most {max(found):.0f}")
