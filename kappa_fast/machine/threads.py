"""Matrices side by side on the cores of a CPU, one thread each, unless a matrix is so large that all should share it.

Several threads in one thin product spend their time waiting for each other, and without end when the machine has other
work to do: next to three busy processes a two-layer TinyLlama took 3.6 to 4.1 s one thread each and 5 to 63 s with two
threads in each. Which matrices are small enough depends on their shape alone, since the number of threads may change
the last bits of a product.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from ..errors import ComputeError

T = TypeVar("T")
R = TypeVar("R")

SINGLE_THREAD_OPERATIONS = 3e10  # m n^2; such a matrix takes about 0.3 s on one core


_of_thread = threading.local()
_beginning = threading.Lock()


def usual_threads() -> int:
    """The number of threads that torch uses in this thread, never what another run has just said for its workers."""
    with _beginning:
        return torch.get_num_threads()


def no_thread(error: RuntimeError) -> ComputeError:
    """What to say where the system starts no thread."""
    return ComputeError(
        f"the system starts no thread ({error}): raise the limits of the process (ulimit -u, ulimit -v), or ask for "
        "fewer threads with torch.set_num_threads()"
    )


def stopping() -> bool:
    """Whether nobody waits for the task of this thread any more."""
    stop: threading.Event | None = getattr(_of_thread, "stop", None)
    return stop is not None and stop.is_set()


def fits_one_thread(shape: tuple[int, int]) -> bool:
    """Whether a matrix of this shape is worked on by one thread."""
    return float(max(shape)) * min(shape) ** 2 <= SINGLE_THREAD_OPERATIONS


def each_on_one_thread(task: Callable[[T], R], items: Sequence[T]) -> Generator[tuple[T, R], None, None]:
    """Pairs (item, task(item)) as they finish, at most as many at a time as torch has threads, one thread in each.

    An exception of a task, or one thrown into the iterator (Ctrl-C), waits for the tasks that are running and drops
    those that are not; a task that waits for something itself asks ``stopping()``. torch's number of threads is what it
    was, also for threads that others begin in the meantime.
    """
    if not items:
        return
    stop = threading.Event()
    count = min(usual_threads(), len(items))
    begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread takes the number of the process, later ones its own
        torch.set_num_threads(1)
        _of_thread.stop = stop
        with contextlib.suppress(threading.BrokenBarrierError):
            begun.wait()

    pool = ThreadPoolExecutor(count, "kappa_fast", begin)
    try:
        with _beginning:  # what new threads begin with is one number for the process: only now it is that of workers
            threads = torch.get_num_threads()
            try:
                futures = {pool.submit(task, item): item for item in items}
                begun.wait()
            except RuntimeError as error:
                raise no_thread(error) from error
            finally:
                begun.abort()
                torch.set_num_threads(threads)
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
