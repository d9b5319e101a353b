"""How much memory this process may still take, where less than what is free: by its control groups and its own limits.

A container sees all memory of its machine, and is ended by the kernel when it takes more than its control group may
have. The kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst have the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Of torch on the CPU, of a launch that Triton makes, of the libraries beside torch.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "_alloc_failed")

PROCESS = Path("/proc/self")
MOUNTED = Path("/sys/fs/cgroup")

# Of both versions: the folders that may hold the groups, the limit, what is used, and what of it is given back at need.
_VERSIONS = (
    (("", "unified"), "memory.max", "memory.current", "inactive_file"),
    (("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def headroom() -> int | None:
    """Bytes that the limits of this process leave; None where there are none, or the system does not tell."""
    found = [*_of_groups(), *_of_addresses()]
    return max(0, min(found)) if found else None


def physical() -> int | None:
    """Bytes of memory that the machine has, or that a control group admits; None if the system does not tell."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    return min([whole, *_limits_of_groups()]) if whole > 0 else None


def _of_groups() -> Iterator[int]:
    for group, limit, used, given_back in _groups():
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None:
            yield most - now + _in_table(group / "memory.stat", given_back)


def _limits_of_groups() -> Iterator[int]:
    found = (_number(group / limit) for group, limit, _, _ in _groups())
    return (most for most in found if most is not None)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """The groups of this process up to the root, and the names of their files."""
    for names, *files in _VERSIONS:
        path = _path_of(files[0] == "memory.max")
        for home in (MOUNTED / name for name in names):
            if path is None or not home.is_dir():
                continue
            # A group that is not below what is mounted here is the one that is: so it is in a container.
            group = home / path if (home / path).is_dir() else home
            while True:
                yield group, files[0], files[1], files[2]
                if group == home:
                    break
                group = group.parent


def _path_of(second: bool) -> str | None:
    """The group of this process, as a path below that of the mount."""
    for line in _text(PROCESS / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (second and number == "0" and not controllers) or (not second and "memory" in controllers.split(",")):
            return path.strip("/") if ".." not in path else ""
    return None


def _of_addresses() -> Iterator[int]:
    """What a limit of the address space leaves (``ulimit -v``)."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = _text(PROCESS / "statm").split()
        if limit != resource.RLIM_INFINITY and pages:
            yield limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, ValueError, OSError):  # Windows, macOS
        return


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() and len(text) < 20 else None  # "max": no limit


def _in_table(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for the ways in which torch and Python say that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _NO_MEMORY)
