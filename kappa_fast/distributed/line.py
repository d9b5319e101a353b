"""What ranks tell each other, through the store of their process group, and how they notice that one is gone.

The store (torch.distributed.Store) and no collectives: a collective has no answer to a rank that is gone but to wait,
does not say which one it is, and with nccl ends the process. A thread of its own talks to the store, so that a store
that does not answer stops nobody.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import ProcessGroupError
from ..machine import signals as stops

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

R = TypeVar("R")

BEATS = 20  # signs of life within a timeout, at least
SLOWEST = 0.5  # seconds between two of them,
FEW = 50  # as long as there are no more ranks than this: each reads the signs of all, and one store has them
GLANCE = 0.05  # seconds between two looks at what another thread has to say
AGAIN = "start all ranks again: what is in a cache (cache=) is kept, and they go on from there"


class Failure(NamedTuple):
    """Why no rank can go on. ``kind``: "error", "interrupted", "lost" or "store"; ``rank``: whose fault it is."""

    kind: str
    rank: int
    message: str


class Line:
    """One rank's line to the others, for one call of rank(). ``rank`` and ``size`` are those within the group.

    Every rank gives a sign of life many times within ``timeout`` (seconds), with the time since its work last moved on.
    One whose sign, or whose work, stands still for as long as the timeout is lost, and all others fail with its number.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        """``store`` may hold what earlier calls have left, of processes that are gone too."""
        self.rank, self.size, self.timeout = rank, size, timeout
        self.sent = self.received = 0  # bytes of what was posted, and of what others have posted
        self._store = store
        self._interval = min(timeout / BEATS, SLOWEST * max(1.0, size / FEW))
        self._patience = timeout - 2 * self._interval  # so that it is told within the timeout
        now = time.monotonic()
        self._signs = {other: ("", now) for other in range(size) if other != rank}  # what it was, and since when
        self._pause = min(self._interval, 0.005 + 1e-4 * size)  # while ranks join
        self._beats, self._name, self._invited = 0, "", dict[str, str]()
        self._moved = self._answered = now
        self._failure: Failure | None = None
        self._ended = False
        self._posted: list[str] = []
        self._counters: dict[str, None] = {}
        self._requests: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]]] = queue.SimpleQueue()
        # A daemon: where the store's process is stopped, the call never comes back, and must not keep this one.
        self._thread = threading.Thread(target=self._run, name="kappa_fast_line", daemon=True)
        self._thread.start()

    def moved(self) -> None:
        """The work has moved on.

        Raises:
            ProcessGroupError: another rank is lost or has failed, or the store cannot be reached.
            KeyboardInterrupt: a signal has come.
        """
        self._moved = time.monotonic()
        stops.check()
        silent = self._moved - self._answered
        if self._failure is None and silent > self._patience:
            self._failure = _unreachable(f"it has not answered for {silent:.3g} s")
        if self._failure is not None:
            if self._failure.kind == "interrupted":  # Ctrl-C reaches all ranks, not all of them at once
                time.sleep(1.0)
                stops.check()
            raise ProcessGroupError(self._failure.message, self._failure.rank)

    def ask(self, what: Callable[[Store], R]) -> R:
        """What the store answers; ``what`` must not wait for other ranks. Raises as ``moved``."""
        self.moved()
        answer: Future[R] = Future()
        self._requests.put((what, answer))
        while True:
            try:
                return answer.result(GLANCE)
            except NotYet:
                self.moved()
            except RuntimeError as error:  # of torch.distributed, which has classes of its own for a few
                self._failure = self._failure or _unreachable(_in_a_line(error))
                self.moved()

    def post(self, key: str, value: Any) -> None:
        """Give JSON to all ranks, under a key that is used once. Raises as ``moved``."""
        data = json.dumps(value)
        self.sent += len(data)
        self._posted.append(key)
        self.ask(lambda store: store.set(key, data))

    def find(self, key: str) -> Any:
        """What was posted under the key, None if nothing was yet. Raises as ``moved``."""
        found = self.ask(lambda store: store.get(key) if store.check([key]) else None)
        if found is None:
            return None
        self.received += len(found)
        return json.loads(found)

    def expect(self, key: str) -> Any:
        """What is posted under the key, once it is there. Raises as ``moved``."""
        return self.until(lambda: self.find(key))

    def until(self, asked: Callable[[], R | None]) -> R:
        """The first answer that is not None. Raises as ``moved``."""
        pause = 0.002
        while (found := asked()) is None:
            time.sleep(pause)
            pause = min(2 * pause, GLANCE)
        return found

    def count(self, key: str, by: int = 1) -> int:
        """Add to a counter that all ranks share; its value afterwards. Raises as ``moved``."""
        self._counters[key] = None
        return self.ask(lambda store: store.add(key, by))

    def meet(self, key: str) -> None:
        """Wait until all ranks have come here. Raises as ``moved``."""
        self.count(key)
        self.until(lambda: self.count(key, 0) >= self.size or None)

    def fail(self, kind: str, message: str) -> None:
        """Tell all others that this rank cannot go on, unless there is another failure already. Never raises."""
        if self._failure is None:
            self._failure = Failure(kind, self.rank, message)
            self._try(self._announce)

    def close(self) -> None:
        """End the line. Whoever may hold the store stays until the others have read what they need. Never raises."""
        failure = self._failure
        if failure is None:  # all have come to the end, and so have read everything
            self._try(lambda store: [store.delete_key(key) for key in self._posted])
        self._try(lambda store: store.add("left", 1))
        if self.rank == 0 or (failure is not None and failure.rank == self.rank):
            lost = failure is not None and failure.kind == "lost"
            now = time.monotonic()
            # A rank that hangs does not leave, but its line hears why the others did.
            earliest, latest = now + (2 * self._interval if lost else 0.0), now + 2 * self._interval + 1.0
            while (left := self._try(lambda store: store.add("left", 0))) is not None:
                now = time.monotonic()
                if now > latest or (left >= self.size - lost and now > earliest):
                    break
                time.sleep(0.01)
            if failure is None and left == self.size:
                used = [*self._counters, *map(_sign, range(self.size)), "left"]
                self._try(lambda store: [store.delete_key(key) for key in used])
        self._ended = True
        self._requests.put((lambda store: None, Future()))
        self._thread.join(2 * self._interval)

    def _try(self, what: Callable[[Store], R]) -> R | None:
        if self._failure is not None and self._failure.kind == "store":
            return None
        answer: Future[R] = Future()
        self._requests.put((what, answer))
        try:
            return answer.result(2 * self._interval)
        except (NotYet, RuntimeError):
            return None

    # What follows runs in the thread of the line.

    def _run(self) -> None:
        try:
            shared = _of_its_own(self._store)
            store = self._joined(shared)
            due = 0.0
            while not (self._ended or (self._failure is not None and self._failure.kind == "store")):
                try:
                    what, answer = self._requests.get(timeout=max(0.0, due - time.monotonic()))
                except queue.Empty:
                    due = time.monotonic() + (self._beat(store, shared) if store is not None else self._interval)
                    self._answered = time.monotonic()
                    continue
                try:
                    answer.set_result(what(store) if store is not None else None)
                    self._answered = time.monotonic()
                except Exception as error:
                    answer.set_exception(error if isinstance(error, RuntimeError) else RuntimeError(str(error)))
        except Exception as error:
            self._failure = self._failure or _unreachable(_in_a_line(error))

    def _joined(self, shared: Store) -> Store | None:
        """The part of the store that is for this call only; None where rank 0 does not come.

        A store may outlive the processes that have written to it: torchrun's does when it starts them again. So rank 0
        makes up a name for each call, and says whom it has invited by what they have made up themselves.
        """
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        if self.rank == 0:
            self._name = secrets.token_hex(8)
            return PrefixStore(self._name, shared)
        mine = secrets.token_hex(8)
        shared.set(f"hello/{self.rank}", mine)
        started = time.monotonic()
        while not self._ended:
            if shared.check(["session"]):
                name, invited = json.loads(shared.get("session"))
                if invited.get(str(self.rank)) == mine:
                    return PrefixStore(name, shared)
            self._answered = time.monotonic()
            if self._answered - started > self._patience:
                self._failure = _lost(0, self.timeout, came=False, works=False)
                break
            time.sleep(self._pause)
        return None

    def _invite(self, shared: Store) -> None:
        """Tell those who wait, and have not come yet, what this call is called."""
        waiting = [other for other, (sign, _) in self._signs.items() if not sign and shared.check([f"hello/{other}"])]
        invited = {str(other): shared.get(f"hello/{other}").decode() for other in waiting}
        if invited and invited != self._invited:
            self._invited = invited
            shared.set("session", json.dumps([self._name, invited]))

    def _beat(self, store: Store, shared: Store) -> float:
        """A sign of life, and a look at those of the others; seconds until the next."""
        if self.rank == 0 and not all(sign for sign, _ in self._signs.values()):
            self._invite(shared)
        self._beats += 1
        now = time.monotonic()
        store.set(_sign(self.rank), f"{self._beats} {now - self._moved:.3f}")
        if self._failure is not None:
            return self._interval
        if store.check(["failure"]):
            self._failure = Failure(*json.loads(store.get("failure")))
            return self._interval
        for other, sign in self._read_signs(store).items():
            before, since = self._signs[other]
            if sign != before:
                since = now
                self._signs[other] = sign, now
            idle = float(sign.split()[1]) if sign else 0.0
            if now - since + idle > self._patience:
                self._failure = _lost(other, self.timeout, came=bool(sign), works=now - since < idle)
                self._announce(store)
                break
        return self._interval if all(sign for sign, _ in self._signs.values()) else self._pause

    def _read_signs(self, store: Store) -> dict[int, str]:
        come = [other for other, (sign, _) in self._signs.items() if sign or store.check([_sign(other)])]
        keys = [_sign(other) for other in come]
        extended: bool = store.has_extended_api()  # type: ignore[attr-defined]
        many = store.multi_get(keys) if keys and extended else [store.get(key) for key in keys]
        return {**dict.fromkeys(self._signs, ""), **{o: text.decode() for o, text in zip(come, many, strict=True)}}

    def _announce(self, store: Store) -> None:
        """The first failure is the one that counts."""
        assert self._failure is not None
        mine = json.dumps(self._failure)
        first = store.compare_set("failure", "", mine)
        if first.decode() != mine and self._failure.rank != self.rank:
            self._failure = Failure(*json.loads(first))


