"""Carrying work out: which backend on which device, in which waves, and what happens when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..backends import Backend, get_backend
from ..errors import BackendError, ComputeError, KappaError, OptionError
from ..machine.memory import is_out_of_memory, physical
from ..machine.threads import each_on_one_thread, fits_one_thread
from ..machine.torch_state import undisturbed_thread
from ..sources.base import Matrix, Source
from .cost import operations
from .prefetch import Staged, one_ahead, read_ahead
from .waves import default_budget, into_waves

log = logging.getLogger("kappa_fast")

LINALG_ERROR: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

R = TypeVar("R")
Work = Callable[[Sequence[int], Backend, list[torch.Tensor]], list[R]]  # on the positions and weights of a wave


def usable_device(device: torch.device | str | None) -> torch.device | None:
    """The device as torch has it, None for None; OptionError where rank() could not compute there."""
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type in ("meta", "mps"):
        raise OptionError(f"device={device!r} has no float64 arithmetic: use 'cpu' or a CUDA device")
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


@dataclass(frozen=True)
class PlannedWave:
    """Matrices, by position, that are worked on together; ``nbytes`` is what they are taken to need beside the weights.

    side_by_side: whether each is worked on alone, by one thread of many where it is small enough.
    """

    device: torch.device
    side_by_side: bool
    positions: tuple[int, ...]
    nbytes: int


class Executor:
    """The matrices of one source, worked on wave by wave; a backend for every device that is needed."""

    def __init__(
        self, source: Source, backend: str, device: torch.device | None, budget: int | None, *, proofs: bool = False
    ) -> None:
        """``proofs``: whether the work on some wave will prove intervals, which takes more memory."""
        self._matrices, self._in_memory = source.matrices, source.in_memory
        self._name, self._device, self._budget, self._proofs = backend, device, budget, proofs
        self._backends: dict[torch.device, Backend] = {}
        self._tried: list[Backend] = []  # with those that have been given up
        self._waves_done, self._counting = 0, threading.Lock()
        self._warm: set[tuple[tuple[int, int], torch.dtype]] = set()  # what kernels have been compiled for
        self.notify: Callable[[str], None] = lambda text: None  # is told what is done before any results come
        # A backend that is unknown, or that cannot work where the weights will be, fails before any work.
        places = [self._where(matrix) for matrix in self._matrices[:1]] or [device or torch.device("cpu")]
        self._backend_for(places[0])

    @property
    def backend_name(self) -> str:
        """Of the backend that was asked first."""
        return next(iter(self._backends.values())).name

    @property
    def counts(self) -> dict[str, int]:
        """How many waves were worked on, how many kernels of ours launched, how often the host waited for results."""
        totals = {"waves": self._waves_done}
        for backend in self._tried:
            for name, count in backend.counts.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    @property
    def devices(self) -> list[str]:
        """Where work was done."""
        return sorted({str(device) for device in self._backends})

    def planned(self, positions: Sequence[int]) -> Iterator[PlannedWave]:
        """The waves that ``results`` would work on; nothing is loaded."""
        for device, waves in self._waves(positions):
            backend = self._backend_for(device)
            for wave in waves:
                need = sum(self._need(i, backend) for i in wave)
                yield PlannedWave(device, backend.side_by_side, tuple(wave), need)

    def budget_on(self, device: torch.device) -> int:
        """Bytes that a wave may take there."""
        return self._budget or default_budget(device)

    def results(self, positions: Sequence[int], work: Work[R]) -> Generator[tuple[int, R], None, None]:
        """``work`` on every matrix, wave by wave, in the order of the disk where the weights come from one.

        The next waves are read ahead from the disk; an accelerator gets one of them while it works on this one.
        """
        ordered = sorted(positions, key=lambda i: self._matrices[i].location or ("", 0))
        for device, waves in self._waves(ordered):
            self._warm_up(device, [i for i in ordered if self._where(self._matrices[i]) == device])
            with contextlib.closing(self._read_ahead(waves)) as coming:
                if self._backend_for(device).side_by_side:
                    yield from self._on_cores(coming, work)
                    continue
                with contextlib.closing(one_ahead(coming, self._matrices_of, device)) as staged:
                    for wave, weights in staged:
                        yield from zip(wave, self._attempt(wave, work, weights), strict=True)

    def _warm_up(self, device: torch.device, positions: Sequence[int]) -> None:
        """Compile on all cores what waves of these matrices will launch on a GPU, instead of one by one at work.

        What does not compile is found again, and told, where it is launched.
        """
        kinds = {(self._matrices[i].shape, self._matrices[i].dtype) for i in positions} - self._warm
        if device.type != "cuda" or self._backend_for(device).name != "triton" or not kinds:
            return
        from kappa_fast.kernels import warmup

        self._warm |= kinds
        stand_ins = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sorted(kinds, key=str)]
        started = time.perf_counter()
        found = warmup(stand_ins, device, lambda done, known: self.notify(f"compiling kernels {done}/{known}"))
        self.notify("ranking")
        seconds = time.perf_counter() - started
        log.info("%d kernels were compiled for %s in %.1f s", len(found.compiled), device, seconds)

    def _read_ahead(self, waves: Iterator[list[int]]) -> Generator[list[int], None, None]:
        if any(matrix.prefetch is not None for matrix in self._matrices):
            yield from read_ahead(waves, self._matrices_of)
        else:
            yield from waves

    def _on_cores(self, waves: Iterable[list[int]], work: Work[R]) -> Generator[tuple[int, R], None, None]:
        """On a CPU the small matrices by themselves, for one thread each, and the large ones one by one."""
        for wave in waves:
            single = [i for i in wave if fits_one_thread(self._matrices[i].shape)]
            # The longest first, so that no core waits at the end.
            single.sort(key=lambda i: operations(self._matrices[i].shape), reverse=True)
            with contextlib.closing(self._side_by_side(single, work)) as results:
                yield from results
            for i in wave:
                if not fits_one_thread(self._matrices[i].shape):
                    yield i, self._attempt([i], work)[0]

    def _side_by_side(self, positions: Sequence[int], work: Work[R]) -> Generator[tuple[int, R], None, None]:
        """One thread for each matrix; those for which the others left no memory come again, one at a time."""

        def attempt(i: int) -> R | None:
            try:
                return self._attempt([i], work)[0]
            except ComputeError as error:
                if not is_out_of_memory(error.__cause__):
                    raise
                return None

        crowded: list[int] = []
        with contextlib.closing(each_on_one_thread(attempt, positions)) as results:
            for i, found in results:
                if found is None:
                    crowded.append(i)
                else:
                    yield i, found
        for i in crowded:
            yield from each_on_one_thread(lambda i: self._attempt([i], work)[0], [i])

    def _attempt(self, wave: Sequence[int], work: Work[R], staged: Staged | None = None) -> list[R]:
        """One wave; when memory runs out, in halves; when Triton fails, with torch if that is left to us."""
        matrices = self._matrices_of(wave)
        place = self._where(matrices[0])
        backend = self._backend_for(place)
        half = len(wave) // 2
        weights: list[torch.Tensor] = []
        with self._counting:
            self._waves_done += 1
        try:
            if len(wave) == 1 and place.type == "cpu" and not self._in_memory:
                _check_fits(matrices[0])
            with undisturbed_thread():
                weights = staged.ready() if staged and staged.weights else [m.load(place) for m in matrices]
                return work(wave, backend, weights)
        except Exception as error:
            if is_lost(place):
                raise _lost(place, error) from error
            if is_out_of_memory(error) or isinstance(error, LINALG_ERROR):
                if len(wave) == 1:
                    raise _failure(matrices[0], error) from error
                log.info("a wave of %d matrices failed (%s); trying halves", len(wave), error)
            elif backend.name == "triton" and not isinstance(error, KappaError):
                self._give_up(place, error)
                half = 0
            else:
                raise
        del weights  # or they would take the room that halves are to make
        return (self._attempt(wave[:half], work) if half else []) + self._attempt(wave[half:], work)

    def _give_up(self, device: torch.device, error: Exception) -> None:
        """A kernel did not compile, did not start, or computed something else than it should."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self._name != "auto":
            raise BackendError(
                f"backend={self._name!r} failed on {device} ({reason}): use backend='auto' or backend='torch'"
            ) from error
        log.warning("backend='triton' failed on %s (%s): going on with backend='torch'", device, reason)
        self._backends[device] = get_backend("torch", device)
        self._tried.append(self._backends[device])

    def _matrices_of(self, wave: Sequence[int]) -> list[Matrix]:
        return [self._matrices[i] for i in wave]

    def _waves(self, positions: Sequence[int]) -> Iterator[tuple[torch.device, Iterator[list[int]]]]:
        """The waves of every device."""
        by_device: dict[torch.device, list[int]] = {}
        for i in positions:
            by_device.setdefault(self._where(self._matrices[i]), []).append(i)
        for device, chosen in by_device.items():
            backend = self._backend_for(device)
            waves = into_waves(chosen, lambda i, b=backend: self._need(i, b), self.budget_on(device))  # type: ignore[misc]
            yield device, waves

    def _need(self, position: int, backend: Backend) -> int:
        matrix = self._matrices[position]
        tall = (max(matrix.shape), min(matrix.shape))
        made = matrix.quantization is not None or matrix.overhead > 0  # by load(), which a plain weight is not
        there = matrix.device == backend.device and self._in_memory and not made
        moved = 0 if there else matrix.nbytes + matrix.overhead
        ahead = 1 if backend.side_by_side else 2  # the next wave comes in while this one is there
        return backend.workspace(tall, matrix.dtype, proofs=self._proofs) + ahead * moved

    def _where(self, matrix: Matrix) -> torch.device:
        if self._device is not None:
            return self._device
        if matrix.device.type not in ("cpu", "meta"):
            return matrix.device if matrix.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else matrix.device

    def _backend_for(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = get_backend(self._name, device)
            self._tried.append(self._backends[device])
        return self._backends[device]


def _check_fits(matrix: Matrix) -> None:
    """Raise ComputeError for a matrix of a file that the machine cannot hold: the system might end the process instead.

    A file may have holes, and take no room on the disk.
    """
    whole = physical()
    if whole is not None and matrix.nbytes + matrix.overhead > whole:
        raise ComputeError(
            f"{matrix.key!r} of shape {tuple(matrix.shape)}, {matrix.dtype}, takes {matrix.nbytes:,} bytes, more than "
            f"the {whole:,} that this process may have: use another machine, or leave it out with "
            f"exclude={matrix.name!r}"
        )


def is_lost(device: torch.device) -> bool:
    """Whether an earlier failure (an illegal access, say) has left the device unusable for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _lost(device: torch.device, error: Exception) -> BackendError:
    """No fallback can work there any more, and what it would say is not what went wrong."""
    last = ""
    if "kappa_fast.kernels.launch" in sys.modules:
        from kappa_fast.kernels.launch import tally

        last = f"; one of the last kernels launched failed there: {', '.join(tally.recent)}" if tally.recent else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BackendError(
        f"{device} cannot be used by this process any more ({reason}){last}. Start a new one, there use "
        "backend='torch', or set CUDA_LAUNCH_BLOCKING=1 to find which kernel it is"
    )


def _failure(matrix: Matrix, error: Exception) -> ComputeError:
    what = "there is not enough memory for" if is_out_of_memory(error) else f"a library routine failed ({error}) on"
    return ComputeError(
        f"{what} {matrix.key!r} of shape {tuple(matrix.shape)}, {matrix.dtype}: "
        f"free memory, use another device, or leave it out with exclude={matrix.name!r}"
    )
