"""``kappa-fast plan PATH``: predict the work, memory and time of ranking a checkpoint from its headers."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .outcome import count_or_share, outcome, use_threads
from .output import AllRows, Debug, Json, Limit, Output, Quiet, Threads, Verbose


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
    score: options.ScoreOption = "kappa",
    statistics: options.StatisticsOption = None,
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
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="Also how N ranks of a process group would divide the work.")
    ] = None,
    threads: Threads = None,
    json: Json = None,
    quiet: Quiet = False,
    limit: Limit = 40,
    all_rows: AllRows = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """What ranking a checkpoint would take: matrices, operations, memory, time.

    Reads headers only, and of a model of the hub that is not here downloads no more than those. The options are
    those of rank; the time is predicted from two seconds of measurement.
    """
    with outcome(debug, verbose):
        count = None if top is None else count_or_share(top, "--top")
        output = Output("plan", json, quiet=quiet)
        use_threads(threads)
        from ..planning import plan as plan_ranking

        found = plan_ranking(
            path,
            top=count,
            top_per_group=top_per_group,
            rtol=rtol,
            certify=options.proofs(certify),
            score=score,
            statistics=statistics,
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
            ranks=ranks,
        )
        output.write_json(found.to_json, found.document)
        output.show(found.table(None if all_rows else limit))
        output.say_where()
