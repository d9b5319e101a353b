"""Waves: groups of matrices that are worked on together under a memory budget."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch

from ..errors import OptionError
from ..machine.memory import headroom

T = TypeVar("T")

LARGEST_DEFAULT = 1 << 30  # or SHARE for each thread: on a CPU a wave only has to keep all cores busy
SHARE = 256 << 20
# Of what is free on an accelerator: at least, at first, at most. Pieces that do not fit and the workspaces of libraries
# take the rest; what they have loaded after a first run must not change the waves of a second.
SHARES = (0.7, 0.8, 0.9)
_given: dict[torch.device, int] = {}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(value: int | str | None) -> int | None:
    """A number of bytes from an int or a text such as "2GB", "512 MiB", "1.5G"; None stays None.

    Raises:
        OptionError: the text is no size, or the size is not positive.
    """
    if value is None:
        return None
    size: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([KMGT]?)(I?)B?\s*", value.upper())
        if match:
            number, unit, binary = match.groups()
            size = float(number) * (1024 ** " KMGT".index(unit) if binary and unit else _UNITS[unit])
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size is None or not 1 <= size < 1 << 63:
        raise OptionError(f"memory_budget={value!r} is no size in bytes; give a positive int or a text such as '2GB'")
    return int(size)


def default_budget(device: torch.device) -> int:
    """Bytes that a wave may take: most of what is free on an accelerator; on a CPU up to a quarter of it.

    On a CPU no more counts as free than the control groups and limits of the process leave it.

    On an accelerator what torch's allocator holds without using it is free as well; and while it is near enough, what
    an earlier run was given is given again, so that a second run cuts the same waves as the first.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        usable = free + unused
        earlier = _given.get(device, 0)
        if not SHARES[0] * usable <= earlier <= SHARES[2] * usable:
            _given[device] = int(SHARES[1] * usable)
        return _given[device]
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):  # macOS does not tell
        free = LARGEST_DEFAULT
    left = headroom()
    free = free if left is None else min(free, left)
    return min(free // 4, max(LARGEST_DEFAULT, SHARE * torch.get_num_threads()))


def cut(items: Sequence[T], size: Callable[[T], int], budget: int) -> Generator[list[T], None, None]:
    """Consecutive items whose sizes (bytes) add up to at most ``budget``; an item larger than that goes alone."""
    wave: list[T] = []
    used = 0
    for item in items:
        need = size(item)
        if wave and used + need > budget:
            yield wave
            wave, used = [], 0
        wave.append(item)
        used += need
    if wave:
        yield wave