def _of_its_own(store: Store) -> Store:
    """A connection that nobody else's waiting blocks, where the store can be had twice."""
    clone: Callable[[], Store] | None = getattr(store, "clone", None)
    try:
        return store if clone is None else clone()
    except (RuntimeError, NotImplementedError):
        return store


def _sign(rank: int) -> str:
    return f"sign/{rank}"


def _lost(rank: int, timeout: float, *, came: bool, works: bool) -> Failure:
    seconds = f"{timeout:.3g} s, the timeout of the process group"
    if not came:
        text = f"rank {rank} has not called rank() with this process group for {seconds}: all its ranks must"
    elif works:
        text = (
            f"rank {rank} is there, but has finished no matrix for {seconds}: it hangs, or the timeout is too short "
            f"for one matrix (timeout= of init_process_group or new_group); {AGAIN}"
        )
    else:
        text = f"rank {rank} has given no sign of life for {seconds}: it has ended, or it or its machine hangs; {AGAIN}"
    return Failure("lost", rank, text)


def _unreachable(reason: str) -> Failure:
    text = (
        f"rank 0, or who else holds the store of the process group, cannot be reached any more ({reason}): that "
        f"process has ended or hangs; {AGAIN}"
    )
    return Failure("store", 0, text)


def _in_a_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
