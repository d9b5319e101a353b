"""Threads that have no matrix of their own help those that have one: they compute parts of it, or all of its parts.

The parts are the same whoever computes them, and each is computed by one thread of torch: no bit of a result depends on
how many helpers there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

Task = Callable[[], object]
PATIENCE = 0.25  # seconds

# crew: that of the thread, if it belongs to one; leads: whether the thread leaves all that it shares to the others
_thread = threading.local()


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
        self._helpers = self._gone = 0  # those that a leader counts on, and those that have ended

    def join(self) -> None:
        """Make this thread one of the crew for the rest of its life."""
        _thread.crew = self

    @contextlib.contextmanager
    def lead(self, helpers: int) -> Iterator[None]:
        """Within it the helpers do all that this thread shares, which has several threads of torch and waits."""
        self._helpers = helpers
        before = getattr(_thread, "crew", None), getattr(_thread, "leads", False)
        _thread.crew, _thread.leads = self, True
        try:
            yield
        finally:
            _thread.crew, _thread.leads = before

    def help(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Do what others share, within the context ``around()``, until ``close`` is called."""
        try:
            with around():
                while self._one():
                    pass
        finally:
            with self._lock:
                self._gone += 1
                self._finished.notify_all()

    def _one(self) -> bool:
        """Do one task; False when the crew is closed."""
        if (found := self._next()) is None:
            return False
        job, task = found
        try:
            task()
        except BaseException as error:
            job.error = error
        del found, task  # they hold what they work on
        with self._lock:
            job.running -= 1
            if job.error is not None or not (job.running or job.waiting):
                self._finished.notify_all()
        return True

    def close(self) -> None:
        """Let the helpers go: what is shared from now on is done by whoever shares it."""
        with self._lock:
            self._closed = True
            self._offered.notify_all()

    def work(self, tasks: Sequence[Task]) -> None:
        """Do the tasks, some or all of them by helpers; see share()."""
        job, leads = _Job(tasks), getattr(_thread, "leads", False)
        with self._lock:
            self._jobs.append(job)
            self._offered.notify(len(tasks) - (not leads))
        try:
            if leads:
                self._wait(lambda: job.error is not None or not (job.running or job.waiting) or not self._can_help)
            while job.error is None and (task := self._taken(job)) is not None:
                task()
        finally:
            with self._lock:
                job.waiting.clear()
            self._wait(lambda: not job.running)
            with self._lock:
                self._jobs.remove(job)
        if job.error is not None:
            raise job.error

    @property
    def _can_help(self) -> bool:
        return self._gone < self._helpers

    def _wait(self, until: Callable[[], bool]) -> None:
        """A thread that waits for a lock misses a Ctrl-C that came right before it began to: so it wakes at times."""
        with self._lock:
            while not self._finished.wait_for(until, PATIENCE):
                pass

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


def share(tasks: Sequence[Task], *, brief: bool = False) -> None:
    """Do tasks that do not depend on each other, with the help of threads of the crew that have nothing to do.

    They write to places of their own and need not be done in their order. An exception of one of them is raised here
    when none runs any more; those that had not begun are not done.

    brief: so few and short that a leader does them sooner with several threads of torch in each: the factor of
    8192 x 4096 takes 0.38 s then, and 0.53 s by helpers.
    """
    crew: Crew | None = getattr(_thread, "crew", None)
    if crew is not None and len(tasks) > 1 and not (brief and getattr(_thread, "leads", False)):
        crew.work(tasks)
        return
    for task in tasks:
        task()
