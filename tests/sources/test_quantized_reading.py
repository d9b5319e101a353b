"""What all quantized formats have in common: when codes are read, where they are dequantized, how results say so."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fp4_codes import as_in_gpt_oss
from fp8_codes import FP8, dequantized, quantized
from models import EVERYTHING, matrices
from packed_codes import awq, config, gptq, in_turn
from packing import check, minilm, saved, trained
from safetensors.torch import save_file
from torchao_codes import in_int4, in_nvfp4, peak_of

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.execution.executor import Executor
from kappa_fast.execution.prefetch import stage
from kappa_fast.io import patterns
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.base import Stored
from kappa_fast.sources.quantized import FAMILIES, weights_of
from kappa_fast.sources.quantized.config import is_left_plain, quantization_config, scheme_of
from kappa_fast.sources.quantized.recipe import Candidate

CPU = torch.device("cpu")


def recorded(tensors: dict[str, torch.Tensor]) -> tuple[list[Stored], list[tuple[str, object]]]:
    """The tensors as a reader finds them, and a log of every read."""
    log: list[tuple[str, object]] = []

    def store(name: str, tensor: torch.Tensor) -> Stored:
        def take(index, device=None):
            log.append((name, index))
            return tensor[index] if index else tensor

        return Stored((name,), tuple(tensor.shape), tensor.dtype, CPU, take)

    return [store(name, tensor) for name, tensor in tensors.items()], log


def experts() -> dict[str, torch.Tensor]:
    stack = torch.stack([trained(272, 96, layer) for layer in range(3)])
    codes, scale = quantized(stack, (128, 128))
    return {"experts.down_proj": codes, "experts.down_proj_scale_inv": scale}


def test_an_expert_is_read_with_its_own_scales_and_nothing_before_it_is_wanted():
    found, log = recorded(experts())
    weight, _ = weights_of(found, None)
    assert log == []
    weight.take((1,))
    assert sorted(log) == [("experts.down_proj", (1,)), ("experts.down_proj_scale_inv", (1,))]


def test_a_part_of_a_matrix_keeps_none_of_the_rest_in_memory():
    found, _ = recorded(experts())
    weight, _ = weights_of(found, None)
    half = weight.take((1, slice(0, 136), slice(None)))
    assert torch.equal(half, weight.take((1,))[:136])
    assert half.untyped_storage().nbytes() == half.nbytes


class Elsewhere:
    """Stands for a device: notes what is moved there before anything is computed with it."""

    type = "elsewhere"


def test_codes_and_scales_are_moved_before_they_are_dequantized(monkeypatch):
    found, _ = recorded(experts())
    weight, _ = weights_of(found, None)
    moved: list[torch.dtype] = []
    original = torch.Tensor.to

    def to(tensor, *arguments, **options):
        if arguments and isinstance(arguments[0], Elsewhere):
            moved.append(tensor.dtype)
            return tensor
        return original(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    there = weight.take((1,), Elsewhere())
    assert moved == [torch.float8_e4m3fn, torch.float32]
    assert torch.equal(there, weight.take((1,)))
    assert torch.equal(there, weight.take((1,), CPU))


def test_the_device_reaches_the_codes_from_staging_and_plain_weights_are_left_to_it(monkeypatch):
    asked: list[object] = []
    source = open_source(experts() | {"plain.weight": torch.randn(32, 16)}, Filters())

    def noting(matrix):
        def load(device=None):
            asked.append(device)
            return matrix.load(device)

        return replace(matrix, load=load)

    noted = [noting(matrix) for matrix in source.matrices]
    weights = stage(noted, CPU).weights
    assert asked == [CPU] * 4
    assert [tuple(weight.shape) for weight in weights] == [(272, 96)] * 3 + [(32, 16)]
    assert source.matrices[3].load(torch.device("meta")).device == CPU


def test_waves_count_codes_floats_and_what_dequantizing_takes():
    tensors = experts()
    quantized_source = open_source(tensors, Filters())
    plain = open_source({"experts.down_proj": torch.zeros(3, 272, 96)}, Filters())
    first, other = quantized_source.matrices[0], plain.matrices[0]
    assert (first.nbytes, first.overhead) == (272 * 96 * 4, 272 * 96 + 3 * 4 + 272 * 96)
    assert (other.nbytes, other.overhead) == (first.nbytes, 0)
    backend = Executor(plain, "torch", CPU, None)._backend_for(CPU)
    need, without = (Executor(s, "torch", CPU, None)._need(s.matrices[0], backend) for s in (quantized_source, plain))
    assert need == without + first.nbytes + first.overhead


def test_halves_count_the_matrix_that_they_are_cut_from():
    stored, _ = as_in_gpt_oss("mlp.experts.gate_up_proj", torch.stack([trained(96, 128)] * 2))
    halves = matrices(stored | as_in_gpt_oss("mlp.experts.down_proj", torch.stack([trained(64, 96)] * 2))[0])
    wholes = matrices(stored, replace(EVERYTHING, fused="stored"))
    whole, half = wholes["mlp.experts.gate_up_proj[0]"], halves["mlp.experts.gate_up_proj[0]"]
    assert half.part == "[0]"  # no model type: gate and up cannot be told apart
    assert whole.overhead == half.overhead
    (gptq_weight,) = matrices(gptq(trained(96, 128), 4, in_turn(), symmetric=True)[0]).values()
    assert gptq_weight.overhead >= 96 * 128 // 2
    codes, scale = quantized(torch.stack([trained(256, 96)]), (128, 128))
    stored = {"mlp.experts.gate_up_proj": codes, "mlp.experts.gate_up_proj_scale_inv": scale}
    stored["mlp.experts.down_proj"] = torch.zeros(1, 96, 128)
    halves = matrices(stored)
    assert halves["mlp.experts.gate_up_proj[0].gate"].overhead == 2 * 256 * 96 + 2 * 4 + 4 * 256 * 96


def test_a_budget_smaller_than_the_model_changes_nothing_but_the_waves(tmp_path):
    path = saved(tmp_path, experts(), quantization_config=FP8)
    once, in_waves = kappa_fast.rank(path), kappa_fast.rank(path, memory_budget="200KB")
    assert once.entries == in_waves.entries


def test_the_order_is_that_of_the_model_and_scales_stay_where_they_were():
    codes, scale = quantized(trained(128, 128), (128, 128))
    tensors = {
        "b.weight": codes,
        "a.weight": torch.randn(16, 16),
        "b.weight_scale_inv": scale,
        "c.weight": codes.clone(),
    }
    found, _ = recorded(tensors)
    weights = weights_of(found, None)
    assert [t.name for t in weights] == list(tensors)
    assert [bool(t.quantization) for t in weights] == [True, False, False, False]
    assert [t.roles for t in weights] == [frozenset(), frozenset(), {"scales"}, frozenset()]


def test_tied_codes_are_ranked_once_under_all_their_plain_names():
    stored, values = gptq(trained(96, 128), 4, in_turn(), symmetric=True)
    tied = stored | {name.replace("a.", "b."): tensor for name, tensor in stored.items()}
    (entry,) = check(tied, {"a.weight": values})
    assert (entry.name, entry.aliases) == ("a.weight", ("a.qweight", "b.qweight", "b.weight"))


def test_scales_are_found_below_the_wrappers_of_peft():
    codes, scale = quantized(trained(256, 128), (128, 128))
    names = {"q_proj.base_layer.weight": codes, "q_proj.base_layer.weight_scale_inv": scale}
    source = names | {"q_proj.lora_A.default.weight": torch.randn(16, 128)}
    (entry,) = check(source, {"q_proj.weight": dequantized(codes, scale.numpy(), (128, 128))})
    assert entry.quantization == "fp8 e4m3, 128x128 blocks"


def test_codes_and_scales_may_lie_in_different_shards(tmp_path):
    codes, scale = quantized(trained(128, 128), (128, 128))
    save_file({"a.weight": codes}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a.weight_scale_inv": scale}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    check(tmp_path, {"a.weight": dequantized(codes, scale.numpy(), (128, 128))})
    with (
        pytest.warns(UserWarning, match="is shard 1 of 2: only its tensors are ranked"),
        pytest.raises(SourceError, match=r"its scale is missing .*: give the directory if it is in another file"),
    ):
        kappa_fast.rank(tmp_path / "model-00001-of-00002.safetensors")


def test_scales_whose_codes_are_elsewhere_are_no_weights():
    names = ("a.weight_scale_inv", "b.weight_scale", "experts.down_proj_scale", "experts.up_proj_scale_inv")
    others = ("w", "logit_scale", "scale_proj.weight", "kept.weight")
    tensors = {name: torch.randn(16, 16) for name in (*names, *others)}
    opened = open_source(tensors, EVERYTHING)
    assert {m.name for m in opened.matrices} == set(others)
    assert {s.name for s in opened.skipped} == set(names)
    assert all(s.reason.startswith("scales or zero points of quantized weights") for s in opened.skipped)
    assert opened.num_parameters == 4 * 256


def test_scales_that_the_index_does_not_list_are_not_used(tmp_path):
    codes, scale = quantized(trained(128, 128), (128, 128))
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    with pytest.raises(SourceError, match=r"'a\.weight' .* its scale is missing"):
        kappa_fast.rank(tmp_path)


def test_rankings_and_selections_keep_how_weights_were_quantized(tmp_path):
    stored, _ = gptq(trained(96, 128), 4, in_turn(), symmetric=True)
    (tmp_path / "model").mkdir()
    path = saved(tmp_path / "model", stored | {"b.weight": trained(96, 96)}, quantization_config=config(4))
    ranking = kappa_fast.rank(path)
    ranking.to_json(tmp_path / "r.json")
    again = kappa_fast.Ranking.from_json(tmp_path / "r.json")
    assert again == ranking
    assert {e.name: e.quantization for e in again} == {"a.weight": "gptq 4 bits, groups of 32", "b.weight": None}
    assert dict(again.metadata["source"]["quantization"]) == {"gptq 4 bits, groups of 32": 1}
    frame = ranking.to_dataframe()
    assert "quantization" in frame.columns
    assert "gptq*" in ranking.to_text()
    assert ranking.select(max_params=0.9).names == (("b.weight",) if ranking[0].name == "b.weight" else ("a.weight",))


def test_a_selection_from_a_quantized_checkpoint_trains_the_plain_model(tmp_path):
    stored, _ = gptq(trained(96, 128), 4, in_turn(), symmetric=True)
    ranking = kappa_fast.rank(saved(tmp_path, stored, quantization_config=config(4)))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(128, 96), "b": torch.nn.Linear(8, 8)})
    with ranking.select(num_tensors=1).apply(model):
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["a.weight"]


def test_a_plain_model_has_no_quantization_to_tell():
    ranking = kappa_fast.rank({"a.weight": trained(96, 64)})
    assert ranking[0].quantization is None
    assert dict(ranking.metadata["source"]["quantization"]) == {}


def test_quantizing_a_trained_matrix_moves_its_kappa():
    """Why results have to say it: what is ranked is the rounded matrix."""
    weight = minilm()["encoder.layer.0.attention.self.query.weight"].float()
    codes, scale = quantized(weight, (128, 128))
    (plain,) = kappa_fast.rank({"q.weight": weight})
    (rounded,) = check(
        {"q.weight": codes, "q.weight_scale_inv": scale}, {"q.weight": dequantized(codes, scale.numpy(), (128, 128))}
    )
    assert not plain.lower <= rounded.kappa <= plain.upper


# Configs


def test_where_the_config_of_a_quantization_is_found(tmp_path: Path):
    assert quantization_config(tmp_path, {}) == {}
    assert quantization_config(tmp_path, {"quantization_config": {"bits": 4}}) == {"bits": 4}
    assert quantization_config(tmp_path, {"text_config": {"quantization_config": {"bits": 3}}}) == {"bits": 3}
    assert quantization_config(tmp_path, {"compression_config": {"format": "x"}}) == {"format": "x"}
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {}, "quantization": {"quant_algo": "FP8"}}')
    assert quantization_config(tmp_path, {}) == {"quant_algo": "FP8"}
    (tmp_path / "hf_quant_config.json").write_text("[1]")
    assert quantization_config(tmp_path, {"quantization_config": 3, "text_config": 4}) == {}


@pytest.mark.parametrize(
    ("item", "name", "plain"),
    [
        ("lm_head", "lm_head.weight", True),
        ("lm_head", "model.lm_head.weight", True),
        ("lm_head", "model.lm_head_2.weight", False),
        ("model.layers.1", "model.layers.1.q_proj.weight", True),
        ("model.layers.1", "model.layers.11.q_proj.weight", False),
        ("re:.*gate$", "model.layers.3.mlp.gate.weight", True),
        ("re:.*gate$", "model.layers.3.mlp.gate_proj.weight", False),
        ("model.layers.*.router*", "model.layers.3.router.proj.weight", True),
        ("vision_tower", "model.vision_tower.blocks.0.weight", True),
        (3, "3.weight", False),
    ],
)
def test_modules_that_a_config_leaves_plain(item, name, plain):
    for key in ("ignore", "modules_to_not_convert", "exclude_modules"):
        assert is_left_plain(name, {key: [item]}) is plain
    assert not is_left_plain(name, {"ignore": None})


@pytest.mark.parametrize(
    "item", ["re:(", "re:a{99999999999999}", "re:" + "(" * 3000 + ")" * 3000, r"re:(a)\1", "re:" + "a" * 2000]
)
def test_a_pattern_of_a_config_that_cannot_be_searched_is_refused_with_its_field(item):
    with pytest.raises(SourceError, match=r"quantization_config: 're:.*' in ignore cannot be searched for"):
        is_left_plain("a.weight", {"ignore": [item]})
    groups = {"g": {"targets": [item], "weights": {"num_bits": 4}}}
    with pytest.raises(SourceError, match="in the targets of config_groups cannot be searched for"):
        scheme_of("a.weight", {"config_groups": groups})


@pytest.mark.parametrize(
    ("item", "plain"),
    [("re:.*(a+)+$z", False), ("*a" * 25 + "z", False), (r"re:(.*a){12}(.*a)*b", False), ("re:(x|.*)*a$", True)],
)
def test_no_pattern_takes_longer_the_more_it_could_backtrack(item, plain):
    names = [f"l.{i}." + "a" * 60 for i in range(50)]
    started = time.perf_counter()
    assert {is_left_plain(name + ".weight", {"ignore": [item]}) for name in names} == {plain}
    assert time.perf_counter() - started < 5  # hours, where each way is tried


def test_patterns_that_take_more_steps_than_any_real_one_are_refused(monkeypatch):
    monkeypatch.setattr(patterns, "MOST_STEPS", 20)
    with pytest.raises(SourceError, match="ignore cannot be searched for"):
        is_left_plain("a" * 200 + ".weight", {"ignore": ["re:((a*)*b)*c"]})


def test_the_number_of_patterns_is_limited_and_that_of_names_is_not():
    config = {"ignore": [f"m.{i}.q" for i in range(5000)]}
    assert is_left_plain("m.4999.q.weight", config)
    assert not is_left_plain("m.5000.q.weight", config)
    with pytest.raises(SourceError, match="the number of patterns in ignore is 2,000"):
        is_left_plain("a.weight", {"ignore": [f"re:m{i}" for i in range(2000)]})


def test_what_is_no_config_group_says_nothing():
    for groups in (None, [], {"group_0": 3}, {"group_0": {"targets": None, "weights": 3}}):
        assert scheme_of("a.weight", {"config_groups": groups}) == {}
    alone = {"targets": ["re:nothing"], "weights": {"num_bits": 4}}
    assert scheme_of("a.weight", {"config_groups": {"group_0": alone}}) == {"num_bits": 4}
    assert scheme_of("a.weight", {"config_groups": {"group_0": alone, "group_1": alone}}) == {}


def test_no_family_takes_what_has_another_dtype_or_rank():
    scale = torch.ones(1)
    for dtype in (torch.int64, torch.bool, torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int32):
        for shape in ((4,), (2, 2, 2, 2), (0, 16)):
            for name in ("weight", "qweight", "weight_packed", "x_blocks"):
                (codes, *rest), _ = recorded({name: torch.zeros(shape, dtype=dtype), "scales": scale})
                candidate = Candidate(codes, {"scale": rest[0]})
                assert all(family.recognize(candidate) is None for family in FAMILIES), (name, dtype, shape)


# Memory


def in_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale = quantized(weight, (64, 64))
    return {"a.weight": codes, "a.weight_scale_inv": scale}


SHUFFLED = np.random.default_rng(0).permutation(in_turn(64, 256))
FORMATS = {
    "fp8": in_fp8,
    "gpt-oss": lambda weight: as_in_gpt_oss("down_proj", weight[None].contiguous())[0],
    "nvfp4": in_nvfp4,
    "gptq 3 bits": lambda weight: gptq(weight, 3, in_turn(64, 256), symmetric=True)[0],
    "gptq 4 bits": lambda weight: gptq(weight, 4, in_turn(64, 256), symmetric=True)[0],
    "gptq in the order of activations": lambda weight: gptq(weight, 4, SHUFFLED, symmetric=True)[0],
    "awq": lambda weight: awq(weight, 64)[0],
    "int4": in_int4,
    "int8": lambda weight: {"a.weight": torch.ones(256, 256).char(), "a.weight_scale": torch.ones(256, 1).bfloat16()},
}


@pytest.mark.parametrize("format", FORMATS)
def test_loading_takes_no_more_than_is_counted_and_not_far_less(format):
    (matrix,) = matrices(FORMATS[format](trained(256, 256))).values()
    matrix.load()  # whatever is allocated once
    peak = peak_of(matrix)
    assert peak <= matrix.nbytes + matrix.overhead
    assert matrix.nbytes + matrix.overhead <= 2 * peak
