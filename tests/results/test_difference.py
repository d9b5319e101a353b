"""difference(): two models paired by name, what changed in each matrix, and everything else by name with a reason."""

from __future__ import annotations

import copy
import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import batch, build
from models import one_thread
from safetensors.torch import save_file
from typer.testing import CliRunner
from wrapping import selection_of

import kappa_fast
import kappa_fast.updates
from kappa_fast import OptionError
from kappa_fast.cli import app

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore::UserWarning:torch"
)


def pairs(**changed: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three weights before, and after with others in place of some; "__" stands for a dot."""
    drawn = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (48, 32), "b.weight": (32, 32), "c.weight": (24, 64), "norm.weight": (32,)}
    before = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    return before, {**before, **{name.replace("__", "."): value for name, value in changed.items()}}


def another(*shape: int) -> torch.Tensor:
    """A matrix that has nothing to do with those of ``pairs``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _alone():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def tuned():
    """A tiny model, a copy of which was trained where a selection says, and the selection."""
    model = build("llama")
    before = copy.deepcopy(model)
    selection = selection_of(model)
    with selection.apply(model) as handle:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in range(5):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle.targets
    return before, model, selection


def test_a_fine_tuned_model_changed_where_it_was_trained_and_nowhere_else(tuned):
    before, after, selection = tuned
    found = kappa_fast.difference(before, after, k=4)
    assert {u.key for u in found.changed} == {entry.key for entry in selection}
    assert 0 < len(found.changed) < len(found)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for u in found.changed:
        w, v = (side[u.key].detach().double().numpy() for side in (old, new))
        left, _, right = np.linalg.svd(w)
        p, q = left[:, :4] @ left[:, :4].T, right[:4].T @ right[:4]
        d = v - w
        total = np.sum(d * d)
        cosines = np.abs(left[:, : min(w.shape)].T @ np.linalg.svd(v)[0][:, :4]).max(axis=0)
        assert u.norm == pytest.approx(math.sqrt(total), rel=1e-12)
        assert u.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-12)
        assert u.stable_rank == pytest.approx(total / np.linalg.svd(d)[1][0] ** 2, rel=1e-10)
        assert u.share_left == pytest.approx(np.sum((p @ d) ** 2) / total, rel=1e-9)
        assert u.share_right == pytest.approx(np.sum((d @ q) ** 2) / total, rel=1e-9)
        assert u.share == pytest.approx(np.sum((p @ d @ q) ** 2) / total, rel=1e-9)
        assert u.similarities == pytest.approx(cosines, rel=1e-9)
        assert u.intruders == sum(cosines < 0.5)


