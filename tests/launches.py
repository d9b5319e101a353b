"""Counting the launches of kernels under the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

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
