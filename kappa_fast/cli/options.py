"""The options of a ranking, for the commands ``rank`` and ``plan``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer


class Certify(StrEnum):
    """The intervals that have to be proven."""

    NO = "no"
    ALL = "all"
    SELECTION = "selection"


class Fused(StrEnum):
    """The ways to rank fused projections."""

    SPLIT = "split"
    STORED = "stored"


class BackendName(StrEnum):
    """The backends of this version."""

    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"


Top = Annotated[
    str | None,
    typer.Option(metavar="N|SHARE", help="Resolve only the lowest N (10), or that share of all (0.2)."),
]
TopPerGroup = Annotated[bool, typer.Option("--top-per-group", help="--top counts within each group of like matrices.")]
Rtol = Annotated[float, typer.Option(help="Relative half-width that each interval is to reach.")]
CertifyOption = Annotated[
    Certify, typer.Option(help="Prove the intervals in float64: none, all, or those of the --top.")
]
ScoreOption = Annotated[
    str,
    typer.Option(metavar="NAME", help="What to sort by: kappa, flatness, stable_rank, ...; -NAME: highest first."),
]
StatisticsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Those of all singular values too: outliers, spectrum; repeatable."),
]
SortOption = Annotated[
    str | None,
    typer.Option("--score", metavar="NAME", help="Sort by this first, from what the file knows; -NAME: highest first."),
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Only names in which this is found; repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="No names in which this is found; repeatable.")
]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Rank embeddings and output heads too.")]
Routers = Annotated[bool, typer.Option("--routers", help="Rank the routers of mixtures of experts too.")]
FusedOption = Annotated[Fused, typer.Option(help="Fused projections: their parts, or the tensor as stored.")]
MinDim = Annotated[int, typer.Option(help="Skip matrices whose smaller side is below this.")]
MaxDim = Annotated[int | None, typer.Option(help="Skip matrices whose larger side is above this.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
BackendOption = Annotated[BackendName, typer.Option(help="What computes.")]
MemoryBudget = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to take beside the weights, such as 2GB.")
]


def proofs(choice: Certify) -> bool | Literal["selection"]:
    """The option ``certify`` of rank()."""
    return "selection" if choice is Certify.SELECTION else choice is Certify.ALL
