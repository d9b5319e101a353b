"""One step of the work on several ranks: its results go to the other ranks as JSON, and theirs come here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..cache.records import Query, decode, encode
from ..sources.base import Matrix
from .line import Line
from .shares import shares_of

if TYPE_CHECKING:
    from ..cache import ResultCache

R = TypeVar("R")
Message = list[Any]  # rank, number of the matrix, record of its result, what the cache of that rank knows of it


class Step(Protocol[R]):
    """What is to be known of every matrix, as ``execution/step.py`` has it."""

    @property
    def query(self) -> Query[R]:
        """Makes records of results, and results of records."""

    @property
    def cache(self) -> ResultCache | None:
        """The cache of this rank, if there is one."""

    def known(self, matrix: Matrix) -> R | None:
        """The result of a matrix, if the cache has it without reading the weights."""

    def cost(self, matrix: Matrix) -> float:
        """What a matrix takes, relative to others; the same on every rank."""


class Exchange(Generic[R]):
    """The results of one step, seen from one rank. Between ranks a number stands for a matrix.

    Attributes:
        open: the matrices without a result so far, by number.
    """

    def __init__(self, line: Line, step_number: int, step: Step[R], matrices: Mapping[int, Matrix]) -> None:
        self.open = dict(matrices)
        self._line, self._step_number, self._step = line, step_number, step
        self._numbers = {matrix: number for number, matrix in matrices.items()}
        self._unsent: list[Message] = []
        self._batches_read = 0

    def post_known(self) -> None:
        """Tell all ranks which results this one has without reading weights."""
        known = [(matrix, self._step.known(matrix)) for matrix in self.open.values()]
        messages = [self._message(matrix, result) for matrix, result in known if result is not None]
        self._line.post(self._key("known"), messages)

    def known(self) -> list[Message]:
        """What ``post_known`` tells on the first rank, once it is there."""
        messages: list[Message] = self._line.expect(self._key("known"))
        return messages

    def assigned(self, holders: Mapping[str, tuple[int, ...]]) -> Iterator[Sequence[Matrix]]:
        """The matrices that this rank is to work on: its first shares, then a piece whenever it asks for one.

        holders: by the key of a matrix the ranks that can work on it; those of a matrix that is not named are all.
        """
        matrices, everybody = dict(self.open), tuple(range(self._line.size))
        costs = {number: self._step.cost(matrix) for number, matrix in matrices.items()}
        shares = shares_of(costs, lambda number: holders.get(matrices[number].key, everybody))
        mine = {ranks: share for ranks, share in shares.items() if self._line.rank in ranks}
        for ranks, share in mine.items():
            yield [matrices[number] for number in share.first[ranks.index(self._line.rank)]]
        for ranks, share in mine.items():
            handed_out = self._key(f"handed out/{','.join(map(str, ranks))}")
            while (piece := self._line.count(handed_out) - 1) < len(share.pieces):
                yield [matrices[number] for number in share.pieces[piece]]

    def add(self, matrix: Matrix, result: R) -> None:
        """A result that this rank has computed; it goes with the next ``send``."""
        self._unsent.append(self._message(matrix, result))
        self.open.pop(self._numbers[matrix], None)

    def send(self) -> None:
        """Give what was added to all other ranks."""
        if self._unsent:
            number = self._line.count(self._key("batches"))
            self._line.post(self._key(f"batch/{number - 1}"), self._unsent)
            self._unsent = []

    def next_batch(self) -> list[Message] | None:
        """What some rank has sent and this one has not read, None if there is nothing by now."""
        batch: list[Message] | None = self._line.find(self._key(f"batch/{self._batches_read}"))
        if batch is not None:
            self._batches_read += 1
        return batch

    def received_so_far(self) -> Iterator[tuple[Matrix, R]]:
        """The results that have come by now."""
        while (batch := self.next_batch()) is not None:
            yield from self.received(batch)

    def received(self, batch: Sequence[Message]) -> Iterator[tuple[Matrix, R]]:
        """The results in a batch, without those that this rank has itself."""
        cache = self._step.cache
        for rank, number, record, known in batch:
            matrix = self.open.pop(number, None)
            if matrix is None:
                continue
            if cache is not None and rank != self._line.rank and known is not None:
                cache.take_over(matrix, known, keep=self._line.rank == 0)
            result = self._step.query.answer(decode(record))
            assert result is not None  # the record was made of a result of this query
            yield matrix, result

    def _message(self, matrix: Matrix, result: R) -> Message:
        cache, record = self._step.cache, self._step.query.record_of(result)
        known = None if cache is None else cache.exported(matrix)
        return [self._line.rank, self._numbers[matrix], encode(record), known]

    def _key(self, name: str) -> str:
        return f"{self._step_number}/{name}"
