"""Threads that have no matrix of their own help those that have one: they compute parts of it.

The parts are the same whoever computes them, and each is computed by one thread of torch: no bit of a result depends on
how many helpers there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

Task = Callable[[], object]

_thread = threading.local()  # crew: that of the thread, if it belongs to one


class _Job:
    """The parts of one matrix that are to be done now, in any order."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.waiting = deque(tasks)
        self.running = 0  # by helpers
        self.error: BaseException | None = None


class Crew:
    """The threads of one pool: each calls ``join``, those without a matrix ``help``, those with one ``share``."""

    def __init__(self) -> None:
        self._jobs: list[_Job] = []
        self._lock = threading.Lock()
        # Helpers wait for the one and those who share for the other: each wakes no more threads than it has use for.
        self._offered, self._finished = threading.Condition(self._lock), threading.Condition(self._lock)
        self._closed = False

    def join(self) -> None:
        """Make this thread one of the crew for the rest of its life."""
        _thread.crew = self

    def help(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Do what others share, within the context ``around()``, until ``close`` is called."""
        with around():
            while (found := self._next()) is not None:
                job, task = found
                try:
                    task()
                except BaseException as error:
                    job.error = error
                del task  # it holds what it works on
                with self._lock:
                    job.running -= 1
                    if not job.running:
                        self._finished.notify_all()

    def close(self) -> None:
        """Let the helpers go: what is shared from now on is done by whoever shares it."""
        with self._lock:
            self._closed = True
            self._offered.notify_all()

    def work(self, tasks: Sequence[Task]) -> None:
        """Do the tasks, some of them by helpers; see share()."""
        job = _Job(tasks)
        with self._lock:
            self._jobs.append(job)
            self._offered.notify(len(tasks) - 1)
        try:
            while job.error is None and (task := self._taken(job)) is not None:
                task()
        finally:
            with self._lock:
                job.waiting.clear()
                self._finished.wait_for(lambda: not job.running)
                self._jobs.remove(job)
        if job.error is not None:
            raise job.error

    def _taken(self, job: _Job) -> Task | None:
        with self._lock:
            return job.waiting.popleft() if job.waiting else None

    def _next(self) -> tuple[_Job, Task] | None:
        """A task of the oldest job that has one waiting, as soon as there is one; None when the crew is closed."""
        with self._lock:
            while not self._closed:
                for job in self._jobs:
                    if job.waiting:
                        job.running += 1
                        return job, job.waiting.popleft()
                self._offered.wait()
        return None


def share(tasks: Sequence[Task]) -> None:
    """Do tasks that do not depend on each other, with the help of threads of the crew that have nothing to do.

    They write to places of their own and need not be done in their order. An exception of one of them is raised here
    when none runs any more; those that had not begun are not done.
    """
    crew: Crew | None = getattr(_thread, "crew", None)
    if crew is not None and len(tasks) > 1:
        crew.work(tasks)
        return
    for task in tasks:
        task()
