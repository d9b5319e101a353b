"""``kappa-fast plan PATH``: what ranking a checkpoint would take, from its headers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .outcome import count_or_share, outcome
from .rank import check_writable


def plan(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A .safetensors or .gguf file, a directory with them, or the id of a model on the hub (org/name).",
            show_default=False,
        ),
    ],
    top: options.Top = None,
    top_per_group: options.TopPerGroup = False,
    rtol: options.Rtol = 1e-2,
    certify: options.CertifyOption = options.Certify.NO,
    include: options.Include = None,
    exclude: options.Exclude = None,
    embeddings: options.Embeddings = False,
    routers: options.Routers = False,
    fused: options.FusedOption = options.Fused.SPLIT,
    min_dim: options.MinDim = 16,
    max_dim: options.MaxDim = None,
    device: options.Device = None,
    backend: options.BackendOption = options.BackendName.AUTO,
    memory_budget: options.MemoryBudget = None,
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

    Reads headers only, and of a model of the hub that is not here downloads no more than those. The options are
    those of rank; the time is predicted from two seconds of measurement.
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
            certify=options.proofs(certify),
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
