"""What a stage of gpu.py works with: a device, a deadline, timing, and a file that gets every number at once."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_results import read_lines, write_line

FLUSH = 256 << 20  # bytes written between two runs: more than any second-level cache


class DeviceLost(RuntimeError):
    """An error after which this process can use the device no more."""


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated runs."""

    median: float
    low: float
    high: float
    runs: int

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high, "runs": self.runs}


@dataclass
class Bench:
    """One stage: where it runs, until when (seconds of time.time()), and what it found so far."""

    stage: str
    device: torch.device
    smoke: bool
    deadline: float
    lines: Path
    repeats: int = 5
    failed: bool = False

    def keep(self, key: str, value: Any) -> None:
        """Write a result down, before anything else can go wrong."""
        write_line(self.lines, {"stage": self.stage, "key": key, "value": value})

    def attempt(self, key: str, work: Callable[[], Any], seconds: float = 0.0) -> Any:
        """Do the work and keep what it returns. An error is kept in its place, and None is returned.

        ``seconds``: what it will take, by what was measured; where less is left it is skipped, and the reason is kept.

        Raises:
            DeviceLost: the device does not answer any more, so nothing else in this process would work.
        """
        left = self.deadline - time.time()
        if seconds > left:
            self.skip(key, f"would take about {seconds:.0f} s, and {max(left, 0):.0f} s are left")
            return None
        try:
            value = work()
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            reason = f"{type(error).__name__}: {str(error)[:2000]}"
            write_line(self.lines, {"stage": self.stage, "key": key, "error": reason})
            try:
                self.wait()
            except Exception as lost:
                raise DeviceLost(f"after {key}: {lost}") from error
            return None
        self.keep(key, value)
        return value

    def skip(self, key: str, reason: str) -> None:
        """Keep why something was not done."""
        write_line(self.lines, {"stage": self.stage, "key": key, "skipped": reason})

    def found(self, stage: str, key: str) -> Any:
        """What another stage of this run kept, or None."""
        return next((x["value"] for x in reversed(read_lines(self.lines)) if _is(x, stage, key) and "value" in x), None)

    def time(self, work: Callable[[], Any], repeats: int | None = None) -> Spread:
        """Median of runs after one that compiles and warms up; device events where there is a device."""
        work()
        seconds = [self._once(work) for _ in range(repeats or self.repeats)]
        return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def _once(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            return self.clock(work)[0]
        torch.empty(FLUSH, dtype=torch.int8, device=self.device).zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        before.record()
        work()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3

    def clock(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of one run by the clock on the wall, for what the host takes part in; and what it returned."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> int:
        """Bytes that may be used."""
        if self.device.type != "cuda":
            return 1 << 30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])


def _is(line: dict[str, Any], stage: str, key: str) -> bool:
    return line["stage"] == stage and line["key"] == key


def without_canaries() -> None:
    """Let this process use kernels that are not trusted: what they are worth has a stage of its own."""
    from kappa_fast.kernels import canary

    canary.check_device = canary.check_storage = lambda *_: None


def mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 work with numpy 2.5: it takes arrays of one entry for numbers, numpy does not.

    Compiled kernels are not concerned, nor is Triton 3.7.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended
