"""Exports match the selected parameters and no others, as the programs that read them would."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest
import torch
from families import FAMILIES, MOE, build

import kappa_fast
from kappa_fast import OptionError, RankingFileError, Selection
from kappa_fast.integrations.exports import FORMATS

yaml = pytest.importorskip("yaml")
NAMES = {(f, name) for f in FAMILIES for name, _ in build(f).named_parameters()}


def ranked(family, **options):
    return kappa_fast.rank(build(family), progress=False, **options)


def axolotl_matches(pattern, name):
    """As axolotl.utils.freeze reads a pattern: a range behind it, dots made literal, matched from the start."""
    found = re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", pattern)
    expression, rows = (found.group(1), (int(found.group(2)), int(found.group(3)))) if found else (pattern, None)
    return (rows,) if re.compile(re.sub(r"\.(?!\+)", r"\\.", expression)).match(name) else None


@pytest.mark.parametrize("family", FAMILIES)
def test_no_expression_matches_another_parameter_of_any_family(family):
    for share in (0.3, 1.0):
        selection = ranked(family).select(top_p=share, unit="parameter")
        wanted = {name for name in selection.names}
        own = {name for _, name in NAMES}
        patterns = yaml.safe_load(selection.to_axolotl())["unfrozen_parameters"]
        assert {name for name in own if any(axolotl_matches(p, name) for p in patterns)} == wanted
        for expression in (selection.to_regex().strip(), shlex.split(selection.to_ms_swift())[-1]):
            assert {name for name in own if re.search(expression, name)} == wanted
            assert {name for name in own if re.match(expression, name)} == wanted
        assert selection.to_names().split() == list(dict.fromkeys(selection.names))
        spectrum = json.loads(selection.to_spectrum())
        assert {name for name in own if name.removesuffix(".weight") in spectrum} == wanted


def test_ms_swift_freezes_everything_first():
    words = shlex.split(ranked("llama").select(num_tensors=1).to_ms_swift())
    assert words[:3] == ["--freeze_parameters_ratio", "1.0", "--trainable_parameters_regex"]


@pytest.mark.parametrize("family", MOE)
def test_axolotl_gets_ranges_for_experts_with_a_warning_that_decay_moves_the_rest(family):
    selection = ranked(family, include=r"mlp\.experts\.").select(num_tensors=3, unit="expert")
    text = selection.to_axolotl()
    assert "weight decay still moves the other experts" in text
    model, covered = build(family), {}
    for pattern in yaml.safe_load(text)["unfrozen_parameters"]:
        for name, _ in model.named_parameters():
            rows = axolotl_matches(pattern, name)
            if rows is not None:
                covered.setdefault(name, torch.zeros(4, dtype=torch.bool))[slice(*rows[0])] = True
    wanted = {}
    for entry in selection:
        wanted.setdefault(entry.name, torch.zeros(4, dtype=torch.bool))[entry.index[0]] = True
    assert {name: found.tolist() for name, found in covered.items()} == {n: w.tolist() for n, w in wanted.items()}


def test_without_ranges_axolotl_needs_no_warning():
    assert "decay" not in ranked("llama").select(top_p=0.5).to_axolotl()


@pytest.mark.parametrize("kind", ["axolotl", "names", "regex", "ms-swift", "spectrum"])
def test_half_an_expert_names_the_unit_that_works(kind):
    ranking = ranked("mixtral", include="gate_up")
    half = Selection((next(e for e in ranking if e.part == "[2].gate"),), True, {})
    with pytest.raises(OptionError, match=r"only gate of expert 2 of '.*gate_up_proj' is selected.*unit='expert'"):
        half.export(kind)


@pytest.mark.parametrize("kind", ["names", "regex", "ms-swift", "spectrum"])
def test_some_experts_of_a_tensor_name_the_unit_that_works(kind):
    selection = ranked("mixtral", include="experts").select(num_tensors=2, unit="expert")
    advice = "select with unit='parameter'"
    with pytest.raises(OptionError, match=rf"is selected in part, which .* cannot express: {advice}"):
        selection.export(kind)
    ranked("mixtral", include="experts").select(num_tensors=2, unit="parameter").export(kind)


def test_k_and_v_are_all_of_kv_but_not_of_qkv():
    entry = ranked("phi3", include="qkv")[0]
    for name, works in (("a.kv_proj.weight", True), ("a.qkv_proj.weight", False)):
        parts = [
            dataclasses.replace(entry, name=name, part=f".{part}", index=(slice(i * 16, i * 16 + 16),))
            for i, part in enumerate("kv")
        ]
        selection = Selection(tuple(parts), True, {})
        if works:
            assert selection.to_names() == f"{name}\n"
        else:
            with pytest.raises(OptionError, match=r"only k and v of 'a\.qkv_proj\.weight' is selected"):
                selection.to_names()


def test_interleaved_halves_of_gpt_oss_are_refused_and_whole_experts_are_not():
    model, ranking = build("gpt_oss"), ranked("gpt_oss", include="gate_up")
    gate = Selection((next(e for e in ranking if e.part == "[1].gate"),), True, {})
    with pytest.raises(OptionError, match="is not a range of its first dimension"):
        gate.to_axolotl(model=model)
    both = Selection(tuple(e for e in ranking if e.part.startswith("[1]") and "layers.0" in e.name), True, {})
    assert yaml.safe_load(both.to_axolotl(model=model))["unfrozen_parameters"] == [
        "^model.layers.0.mlp.experts.gate_up_proj$[1:2]"
    ]


@pytest.mark.parametrize("family", MOE)
def test_esft_lists_whole_experts_by_layer(family):
    selection = ranked(family, include=r"mlp\.experts\.").select(num_tensors=3, unit="expert")
    with pytest.warns(UserWarning, match="ESFT needs every layer of the model, and the last selected one is"):
        found = json.loads(selection.to_esft())
    assert list(found["experts"]) == [str(i) for i in range(1 + max(entry.layer for entry in selection))]
    assert list(json.loads(selection.to_esft(model=build(family)))["experts"]) == ["0", "1"]
    pairs = {(int(layer), e) for layer, numbers in found["experts"].items() for e in numbers}
    assert pairs == {(entry.layer, entry.index[0]) for entry in selection}
    assert len(pairs) == 3
    assert found["shared_experts"] is False
    assert found["non_expert_modules"] is False


def test_esft_refuses_what_is_no_expert_and_what_is_half_of_one():
    with pytest.raises(OptionError, match="ESFT trains whole experts: select with unit='expert'"):
        ranked("mixtral").select(num_tensors=3).to_esft()
    with pytest.raises(
        OptionError, match=r"names experts only, and 'model\.layers.* is not in one: rank with include=r'\\.experts\\b'"
    ):
        ranked("mixtral").select(top_p=1.0, unit="expert").to_esft()


def test_spectrum_puts_the_lowest_kappa_first_with_its_type():
    selection = ranked("llama").select(top_p=1.0)
    found = json.loads(selection.to_spectrum())
    best = max(found, key=lambda layer: found[layer]["snr"])
    assert best + ".weight" == selection.entries[0].name
    assert {row["type"] for row in found.values()} >= {"self_attn.q_proj", "mlp.down_proj"}


def test_spectrum_has_the_kappas_of_entries_that_a_model_calls_otherwise(tmp_path):
    """Saved and ranked without its config, the experts have the names of the disk, and the model others."""
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    ranking = kappa_fast.rank(tmp_path, include="experts", min_dim=4, progress=False)
    selection = ranking.select(top_p=1.0)
    assert not any("gate_up_proj" in name for name in selection.names)
    found = json.loads(selection.to_spectrum(model=model))
    assert len(found) == 4
    assert all(row["snr"] > 0 for row in found.values())
    assert max(1 / row["snr"] for row in found.values()) == ranking[len(ranking) - 1].kappa


def test_patterns_count_where_a_model_says_what_they_match():
    model = build("llama")
    selection = ranked("llama").select(num_tensors=2).including(r"norm\.weight$")
    with pytest.raises(OptionError, match=r"names parameters of a model: give it as model="):
        selection.to_names()
    names = selection.to_names(model=model).split()
    assert {"model.norm.weight", *selection.names} <= set(names)


def test_names_that_axolotl_would_misread_are_refused():
    selection = kappa_fast.rank({"a+b.weight": torch.randn(20, 30)}, progress=False).select(top_p=1.0)
    with pytest.raises(OptionError, match=r"'a\+b\.weight' has characters that it would misread"):
        selection.to_axolotl()
    assert re.search(selection.to_regex().strip(), "a+b.weight")


def test_what_cannot_be_exported_says_so():
    selection = ranked("llama").select(num_tensors=1)
    with pytest.raises(OptionError, match="LLaMA-Factory's freeze tuning takes ranges of layers only"):
        selection.export("llama-factory")
    with pytest.raises(OptionError, match=r"format 'toml' is unknown; choose one of axolotl, ms-swift"):
        selection.export("toml")
    for kind in FORMATS:
        with pytest.raises(OptionError, match="the selection is empty"):
            Selection((), True, {}).export(kind)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    selection = ranked("llama").select(num_tensors=1)
    text = selection.to_names(tmp_path / "names.txt")
    assert (tmp_path / "names.txt").read_text() == text
    with pytest.raises(RankingFileError, match="cannot write"):
        selection.to_names(tmp_path / "nowhere" / "names.txt")
