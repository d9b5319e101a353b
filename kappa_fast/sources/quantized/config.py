"""Reads how a checkpoint was quantized, from ``quantization_config`` in config.json or from separate files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import SourceError
from ...io.documents import read_document
from ...io.limits import LARGEST_CONFIG, MOST_PATTERNS, check_limit
from ...io.patterns import Pattern, PatternError, Steps

# Files of older tools, with what quantization_config has today. The first one that exists is read.
AUTO_GPTQ = "quantize_config.json"
FILES = (AUTO_GPTQ, "quant_config.json", "hf_quant_config.json")
# Methods of which at least one format can be read.
METHODS = frozenset(
    {
        *(
            "quanto",
            "",
            "fp8",
            "fbgemm_fp8",
            "compressed-tensors",
            "modelopt",
            "quark",
            "mxfp4",
            "mlx",
            "hqq",
            "torchao",
        ),
        *("gptq", "awq", "auto-round", "intel/auto-round", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    }
)
# Keys under which configs list the modules that were not quantized.
_PLAIN = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")


def quantization_config(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how the weights in a directory were quantized; empty if no file says it.

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
    """Return whether a part of config.json was written by mlx-lm, as ``quantization`` or ``quantization_config``."""
    return isinstance(found, Mapping) and "quant_method" not in found and {"bits", "group_size"} <= found.keys()


def method_of(config: Mapping[str, Any]) -> str:
    """Return the name of the method in lower case, such as "gptq"; "" if the config does not have it."""
    method = config.get("quant_method")
    return method.lower() if isinstance(method, str) else ""


def unknown_method(config: Mapping[str, Any]) -> str:
    """Return the name of the method if none of its formats can be read; else, or without a name, ""."""
    method = method_of(config)
    return "" if method in METHODS else method


def whole_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of these settings that is an integer, or None."""
    found = [config.get(key) for key in keys]
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def is_left_plain(name: str, config: Mapping[str, Any]) -> bool:
    """Return True if the config says that the module of the weight ``name`` was not quantized.

    Raises:
        SourceError: a pattern in the config is not valid, or cannot be searched in a limited time.
    """
    return _lists_of(config).plain.covers(name.removesuffix(".weight"))


def scheme_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what ``config_groups`` of compressed-tensors say about the weight ``name``; empty if they say nothing.

    Groups that list the module by name come first, then groups with a matching regular expression, then groups that
    list a class. The class of a module is not known from its name, so the first group with a class is used.

    Raises:
        SourceError: as for ``is_left_plain``.
    """
    groups = _lists_of(config).groups
    module = name.removesuffix(".weight")
    ranks = [
        1 if module not in targets.names and targets.fits(module) else targets.rank(module) for _, targets in groups
    ]
    best = min(range(len(groups)), key=ranks.__getitem__, default=None)
    if best is None or (ranks[best] == 3 and len(groups) > 1):
        return {}
    weights = groups[best][0].get("weights")
    return weights if isinstance(weights, Mapping) else {}


class _Listed:
    """A list of modules in a config: by their names, by names of parents, or by patterns."""

    def __init__(self, items: Iterable[object], field: str) -> None:
        texts = [item for item in items if isinstance(item, str)]
        self._field, steps = field, Steps()
        wild = [t for t in texts if t.startswith("re:") or "*" in t]
        check_limit("quantization_config", f"the number of patterns in {field}", len(wild), MOST_PATTERNS)
        self.names = frozenset(texts) - frozenset(wild)
        self._patterns = [(t, self._pattern(t, steps)) for t in wild]
        self.has_class = any(not t.startswith("re:") and "." not in t for t in texts)

    def _pattern(self, text: str, steps: Steps) -> Pattern:
        if text.startswith("re:"):
            expression = text.removeprefix("re:")
        else:  # modelopt's wildcards
            expression = re.sub(r"(?:\\\*)+", ".*", re.escape(text)) + "$"
        try:
            return Pattern(expression, steps)
        except PatternError as error:
            raise self._refused(text, error) from error

    def _refused(self, text: str, error: PatternError) -> SourceError:
        return SourceError(
            f"quantization_config: {text[:100]!r} in {self._field} cannot be searched for ({error}): correct it in the "
            "config of the checkpoint, or remove it and leave its modules out with exclude=",
            says_exclude=True,
        )

    def fits(self, module: str, *, wildcards: bool = False) -> bool:
        """Return whether a pattern matches the beginning of a name; with ``wildcards`` those of modelopt count too."""
        for text, pattern in self._patterns:
            if wildcards or text.startswith("re:"):
                try:
                    if pattern.matches(module):
                        return True
                except PatternError as error:
                    raise self._refused(text, error) from error
        return False

    def covers(self, module: str) -> bool:
        """Return whether the list has the module, a parent of it, or any consecutive words of its name."""
        words = module.split(".")
        if self.names and any(
            ".".join(words[i:j]) in self.names for i in range(len(words)) for j in range(i + 1, len(words) + 1)
        ):
            return True
        return self.fits(module, wildcards=True)

    def rank(self, module: str) -> int:
        return 0 if module in self.names else 2 if self.has_class else 3


class _Lists:
    """The parsed lists of one config, kept for all of its tensors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        listed = [(key, config[key]) for key in _PLAIN if isinstance(config.get(key), list)]
        self.plain = _Listed([item for _, items in listed for item in items], " and ".join(key for key, _ in listed))
        groups = config.get("config_groups")
        found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
        self.groups = [
            (group, _Listed(_texts(group.get("targets")), "the targets of config_groups")) for group in found
        ]


def _texts(targets: object) -> Iterable[object]:
    return targets if isinstance(targets, Iterable) else ()


_latest: tuple[Mapping[str, Any], _Lists] | None = None


def _lists_of(config: Mapping[str, Any]) -> _Lists:
    global _latest
    known = _latest  # all tensors of a checkpoint have the same config
    if known is None or known[0] is not config:
        _latest = known = (config, _Lists(config))
    return known[1]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = read_document(path, LARGEST_CONFIG)
    except SourceError:
        raise
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({error}): repair it, or move it away to rank without it") from error
    inner = found.get("quantization", found) if isinstance(found, Mapping) else {}  # hf_quant_config.json nests it
    if not isinstance(inner, Mapping):
        return {}
    if path.name == AUTO_GPTQ and "bits" in inner and inner.get("quant_method", "gptq") == "gptq":
        # Older AutoGPTQ writes neither method nor layout; its second layout, Marlin, has a key of its own.
        layout = "marlin" if inner.get("is_marlin_format") else "gptq"
        return {"quant_method": "gptq", "checkpoint_format": layout, **inner}
    return dict(inner)
