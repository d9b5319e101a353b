"""Parameters of which each process holds a run of entries: those of FSDP1 and of DeepSpeed's ZeRO-3.

Both lay parameters out in a row, pad it, and give each process of a group an equal part of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ShardedError
from .spread import Piece, Spread

WRAPPER = "FullyShardedDataParallel"


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is what FSDP1 puts around a module."""
    return any(kind.__name__ == WRAPPER for kind in type(module).__mro__) and hasattr(module, "_fsdp_wrapped_module")


def is_partitioned(tensor: Any) -> bool:
    """Whether this is a parameter of ZeRO-3 that is not gathered."""
    known = hasattr(tensor, "ds_tensor") and hasattr(tensor, "ds_process_group")
    return known and tuple(tensor.shape) != tuple(tensor.ds_shape)


def spread_by_wrapper(wrapper: Any, name: str) -> Iterator[tuple[nn.Module, str, Spread]]:
    """The modules, and names in them, of all parameters that one wrapper of FSDP1 has flattened, and what is there.

    Args:
        name: of the wrapper, for those of the parameters.

    Raises:
        ShardedError: it is in a state, or of a kind, that is not understood.
    """
    handle = getattr(wrapper, "_handle", None)
    if handle is None:  # there was nothing to flatten
        return
    flat = handle.flat_param
    _check_state(handle, flat, name or type(wrapper).__name__)
    ranks = _ranks_of(handle.process_group)
    shard: torch.Tensor = getattr(flat, "_local_shard", flat).detach()
    offsets = [first for first, padding in _offsets(flat) if not padding]
    made = {}
    for info, fqn, shape, start in zip(flat._param_infos, flat._fqns, flat._shapes, offsets, strict=True):
        numel, size = math.prod(shape), int(shard.numel())
        cut = handle.uses_sharded_strategy
        pieces = tuple(_cut(start, numel, size, ranks)) if cut else _all_of(start, numel, ranks)
        how = f"a row of {size * len(ranks)} on {len(ranks)} processes"
        full = f"{name}.{fqn}" if name else fqn
        spread = Spread(full, "FSDP", how, ranks, tuple(shape), flat.dtype, shard.device, pieces, shard, is_flat=True)
        made[id(info.module), info.param_name] = spread
        yield info.module, info.param_name, spread
    for shared in flat._shared_param_infos:
        yield shared.module, shared.param_name, made[id(shared.prim_module), shared.prim_param_name]


def names_within(name: str, parameter: Any) -> list[str]:
    """The names of the parameters that FSDP1 has flattened into this one; its own where it is no such row."""
    inside = getattr(parameter, "_fqns", None)
    if inside is None:
        return [name]
    prefix = name.rpartition("_flat_param")[0]
    return [f"{prefix}{each}" for each in inside]


def spread_by_zero(name: str, tensor: Any) -> Spread:
    """A parameter of ZeRO-3 of which this process has a part."""
    ranks = _ranks_of(tensor.ds_process_group)
    shard: torch.Tensor = tensor.ds_tensor.detach()
    shape = tuple(tensor.ds_shape)
    numel, size = math.prod(shape), int(shard.numel())
    problem = None
    if str(getattr(tensor.ds_tensor, "status", "AVAILABLE")).rpartition(".")[2] != "AVAILABLE":
        problem = "its part here is not in memory (offloaded to a disk)"
    elif shard.dim() != 1 or shard.dtype != tensor.dtype or size * len(ranks) < numel or not shard.is_floating_point():
        problem = f"its part here is {tuple(shard.shape)}, {shard.dtype} of {shape}, {tensor.dtype}"
    pieces = () if problem else tuple(_cut(0, numel, size, ranks))
    how = f"a row of {size * len(ranks)} on {len(ranks)} processes"
    problem = None if problem is None else f"partitioned by ZeRO-3 in a way that is not read: {problem}"
    return Spread(name, "ZeRO-3", how, ranks, shape, tensor.dtype, shard.device, pieces, shard, True, problem)


def _check_state(handle: Any, flat: Any, name: str) -> None:
    if "HYBRID" in str(getattr(handle, "_sharding_strategy", "")):
        raise ShardedError(f"{name} is sharded by FSDP1 with a hybrid strategy, which is not read: {_ELSE}")
    if handle.uses_sharded_strategy and not handle.is_sharded(flat):
        raise ShardedError(
            f"{name} is gathered at the moment, and FSDP1 may hold newer values elsewhere: rank between two steps of "
            "training, or the checkpoint directory"
        )
    if any(extension is not None for extension in flat._param_extensions):
        raise ShardedError(f"{name} is sharded by FSDP1 and by something else, which is not read: {_ELSE}")


_ELSE = "use FSDP2, or rank the checkpoint directory"


def _offsets(flat: Any) -> list[tuple[int, bool]]:
    """Where each parameter, or what fills gaps between them, begins in the row."""
    starts = itertools.accumulate(flat._numels_with_padding, initial=0)
    return list(zip(starts, flat._is_padding_mask, strict=False))


def _cut(start: int, numel: int, size: int, ranks: Sequence[int]) -> Iterator[Piece]:
    """What of a parameter is on each process, where every one has ``size`` entries of a row that it is a part of."""
    for number, rank in enumerate(ranks):
        first, last = max(start, number * size), min(start + numel, (number + 1) * size)
        if first < last:
            yield Piece((first - start,), (last - first,), (first - number * size,), (rank,))


def _all_of(start: int, numel: int, ranks: tuple[int, ...]) -> tuple[Piece, ...]:
    return (Piece((0,), (numel,), (start,), ranks),)


def _ranks_of(group: Any) -> tuple[int, ...]:
    from torch import distributed

    return tuple(distributed.get_process_group_ranks(group))
