"""``kappa-fast plan PATH``: what ranking a checkpoint would take, from its headers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .outcome import count_or_share, outcome
from .rank import BackendName, Certify, Fused, check_writable, proofs


def plan(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A .safetensors or .gguf file, a directory with them, or the id of a model on the hub (org/name).",
            show_default=False,
        ),
    ],
    top: Annotated[
        str | None,
        typer.Option(metavar="N|SHARE", help="Resolve only the lowest N (10), or that share of all (0.2)."),
    ] = None,
    top_per_group: Annotated[
        bool, typer.Option("--top-per-group", help="--top counts within each group of like matrices.")
    ] = False,
    rtol: Annotated[float, typer.Option(help="Relative half-width that each interval is to reach.")] = 1e-2,
    certify: Annotated[
        Certify, typer.Option(help="Prove the intervals in float64: none, all, or those of the --top.")
    ] = Certify.NO,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Only names in which this is found; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="No names in which this is found; repeatable.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Rank embeddings and output heads too.")] = False,
    routers: Annotated[bool, typer.Option("--routers", help="Rank the routers of mixtures of experts too.")] = False,
    fused: Annotated[
        Fused, typer.Option(help="Fused projections: their parts, or the tensor as stored.")
    ] = Fused.SPLIT,
    min_dim: Annotated[int, typer.Option(help="Skip matrices whose smaller side is below this.")] = 16,
    max_dim: Annotated[int | None, typer.Option(help="Skip matrices whose larger side is above this.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = None,
    backend: Annotated[BackendName, typer.Option(help="What computes.")] = BackendName.AUTO,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to take beside the weights, such as 2GB.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time a few made-up matrices, and the disk, to predict.")
    ] = True,
    device_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also a floor for this GPU, from published figures: h200, h100, a100, ..."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan to this file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 40,
    all_rows: Annotated[bool, typer.Option("--all", help="All rows of the table, whatever --limit says.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log.")] = False,
) -> None:
    """What ranking a checkpoint would take: matrices, operations, memory, time.

    Reads headers only; a model of the hub is downloaded before, as rank does. The options are those of rank; the
    time is predicted from two seconds of measurement.
    """
    with outcome(debug):
        count = None if top is None else count_or_share(top, "--top")
        if json is not None:
            check_writable(json, "plan")
        from ..planning import plan as plan_ranking

        found = plan_ranking(
            path,
            top=count,
            top_per_group=top_per_group,
            rtol=rtol,
            certify=proofs(certify),
            include=include,
            exclude=exclude,
            embeddings=embeddings,
            routers=routers,
            fused=fused.value,
            min_dim=min_dim,
            max_dim=max_dim,
            device=device,
            backend=backend.value,
            memory_budget=memory_budget,
            measure=measure,
            device_model=device_model,
        )
        if json is not None:
            found.to_json(json)
        rows = None if all_rows else limit
        if sys.stdout.isatty():
            from rich.console import Console

            Console().print(found.table(rows))
        else:  # for grep and awk: no name is shortened
            typer.echo(found.to_text(rows, width=10_000))
        if json is not None:
            typer.echo(f"written to {json}")
