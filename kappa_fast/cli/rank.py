"""``kappa-fast rank PATH``: rank a checkpoint, print the table, keep the result."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import Interrupted, OptionError, RankingFileError
from ..report.skipped import by_reason
from ..texts import printable
from . import options
from .launched import launched
from .outcome import count_or_share, outcome

if TYPE_CHECKING:
    from ..ranking import Ranking


MOST_REASONS = 8  # lines of the summary


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
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the ranking to this file.")] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="In the --json FILE, write the path of the weights relative to it.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 40,
    all_rows: Annotated[bool, typer.Option("--all", help="All rows of the table, whatever --limit says.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Under torchrun: how long a rank may be silent; by default torch's own."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log.")] = False,
) -> None:
    """Rank a checkpoint's matrices by condition number.

    Ctrl-C stops; what is done by then goes to the --json FILE, marked as partial, and into the cache: the
    same command goes on from there. Started by torchrun, all ranks share the work, and rank 0 prints.
    """
    with outcome(debug), launched(device, timeout, debug) as launch:
        if relative and json is None:
            raise OptionError("--relative is about the --json FILE: give one")
        json = json if launch.prints else None
        count = None if top is None else count_or_share(top, "--top")
        if json is not None:
            check_writable(json)
        directory = None if cache_dir is None else _directory(cache_dir)
        from ..pipeline import rank as rank_weights  # torch takes a second: not before everything else is checked

        try:
            ranking = rank_weights(
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
                cache=(directory or True) if cache else None,
                progress=progress,
                process_group=launch.group,
            )
        except Interrupted as stop:
            raise _kept(stop, json, relative) from stop
        if not launch.prints:
            return
        if json is not None:
            ranking.to_json(json, relative=relative)
        _print(ranking, None if all_rows else limit)
        for line in summary(ranking, rtol):
            typer.echo(printable(line))
        if json is not None:
            typer.echo(f"written to {json}")
        if not len(ranking):
            typer.echo("warning: no matrix was left to rank, for the reasons above", err=True)


def _directory(text: str) -> Path:
    """What ``--cache-dir`` says; the empty one would be the directory that one is in."""
    try:
        path = Path(text).expanduser()  # what was quoted comes as it is
        usable = bool(text) and (path.is_dir() or not os.path.lexists(path.resolve()))
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a user that there is not
        usable = False
    if not usable:
        raise OptionError(f"--cache-dir {text!r} is no directory: give the path of one, it is made if need be")
    return path


def summary(ranking: Ranking, rtol: float) -> list[str]:
    """What the table does not say: how well and how fast it was ranked, and what was left out for which reasons."""
    status = Counter[str](entry.status for entry in ranking)
    reached = sum(entry.status == "ok" and (entry.upper - entry.lower) / 2 <= rtol * entry.kappa for entry in ranking)
    parts = [f"{reached} of {status['ok']} intervals within rtol {rtol:g}"]
    names = {"rank_deficient": "rank deficient", "bounded": "only bounded", "non_finite": "with NaN or inf"}
    parts += [f"{status[key]} {words}" for key, words in names.items() if status[key]]
    metadata = ranking.metadata
    where = f"{', '.join(metadata['device'])}, threads: {metadata['threads']}"
    lines = [", ".join(parts), f"{metadata['seconds']:.2f} s ({where})"]
    hits = metadata.get("cache", {}).get("hits", 0)
    lines += [f"from the cache: {hits} of {len(ranking)}"] if hits else []
    reasons = [(reason, len(items)) for reason, items in by_reason(ranking.skipped)]
    lines += [f"skipped: {number} {reason}" for reason, number in reasons[:MOST_REASONS]]
    rest = sum(number for _, number in reasons[MOST_REASONS:])
    return lines + ([f"skipped: {rest} for other reasons, which the --json FILE lists"] if rest else [])


def check_writable(path: Path, what: str = "ranking") -> None:
    """Find out now, not after an hour of work, that the result cannot be written (it replaces the file at once).

    Raises:
        OptionError: it is no name of a file.  RankingFileError: nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    if path.name == "-" or (os.path.exists(target) and not os.path.isfile(target)):
        raise OptionError(f"--json {path}: give the name of a file to write the {what} to")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name may be too long for any file
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise RankingFileError(
            f"--json {path} cannot be written: {error.strerror}; choose another directory"
        ) from error


def _kept(stop: Interrupted, json: Path | None, relative: bool) -> Interrupted:
    """The same interruption, with what became of the partial ranking."""
    done = str(stop).partition(" (")[0]
    again = "; the same command goes on from there" if stop.resumable else ""
    if json is None:
        return Interrupted(done + (again or "; --json FILE would have kept them"), stop.partial)
    if not len(stop.partial):
        return Interrupted(f"{done}; {json} was not written", stop.partial)
    stop.partial.to_json(json, relative=relative)
    return Interrupted(f"{done} and written to {json}, marked as partial{again}", stop.partial)


def _print(ranking: Ranking, limit: int | None) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(ranking.table(limit))
    else:  # for grep and awk: no name is shortened
        typer.echo(ranking.to_text(limit, width=10_000))
