"""``python -m benchmarks.forgetting --model ...``: the command line of own.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from . import own

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those for a model of one's own."""
    mine = parser.add_argument_group("a model of your own")
    mine.add_argument("--model", help="a folder or a name on the hub: a causal language model with its tokenizer")
    mine.add_argument("--learn", nargs="+", action="append", metavar="FILE", help="to learn; again for another task")
    mine.add_argument("--keep", nargs="+", metavar="FILE", help="text whose loss is not to rise")
    mine.add_argument("--budget", type=seconds, default=seconds("2h"), help="time for all runs, such as 90m or 2h")
    mine.add_argument("--share", type=share, default=0.2, help="of the weights that train, or of the experts")
    mine.add_argument("--steps", type=int, default=120, help="of the longest schedule")
    mine.add_argument("--length", type=int, default=128, help="tokens of a piece")
    mine.add_argument("--size", type=int, default=8, help="pieces of a batch")
    mine.add_argument("--rates", type=rates, default=(1e-4, 3e-4, 1e-3), help="learning rates, such as 1e-4,3e-4,1e-3")
    mine.add_argument("--draws", type=int, default=99, help="random selections, at most")
    mine.add_argument("--device", default="cpu", help="where runs compute")
    mine.add_argument("--only-plan", action="store_true", help="time a run, say what can be told, and end")


def run(given: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Ends the program with a message where a question cannot be answered."""
    if not given.learn or not given.keep:
        raise SystemExit("--model needs --learn FILE ... and --keep FILE ...")
    name = re.sub(r"\W+", "-", given.model).strip("-")
    folder = given.folder or Path(f"forgetting-{name}")
    question = own.Question(
        model=given.model,
        learn=named(given.learn),
        keep=tuple(given.keep),
        share=given.share,
        steps=given.steps,
        length=given.length,
        size=given.size,
        rates=given.rates,
        draws=given.draws,
        device=given.device,
    )
    try:
        own.study(question, given.budget, folder, given.workers, say, given.only_plan)
    except own.OwnError as error:
        raise SystemExit(f"error: {error}") from None


def named(learn: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Tasks by the name of their first file."""
    found: dict[str, tuple[str, ...]] = {}
    for files in learn:
        name = re.sub(r"\W+", "-", Path(files[0]).stem).strip("-") or "text"
        while name in found or name == own.KEEP:
            name += "-2"
        found[name] = tuple(files)
    return found


def seconds(text: str) -> float:
    """A time such as 90m or 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give one such as 90m, 2h or 1d")
    return float(found[1]) * UNITS[found[2]]


def share(text: str) -> float:
    """A fraction in (0, 1)."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give one between 0 and 1")
    return value


def rates(text: str) -> tuple[float, ...]:
    """Learning rates with commas between them."""
    found = tuple(sorted({float(rate) for rate in text.split(",")}))
    if not found or min(found) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} are no learning rates: give some such as 1e-4,3e-4,1e-3")
    return found
