"""Checkpoints speak of the parameters that the model will have, where transformers' table says which those are."""

import json
import sys

import pytest
import torch
import transformers
from configs import with_config
from families import FAMILIES, SMALL, build
from matched import everything, on_disk
from safetensors.torch import load_file, save_file

import kappa_fast
from kappa_fast.matching.conversion import Conversion, _rows
from kappa_fast.matching.names import match

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
AS_ON_THE_HUB = ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"]


@pytest.fixture(params=AS_ON_THE_HUB)
def hub(request, tmp_path):
    """The model, and a directory with a 2-D tensor for every expert and projection."""
    model = build(request.param)
    tensors = on_disk(model, request.param, tmp_path)
    with_config(model, tmp_path)
    return model, tensors, tmp_path


def test_entries_are_those_of_the_model_with_the_names_on_disk_as_aliases(hub):
    model, tensors, folder = hub
    live = {e.key: e for e in kappa_fast.rank(model, progress=False)}
    found = kappa_fast.rank(folder, progress=False)
    assert {e.key for e in found} == set(live)
    experts = 0
    for entry in found:
        twin = live[entry.key]
        assert (entry.kappa, entry.index, entry.group, entry.layer) == (twin.kappa, twin.index, twin.group, twin.layer)
        piece = model.get_parameter(entry.name).detach()[entry.index]
        if entry.part:
            experts += 1
            assert len(entry.aliases) == 1
            assert torch.equal(piece, tensors[entry.aliases[0]])
    assert experts == 2 * 4 * 3
    assert all(target.whole for target in match(everything(found), model))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_gives_the_keys_of_the_model(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    live, found = kappa_fast.rank(model, progress=False), kappa_fast.rank(tmp_path, progress=False)
    assert [e.key for e in found] == [e.key for e in live]


@pytest.mark.parametrize("text", ["phi3", "granitemoe"])
def test_fused_projections_of_a_model_inside_of_a_model_are_split(text, tmp_path):
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    inner = AutoConfig.for_model(text, **SMALL, num_local_experts=4)
    config = LlavaConfig(text_config=inner, vision_config=CLIPVisionConfig(**VISION), image_token_index=5)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    found = kappa_fast.rank(tmp_path, progress=False)
    assert [e.key for e in found] == [e.key for e in kappa_fast.rank(model, progress=False)]
    assert {e.part.rpartition(".")[2] for e in found} >= {"gate", "up"}


def test_patterns_find_both_names(hub):
    _, tensors, folder = hub
    down = "w2" if any("w2" in name for name in tensors) else r"experts\.\d+\.down_proj"
    of_disk = kappa_fast.rank(folder, include=down, progress=False)
    of_model = kappa_fast.rank(folder, include=r"mlp\.experts\.down_proj$", progress=False)
    assert [e.key for e in of_disk] == [e.key for e in of_model]
    assert len(of_disk) == 2 * 4
    left = kappa_fast.rank(folder, exclude=r"mlp\.experts\.down_proj$", progress=False)
    assert not [e for e in left if "down_proj[" in e.key]
    assert len([s for s in left.skipped if "down_proj[" in s.name]) == 2 * 4


def test_halves_that_are_stored_on_their_own_stay_halves(hub):
    _, _, folder = hub
    split, stored = (kappa_fast.rank(folder, fused=fused, progress=False) for fused in ("split", "stored"))
    assert [e.key for e in split] == [e.key for e in stored]


def test_matrices_that_are_too_small_are_listed_one_by_one(hub):
    _, _, folder = hub
    found = kappa_fast.rank(folder, min_dim=25, progress=False)
    small = [s.name for s in found.skipped if s.name.endswith(".gate") and "too small" in s.reason]
    assert len(small) == len(set(small)) == 2 * 4


def kept_as_on_disk(folder):
    found = kappa_fast.rank(folder, progress=False)
    assert {e.key for e in found} <= set(load_file(folder / "model.safetensors"))
    return found


@pytest.fixture
def mixtral(tmp_path):
    model = build("mixtral")
    on_disk(model, "mixtral", tmp_path)
    with_config(model, tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_transformers_names_are_those_on_disk(mixtral, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    kept_as_on_disk(mixtral)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["NoSuchModel"]},
        {"model_type": "no such type"},
        {"hidden_size": "wide"},
        {"num_local_experts": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_the_model_is_unknown_names_are_those_on_disk(mixtral, changes):
    edit(mixtral, **changes)
    found = kappa_fast.rank(mixtral, progress=False)
    disk = set(load_file(mixtral / "model.safetensors"))
    fourth = [e for e in found if "experts.3." in e.name]
    assert len(fourth) == 2 * 3
    assert {e.name for e in fourth} <= disk


def test_a_tensor_of_another_shape_keeps_its_name(mixtral):
    tensors = load_file(mixtral / "model.safetensors")
    odd = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors[odd] = torch.randn(40, 30)
    save_file(tensors, mixtral / "model.safetensors")
    keys = {e.key for e in kappa_fast.rank(mixtral, progress=False)}
    assert odd in keys
    assert "model.layers.0.mlp.experts.down_proj[2]" in keys


def test_a_dense_model_imports_nothing_for_its_names(root, run_python, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    code = f"import sys, kappa_fast; kappa_fast.rank({str(tmp_path)!r}); print('transformers' in sys.modules)"
    assert run_python(code, cwd=root).strip() == "False"


def test_classes_of_the_architecture_in_config_json_decide_what_names_cannot_tell(tmp_path):
    """Tables without a name that says so, convolutions called query, and buffers, in a file without any module."""
    from transformers import CTRLConfig, CTRLLMHeadModel, IBertConfig, IBertModel, SqueezeBertConfig, SqueezeBertModel

    table = CTRLLMHeadModel(CTRLConfig(vocab_size=96, n_positions=16, n_embd=32, dff=48, n_layer=1, n_head=2))
    table.save_pretrained(tmp_path / "table")
    ranking = kappa_fast.rank(tmp_path / "table", progress=False)
    assert [(s.name, s.reason) for s in ranking.skipped] == [
        ("transformer.w.weight", "embedding or output head (embeddings=True ranks it)")
    ]
    sizes = {"hidden_size": 64, "embedding_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    grouped = SqueezeBertModel(SqueezeBertConfig(vocab_size=96, num_hidden_layers=1, **sizes))
    grouped.save_pretrained(tmp_path / "grouped")
    entry = next(e for e in kappa_fast.rank(tmp_path / "grouped", progress=False) if "attention.query" in e.name)
    sigma = torch.linalg.svdvals(grouped.get_parameter(entry.name).detach().double().flatten(1))
    assert entry.lower <= sigma[0] / sigma[-1] <= entry.upper
    integers = IBertModel(IBertConfig(vocab_size=96, num_hidden_layers=1, quant_mode=False, **sizes))
    integers.save_pretrained(tmp_path / "integers")
    ranking = kappa_fast.rank(tmp_path / "integers", progress=False)
    (reason,) = {s.reason for s in ranking.skipped if "dense.weight_integer" in s.name}
    assert reason == "buffer of QuantLinear in the model that config.json describes, not a parameter"
    assert ranking.metadata["num_parameters"] == sum(p.numel() for p in integers.parameters())


def test_a_tied_weight_has_the_first_name_that_the_model_has_for_it(tmp_path):
    model = build("llama", tie_word_embeddings=True)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    tensors["model.layers.0.mlp.experts.0.gate.weight"] = torch.zeros(16, 16)  # so that the model is looked at
    save_file(tensors, tmp_path / "model.safetensors")
    with_config(model, tmp_path)
    ranking = kappa_fast.rank(tmp_path, embeddings=True, progress=False)
    assert next(e.aliases for e in ranking if e.name == "model.embed_tokens.weight") == ("lm_head.weight",)


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them():
    from kappa_fast.matching.architecture import architecture

    config = {"model_type": "mamba2", "architectures": ["Mamba2Model"], "vocab_size": 64, "hidden_size": 32}
    config |= {"num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "state_size": 16, "expand": 2}
    assert architecture({**config, "time_step_limit": [0.0, {"__float__": "Infinity"}]}) is not None


@pytest.mark.parametrize("pattern", ["mlp.experts.*.w1.weight", r"\.experts.*.w1.weight", r"experts\.*\.w1\.weight$"])
def test_the_number_of_an_expert_is_found_however_the_table_writes_its_dots(pattern):
    from kappa_fast.matching.conversion import _number

    assert _number(pattern, "model.layers.5.mlp.experts.12.w1.weight") == 12


def test_a_tensor_that_becomes_several_parameters_is_ranked_as_these(tmp_path):
    """Gate and up projection are one tensor on disk, and two in the model; so it is with query, key and value."""
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, use_swiglu_ffn=True)
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    first = kappa_fast.rank(tmp_path, progress=False, cache=tmp_path / "cache")
    live = kappa_fast.rank(model, progress=False)
    assert {e.key for e in first} == {e.key for e in live}
    assert first.metadata["num_parameters"] == live.metadata["num_parameters"]
    for number in range(2):
        fused = stored[f"encoder.layer.{number}.mlp.weights_in.weight"]
        for word, half in zip(("gate", "up"), fused.chunk(2), strict=True):
            entry = first[f"encoder.layer.{number}.mlp.{word}_proj.weight"]
            sigma = torch.linalg.svdvals(half.double())
            assert entry.lower <= float(sigma[0] / sigma[-1]) <= entry.upper
            assert entry.index == ()
            assert torch.equal(model.get_parameter(entry.name), half)
    again = kappa_fast.rank(tmp_path, progress=False, cache=tmp_path / "cache")
    assert [(e.key, e.kappa, e.upper) for e in again] == [(e.key, e.kappa, e.upper) for e in first]
    assert again.metadata["cache"]["hits"] == len(first)
    with first.select(top_p=0.5).apply(model) as handle:
        assert all(target.whole for target in handle.targets)


def test_a_tensor_without_dimensions_is_divided_among_none():
    """A damaged file may have one under the name of what is divided."""
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, use_swiglu_ffn=True)
    conversion = Conversion(transformers.Dinov2Model(config), lambda name: name)
    name = "encoder.layer.0.mlp.weights_in.weight"
    assert conversion.division(name, ()) is None
    assert conversion.division(name, (7, 64)) is None
    assert conversion.division("encoder.layer.0.norm1.weight", (64,)) is None


def operation(kind, **fields):
    return type(kind, (), fields)()


@pytest.mark.parametrize(
    ("operations", "sizes", "rows"),
    [
        ([operation("Chunk", dim=0)], [6, 6], [(0, 6), (6, 12)]),
        ([operation("Split", dim=0)], [8, 2, 2], [(0, 8), (8, 10), (10, 12)]),
        ([operation("Chunk", dim=0), operation("PermuteForRope")], [4, 4, 4], [(0, 4), (4, 8), (8, 12)]),
        ([operation("Interleave", dim=0, inverse=False), operation("Chunk", dim=0)], [6, 6], "alternate"),
        ([operation("Interleave", dim=0, inverse=True), operation("Chunk", dim=0)], [6, 6], None),
        ([operation("Chunk", dim=1)], [12, 12], None),
        ([operation("Chunk", dim=0)], [8, 2, 2], None),
        ([operation("Split", dim=0)], [8, 2], None),
        ([operation("Unheard", dim=0)], [6, 6], None),
    ],
)
def test_rows_are_known_only_where_that_is_all_that_happens(operations, sizes, rows):
    found = _rows(operations, 12, sizes)
    if rows == "alternate":
        assert [list(range(12))[r] for r in found] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    else:
        assert found == (None if rows is None else [slice(*r) for r in rows])


def test_operations_of_transformers_do_what_the_rows_say():
    from transformers.core_model_loading import Chunk, Interleave

    weight = torch.randn(12, 5)
    mixed = Interleave(dim=0).convert({"a": weight}, ["a"], ["x", "y"])
    made = Chunk(dim=0).convert({"a": next(iter(mixed.values()))}, ["a"], ["x", "y"])
    for rows, half in zip(_rows([Interleave(dim=0), Chunk(dim=0)], 12, [6, 6]), made.values(), strict=True):
        assert torch.equal(weight[rows], half)
