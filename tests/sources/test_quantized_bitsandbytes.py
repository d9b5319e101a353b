"""bitsandbytes' formats: values as its own kernels give them, from files, state dicts and modules."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes_codes import assert_ranked, hard
from models import EVERYTHING, matrices, reasons
from packing import minilm
from safetensors.torch import load_file, save_file
from torch import nn
from torchao_codes import peak_of

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.files import Region
from kappa_fast.sources.quantized.bitsandbytes import TABLES, Blocks, dequantize_4bit, dequantize_8bit

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCKS = 64


def quantized(weight: torch.Tensor, kind: str = "nf4", *, size: int = BLOCKS, nested: bool = False, **options: object):
    """Codes and quantization state, by the library."""
    return functional.quantize_4bit(weight, blocksize=size, compress_statistics=nested, quant_type=kind, **options)


def stored(name: str, weight: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that the library makes of a weight."""
    codes, state = quantized(weight, **options)
    return {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def by_numpy(codes: torch.Tensor, state: object) -> torch.Tensor:
    """The weights, worked out one by one in float32 from the definition of the format."""
    packed = codes.contiguous().view(torch.uint8).numpy().ravel()
    code = np.stack([packed >> 4, packed & 15], 1).ravel()[: math.prod(state.shape)]
    absmax = state.absmax.numpy()
    if state.nested:
        scale = state.state2.absmax.numpy()[np.arange(absmax.size) // state.state2.blocksize]
        absmax = state.state2.code.numpy()[absmax] * scale + np.float32(state.offset)
    values = np.array(TABLES[state.quant_type], np.float32)[code] * absmax[np.arange(code.size) // state.blocksize]
    return torch.from_numpy(values).reshape(state.shape).to(state.dtype)


# Values


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_values_of_the_codes_are_those_of_the_library(kind):
    assert TABLES[kind] == tuple(functional.get_4bit_type(kind, device="cpu").tolist())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_bit_for_bit_those_of_the_library(kind, size, nested):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((32, 2048), (3, 16, 2048)):  # rows that hold whole blocks: see the next test
            codes, state = quantized(torch.randn(shape, dtype=dtype), kind, size=size, nested=nested)
            expected = functional.dequantize_4bit(codes, state)
            given = {f"w.{k}": v for k, v in state.as_dict(packed=True).items()} | {"w": codes}
            found = [m.load() for m in matrices(given, Filters(min_dim=1)).values()]
            assert torch.equal(torch.stack(found).view(shape), expected)
            assert torch.equal(expected, by_numpy(codes, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(33, 45), (96, 80), (40, 100), (7, 9, 11), (4, 33, 31), (1, 300)])
def test_blocks_that_reach_from_one_row_or_expert_into_the_next_are_followed(shape, nested):
    # With rows that are not a multiple of the block, bitsandbytes' own kernel for AVX-512 takes the wrong scales.
    weight = torch.randn(shape) * torch.logspace(0, 3, shape[-1])
    codes, state = quantized(weight, nested=nested)
    expected = by_numpy(codes, state)
    given = {f"w.{k}": v for k, v in state.as_dict(packed=True).items()} | {"w": codes}
    found = matrices(given, Filters(min_dim=1))
    assert torch.equal(torch.stack([m.load() for m in found.values()]).view(shape), expected)
    if not nested:  # what is dequantized is near what was quantized: half the widest gap between two values
        largest = [block.max().expand_as(block) for block in weight.abs().flatten().split(BLOCKS)]
        assert bool(((expected - weight).abs().flatten() <= 0.16 * torch.cat(largest)).all())


def test_runs_longer_than_a_chunk_are_the_same():
    codes, state = quantized(torch.randn(1 << 11, 1 << 10).bfloat16(), size=4096)  # two chunks
    blocks = Blocks("nf4", 4096, (1 << 11, 1 << 10), torch.bfloat16)
    assert torch.equal(dequantize_4bit(codes, state.absmax, blocks).view(1 << 11, -1), by_numpy(codes, state))


def test_eight_bits_are_bit_for_bit_those_of_the_library():
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(50, 70).half())
    assert torch.equal(dequantize_8bit(codes, scales), functional.int8_vectorwise_dequant(codes, scales))


# Files and state dicts


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
def test_a_checkpoint_is_ranked_by_the_weights_that_the_library_reads_from_it(kind, nested, storage, tmp_path):
    weights = {"l.0.q.weight": hard(96, 128), "l.0.k.weight": hard(64, 128, 30.0).bfloat16()}
    tensors, expected = {"l.0.q.bias": torch.ones(96), "l.0.norm.weight": torch.ones(128)}, {}
    for name, weight in weights.items():
        tensors |= stored(name, weight, kind=kind, nested=nested, quant_storage=storage)
        expected[name] = functional.dequantize_4bit(*quantized(weight, kind=kind, nested=nested, quant_storage=storage))
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")):
        ranking = assert_ranked(source, expected, certify=True)
        assert {e.quantization for e in ranking} == {f"bitsandbytes {kind}, blocks of 64" + ", nested" * nested}
        assert {e.name: e.dtype for e in ranking} == {"l.0.q.weight": "float32", "l.0.k.weight": "bfloat16"}
        assert ranking.skipped == ()
        assert ranking.metadata["num_parameters"] == 96 * 128 + 64 * 128 + 96 + 128


def test_a_checkpoint_of_eight_bits_is_ranked_by_rows_times_scales(tmp_path):
    codes, scales, _ = functional.int8_vectorwise_quant(hard(96, 128).half())
    tensors = {"q.weight": codes, "q.SCB": scales, "q.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    expected = {"q.weight": functional.int8_vectorwise_dequant(codes, scales)}
    for source in (tmp_path, tensors):
        ranking = assert_ranked(source, expected)
        assert ranking[0].quantization == "bitsandbytes int8, a scale for each row"
        assert ranking[0].dtype == "float32"


def test_codes_are_read_where_the_experts_are_and_no_others(tmp_path, monkeypatch):
    weight = torch.randn(4, 32, 64)
    save_file(stored("mlp.experts.up", weight, nested=True), tmp_path / "model.safetensors")
    read: list[tuple[str, int]] = []
    original = Region.take

    def take(self: Region, *arguments: Any) -> torch.Tensor:
        tensor = original(self, *arguments)
        read.append((self.name, tensor.nbytes))
        return tensor

    monkeypatch.setattr(Region, "take", take)
    found = matrices(tmp_path)
    expected = functional.dequantize_4bit(*quantized(weight, nested=True))
    assert torch.equal(found["mlp.experts.up[2]"].load(), expected[2])
    assert sum(nbytes for name, nbytes in read if name == "mlp.experts.up") == 32 * 64 // 2


@pytest.mark.parametrize("shape", [(256, 256), (1536, 1024), (3, 256, 256), (3, 255, 255)])
@pytest.mark.parametrize("nested", [False, True])
def test_loading_takes_no_more_than_is_counted_and_not_far_less(shape, nested):
    m = next(iter(matrices(stored("experts.up", torch.randn(shape).bfloat16(), nested=nested)).values()))
    m.load()  # whatever is allocated once
    assert peak_of(m) <= m.nbytes + m.overhead <= 2 * peak_of(m)


def test_codes_move_before_they_are_dequantized():
    given = stored("q.weight", torch.randn(64, 64), nested=True) | stored("e", torch.randn(2, 32, 64))
    given |= stored("odd", torch.randn(3, 5, 7))
    for m in open_source(given, EVERYTHING).matrices:
        found = m.load(torch.device("meta"))
        assert (found.device.type, tuple(found.shape), found.dtype) == ("meta", m.shape, torch.float32)


def test_nothing_of_the_library_is_needed_to_rank_a_file(tmp_path, root):
    save_file(stored("q.weight", hard(64, 96), nested=True), tmp_path / "model.safetensors")
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; import kappa_fast; "
        f"print(kappa_fast.rank({str(tmp_path)!r})[0].kappa)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(kappa_fast.rank(tmp_path)[0].kappa, rel=1e-6)


# Real weights


def test_trained_weights_in_four_and_eight_bits():
    trained = minilm()
    names = [f"encoder.layer.{i}.{n}.weight" for i, n in ((0, "attention.self.query"), (5, "intermediate.dense"))]
    tensors, expected = {}, {}
    for name in names:
        tensors |= stored(name, trained[name].bfloat16(), nested=True)
        expected[name] = functional.dequantize_4bit(*quantized(trained[name].bfloat16(), nested=True))
        codes, scales, _ = functional.int8_vectorwise_quant(trained[name].half())
        other = name.replace("encoder", "eight")
        tensors |= {other: codes, other.removesuffix("weight") + "SCB": scales}
        expected[other] = functional.int8_vectorwise_dequant(codes, scales)
    assert_ranked(tensors, expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_8bit=True),
    ],
    ids=["4 bits", "8 bits"],
)
def test_what_transformers_loads_and_saves_is_ranked_alike(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=80),
        **dict(num_key_value_heads=2, bos_token_id=0, eos_token_id=1),
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(**options)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    names = [n for n, m in model.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    assert len(names) == 7
    state = lambda n: getattr(model.get_submodule(n), "state", None)  # noqa: E731
    expected = {f"{n}.weight": dequantize_bnb_weight(model.get_submodule(n).weight, state(n)) for n in names}
    reloaded = load(tmp_path / "saved")
    for source in (model, reloaded, tmp_path / "saved", model.state_dict()):
        found = matrices(source, Filters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].load(), expected[key]) for key in expected)


