"""The executor: runs a step on matrices, with a backend for each device, in waves that fit into the memory."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ..backends import Backend, get_backend
from ..errors import BackendError, ComputeError, KappaError, OptionError
from ..machine.memory import is_out_of_memory, physical
from ..machine.threads import deserves_help, each_on_one_thread, fits_one_thread, helped, usual_threads
from ..machine.torch_state import undisturbed_thread
from ..sources.base import Matrix, Source
from ..spectrum.small import batch_size
from .cost import operations
from .prefetch import Staged, one_ahead, read_ahead
from .step import Step
from .waves import default_budget, into_waves

log = logging.getLogger("kappa_fast")

LINALG_ERROR: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

R = TypeVar("R")

# The shapes and dtypes that kernels have been compiled for in this process.
_warm: dict[torch.device, set[tuple[tuple[int, int], torch.dtype]]] = {}


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
    """Matrices that are worked on together; ``nbytes`` is what they are taken to need beside the weights.

    side_by_side: whether threads share them out, and all threads work on what is too large for one.
    """

    device: torch.device
    side_by_side: bool
    matrices: tuple[Matrix, ...]
    nbytes: int


class Executor:
    """The matrices of one source, worked on wave by wave; a backend for every device that is needed."""

    def __init__(
        self, source: Source, backend: str, device: torch.device | None, budget: int | None, *, proofs: bool = False
    ) -> None:
        """``proofs``: whether a step will prove intervals, which takes more memory."""
        self._in_memory = source.in_memory
        self._reads_ahead = any(matrix.prefetch is not None for matrix in source.matrices)
        self._name, self._device, self._budget, self._proofs = backend, device, budget, proofs
        self._backends: dict[torch.device, Backend] = {}
        self._budgets: dict[torch.device, int] = {}
        self._tried: list[Backend] = []  # with those that have been given up
        self._waves_done, self._counting = 0, threading.Lock()
        self.notify: Callable[[str], None] = lambda text: None  # is told what is done before any results come
        # A backend that is unknown, or that cannot work where the weights will be, fails before any work.
        places = [self._where(matrix) for matrix in source.matrices[:1]] or [device or torch.device("cpu")]
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

    def planned(self, matrices: Sequence[Matrix]) -> Iterator[PlannedWave]:
        """The waves that ``results`` would work on; nothing is loaded."""
        for device, placed in self._by_device(matrices).items():
            backend = self._backend_for(device)
            for wave in self._waves(device, placed):
                need = sum(self._need(matrix, backend) for matrix in wave)
                yield PlannedWave(device, backend.side_by_side, tuple(wave), need)

    def budget_on(self, device: torch.device) -> int:
        """Bytes that a wave may take there."""
        if device not in self._budgets:
            self._budgets[device] = self._budget or default_budget(device)
        return self._budgets[device]

    def results(
        self, step: Step[R], matrices: Sequence[Matrix], stop: threading.Event | None = None
    ) -> Generator[tuple[Matrix, R], None, None]:
        """The step's result for every matrix: those that the cache knows first, the others wave by wave.

        Waves come in the order of the disk where the weights come from one, and the next ones are read ahead from it;
        an accelerator gets one of them while it works on this one. On a CPU the small matrices of a wave are worked on
        side by side, one thread for each, and threads without one help the others; the large ones one by one.

        stop: is set if this ends early, before it waits for what still runs.
        """
        unknown = list[Matrix]()
        for matrix in matrices:
            if (result := step.known(matrix)) is None:
                unknown.append(matrix)
            else:
                yield matrix, result
        unknown.sort(key=lambda matrix: matrix.location or ("", 0))
        for device, placed in self._by_device(unknown).items():
            waves = self._waves(device, placed)
            self._warm_up(device, placed)
            with contextlib.closing(read_ahead(waves) if self._reads_ahead else waves) as coming:
                if not self._backend_for(device).side_by_side:
                    with contextlib.closing(one_ahead(coming, device)) as staged:
                        for wave, weights in staged:
                            yield from zip(wave, self._attempt(step, wave, weights), strict=True)
                    continue
                for wave in coming:
                    small, large = _by_threads(wave)
                    deserving = any(deserves_help(matrix.shape) for part in small for matrix in part)
                    helping = undisturbed_thread if deserving else None
                    work = each_on_one_thread(partial(self._attempt, step), small, stop, helping)
                    with contextlib.closing(work) as finished:
                        for alone, computed in finished:
                            yield from zip(alone, computed, strict=True)
                    for alone in large:
                        with helped(alone[0].shape, undisturbed_thread):
                            results = self._attempt(step, alone)
                        yield from zip(alone, results, strict=True)

    def _warm_up(self, device: torch.device, matrices: Sequence[Matrix]) -> None:
        """Compile on all cores what waves of these matrices will launch on a GPU, instead of one by one at work.

        What does not compile is found again, and told, where it is launched.
        """
        kinds = {(matrix.shape, matrix.dtype) for matrix in matrices} - _warm.setdefault(device, set())
        if device.type != "cuda" or self._backend_for(device).name != "triton" or not kinds:
            return
        from kappa_fast.kernels import warmup

        stand_ins = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sorted(kinds, key=str)]
        started = time.perf_counter()
        found = warmup(stand_ins, device, lambda done, known: self.notify(f"compiling kernels {done}/{known}"))
        _warm[device] |= kinds
        self.notify("ranking")
        seconds = time.perf_counter() - started
        log.info("%d kernels were compiled for %s in %.1f s", len(found.compiled), device, seconds)

    def _attempt(self, step: Step[R], wave: Sequence[Matrix], staged: Staged | None = None) -> list[R]:
        """One wave; when memory runs out, in halves; when Triton fails, with torch if that is left to us."""
        place = self._where(wave[0])
        backend = self._backend_for(place)
        half = len(wave) // 2
        weights: list[torch.Tensor] = []
        with self._counting:
            self._waves_done += 1
        try:
            if len(wave) == 1 and place.type == "cpu" and not self._in_memory:
                _check_fits(wave[0])
            with undisturbed_thread():
                weights = staged.ready() if staged and staged.weights else [matrix.load(place) for matrix in wave]
                return step.on_wave(backend, wave, weights)
        except Exception as error:
            if is_lost(place):
                raise _lost(place, error) from error
            if is_out_of_memory(error) or isinstance(error, LINALG_ERROR):
                if len(wave) == 1:
                    raise _failure(wave[0], error) from error
                log.info("a wave of %d matrices failed (%s); trying halves", len(wave), error)
            elif backend.name == "triton" and not isinstance(error, KappaError):
                self._give_up(place, error)
                half = 0
            else:
                raise
        del weights  # or they would take the room that halves are to make
        return (self._attempt(step, wave[:half]) if half else []) + self._attempt(step, wave[half:])

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

    def _by_device(self, matrices: Sequence[Matrix]) -> dict[torch.device, list[Matrix]]:
        placed: dict[torch.device, list[Matrix]] = {}
        for matrix in matrices:
            placed.setdefault(self._where(matrix), []).append(matrix)
        return placed

    def _waves(self, device: torch.device, matrices: Sequence[Matrix]) -> Generator[list[Matrix], None, None]:
        backend = self._backend_for(device)
        return into_waves(matrices, lambda matrix: self._need(matrix, backend), self.budget_on(device))

    def _need(self, matrix: Matrix, backend: Backend) -> int:
        """Bytes that a matrix takes in a wave, beside the weights that are there anyway."""
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


def _by_threads(wave: Sequence[Matrix]) -> tuple[list[list[Matrix]], list[list[Matrix]]]:
    """The wave in parts: those that one thread each works on, and single matrices that all threads share.

    Small matrices of one shape make a part together, so that all threads have some.
    """
    alike: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in wave:
        if fits_one_thread(matrix.shape):
            alike.setdefault(matrix.shape, []).append(matrix)
    parts: list[list[Matrix]] = []
    for shape, matrices in alike.items():
        size = min(batch_size(max(shape), min(shape)), -(-len(matrices) // usual_threads()))
        parts += [matrices[start : start + size] for start in range(0, len(matrices), size)]
    parts.sort(key=lambda part: len(part) * operations(part[0].shape), reverse=True)  # so that no core waits at the end
    return parts, [[matrix] for matrix in wave if not fits_one_thread(matrix.shape)]


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
    crowded = is_out_of_memory(error)
    what = "there is not enough memory for" if crowded else f"a library routine failed ({error}) on"
    return ComputeError(
        f"{what} {matrix.key!r} of shape {tuple(matrix.shape)}, {matrix.dtype}: "
        f"free memory, use another device, or leave it out with exclude={matrix.name!r}",
        out_of_memory=crowded,
    )
