"""``kappa-fast rank PATH``: rank a checkpoint, print the table, keep the result."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from ..report.skipped import by_reason
from ..results.interruption import Interrupted
from ..results.scores import score_of
from ..texts import printable
from . import options
from .budget import By
from .launched import launched
from .outcome import BROKEN, NOTHING, Stopped, count_or_share, outcome, use_threads
from .output import AllRows, Csv, Debug, Json, Limit, Output, Quiet, Threads, Verbose, progress_option

if TYPE_CHECKING:
    from ..results.ranking import Ranking


MOST_REASONS = 8  # lines with reasons for skipped parameters


def rank(
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
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="A bar on stderr; by default on a terminal.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep results by the content of the weights, and use them again.")
    ] = True,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to keep them instead of the user's cache directory.")
    ] = None,
    threads: Threads = None,
    json: Json = None,
    csv: Csv = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="In the --json FILE, write the path of the weights relative to it.")
    ] = False,
    by: Annotated[By | None, typer.Option("--summary", help="Show a summary by group or by layer too.")] = None,
    quiet: Quiet = False,
    limit: Limit = 40,
    all_rows: AllRows = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Under torchrun: how long a rank may be silent; by default torch's own."),
    ] = None,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Rank a checkpoint's matrices by condition number.

    Ctrl-C stops; what is done by then goes to the --json FILE, marked as partial, and into the cache: the
    same command goes on from there. Started by torchrun, all ranks share the work, and rank 0 prints. Exit code
    4: NaN or inf among the weights; 5: nothing was left to rank.
    """
    with outcome(debug, verbose), launched(device, timeout, debug) as launch:
        if relative and (json is None or str(json) == "-"):
            raise OptionError("--relative needs --json FILE, in which it changes the path: give one")
        json, csv = (json, csv) if launch.prints else (None, None)
        count = None if top is None else count_or_share(top, "--top")
        output = Output("ranking", json, csv, quiet=quiet)
        use_threads(threads)
        directory = None if cache_dir is None else _directory(cache_dir)
        from ..pipeline import rank as rank_weights  # loads torch, which takes a second, after all other checks

        try:
            ranking = rank_weights(
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
                cache=(directory or True) if cache else None,
                progress=progress_option(progress, quiet or not launch.prints),
                process_group=launch.group,
            )
        except Interrupted as stop:
            raise _kept(stop, json if str(json) != "-" else None, relative) from stop
        if not launch.prints:
            return
        output.write_json(lambda file: ranking.to_json(file, relative=relative), ranking.document)
        from ..report.frames import rows_of

        output.write_csv(rows_of(ranking))
        output.show(ranking.table(None if all_rows else limit))
        if by is not None:
            output.show(ranking.summary(by.value).table())
        for line in summary(ranking, rtol):
            output.say(line)
        output.say_where()
        _judge(ranking)


def _judge(ranking: Ranking) -> None:
    """Exit with a code of its own for a result that a gate should refuse."""
    broken = [entry.key for entry in ranking if entry.status == "non_finite"]
    if broken:
        typer.echo(f"warning: NaN or inf in {len(broken)} matrices, {printable(broken[0])!r} among them", err=True)
        raise typer.Exit(BROKEN)
    if not len(ranking):
        typer.echo("warning: no matrix was left to rank, for the reasons above", err=True)
        raise typer.Exit(NOTHING)


def _directory(text: str) -> Path:
    """The directory of ``--cache-dir``; an empty text is refused, since it would mean the current directory."""
    try:
        path = Path(text).expanduser()  # the shell does not expand "~" in quotes
        usable = bool(text) and (path.is_dir() or not os.path.lexists(path.resolve()))
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a user that there is not
        usable = False
    if not usable:
        raise OptionError(f"--cache-dir {text!r} is not a directory: give the path of one, which need not exist yet")
    return path


def summary(ranking: Ranking, rtol: float) -> list[str]:
    """The lines below the table: how many intervals reached ``rtol``, the time, and the reasons for skipping."""
    status = Counter[str](entry.status for entry in ranking)
    reached = sum(entry.status == "ok" and (entry.upper - entry.lower) / 2 <= rtol * entry.kappa for entry in ranking)
    alone = status["scored"] and not status["ok"]  # then no interval of kappa was wanted
    parts = [] if alone else [f"{reached} of {status['ok']} intervals within rtol {rtol:g}"]
    named = score_of(ranking.metadata)
    score = "the score" if named is None else named.name
    names = {
        "rank_deficient": "rank deficient",
        "bounded": "only bounded",
        "scored": f"with {score}, which needs no kappa",
        "non_finite": "with NaN or inf",
    }
    parts += [f"{status[key]} {words}" for key, words in names.items() if status[key]]
    metadata = ranking.metadata
    where = f"{', '.join(metadata['device'])}, threads: {metadata['threads']}"
    lines = [", ".join(parts), f"{metadata['seconds']:.2f} s ({where})"]
    hits = metadata.get("cache", {}).get("hits", 0)
    lines += [f"from the cache: {hits} of {len(ranking)}"] if hits else []
    if len(ranks := metadata.get("ranks", ())) > 1:
        worked = [each["seconds"] - each["waiting"] for each in ranks]
        waited = max(each["waiting"] for each in ranks)
        lines.append(
            f"{len(ranks)} ranks, {min(worked):.2f} to {max(worked):.2f} s of work, waiting {waited:.2f} s at most"
        )
    reasons = [(reason, len(items)) for reason, items in by_reason(ranking.skipped)]
    lines += [f"skipped: {number} {reason}" for reason, number in reasons[:MOST_REASONS]]
    rest = sum(number for _, number in reasons[MOST_REASONS:])
    return lines + ([f"skipped: {rest} for other reasons, which the --json FILE lists"] if rest else [])


def _kept(stop: Interrupted, json: Path | None, relative: bool) -> Stopped:
    """The exception that ends the command: the interruption, with a message about the partial ranking."""
    again = "; the same command goes on from there" if stop.resumable else ""
    if json is None:
        return Stopped(stop.state + (again or "; --json FILE would have kept them"))
    if not len(stop.partial):
        return Stopped(f"{stop.state}; {json} was not written")
    stop.partial.to_json(json, relative=relative)
    return Stopped(f"{stop.state} and written to {json}, marked as partial{again}")
