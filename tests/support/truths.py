"""Values of small files, read by the definitions of their formats and with numpy alone, and what an entry must then be.

The number of an entry is held to LAPACK's SVD of these values in float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import numbers

import kappa_fast

EIGHT = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def values_of(folder: Path) -> dict[str, np.ndarray]:
    """By name, what the safetensors files of a folder hold, as float64."""
    found = {}
    for path in folder.glob("*.safetensors"):
        header, data = header_of(path)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            # Bytes beside eight-bit floats are the exponents of powers of two, as the OCP formats have them.
            kind = "F8_E8M0" if entry["dtype"] == "U8" and "_scale" in name else entry["dtype"]
            found[name] = _decoded(data[start:end], kind).reshape(entry["shape"])
    return found


def _decoded(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if not data:
        return np.empty(0)
    if dtype == "F8_E8M0":
        exponents = np.frombuffer(data, "u1").astype(np.int64)
        return np.where(exponents == 255, np.nan, np.ldexp(1.0, exponents - 127))
    if dtype in EIGHT:
        codes = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(EIGHT[dtype])
        return numbers(codes).astype(np.float64)
    return (
        np.frombuffer(data, NUMPY[dtype]).astype(np.float64) if dtype in NUMPY else np.frombuffer(data, "u1") * np.nan
    )


def q8_0(path: Path, name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Blocks of a half and 32 signed bytes."""
    blocks = np.frombuffer(path.read_bytes(), "u1", math.prod(shape) // 32 * 34, offset).reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (blocks[:, 2:].copy().view("i1").astype(np.float32) * scales).astype(np.float64).reshape(shape)


def truth_of(source: Path, entry: kappa_fast.TensorKappa) -> np.ndarray | None:
    if source.suffix == ".gguf":
        return None if entry.dtype == "float64" else _of_gguf(source, entry)
    stored = values_of(source)
    name = next((n for n in (*entry.aliases, entry.name) if n in stored), None)
    if name is None:
        return _loaded(source, entry)  # the codes have another name than the weight
    values = stored[name]
    if entry.quantization is not None:
        if not entry.quantization.startswith("fp8"):
            return _loaded(source, entry)
        scales = stored.get(name + "_scale_inv", stored.get(name + "_scale"))
        if scales is None or scales.ndim != 2:
            return _loaded(source, entry)  # by tensors or rows
        rows, columns = _block_of(source, values.shape, scales.shape)
        spread = np.repeat(np.repeat(scales, rows, 0), columns, 1)[: values.shape[0], : values.shape[1]]
        values = (values.astype(np.float32) * spread.astype(np.float32)).astype(np.float64)
    if name != entry.name:
        return values if values.shape == entry.shape else None
    values = values[entry.index] if entry.index else values
    return values.reshape(values.shape[0], -1)


def _block_of(folder: Path, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and columns share a scale: as the config says, else as many as the scales would need."""
    try:
        said = json.loads((folder / "config.json").read_bytes())["quantization_config"]["weight_block_size"]
        if [-(-shape[i] // said[i]) for i in range(2)] == list(scales):
            return said[0], said[1]
    except (ValueError, TypeError, LookupError, OSError, ArithmeticError):
        pass
    return -(-shape[0] // scales[0]), -(-shape[1] // scales[1])


def _loaded(source: Path, entry: kappa_fast.TensorKappa) -> np.ndarray:
    """What kappa_fast itself reads, where the tests of the format hold the reading to its definition."""
    from models import matrices

    return matrices(source)[entry.key].load().double().numpy()


def _of_gguf(path: Path, entry: kappa_fast.TensorKappa) -> np.ndarray | None:
    from kappa_fast.sources.gguf_header import read_header

    with open(path, "rb") as stream:
        header = read_header(stream, path.stat().st_size)
    info = next(t for t in header.tensors if t.name == entry.name)
    if entry.index or info.kind not in (0, 8):
        return None
    if info.kind == 8:
        return q8_0(path, info.name, info.shape, info.offset).reshape(info.shape[0], -1)
    data = np.frombuffer(path.read_bytes(), "<f4", math.prod(info.shape), info.offset)
    return data.astype(np.float64).reshape(info.shape[0], -1)


def not_of(entry: kappa_fast.TensorKappa, values: np.ndarray) -> str | None:
    """Why the entry is not that of a matrix with these values, None if it may be."""
    if tuple(values.shape) != tuple(entry.shape):
        return f"{entry.key!r} has shape {entry.shape}, and the file {values.shape}"
    if not np.isfinite(values).all():
        return None if entry.status == "non_finite" else f"{entry.key!r} is {entry.status}, and has no finite values"
    if entry.status == "non_finite":
        return f"{entry.key!r} is called non-finite"
    largest = np.abs(values).max(initial=0.0)
    if largest == 0:
        return None if entry.status == "rank_deficient" else f"{entry.key!r} is zero and {entry.status}"
    sigma = np.linalg.svd(np.ldexp(values, -math.frexp(largest)[1]), compute_uv=False)
    kappa = sigma[0] / sigma[-1] if sigma[-1] > 0 else math.inf
    slack = 1e-9 + kappa * 1e-14  # what LAPACK itself may be off by
    if entry.status == "rank_deficient":
        return None if kappa > 1e13 else f"{entry.key!r} is called singular, with kappa {kappa}"
    if kappa > 1e13:
        return None  # beyond what this SVD can tell
    if not entry.lower * (1 - slack) <= kappa <= entry.upper * (1 + slack):
        return f"{entry.key!r} has kappa {kappa}, outside of {entry.lower} to {entry.upper}"
    return None
