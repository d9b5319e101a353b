"""Counting the launches of kernels under the interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction


@contextmanager
def counted(*, run: bool = True) -> Iterator[list[str]]:
    """The names of all kernels launched inside, in order; with ``run=False`` they are counted and not run."""
    names: list[str] = []
    original = InterpretedFunction.run

    def launch(self, *arguments, **options):
        names.append(self.fn.__name__.strip("_").removesuffix("_kernel"))
        return original(self, *arguments, **options) if run else None

    with patch.object(InterpretedFunction, "run", launch):
        yield names


class Launch(NamedTuple):
    """What the compiler is asked for: ``constants`` and ``types`` are pairs of a name and what it is compiled for.

    Tensors count by dtype and alignment.
    """

    file: str
    kernel: str
    constants: frozenset[tuple[str, str]]
    types: frozenset[tuple[str, str]]
    num_warps: int
    num_stages: int | None


@contextmanager
def specialized() -> Iterator[set[Launch]]:
    """All that differ inside."""
    found: set[Launch] = set()
    original = InterpretedFunction.run

    def launch(self, *arguments, **options):
        signature = inspect.signature(self.fn)
        bound = signature.bind(*arguments, **{k: v for k, v in options.items() if k in signature.parameters}).arguments
        fixed = {name for name, p in signature.parameters.items() if "constexpr" in str(p.annotation)}
        constants = frozenset((name, str(value)) for name, value in bound.items() if name in fixed)
        types = frozenset((name, _type(value)) for name, value in bound.items() if name not in fixed)
        chosen = (options.get("num_warps", 4), options.get("num_stages"))
        found.add(Launch(self.fn.__module__, self.fn.__name__, constants, types, *chosen))
        return original(self, *arguments, **options)

    with patch.object(InterpretedFunction, "run", launch):
        yield found


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}, {'aligned' if value.data_ptr() % 16 == 0 else 'odd'}"
    return "i64" if isinstance(value, int) and abs(value) >= 2**31 else type(value).__name__
