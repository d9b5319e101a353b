"""compressed-tensors: what its own compressors write, from disk and from state dicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import reasons
from packing import check, check_complete, packed, saved, trained

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

ROWS, COLUMNS = 72, 128
INT = {"type": "int", "symmetric": True}


def settings(format: str, weights: dict[str, object], targets: tuple[str, ...] = ("Linear",), **more: object) -> dict:
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups} | more


def compressed(
    weight: torch.Tensor, format: str, scheme: dict[str, object], *, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What the library writes for a weight, and what it reads back."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**scheme)
    parts = _blocks(weight, args)
    scale, zero = calculate_qparams(parts.amin((-2, -1)), parts.amax((-2, -1)), args)
    whole = torch.tensor([1000.0])
    state = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    if format == "nvfp4-pack-quantized":
        state |= {"weight_scale": (scale * whole).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole}
    compressor = BaseCompressor.get_value_from_registry(format)
    described = QuantizationScheme(targets=["Linear"], weights=args)
    stored = compressor.compress(state, described)
    return stored, compressor.decompress(dict(stored), described)["weight"].float().numpy()


def _blocks(weight: torch.Tensor, args) -> torch.Tensor:
    """Of shape (rows, groups, 1, entries), or what has one scale in the last two dimensions."""
    if args.strategy == "tensor":
        return weight[None]
    if args.strategy == "channel":
        return weight[:, None, None]
    if args.strategy == "block":
        (height, width), (rows, columns) = args.block_structure, weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)
    return weight.unflatten(1, (-1, args.group_size))[:, :, None]


PACKED = "pack-quantized"
SCHEMES = [
    (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 32}, "int4, groups of 32"),
    (PACKED, {"num_bits": 4, "strategy": "channel"}, "int4, a scale for each row"),
    (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "int4, groups of 32"),
    (PACKED, {"num_bits": 4, "strategy": "channel", "symmetric": False}, "int4, a scale for each row"),
    (PACKED, {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": False}, "int8, groups of 64"),
    (PACKED, {"num_bits": 2, "strategy": "group", "group_size": 32}, "int2, groups of 32"),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "int8, a scale for each row"),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, "int8, one scale"),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, "int8, a scale for each row"),
    ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}, "int8, groups of 32"),
]


@pytest.mark.parametrize(("format", "scheme", "words"), SCHEMES)
def test_integers_are_what_the_library_makes_of_them(format, scheme, words, tmp_path):
    stored, values = compressed(trained(ROWS, COLUMNS), format, INT | scheme)
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    ranking = check(saved(tmp_path, tensors, quantization_config=settings(format, INT | scheme)), {"a.weight": values})
    (entry,) = ranking
    assert (entry.quantization, entry.dtype) == (f"{words} (compressed-tensors)", "bfloat16")
    assert ranking.metadata["num_parameters"] == ROWS * COLUMNS
    check_complete(tensors, ranking)
    check(tensors, {"a.weight": values})


@pytest.mark.parametrize("columns", [100, 132])
def test_rows_that_do_not_fill_their_words(columns, tmp_path):
    scheme = INT | {"num_bits": 4, "strategy": "channel"}
    stored, values = compressed(trained(ROWS, columns), PACKED, scheme)
    assert stored["weight_packed"].shape[1] * 8 > columns
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    check(saved(tmp_path, tensors, quantization_config=settings(PACKED, scheme)), {"a.weight": values})


def test_inputs_in_the_order_of_their_activations(tmp_path):
    """As the library did until it left that to vLLM: each input has the scale and zero point of its group."""
    scheme = INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    stored, values = compressed(trained(ROWS, COLUMNS), PACKED, scheme)
    grouped = torch.arange(COLUMNS, dtype=torch.int32) // 32
    unpacked = stored | {"weight_packed": _permuted(stored["weight_packed"], order)}
    tensors = {f"a.{name}": tensor for name, tensor in unpacked.items()} | {"a.weight_g_idx": grouped[order]}
    path = saved(tmp_path, tensors, quantization_config=settings(PACKED, scheme))
    check(path, {"a.weight": values[:, order.numpy()]})
    never_set = torch.full((COLUMNS,), -1, dtype=torch.int32)
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()} | {"a.weight_g_idx": never_set}
    check(tensors, {"a.weight": values})
    tensors["a.weight_g_idx"] = (grouped + 1).int()
    with pytest.raises(SourceError, match=r"g_idx of 'a\.weight_packed' has groups from 1 to 4.* scales for 4"):
        kappa_fast.rank(tensors)


def _permuted(packed: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(packed, 4, torch.Size((packed.shape[0], len(order))))
    return pack_to_int32(codes[:, order].contiguous(), 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_experts(symmetric, tmp_path):
    scheme = INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    parts = [compressed(trained(ROWS, COLUMNS, layer), PACKED, scheme) for layer in range(3)]
    stored = {f"experts.{name}": torch.stack([part[name] for part, _ in parts]) for name in parts[0][0]}
    stored["experts.weight_shape"] = torch.tensor([3, ROWS, COLUMNS])
    truth = {f"experts.weight[{e}]": values for e, (_, values) in enumerate(parts)}
    ranking = check(saved(tmp_path, stored, quantization_config=settings(PACKED, scheme)), truth)
    check_complete(stored, ranking)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"num_bits": 8, "strategy": "channel"}, "a scale for each row"),
        ({"num_bits": 8, "strategy": "tensor"}, "one scale"),
        ({"num_bits": 8, "strategy": "block", "block_structure": [32, 48]}, "32x48 blocks"),
        ({"num_bits": 8, "strategy": "group", "group_size": 32}, "1x32 blocks"),
    ],
)
def test_fp8_is_what_the_library_rounds_to_bfloat16(scheme, words, tmp_path):
    scheme = {"type": "float", "symmetric": True} | scheme
    stored, values = compressed(trained(ROWS, COLUMNS), "float-quantized", scheme)
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    path = saved(tmp_path, tensors, quantization_config=settings("float-quantized", scheme))
    (entry,) = kappa_fast.rank(path)
    assert (entry.quantization, entry.dtype) == (f"fp8 e4m3, {words}", "float32")
    (found,) = open_source(path, Filters()).matrices
    np.testing.assert_array_equal(found.load().bfloat16().float().numpy(), values)


def test_nvfp4_is_what_the_library_rounds_to_bfloat16(tmp_path):
    scheme = {"type": "float", "symmetric": True, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    stored, values = compressed(trained(ROWS, COLUMNS), "nvfp4-pack-quantized", scheme)
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    path = saved(tmp_path, tensors, quantization_config=settings("nvfp4-pack-quantized", scheme))
    (found,) = open_source(path, Filters()).matrices
    assert (found.name, found.quantization) == ("a.weight", "nvfp4")
    np.testing.assert_array_equal(found.load().bfloat16().float().numpy(), values)


@pytest.mark.parametrize("format", ["mxfp8-quantized", "mxfp6-pack-quantized", "mxfp4-pack-quantized"])
@pytest.mark.parametrize("rows", [ROWS, 128])
def test_mxfp8_is_what_the_library_makes_of_it(format, rows, tmp_path):
    """And the narrower ones. 128 rows of four scales would fill a tile, but the config says that they lie in rows."""
    bits = int(format[4])
    scheme = {"type": "float", "symmetric": True, "num_bits": bits, "strategy": "group", "group_size": 32}
    stored, values = compressed(trained(rows, COLUMNS), format, scheme | {"scale_dtype": "torch.uint8"})
    assert stored["weight_scale"].dtype == torch.uint8
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    path = saved(tmp_path, tensors, quantization_config=settings(format, scheme))
    (found,) = open_source(path, Filters()).matrices
    assert (found.name, found.dtype) == ("a.weight", torch.float32)
    np.testing.assert_array_equal(found.load().bfloat16().float().numpy(), values)


@pytest.mark.parametrize("targets", [("re:.*q_proj$",), ("b.q_proj",), ("Linear",)])
def test_the_config_group_of_a_module_is_found_by_name_pattern_or_class(targets, tmp_path):
    narrow = INT | {"num_bits": 4, "strategy": "group", "group_size": 64}
    wide = INT | {"num_bits": 8, "strategy": "group", "group_size": 32}
    named = {"group_0": {"targets": list(targets), "weights": narrow}}
    others = {"group_1": {"targets": ["re:.*k_proj$"], "weights": wide}}
    config = settings(PACKED, narrow) | {"config_groups": others | named}
    tensors, truth = {}, {}
    for name, scheme in (("q_proj", narrow), ("k_proj", wide)):
        # Of 192 inputs three groups may be of 64 or of 128, and six of 32 or a few less.
        stored, truth[f"b.{name}.weight"] = compressed(trained(ROWS, 192), PACKED, scheme)
        tensors |= {f"b.{name}.{key}": tensor for key, tensor in stored.items()}
    found = {e.name: e.quantization for e in check(saved(tmp_path, tensors, quantization_config=config), truth)}
    assert found["b.q_proj.weight"] == "int4, groups of 64 (compressed-tensors)"
    assert found["b.k_proj.weight"] == "int8, groups of 32 (compressed-tensors)"


def test_one_scale_and_one_packed_zero_point_for_all(tmp_path):
    codes = torch.randint(0, 16, (ROWS, 32), generator=torch.Generator().manual_seed(0))
    tensors = {"a.weight_packed": packed(codes.numpy(), 4), "a.weight_shape": torch.tensor([ROWS, 32])}
    tensors |= {"a.weight_scale": torch.full((1, 1), 0.5).bfloat16(), "a.weight_zero_point": packed(np.array([[9]]), 4)}
    check(tensors, {"a.weight": (codes.numpy() - 9) * 0.5})


def test_a_state_dict_without_values_is_skipped():
    meta = {"a.weight_packed": torch.zeros(ROWS, 16, dtype=torch.int32), "a.weight_shape": torch.tensor([ROWS, 128])}
    meta |= {"a.weight_scale": torch.ones(ROWS, 1).bfloat16()}
    source = {name: tensor.to("meta") for name, tensor in meta.items()} | {"b.weight": torch.randn(16, 16)}
    assert set(reasons(source)) == {"a.weight_packed", "a.weight_scale"}
    fp8 = {"a.weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn), "a.weight_scale": torch.ones(64, 1)}
    source = {name: tensor.to("meta") for name, tensor in fp8.items()} | {"b.weight": torch.randn(16, 16)}
    assert reasons(source)["a.weight"] == "on the meta device, without values: rank from the checkpoint"


def test_what_a_format_of_the_library_lacks_here_is_skipped_by_name(tmp_path):
    scheme = INT | {"num_bits": 4, "strategy": "channel"}
    stored, _ = compressed(trained(ROWS, COLUMNS), PACKED, scheme)
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()} | {"b.weight": torch.randn(16, 16)}
    found = reasons(saved(tmp_path, tensors, quantization_config=settings("marlin-24", scheme)))
    assert found["a.weight_packed"].endswith("this quantized format is not supported (compressed-tensors)")


def test_a_missing_scale_zero_point_or_shape_is_an_error(tmp_path):
    scheme = INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    stored, _ = compressed(trained(ROWS, COLUMNS), PACKED, scheme)
    for name in ("weight_scale", "weight_zero_point", "weight_shape"):
        tensors = {f"a.{key}": tensor for key, tensor in stored.items() if key != name}
        path = saved(tmp_path, tensors, quantization_config=settings(PACKED, scheme))
        with pytest.raises(SourceError, match=rf"'a\.weight_packed' of shape .72, 16. holds .* '{name}' .* is missing"):
            kappa_fast.rank(path)


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("weight_scale", torch.ones(ROWS, 3).bfloat16(), "3 groups of 128 inputs do not determine"),
        ("weight_scale", torch.ones(ROWS + 1, 4).bfloat16(), "one scale, one for each row or one for each group"),
        ("weight_scale", torch.ones(ROWS, 4).int(), "scales are float16, bfloat16 or float32"),
        ("weight_shape", torch.tensor([ROWS, COLUMNS + 8]), "4 bits per weight do not fit"),
        ("weight_shape", torch.tensor([ROWS + 1, COLUMNS]), r"the shape in it is \(73, 128\)"),
        ("weight_shape", torch.ones(2), "2 integers are expected"),
        ("weight_zero_point", torch.ones(ROWS, 4).int(), "zero points do not match scales of shape"),
        ("weight_g_idx", torch.ones(3).int(), "the group of each of 128 inputs"),
    ],
)
def test_companions_that_do_not_fit_are_refused(name, tensor, why, tmp_path):
    scheme = INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    stored, _ = compressed(trained(ROWS, COLUMNS), PACKED, scheme)
    tensors = {f"a.{key}": value for key, value in (stored | {name: tensor}).items()}
    path = saved(tmp_path, tensors, quantization_config=settings(PACKED, scheme))
    with pytest.raises(SourceError, match=rf"'a\.{name}' of shape .* does not fit the codes 'a\.weight_packed'.*{why}"):
        kappa_fast.rank(path)
