"""The parameter groups of wrap(): selected parameters with and without weight decay."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..errors import OptionError
from ..matching.names import Target
from ..results.names import plain_name

# Besides nn.LayerNorm, transformers' Trainer applies no weight decay to these parameters.
NO_DECAY = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def patterns_without_decay(no_decay: object) -> list[re.Pattern[str]]:
    """The patterns of the option ``no_decay`` of wrap().

    Raises:
        OptionError: the option is neither a bool nor regular expressions.
    """
    if isinstance(no_decay, bool):
        return [re.compile(pattern) for pattern in NO_DECAY] if no_decay else []
    try:
        return [re.compile(p) for p in ([no_decay] if isinstance(no_decay, str) else no_decay)]  # type: ignore[attr-defined]
    except (re.error, TypeError) as error:
        raise OptionError(f"no_decay={no_decay!r}: give True, False or regular expressions ({error})") from error


def parted(
    model: nn.Module, targets: Sequence[Target], patterns: Sequence[re.Pattern[str]]
) -> list[tuple[dict[str, float], list[Target]]]:
    """The settings and the targets of each parameter group: with weight decay, then without; empty ones are omitted."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}

    def decays(target: Target) -> bool:
        named = any(pattern.search(plain_name(target.name)) for pattern in patterns)
        return not named and not (patterns and target.name.rpartition(".")[0] in norms)

    groups: list[tuple[dict[str, float], list[Target]]] = [
        ({}, [target for target in targets if decays(target)]),
        ({"weight_decay": 0.0}, [target for target in targets if not decays(target)]),
    ]
    return [group for group in groups if group[1]]
