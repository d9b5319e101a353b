"""The ranks of a process group that work on one call of rank(): they join, agree, and divide every step of the work."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import OptionError, ProcessGroupError
from ..sources.base import Matrix, Source
from . import agreement
from .exchange import Exchange, Step
from .line import AGAIN, Line
from .pieces import Pieces
from .stages import united

if TYPE_CHECKING:
    import threading

    from torch.distributed import ProcessGroup

    from ..cache import ResultCache

R = TypeVar("R")
S = TypeVar("S", bound=Step[Any])

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
        self._numbers: dict[Matrix, int] = {}  # the same on all ranks
        self._steps = 0  # of the work, so far
        self._sent_at = 0.0
        self._waited, self._computed = 0.0, 0  # seconds, matrices
        self._pieces: Pieces | None = None
        self._holders: Mapping[str, tuple[int, ...]] = {}  # by key, if not all ranks hold all matrices

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
        self._numbers = {matrix: number for number, matrix in enumerate(source.matrices)}
        mine = {
            "versions": agreement.versions(),
            "settings": json.loads(json.dumps(dict(settings))),
            "matrices": agreement.inventory(source, shards=not self._holders),
            "weights": {} if self._holders else agreement.contents(source, self._line.moved),
        }
        large = ("matrices", "weights")
        if self.first:
            for name in large:
                self._line.post(f"agree/{name}", mine[name])
            self._line.post("agree", {n: agreement.digest(mine[n]) if n in large else mine[n] for n in mine})
        else:
            theirs = self._line.expect("agree")
            for name, value in mine.items():
                if name in large and theirs[name] != agreement.digest(value):
                    self._refuse(name, value, self._line.expect(f"agree/{name}"))
                elif name not in large and theirs[name] != value:
                    self._refuse(name, value, theirs[name])
        with self._waiting():
            self._line.meet("agreed")
            if self._pieces is not None:
                self._pieces.agree(self._copies(source))

    def _copies(self, source: Source) -> dict[str, Callable[[], torch.Tensor]]:
        """The weights that other ranks hold too, if the ranks hold different parts of a model."""
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

    def finished(self, cache: ResultCache | None) -> None:
        """Nothing is left to be resolved: rank 0 remembers for all what the files hold."""
        if cache is not None and not self.first:
            cache.leave_memos()

    def results(
        self,
        compute: Callable[[S, Sequence[Matrix], threading.Event], Generator[tuple[Matrix, R], None, None]],
        step: S,
        matrices: Sequence[Matrix],
        stop: threading.Event,
    ) -> Generator[tuple[Matrix, R], None, None]:
        """A step's result for every matrix, those that this rank computes and those of the others, as they come.

        compute: gives this rank's results of a step for some matrices; it is an executor's ``results``.
        """
        self._steps += 1
        exchange: Exchange[R] = Exchange(
            self._line, self._steps, step, {self._numbers[matrix]: matrix for matrix in matrices}
        )
        if step.cache is not None:
            # One rank looks up what is known without reading weights: two would not find the same at the same time.
            if self.first:
                exchange.post_known()
            with self._waiting():
                known = exchange.known()
            yield from exchange.received(known)
        for share in exchange.assigned(self._holders):
            with contextlib.closing(compute(step, share, stop)) as computed:
                for matrix, result in computed:
                    self._line.moved()
                    exchange.add(matrix, result)
                    self._computed += 1
                    yield matrix, result
                    if time.monotonic() - self._sent_at > EVERY:
                        self._send(exchange)
                        yield from exchange.received_so_far()
            self._send(exchange)
        while exchange.open:
            with self._waiting():
                batch = self._line.until(exchange.next_batch)
            yield from exchange.received(batch)

    def _send(self, exchange: Exchange[R]) -> None:
        self._sent_at = time.monotonic()
        exchange.send()

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
        own = {
            "device": mine["device"],
            "work": mine["work"],
            "rank": {
                "seconds": mine["seconds"],
                "waiting": self._waited,
                "matrices": self._computed,
                "sent": line.sent,
                "received": line.received,
                "gathered": 0 if self._pieces is None else self._pieces.received,
            },
        }
        line.post(f"metadata/{line.rank}", own)
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
