"""The models of transformers, tiny and randomly initialized: what is split is what their forward pass splits."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Callable

import pytest
import torch
from architectures import (
    FAMILIES,
    Family,
    build,
    transformers,
)

from kappa_fast.sources import Filters, open_source


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> tuple[Family, torch.nn.Module]:
    return FAMILIES[request.param], build(request.param)


def test_every_group_has_the_shapes_of_its_pieces(family):
    expected, model = family
    shapes = {m.group: m.shape for m in open_source(model, Filters()).matrices}
    for ending, shape in expected.groups.items():
        found = {group: s for group, s in shapes.items() if group.endswith(ending)}
        assert set(found.values()) == {shape}, (ending, shapes)


def test_every_parameter_is_ranked_or_skipped_with_a_reason(family):
    _, model = family
    source = open_source(model, Filters())
    named = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert {m.name for m in source.matrices} | {s.name for s in source.skipped} == named
    assert {m.name for m in source.matrices}.isdisjoint(s.name for s in source.skipped)
    everything = open_source(model, Filters(embeddings=True, routers=True, min_dim=1))
    assert {s.reason for s in everything.skipped} <= {"stacked biases of experts, not a matrix"}


def test_routers_embeddings_and_heads_are_told_from_projections(family):
    expected, model = family
    skipped = open_source(model, Filters(min_dim=1)).skipped
    assert sum(s.reason.startswith("router") for s in skipped) == expected.routers
    embeddings = {s.name for s in skipped if s.reason.startswith("embedding")}
    tables = {n + ".weight" for n, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    assert tables <= embeddings
    assert embeddings - tables <= {"lm_head.weight"}


def test_layouts_that_are_left_as_stored_are_noted(family):
    expected, model = family
    notes = open_source(model, Filters()).metadata["layouts"]
    assert len(notes) == len(expected.stored)
    assert all(any(word in group for word in expected.stored) for group in notes)


def test_a_checkpoint_of_the_model_gives_the_same_matrices(family, tmp_path):
    _, model = family
    weights = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    for name, alias in (model.all_tied_weights_keys or {}).items():
        weights.pop(name if alias in weights else alias, None)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    stored, live = open_source(tmp_path, Filters()), open_source(model, Filters())
    assert {(m.key, str(m.index), m.shape, m.layer, m.group) for m in stored.matrices} == {
        (m.key, str(m.index), m.shape, m.layer, m.group) for m in live.matrices
    }
    for m in stored.matrices:
        assert torch.equal(m.load(), next(other for other in live.matrices if other.key == m.key).load())


SPLIT_ON_DISK = [
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "granitemoe",
    "jetmoe",
    "phi3",
    "gpt2",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPLIT_ON_DISK)
def test_what_transformers_writes_holds_the_same_matrices_whatever_they_are_called_there(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    seen = lambda source: collections.Counter(  # noqa: E731
        (m.shape, float(m.load().double().sum()), float(m.load().double().square().sum()))
        for m in open_source(source, Filters()).matrices
    )
    assert seen(tmp_path) == seen(model)
    reasons = lambda source: {s.reason for s in open_source(source, Filters()).skipped}  # noqa: E731
    assert reasons(tmp_path) == reasons(model)


def changed(model: torch.nn.Module, choose: Callable[[str], bool], factor: float) -> torch.Tensor:
    """The logits when the matrices that are chosen by their group are multiplied by a factor."""
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("bias"):
                parameter.zero_()
        for m in open_source(other, Filters(min_dim=1)).matrices:
            if choose(m.group):
                parameters[m.name][m.index] *= factor
        return other(input_ids=torch.tensor([[3, 14, 15, 92, 65, 35]])).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def ends(*endings: str) -> Callable[[str], bool]:
    return lambda group: group.endswith(endings)


GATED = [n for n, f in FAMILIES.items() if any(group.endswith(".gate") for group in f.groups)]
AFTER = ends("gate_up_proj.weight", "experts.down_proj", "mlp.down_proj.weight", "mlp.output_linear.weight")


@pytest.mark.parametrize("name", GATED)
def test_what_is_called_gate_and_up_is_what_the_forward_pass_takes_for_them(name):
    model = build(name)
    plain, down = changed(model, lambda _: False, 1.0), ends("experts.down_proj", "mlp.output_linear.weight")
    if name in ("phi3", "glm"):
        down = ends("mlp.down_proj.weight")
    # Without gate nothing passes, as without the projection down: not so if any row or column were misplaced.
    silent = changed(model, ends(".gate"), 0.0)
    assert close(silent, changed(model, down, 0.0))
    assert not close(silent, plain)
    if name != "gpt_oss":  # whose up has one added to it
        assert close(changed(model, ends(".up"), 2.0), changed(model, down, 2.0))
        assert not close(changed(model, ends(".gate"), 2.0), changed(model, down, 2.0))
    else:
        assert not close(changed(model, ends(".up"), 0.0), silent)


ATTENDING = ["phi3", "gpt2", "openai-gpt", "mpt"]


@pytest.mark.parametrize("name", ATTENDING)
def test_what_is_called_q_k_and_v_is_what_the_forward_pass_takes_for_them(name):
    model = build(name)
    output = ends("self_attn.o_proj.weight", "attn.c_proj.weight", "attn.out_proj.weight")
    assert close(changed(model, ends(".v"), 0.0), changed(model, output, 0.0))
    assert close(changed(model, ends(".v"), 2.0), changed(model, output, 2.0))
    assert close(changed(model, ends(".q"), 0.0), changed(model, ends(".k"), 0.0))
    assert not close(changed(model, ends(".q"), 0.0), changed(model, lambda _: False, 1.0))


def test_fused_stored_ranks_every_expert_as_it_lies_there():
    matrices = open_source(build("mixtral"), Filters(fused="stored")).matrices
    stacked = [m for m in matrices if "gate_up_proj" in m.name]
    assert {m.shape for m in stacked} == {(96, 64)}
    assert [m.part for m in stacked[:4]] == ["[0]", "[1]", "[2]", "[3]"]
    assert [m.index for m in stacked[:2]] == [(0,), (1,)]


def test_stacked_biases_of_gpt_oss_are_no_matrices():
    skipped = {s.name: s.reason for s in open_source(build("gpt_oss"), Filters(min_dim=1)).skipped}
    assert skipped["model.layers.0.mlp.experts.gate_up_proj_bias"] == "stacked biases of experts, not a matrix"
    assert skipped["model.layers.1.mlp.experts.down_proj_bias"] == "stacked biases of experts, not a matrix"


def test_tied_heads_are_ranked_once_under_both_names():
    source = open_source(build("gpt2"), Filters(embeddings=True))
    (table,) = [m for m in source.matrices if m.name == "transformer.wte.weight"]
    assert table.aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in {m.name for m in source.matrices}


def test_dbrx_experts_lie_below_each_other_and_qkv_is_contiguous():
    dbrx = transformers.models.dbrx.modeling_dbrx
    config = transformers.DbrxConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=100)
    config.attn_config.kv_n_heads, config.attn_config.rope_theta = 2, 1e4
    config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size, config.ffn_config.hidden_size = 4, 48, 64
    model = torch.nn.Module()
    model.ffn, model.attn = dbrx.DbrxFFN(config), dbrx.DbrxAttention(config)
    model.config = config
    source = open_source(model, Filters())
    shapes = {m.group: m.shape for m in source.matrices}
    assert {shapes[f"ffn.experts.mlp.{w}"] for w in ("w1", "v1", "w2")} == {(48, 64)}
    assert (shapes["attn.Wqkv.weight.q"], shapes["attn.Wqkv.weight.v"]) == ((64, 64), (32, 64))
    (third,) = [m for m in source.matrices if m.key == "ffn.experts.mlp.v1[2]"]
    assert third.index == (slice(96, 144), slice(None))
    assert torch.equal(third.load(), model.ffn.experts.mlp.v1.view(4, 48, 64)[2])
    assert [s.name for s in source.skipped] == ["ffn.router.layer.weight"]


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda m: torch.nn.ModuleDict({"module": m}), "module."),
        (lambda m: torch.nn.Sequential(collections.OrderedDict(_orig_mod=m)), "_orig_mod."),
    ],
)
def test_wrappers_change_names_but_not_what_is_split(wrap, prefix):
    model = build("phi3")
    keys = [prefix + m.key for m in open_source(model, Filters()).matrices]
    assert [m.key for m in open_source(wrap(model), Filters()).matrices] == keys
    assert any(re.search(r"qkv_proj\.weight\.k$", key) for key in keys)
