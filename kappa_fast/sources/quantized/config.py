"""What a checkpoint says about how it was quantized: ``quantization_config`` of config.json, or files of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import SourceError

# Older tools wrote these; what they say is what quantization_config says today. The first one that is there counts.
AUTO_GPTQ = "quantize_config.json"
FILES = (AUTO_GPTQ, "quant_config.json", "hf_quant_config.json")
# Methods of which some format at least is read; what others have made of a weight nobody here can know.
METHODS = frozenset(
    {
        *("", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark", "mxfp4", "mlx", "hqq", "torchao"),
        *("gptq", "awq", "auto-round", "intel/auto-round", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    }
)
# Where configs list the modules that keep their weights as they were.
_PLAIN = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")


def quantization_config(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the weights in a directory were quantized; empty if nothing says so.

    Raises:
        SourceError: the file that should say it is damaged.
    """
    text = config.get("text_config")
    holders = [config, text] if isinstance(text, Mapping) else [config]
    for holder in holders:
        if is_of_mlx(holder.get("quantization")):
            return {**holder["quantization"], "quant_method": "mlx"}
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), Mapping):
                return dict(holder[key])
    for path in map(directory.joinpath, FILES):
        if path.is_file():
            return _read(path)
    return {}


def is_of_mlx(found: object) -> bool:
    """mlx-lm writes ``quantization`` into config.json, and the same once more as ``quantization_config``."""
    return isinstance(found, Mapping) and "quant_method" not in found and {"bits", "group_size"} <= found.keys()


def method_of(config: Mapping[str, Any]) -> str:
    """The name of the method, such as "gptq"; "" if the config is empty or does not say."""
    method = config.get("quant_method")
    return method.lower() if isinstance(method, str) else ""


def unknown_method(config: Mapping[str, Any]) -> str:
    """The name of the method if it is none whose files are read here; "" if it is, or if nothing is said."""
    method = method_of(config)
    return "" if method in METHODS else method


def whole_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these settings that is a whole number."""
    found = [config.get(key) for key in keys]
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def is_left_plain(name: str, config: Mapping[str, Any]) -> bool:
    """True if the config says that the module of the weight called ``name`` was not quantized."""
    module = name.removesuffix(".weight")
    listed = [item for key in _PLAIN if isinstance(config.get(key), list) for item in config[key]]
    return any(isinstance(item, str) and _covers(item, module) for item in listed)


def scheme_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors' ``config_groups`` say about the weight called ``name``; empty if nothing does.

    A group whose targets name the module comes before one that names it by a regular expression, and that before one
    that names its class: only the first two can be told from names, so the first group with a class is taken.
    """
    groups = config.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    module = name.removesuffix(".weight")

    def rank(group: Mapping[str, Any]) -> int:
        targets = group.get("targets")
        named = [t for t in targets if isinstance(t, str)] if isinstance(targets, Iterable) else []
        if module in named:
            return 0
        if any(t.startswith("re:") and matches(t.removeprefix("re:"), module) for t in named):
            return 1
        return 2 if any(not t.startswith("re:") and "." not in t for t in named) else 3

    best = min(found, key=rank, default=None)
    weights = best.get("weights") if best is not None and (rank(best) < 3 or len(found) == 1) else None
    return weights if isinstance(weights, Mapping) else {}


def _covers(item: str, module: str) -> bool:
    if item.startswith("re:"):
        return matches(item.removeprefix("re:"), module)
    if "*" in item:  # modelopt's wildcards
        return matches(re.escape(item).replace(r"\*", ".*") + "$", module)
    return module == item or module.startswith(item + ".") or module.endswith("." + item) or f".{item}." in module


def matches(pattern: str, module: str) -> bool:
    """Whether a regular expression fits the beginning of a name; one that is none fits nothing."""
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read ({error}): repair it, or move it away to rank without it") from error
    inner = found.get("quantization", found) if isinstance(found, Mapping) else {}  # so in hf_quant_config.json
    if not isinstance(inner, Mapping):
        return {}
    if path.name == AUTO_GPTQ and "bits" in inner and inner.get("quant_method", "gptq") == "gptq":
        # AutoGPTQ says neither method nor layout before it had others; then it had one more, under a key of its own.
        layout = "marlin" if inner.get("is_marlin_format") else "gptq"
        return {"quant_method": "gptq", "checkpoint_format": layout, **inner}
    return dict(inner)
