"""ComfyUI: a marker for every quantized weight, as a tensor or in the header of the file, names the format.

``weight.comfy_quant`` is JSON in bytes, such as {"format": "nvfp4"}; ``_quantization_metadata`` in the header has the
same for each layer. The layouts are those of comfy-kitchen: block scales of mxfp8 and nvfp4 are stored in the tiles of
128 x 4 of cuBLAS (its documentation, "1D block scaling factors layout"); of two four-bit codes in a byte the first is
the upper half. Values are computed in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from ...errors import SourceError
from ...io.documents import parse_json
from ..base import Stored
from .recipe import Candidate, Recipe, refuse
from .unpack import e2m1, scale_values, times_blocks

MARKER = "comfy_quant"
HEADER = "_quantization_metadata"
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
BLOCK = {"mxfp8": 32, "nvfp4": 16}
TILE = (128, 4)
# Keys of markers that are supported, or do not change the weight.
_SUPPORTED_KEYS = {"format", "full_precision_matrix_mult", "orig_dtype", "group_size"}
_LARGEST = 4096  # bytes of a marker


class Comfy:
    """Recognizes weights by the marker."""

    name = "comfyui"

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None:
        """See ``Family``. Raises SourceError if markers contradict each other or the tensors, or scales do not fit."""
        marker = _marker(candidate)
        if marker is None:
            return None
        kind = marker.get("format")
        more = sorted(key for key, value in marker.items() if key not in _SUPPORTED_KEYS and value)
        if more or kind not in (*FLOAT8, *BLOCK, "int8_tensorwise", "int8_blockwise"):
            what = f"{kind}" + (f" with {', '.join(more)}" if more else "")
            return f"quantized codes of ComfyUI ({what}); this quantized format is not supported"
        codes, scale = candidate.codes, candidate.find("scale", "scale_weight")
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise _contradicted(candidate, kind, f"shape {codes.shape}")
        if scale is None:
            raise candidate.missing("weight_scale")
        if kind in BLOCK:
            return _in_tiles(candidate, scale, kind)
        return _scaled(candidate, scale, kind, marker)


def _marker(candidate: Candidate) -> Mapping[str, Any] | None:
    """Return the marker of the weight, from its tensor or from the header; None if it has none."""
    layer = candidate.plain_name.removesuffix(".weight")
    found = []
    marker = candidate.find(MARKER)
    if marker is not None:
        if marker.dtype != torch.uint8 or not 0 < marker.numel <= _LARGEST:
            raise refuse(candidate, marker, "JSON as uint8 is expected")
        found.append(_object(repr(marker.name), bytes(marker.take(()).flatten().tolist())))
    layers = _layers(candidate.header[HEADER]) if HEADER in candidate.header else {}
    if isinstance(layers.get(layer), Mapping):
        found.append(layers[layer])
    if len(found) == 2 and found[0].get("format") != found[1].get("format"):
        raise SourceError(
            f"{marker.name if marker else layer!r} says {found[0].get('format')!r}, and {HEADER} in the header of the "
            f"file {found[1].get('format')!r}: correct one of them"
        )
    return found[0] if found else None


@lru_cache(maxsize=8)  # the header of a file is the same text for each of its weights
def _layers(header: str) -> Mapping[str, Any]:
    layers = _object(f"{HEADER} in the header of the file", header.encode()).get("layers")
    return layers if isinstance(layers, Mapping) else {}


def joined(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merge the headers of the files of a checkpoint; each may describe its own layers.

    Raises:
        SourceError: the description of layers in a header is damaged.
    """
    found = {key: text for header in headers for key, text in header.items()}
    said = dict.fromkeys(header[HEADER] for header in headers if HEADER in header)
    if len(said) > 1:
        found[HEADER] = json.dumps({"layers": {k: v for header in said for k, v in _layers(header).items()}})
    return found


def _object(where: str, text: bytes) -> Mapping[str, Any]:
    try:
        found = parse_json(text, where)
        if not isinstance(found, Mapping):
            raise TypeError("not a JSON object")
    except SourceError:
        raise
    except (ValueError, TypeError) as error:
        raise SourceError(
            f"{where} should describe how weights were quantized, but is damaged ({error}): download the file again"
        ) from error
    return found


def _contradicted(candidate: Candidate, kind: object, what: str) -> SourceError:
    return SourceError(
        f"the marker of {candidate.name!r} says {kind!r}, but the codes have {what}: correct one of them, or "
        "download the file again"
    )