def test_files_modules_and_wrapped_modules_give_the_same(tuned, tmp_path):
    before, after, _ = tuned
    for name, model in (("before", before), ("after", after)):
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
    expected = kappa_fast.difference(before, after)
    files = kappa_fast.difference(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    mixed = kappa_fast.difference(before, tmp_path / "after.safetensors")
    wrapped = kappa_fast.difference(torch.nn.DataParallel(before), after)
    assert {u.key: u for u in files} == {u.key: u for u in expected} == {u.key: u for u in mixed}
    named = {u.key_after: u for u in wrapped}
    assert [replace(named[u.key], key=u.key, group=u.group) for u in expected] == list(expected)
    assert {u.key for u in wrapped} == {f"module.{u.key}" for u in expected}


def test_neither_model_is_changed(tuned):
    before, after, _ = tuned
    states = [copy.deepcopy(model.state_dict()) for model in (before, after)]
    random = torch.get_rng_state()
    kappa_fast.difference(before, after)
    for model, state in zip((before, after), states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_one_matrix_of_each_is_held_at_a_time(tmp_path, monkeypatch):
    before, after = pairs(a__weight=torch.ones(48, 32), b__weight=torch.eye(32))
    for name, weights in (("before", before), ("after", after)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0
    opened = kappa_fast.updates.open_source

    def watched(*args, **options):
        def load(matrix):
            def loaded(device=None):
                nonlocal most
                tensor = matrix.load(device)
                held.append(weakref.ref(tensor))
                most = max(most, sum(ref() is not None for ref in held))
                return tensor

            return replace(matrix, load=loaded)

        source = opened(*args, **options)
        return replace(source, matrices=tuple(map(load, source.matrices)))

    monkeypatch.setattr(kappa_fast.updates, "open_source", watched)
    kappa_fast.difference(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    assert len(held) == 6
    assert most <= 2


def test_learned_adapters_are_part_of_the_change_and_peft_finds_the_same_intruders():
    peft = pytest.importorskip("peft")
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    base = build("llama")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=r".*\.q_proj"))
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.4)
    found = kappa_fast.difference(base, model)
    assert {u.key for u in found.changed} == {u.key for u in found if "q_proj" in u.key}
    assert all(u.stable_rank <= 2 * (1 + 1e-5) for u in found.changed)
    assert kappa_fast.difference(base, model, adapters="base").changed == []
    said: list[str] = []
    intruders.reduce_intruder_dimension(model, logging_sink=said.append)
    told = {}
    for line in said[:-1]:
        name, _, what = line.rpartition(": Intruders: ") if "Intruders: " in line else (line.partition(":")[0], "", "0")
        told[f"{name}.weight".removeprefix("base_model.model.")] = int(what)
    assert told == {u.key: u.intruders for u in found.changed}
    assert sum(told.values()) > 0


def test_what_cannot_be_subtracted_is_refused_by_name():
    before, after = pairs(a__weight=torch.zeros(32, 48))
    after["b.weight"] = before["b.weight"].T.contiguous()
    found = kappa_fast.difference(before, after)
    assert [u.key for u in found] == ["c.weight"]
    assert [(lone.key, lone.reason.split(":")[0]) for lone in found.refused] == [
        ("a.weight", "its shape is (48, 32) before and (32, 48) after"),
        ("b.weight", "it looks transposed after"),
    ]
    assert "'a.weight'" in found.caveats[0]
    with pytest.raises(KeyError, match="looks transposed"):
        found["b.weight"]
    with pytest.raises(OptionError, match=r"'a.weight', its shape is"):
        kappa_fast.difference(before, after, include=r"^[ab]\.")


def test_what_only_one_has_and_what_is_skipped_is_told():
    before, after = pairs()
    del after["a.weight"]
    after["d.weight"] = another(20, 20)
    after["c.weight"] = after["c.weight"].to(torch.int8)
    found = kappa_fast.difference(before, after)
    assert {lone.key: bool(lone.reason) for lone in found.only_before} == {"a.weight": False, "c.weight": True}
    assert [lone.key for lone in found.only_after] == ["d.weight"]
    filtered = kappa_fast.difference(before, before, exclude="^a")
    assert [(s.name, s.reason) for s in filtered.skipped] == [("a.weight", "excluded by the pattern '^a'")]
    with pytest.raises(OptionError, match=r"no matrix in common: the first holds 'a\.weight'"):
        kappa_fast.difference(before, {"other.weight": another(20, 20)})


def test_a_nan_is_told_and_spoils_nothing_else():
    before, after = pairs(b__weight=torch.full((32, 32), math.nan), c__weight=torch.ones(24, 64))
    found = kappa_fast.difference(before, after)
    assert [u.key for u in found.non_finite] == ["b.weight"]
    assert [u.key for u in found.changed] == ["c.weight"]
    broken = found["b.weight"]
    assert math.isnan(broken.norm)
    assert (broken.stable_rank, broken.intruders, broken.share) == (None, None, None)
    assert math.isfinite(found.relative)
    assert found.document()["updates"][1]["norm"] == "nan"
    assert "NaN or inf: b.weight" in found.to_text()


def test_no_change_has_no_rank_and_no_intruders():
    before, _ = pairs()
    found = kappa_fast.difference(before, before)
    assert (found.changed, found.relative) == ([], 0.0)
    assert {(u.status, u.norm, u.relative, u.stable_rank, u.share, u.intruders) for u in found} == {
        ("unchanged", 0.0, 0.0, None, None, 0)
    }
    assert "3 matrices in both, 0 of them changed" in str(found)


def test_rounding_is_a_caveat():
    before, _ = pairs()
    after = {name: value.bfloat16() for name, value in before.items()}
    found = kappa_fast.difference(before, after)
    assert found.caveats == ("dtype is float32 and bfloat16 in 3 matrices: rounding is part of the difference",)
    assert all(0 < u.relative < 2**-8 for u in found)


def test_the_threshold_decides_who_is_an_intruder():
    before, after = pairs(a__weight=another(48, 32))
    low, high = (kappa_fast.difference(before, after, threshold=t)["a.weight"] for t in (1e-6, 1.0))
    assert low.similarities == high.similarities
    assert (low.intruders, high.intruders, high.k) == (0, 10, 10)


@pytest.mark.parametrize(
    "options", [dict(k=-1), dict(k=True), dict(k=1.5), dict(threshold=0), dict(threshold=1.1), dict(threshold="x")]
)
def test_wrong_options_are_refused_before_any_work(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        kappa_fast.difference("no such file", "no such file", **options)


def test_the_rows_and_the_file_have_it_all(tmp_path):
    pytest.importorskip("pandas")
    before, after = pairs(a__weight=another(48, 32))
    found = kappa_fast.difference(before, after)
    found.to_json(tmp_path / "d.json")
    read = json.loads((tmp_path / "d.json").read_text())
    assert read["format"] == "kappa_fast difference"
    first, frame = found["a.weight"], found.to_dataframe().set_index("key")
    assert read["updates"][0]["stable_rank"] == first.stable_rank == frame.loc["a.weight", "stable_rank"]
    assert read["updates"][0]["similarities"] == list(first.similarities)
    assert frame.loc["b.weight", "status"] == "unchanged"
    assert math.isnan(frame.loc["b.weight", "share"])


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def files(tmp_path):
    before, after = pairs(a__weight=another(48, 32))
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_the_command_shows_and_writes_what_the_function_finds(files, tmp_path):
    expected = kappa_fast.difference(*files, k=3)["a.weight"]
    code, out, err = run(*files, "--weights", "--k", 3, "--json", tmp_path / "d.json", "--csv", tmp_path / "d.csv")
    assert (code, err) == (0, "")
    assert f"{100 * expected.share_left:.3g}%" in out
    assert f"{expected.intruders}/3" in out
    assert json.loads((tmp_path / "d.json").read_text())["updates"][0]["share"] == expected.share
    assert (tmp_path / "d.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--fail-above", 2), "--fail-above is for rankings"),
        (("--max-params", 0.1), "a budget is for rankings"),
        (("--html", "x.html"), "--html is for rankings"),
        (("third.safetensors",), "3 are given"),
        (("--threshold", 2), "threshold=2.0"),
    ],
)
def test_the_command_refuses_what_is_for_rankings(files, more, said):
    code, _, err = run(*files, "--weights", *more)
    assert code == 2
    assert said in err


def test_the_command_takes_models_and_no_rankings(files, tmp_path):
    kappa_fast.rank(files[0], progress=False).to_json(tmp_path / "r.json")
    assert "not rankings" in run(tmp_path / "r.json", files[1], "--weights")[2]
    assert "are of --weights" in run(tmp_path / "r.json", tmp_path / "r.json", "--k", 3)[2]


def test_the_command_ends_with_4_where_weights_are_not_finite(files):
    before, after = pairs(a__weight=torch.full((48, 32), math.inf))
    save_file(after, files[1])
    assert before
    code, out, err = run(*files, "--weights")
    assert code == 4
    assert "failed: NaN or inf in 1 matrices, 'a.weight' among them" in err
    assert "NaN or inf: a.weight" in out
