"""What a checkpoint says about how it was quantized: ``quantization_config`` of config.json, or files of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import SourceError

# Older tools wrote these; what they say is what quantization_config says today. The first one that is there counts.
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def quantization_config(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the weights in a directory were quantized; empty if nothing says so.

    Raises:
        SourceError: the file that should say it is damaged.
    """
    text = config.get("text_config")
    holders = [config, text] if isinstance(text, Mapping) else [config]
    for holder in holders:
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), Mapping):
                return dict(holder[key])
    for path in map(directory.joinpath, FILES):
        if path.is_file():
            return _read(path)
    return {}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read ({error}): repair it, or move it away to rank without it") from error
    inner = found.get("quantization", found) if isinstance(found, Mapping) else {}  # so in hf_quant_config.json
    return dict(inner) if isinstance(inner, Mapping) else {}
