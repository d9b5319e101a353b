"""rank() on several ranks: they join, agree, divide every step of the work, and come to the same Ranking."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..cache.records import Question, decode, encode
from ..errors import OptionError, ProcessGroupError
from ..sources.base import Source
from . import agreement
from .line import AGAIN, Line
from .pieces import Pieces
from .shares import Shares, shares_of
from .stages import united

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..cache import ResultCache

R = TypeVar("R")
Own = Callable[[Sequence[int]], Generator[tuple[int, R], None, None]]  # this rank's results of these positions

EVERY = 0.2  # seconds between two times that results are given to the others, and theirs are fetched


@contextlib.contextmanager
def joined(process_group: ProcessGroup | None) -> Iterator[Ranks | None]:
    """The ranks of the group for the body of one call of rank(); None without a group, or with one of one rank.

    Whatever ends the body on one rank, all others learn it.

    Raises:
        OptionError: it is no process group, or this process does not belong to it.
    """
    if process_group is None:
        yield None
        return
    group = _checked(process_group)
    if group.size() == 1:
        yield None
        return
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store = PrefixStore("kappa_fast", _store_of(group))
    line = Line(store, group.rank(), group.size(), _timeout_of(group))
    ranks = Ranks(line, group)
    try:
        yield ranks
        line.meet("done")
    except KeyboardInterrupt:
        line.fail("interrupted", f"rank {line.rank} was interrupted; {AGAIN}")
        raise
    except ProcessGroupError as error:
        line.fail("error", str(error))
        raise
    except BaseException as error:
        text = str(error).strip() or "no message"
        line.fail("error", f"rank {line.rank} failed ({type(error).__name__}: {text}); {AGAIN} once that is corrected")
        raise
    finally:
        ranks.close()
        line.close()


class Ranks:
    """The ranks that work on one call of rank(), seen from one of them.

    Every rank makes the same calls in the same order; they raise ProcessGroupError as soon as one rank is lost.
    """

    def __init__(self, line: Line, group: ProcessGroup) -> None:
        self._line, self._group = line, group
        self._steps = 0  # of the work, so far
        self._read = 0  # how many of the batches of this step
        self._batch: list[list[Any]] = []
        self._exchanged = 0.0  # when
        self._waited, self._done = 0.0, 0  # seconds, matrices
        self._pieces: Pieces | None = None
        self._holders: Mapping[str, tuple[int, ...]] = {}  # by key, where not all ranks hold all matrices,
        self._holders_at: Sequence[tuple[int, ...]] = ()  # and by position

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self._line.rank == 0

    def connected(self, source: Source, stages: bool) -> Source:
        """The source with all that the ranks have together: pieces of weights, and with ``stages`` whole parts.

        Raises:
            OptionError: a piece is on a process that does not belong to the group.
            ProcessGroupError: a rank is lost, or has something else than others under one name.
        """
        kinds = {"stages": stages, "sharded": stages or source.shards is not None}
        if self.first:
            self._line.post("kinds", kinds)
        elif (theirs := self._line.expect("kinds")) != kinds:
            self._refuse("settings" if theirs["stages"] != stages else "matrices", kinds, theirs)
        if stages:
            together = united(source, self._line)
            source, self._holders = together.source, together.holders
            self._holders_at = [self._holders[matrix.key] for matrix in source.matrices]
        if kinds["sharded"]:
            self._pieces = Pieces(source, self._line, self._group, _store_of(self._group))
        return source

    def close(self) -> None:
        """Nothing more is asked of this rank. Never raises."""
        if self._pieces is not None:
            self._pieces.close()

    def agree(self, source: Source, settings: Mapping[str, Any]) -> None:
        """Make sure that all ranks are about to do the same.

        Raises:
            ProcessGroupError: one of them has other versions, settings, matrices or weights than rank 0.
        """
        told = {
            "versions": agreement.versions(),
            "settings": json.loads(json.dumps(dict(settings))),
            "matrices": agreement.inventory(source, shards=not self._holders),
            "weights": {} if self._holders else agreement.contents(source, self._line.moved),
        }
        large = ("matrices", "weights")
        if self.first:
            for name in large:
                self._line.post(f"agree/{name}", told[name])
            self._line.post("agree", {n: agreement.digest(told[n]) if n in large else told[n] for n in told})
        else:
            theirs = self._line.expect("agree")
            for name, mine in told.items():
                if name in large and theirs[name] != agreement.digest(mine):
                    self._refuse(name, mine, self._line.expect(f"agree/{name}"))
                elif name not in large and theirs[name] != mine:
                    self._refuse(name, mine, theirs[name])
        with self._waiting():
            self._line.meet("agreed")
            if self._pieces is not None:
                self._pieces.agree(self._copies(source))

    def _copies(self, source: Source) -> dict[str, Callable[[], torch.Tensor]]:
        """What this rank is not the only one to hold, of different parts of a model."""
        shared = {m.key: m for m in source.matrices if len(self._holders.get(m.key, ())) > 1 and not m.is_spread}
        return {key: m.load for key, m in shared.items() if self._line.rank in self._holders[key]}

    def _refuse(self, what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        others = agreement.differing(mine, theirs)
        name = others[0]
        more = f", and of {len(others) - 1} more" if len(others) > 1 else ""
        detail = f"{name}: {mine.get(name, 'none')} against {theirs.get(name, 'none')}{more}"
        advice = {
            "versions": "install the same on all machines",
            "settings": "call rank() with the same arguments, on devices and with numbers of threads that are alike",
            "matrices": "give all ranks the same model",
            "weights": "load the same weights on all ranks; copies of a file must keep its time (cp -p, rsync -a)",
        }[what]
        raise ProcessGroupError(
            f"rank {self._line.rank} has other {what} than rank 0 ({detail}): {advice}", self._line.rank
        )

    def after_the_first(self) -> None:
        """Wait until rank 0 has opened the cache: it settles what earlier runs have left there."""
        if not self.first:
            with self._waiting():
                self._line.expect("opened")

    def opened(self) -> None:
        """This rank has opened the cache, or there is none."""
        if self.first:
            self._line.post("opened", True)

    def finished(self, store: ResultCache | None) -> None:
        """Nothing is left to be resolved: rank 0 remembers for all what the files hold."""
        if store is not None and not self.first:
            store.leave_memos()

    def results(
        self,
        positions: Sequence[int],
        costs: Mapping[int, float],
        own: Own[R],
        question: Question[R],
        store: ResultCache | None,
    ) -> Generator[tuple[int, R], None, None]:
        """The results of all positions, those of this rank and those of the others, as they come."""
        self._steps += 1
        self._read = 0
        open_ = set(positions)
        if store is not None:
            # One rank looks up what is known without reading weights: two would not find the same at the same time.
            if self.first:
                known = [self._told(i, found, question, store) for i, found in store.remembered(positions, question)]
                self._line.post(self._key("known"), known)
            with self._waiting():
                yield from self._taken(self._line.expect(self._key("known")), open_, question, store)
        everybody = tuple(range(self._line.size))
        left = {i: costs[i] for i in positions if i in open_}
        shares = shares_of(left, lambda i: self._holders_at[i] if self._holders_at else everybody)
        for mine in self._assigned(shares):
            with contextlib.closing(own(mine)) as found_here:
                for position, found in found_here:
                    self._line.moved()
                    self._batch.append(self._told(position, found, question, store))
                    self._done += 1
                    open_.discard(position)
                    yield position, found
                    if time.monotonic() - self._exchanged > EVERY:
                        self._give()
                        yield from self._come(open_, question, store)
            self._give()
        while open_:
            with self._waiting():
                batch = self._line.until(self._next)
            yield from self._taken(batch, open_, question, store)

    def _assigned(self, shares: Mapping[tuple[int, ...], Shares]) -> Iterator[Sequence[int]]:
        """What this rank works on, of all that it holds: its first shares, then pieces."""
        mine = {ranks: share for ranks, share in shares.items() if self._line.rank in ranks}
        for ranks, share in mine.items():
            yield share.first[ranks.index(self._line.rank)]
        for ranks, share in mine.items():
            handed_out = self._key(f"handed out/{','.join(map(str, ranks))}")
            while (number := self._line.count(handed_out) - 1) < len(share.pieces):
                yield share.pieces[number]

    def _told(self, position: int, found: R, question: Question[R], store: ResultCache | None) -> list[Any]:
        known = None if store is None else store.told(position)
        return [self._line.rank, position, encode(question.record(found)), known]

    def _give(self) -> None:
        """This rank's results, to all others."""
        self._exchanged = time.monotonic()
        if self._batch:
            number = self._line.count(self._key("batches"))
            self._line.post(self._key(f"batch/{number - 1}"), self._batch)
            self._batch = []

    def _next(self) -> list[list[Any]] | None:
        batch: list[list[Any]] | None = self._line.find(self._key(f"batch/{self._read}"))
        if batch is not None:
            self._read += 1
        return batch

    def _come(self, open_: set[int], question: Question[R], store: ResultCache | None) -> Iterator[tuple[int, R]]:
        while (batch := self._next()) is not None:
            yield from self._taken(batch, open_, question, store)

    def _taken(
        self, batch: list[list[Any]], open_: set[int], question: Question[R], store: ResultCache | None
    ) -> Iterator[tuple[int, R]]:
        for rank, position, record, known in batch:
            if position not in open_:  # this rank's own
                continue
            if store is not None and rank != self._line.rank and known is not None:
                store.learn(position, known, keep=self.first)
            found = question.answer(decode(record))
            assert found is not None  # it was made from an answer to this question
            open_.discard(position)
            yield position, found

    def _key(self, name: str) -> str:
        return f"{self._steps}/{name}"

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def metadata(self, mine: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's, with what only the ranks together know; the same on all of them.

        ``ranks`` is a list with a dict for each: seconds of the whole run and of waiting for others, how many
        matrices it has resolved, bytes of JSON that it has sent and received, bytes of weights that others gave it.
        """
        line = self._line
        told = {
            "device": mine["device"],
            "work": mine["work"],
            "rank": {
                "seconds": mine["seconds"],
                "waiting": self._waited,
                "matrices": self._done,
                "sent": line.sent,
                "received": line.received,
                "gathered": 0 if self._pieces is None else self._pieces.received,
            },
        }
        line.post(f"metadata/{line.rank}", told)
        if self.first:
            every = [line.expect(f"metadata/{rank}") for rank in range(line.size)]
            counts = sorted({name for each in every for name in each["work"]})
            whole = {
                **mine,
                "device": sorted({device for each in every for device in each["device"]}),
                "work": {name: sum(each["work"].get(name, 0) for each in every) for name in counts},
                "ranks": [each["rank"] for each in every],
            }
            line.post("metadata", whole)
        found: dict[str, Any] = line.expect("metadata")
        return found


def _checked(process_group: object) -> ProcessGroup:
    if torch.distributed.is_available():
        from torch.distributed import ProcessGroup

        if isinstance(process_group, ProcessGroup):
            return process_group
    raise OptionError(
        f"process_group={process_group!r} is no process group of torch.distributed that this process belongs to: "
        "call rank() on its ranks only, or give torch.distributed.group.WORLD after init_process_group()"
    )


def _store_of(group: ProcessGroup) -> Any:
    if hasattr(group, "get_group_store"):  # not in every torch that this version works with
        return group.get_group_store()
    from torch.distributed import distributed_c10d

    return distributed_c10d._world.pg_map[group][1]


def _timeout_of(group: ProcessGroup) -> float:
    """Seconds that a collective of this group may take."""
    for kind in ("cuda", "cpu"):
        with contextlib.suppress(RuntimeError, AttributeError):
            return float(group._get_backend(torch.device(kind)).options._timeout.total_seconds())
    return float(_store_of(group).timeout.total_seconds())