# Bad input


WEIGHT, STATE = "a.q.weight", "a.q.weight.quant_state.bitsandbytes__nf4"
ABSMAX = f"{WEIGHT}.absmax"

Tensors = dict[str, torch.Tensor]


def text(content: str) -> torch.Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


def without(name: str) -> Callable[[Tensors], object]:
    return lambda given: given.pop(name)


def changed(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda given: given.update({name: by(given[name])})


def said(**changes: object) -> Callable[[Tensors], object]:
    """The state says something else; what is "gone" is left out."""

    def change(given: Tensors) -> None:
        document = json.loads(bytes(given[STATE].tolist())) | changes
        given[STATE] = text(json.dumps({key: value for key, value in document.items() if value != "gone"}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(STATE), rf"'a\.q\.weight' of shape .* but '{STATE}' beside it is missing"),
        (without(ABSMAX), r"'a\.q\.weight\.absmax' beside it is missing"),
        (without(f"{WEIGHT}.nested_absmax"), r"'a\.q\.weight\.nested_absmax' beside it is missing"),
        (changed(ABSMAX, lambda t: t[1:]), r"'a\.q\.weight\.absmax' of shape \(63,\).*64 values"),
        (changed(ABSMAX, torch.Tensor.float), "absmax.*only quantized scales are uint8"),
        (changed(f"{WEIGHT}.nested_quant_map", lambda t: t[:16]), "nested_quant_map.*256 values are expected"),
        (changed(WEIGHT, lambda t: t[1:]), r"a weight of shape \(64, 64\) has two codes in a byte"),
        (changed(STATE, lambda _: text("{")), rf"quantization state of 'a\.q\.weight' \({STATE}\) is damaged"),
        (changed(STATE, lambda t: t[:0]), "is not a text"),
        (changed(STATE, torch.Tensor.float), "is not a text"),
        (changed(STATE, lambda t: t.repeat(1 << 12)), "is not a text"),
        (said(quant_type="fp4"), "quant_type 'fp4' under the name of 'nf4'"),
        (said(blocksize=0), "blocks of 0"),
        (said(blocksize=-64), "blocks of -64"),
        (said(blocksize="64"), "blocks of 64"),
        (said(shape=[]), r"is damaged .*a weight of shape \(\)"),
        (said(shape=None), "is damaged"),
        (said(shape=[64, True]), r"is damaged .*\(64, True\)"),
        (said(shape=[64, 65]), "has two codes in a byte|values are expected"),
        (said(dtype="int8"), "is damaged"),
        (said(nested_offset="gone"), "is damaged .*nested_offset"),
    ],
)
def test_companions_that_do_not_fit_are_named(change, message):
    given = stored(WEIGHT, torch.randn(64, 64), nested=True) | {"a.k.weight": torch.randn(64, 64)}
    change(given)
    with pytest.raises(SourceError, match=message):
        open_source(given, Filters())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("q.SCB", torch.ones(31), r"'q\.SCB' of shape \(31,\).*a float32 for each row is expected"),
        ("q.weight_format", torch.tensor(2, dtype=torch.uint8), r"'q\.weight' is in the order of one kind of GPU"),
    ],
)
def test_eight_bits_whose_companions_do_not_fit_are_named(name, tensor, message):
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(32, 32).half())
    with pytest.raises(SourceError, match=message):
        open_source({"q.weight": codes, "q.SCB": scales, name: tensor}, Filters())


def test_eight_bits_without_scales_are_codes():
    given = {"q.weight": torch.ones(32, 32, dtype=torch.int8), "k.weight": torch.randn(32, 32)}
    assert reasons(given) == {"q.weight": "int8 values: codes, indices or a mask, not weights"}


def test_a_state_that_is_none_of_the_library_leaves_codes_as_they_are():
    layer = nn.Linear(16, 16)
    layer.weight.quant_state = [torch.ones(16)]
    assert re.match(r"quantized codes that need their scales \(quant_state\)", reasons(layer)["weight"])