def _scaled(candidate: Candidate, scale: Stored, kind: str, marker: Mapping[str, Any]) -> Recipe:
    """Return the recipe for FP8 or int8 with one scale, one for each row, or one for each square block."""
    codes = candidate.codes
    stored_in = (FLOAT8[kind], torch.uint8) if kind in FLOAT8 else (torch.int8,)
    if codes.dtype not in stored_in:
        raise _contradicted(candidate, kind, f"dtype {str(codes.dtype).removeprefix('torch.')}")
    if scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise refuse(candidate, scale, "a float32, float16 or bfloat16 is expected")
    rows, columns = codes.shape
    size = marker.get("group_size", 128)
    size = size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 128
    block, counts = (rows, columns), (1, 1)
    if kind == "int8_blockwise":
        block, counts = (size, size), (-(-rows // size), -(-columns // size))
    elif scale.numel != 1 and scale.shape in ((rows,), (rows, 1)):
        block, counts = (1, columns), (rows, 1)
    if scale.numel != counts[0] * counts[1] or (len(scale.shape) == 2 and scale.shape != counts and counts != (1, 1)):
        raise refuse(candidate, scale, f"{counts[0]} x {counts[1]} scales are expected")
    return Recipe(
        quantization=f"comfyui {kind}",
        shape=(rows, columns),
        dtype=torch.float32,
        inputs={"codes": codes, "scale": scale},
        dequantize=partial(_dequantize_plain, kind=kind, counts=counts, block=block),
        peak=1,
    )


def _in_tiles(candidate: Candidate, scale: Stored, kind: str) -> Recipe:
    codes, packed = candidate.codes, kind == "nvfp4"
    fitting = (torch.uint8,) if packed else (torch.float8_e4m3fn, torch.uint8)
    if codes.dtype not in fitting:
        raise _contradicted(candidate, kind, f"dtype {str(codes.dtype).removeprefix('torch.')}")
    rows, columns = codes.shape[0], codes.shape[1] * (2 if packed else 1)
    blocks = columns // BLOCK[kind]
    expected = (-(-rows // TILE[0]) * TILE[0], -(-blocks // TILE[1]) * TILE[1])
    dtypes = (torch.float8_e4m3fn, torch.uint8) if packed else (torch.uint8, torch.float8_e8m0fnu)
    if columns % BLOCK[kind] or scale.shape != expected or scale.dtype not in dtypes:
        raise refuse(candidate, scale, f"scales in tiles of {TILE[0]} x {TILE[1]}, {expected}, are expected")
    read = {"codes": codes, "scale": scale}
    if packed:
        whole = candidate.find("scale_2")
        if whole is None:
            raise candidate.missing("weight_scale_2")
        if whole.numel != 1 or whole.dtype != torch.float32:
            raise refuse(candidate, whole, "one float32 is expected")
        read["whole"] = whole
    return Recipe(
        quantization=f"comfyui {kind}",
        shape=(rows, columns),
        dtype=torch.float32,
        inputs=read,
        dequantize=partial(_dequantize_tiled, kind=kind, blocks=blocks),
        peak=5,
    )


def from_tiles(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return block scales in rows and columns; in a tile of 128 x 4, row 32 j + i begins at 16 i + 4 j."""
    high, wide = scale.shape[0] // TILE[0], scale.shape[1] // TILE[1]
    tiles = scale.contiguous().view(torch.uint8).reshape(high, wide, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(scale.shape)[:rows, :columns]
    return plain.contiguous().view(scale.dtype)


def _dequantize_plain(
    inputs: Mapping[str, torch.Tensor], *, kind: str, counts: tuple[int, int], block: tuple[int, int]
) -> torch.Tensor:
    codes = inputs["codes"].view(FLOAT8[kind]) if kind in FLOAT8 else inputs["codes"]
    return times_blocks(codes.to(torch.float32), inputs["scale"].float().reshape(counts), block)


def _dequantize_tiled(inputs: Mapping[str, torch.Tensor], *, kind: str, blocks: int) -> torch.Tensor:
    codes, stored = inputs["codes"], inputs["scale"]
    scale = from_tiles(stored, codes.shape[0], blocks)
    if kind == "nvfp4":
        values = e2m1((codes << 4) | (codes >> 4), torch.float32)
        spread = scale.view(torch.float8_e4m3fn).float() * inputs["whole"].reshape(1, 1)
    else:
        values, spread = codes.view(torch.float8_e4m3fn).float(), scale_values(scale)
    return times_blocks(values, spread, (1, BLOCK[kind]))
