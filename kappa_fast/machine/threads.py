"""Tasks side by side on the cores of a CPU, one thread of torch in each, and which matrices are small enough for that.

The executor and the predictions of ``planning/`` use it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from ..errors import ComputeError
from .helping import PATIENCE, Crew

T = TypeVar("T")
R = TypeVar("R")

# Several threads in one thin product spend their time waiting for each other, and without end when the machine has
# other work to do: next to three busy processes a two-layer TinyLlama took 3.6 to 4.1 s one thread each and 5 to 63 s
# with two threads in each. Which matrices are small enough depends on their shape alone, since the number of threads
# may change the last bits of a product.
SINGLE_THREAD_OPERATIONS = 3e10  # m n^2; such a matrix takes about 0.3 s on one core
# Threads for which there is no matrix help the others with matrices of so many operations, m n^2, or more: each part
# that they are given takes a millisecond then.
HELPED_OPERATIONS = 1e9
CREW = 8  # threads for each item at most, its own included: at 2048 columns there are 8 parts at a time to be done
# Columns for each thread from which on the parts of a large matrix, of 256 columns, are shared out among threads.
COLUMNS_FOR_EACH = 512

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


def fits_one_thread(shape: tuple[int, int]) -> bool:
    """Whether a matrix of this shape is worked on by one thread."""
    return float(max(shape)) * min(shape) ** 2 <= SINGLE_THREAD_OPERATIONS


def deserves_help(shape: tuple[int, int]) -> bool:
    """Whether a matrix of this shape, which one thread works on, is large enough for others to take parts of it."""
    return float(max(shape)) * min(shape) ** 2 >= HELPED_OPERATIONS


def _as_they_end(futures: Collection[Future[R]]) -> Iterator[Future[R]]:
    """Every future when it is done; none is held here afterwards, with what it has in memory."""
    ended: SimpleQueue[Future[R]] = SimpleQueue()
    for waited_for in futures:
        waited_for.add_done_callback(ended.put)
        del waited_for
    for _ in range(len(futures)):
        yield _next_of(ended)


def _next_of(queue: SimpleQueue[T]) -> T:
    """What comes next. A thread that waits for a lock misses a Ctrl-C that came right before it began to, until it
    wakes; so this one wakes every PATIENCE seconds.
    """
    while True:
        with contextlib.suppress(Empty):
            return queue.get(timeout=PATIENCE)


class _Beginning:
    """What every thread of a pool does first: it takes one thread of torch, and waits until all others have."""

    def __init__(self, count: int, crew: Crew | None) -> None:
        self._crew, self._begun = crew, threading.Barrier(count + 1)

    def __call__(self) -> None:
        if self._crew is not None:
            self._crew.join()
        torch.get_num_threads()  # the first call in a thread takes the number of the process, later ones its own
        torch.set_num_threads(1)
        with contextlib.suppress(threading.BrokenBarrierError):
            self._begun.wait()

    def of_all(self, submit: Callable[[], None]) -> None:
        """Submit something for every thread, so that all begin; torch has as many threads here as before.

        Raises:
            ComputeError: the system starts no thread.
        """
        with _beginning:  # what new threads begin with is one number for the process: only now it is that of workers
            threads = torch.get_num_threads()
            try:
                submit()
                self._begun.wait()
            except RuntimeError as error:
                raise no_thread(error) from error
            finally:
                self._begun.abort()
                torch.set_num_threads(threads)


@contextlib.contextmanager
def helped(shape: tuple[int, int], around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Within it others do the parts of a large matrix that this thread shares, one thread of torch for each part.

    Threads of torch that share a product wait for each other, which is long where the machine has other work: beside
    one busy process two of them took 1.54 s for a Gram matrix of 8192 x 4096, one 0.89 s, and two with parts of their
    own 0.61 s. On an idle machine there is no difference. Where there are few parts for each thread, or where the
    system starts none, torch's threads share each product.
    """
    with contextlib.ExitStack() as stack:
        threads = usual_threads()
        if 1 < threads <= min(shape) // COLUMNS_FOR_EACH:
            crew = Crew()

            def help_all() -> None:
                for _ in range(threads):
                    pool.submit(crew.help, around)

            begun = _Beginning(threads, crew)
            pool = ThreadPoolExecutor(threads, "kappa_fast", begun)
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            stack.callback(crew.close)
            with contextlib.suppress(ComputeError):
                begun.of_all(help_all)
                stack.enter_context(crew.lead(threads))
        yield


def each_on_one_thread(
    task: Callable[[T], R],
    items: Sequence[T],
    stop: threading.Event | None = None,
    helping: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> Generator[tuple[T, R], None, None]:
    """Pairs (item, task(item)) as they finish, at most as many at a time as torch has threads, one thread in each.

    The items are begun in their order: the longest should come first.

    An exception of a task, or one thrown into the iterator (Ctrl-C), waits for the tasks that are running and drops
    those that are not. A task for which the others leave no memory (a ComputeError that says so) is run again alone,
    when they are done. torch's number of threads is what it was, also for threads that others begin in the meantime.

    stop: is set by such an exception, for tasks that wait for something themselves.
    helping: makes the context in which threads without an item do parts of what tasks share() (machine/helping.py).
    Without it there are none.
    """
    if not items:
        return
    count = min(usual_threads(), len(items) * (1 if helping is None else CREW))
    crew = Crew()
    futures: dict[Future[R], T] = {}

    def submit() -> None:
        for item in items:
            futures[pool.submit(task, item)] = item
        if helping is not None:
            for _ in range(count):  # they wait in line behind the items
                pool.submit(crew.help, helping)

    begun = _Beginning(count, None if helping is None else crew)
    pool = ThreadPoolExecutor(count, "kappa_fast", begun)
    try:
        begun.of_all(submit)
        crowded = []
        for future in _as_they_end(futures):
            item = futures.pop(future)
            try:
                result = future.result()
            except ComputeError as error:
                if not error.out_of_memory:
                    raise
                crowded.append(item)
            else:
                yield item, result
            del future  # an exception holds what the task had in memory
        crew.close()
        for item in crowded:
            yield item, pool.submit(task, item).result()
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        crew.close()
        pool.shutdown(wait=True, cancel_futures=True)
