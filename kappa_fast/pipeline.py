"""rank(): opens the source, orders its matrices, resolves them, and returns the Ranking."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .cache import CacheOption, cache_directory, opened_cache
from .errors import OptionError
from .execution.executor import Executor, usable_device
from .execution.progress import ProgressOption, shown
from .execution.run import Run
from .execution.top import BudgetedTop
from .execution.waves import parse_bytes
from .machine import signals as stops
from .machine.torch_state import undisturbed
from .matching.checkpoint_names import places_of
from .options import Options
from .results.entries import TensorKappa
from .results.ranking import Ranking
from .results.scores import Score
from .sources import open_source
from .sources.adapters import has_trained_adapters
from .sources.base import Source
from .sources.filters import Patterns
from .texts import warn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed.ranks import Ranks


def rank(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    *,
    top: int | float | None = None,
    top_per_group: bool = False,
    rtol: float = 1e-2,
    certify: bool | Literal["selection"] = False,
    score: Score = "kappa",
    statistics: str | Sequence[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    embeddings: bool = False,
    routers: bool = False,
    fused: Literal["split", "stored"] = "split",
    adapters: Literal["base", "merged"] | None = None,
    min_dim: int = 16,
    max_dim: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    cache: CacheOption = None,
    progress: ProgressOption = None,
    process_group: ProcessGroup | None = None,
    stages: bool = False,
) -> Ranking:
    """Rank the weight matrices of a model by their condition number sigma_max / sigma_min, lowest first.

    Args:
        source: a module, a mapping of names to tensors, a .safetensors or .gguf file, a directory with them, or the id
            of a model on the hub ("org/name", "org/name@revision"), from the local cache if it is complete there.
        top: resolve only what is needed to know the ``top`` entries with the lowest score (an int), or that share of
            all (a float in (0, 1]); the others are reported as "bounded".
        top_per_group: ``top`` counts within each group of like matrices.
        rtol: relative half-width that the interval around kappa is to reach.
        certify: True proves every interval in float64 (about twice the work, more for large square matrices with a
            high kappa); "selection" only those of the ``top`` entries.
        score: "kappa" or another name of docs/scores.md, with a minus in front for the highest first ("-flatness"), or
            a callable that gives an entry its score. With any but "kappa" everything is resolved, and kappa only as far
            as the score needs it.
        statistics: "outliers", "spectrum" or both: those that take all singular values, for several times the work of
            kappa; not with ``top``.
        include, exclude: regular expressions (re.search) on parameter names.
        embeddings, routers: rank embeddings and output heads, and the routers of mixtures of experts.
        fused: "split" ranks the parts of fused projections on their own, "stored" the tensor as it is.
        adapters: of a model that PEFT has put adapters into, "base" ranks the weights beside which they lie, "merged"
            what both together compute, as merge_and_unload() would store it; None is "base", and warns where adapters
            have learned something.
        min_dim, max_dim: skip matrices whose smaller side is below, or whose larger side is above.
        device: where to compute; by default where the weights are, or the current CUDA device for weights on the CPU.
        backend: "auto" (Triton on a GPU, else torch), "torch" or "triton".
        memory_budget: bytes, or a text such as "2GB", that a wave may take beside the weights.
        cache: where results are kept and looked up by the content of the weights: a directory, or True for that of the
            user (or of the environment variable KAPPA_FAST_CACHE). An interrupted run goes on from there.
        progress: None for a bar on a terminal, True, False, or a callable that takes a Progress.
        process_group: of torch.distributed, all of whose ranks make this call: each works on a share of the matrices,
            and all return the same Ranking. Without it nothing is asked of other processes.
        stages: the ranks hold different parts of one model (stages of a pipeline, experts of their own), which are
            ranked where they are and are one Ranking.

    Returns:
        A Ranking. The model is not changed in any way, also when an error is raised.

    Raises:
        OptionError: an argument cannot work.  SourceError: the source cannot be read.  BackendError: no such backend.
        ComputeError: a single matrix does not fit into memory, or a library routine failed on it.
        Interrupted: Ctrl-C; its ``partial`` is the Ranking of what was done.
        ProcessGroupError: another rank has failed, hangs, or has other weights, settings or versions.
        ShardedError: the model is sharded (DTensor, FSDP, ZeRO-3), and ``process_group`` is not there to rank it
            together, or how it is sharded is not understood.

    Warns:
        UserWarning: weights of the model have no values to read; layers may compute others from what is ranked, in a
            way that cannot be followed; intervals could not be proven; the cache is damaged, or cannot be written to;
            adapters of PEFT have learned something that is left out.
    """
    if stages and process_group is None:
        raise OptionError("stages=True says that other processes have the rest: give their process_group")
    with _joined(process_group) as ranks:
        options = Options(
            top=top,
            top_per_group=top_per_group,
            rtol=rtol,
            certify=certify,
            score=score,
            statistics=statistics,
            include=include,
            exclude=exclude,
            embeddings=embeddings,
            routers=routers,
            fused=fused,
            adapters=adapters,
            min_dim=min_dim,
            max_dim=max_dim,
        )
        directory = cache_directory(cache)
        if ranks is not None and not ranks.first and not callable(progress):
            progress = False  # that of rank 0 shows the work of all
        started = time.perf_counter()
        with undisturbed():
            opened = open_source(source, options.filters, places_of, quiet=not shown(progress))
            stops.check()
            if ranks is not None:
                opened = ranks.connected(opened, stages)
            elif opened.shards is not None:
                opened.shards.check_here()
            _warn_absent(opened)
            _warn_unfollowed(opened)
            if adapters is None and isinstance(source, torch.nn.Module):
                _warn_adapters(source)
            order = BudgetedTop.of(opened.matrices, options.top, options.top_per_group)
            executor = Executor(
                opened, backend, usable_device(device), parse_bytes(memory_budget), proofs=options.proofs
            )
            if ranks is not None:
                ranks.agree(opened, _what_must_agree(options, executor, directory))
                ranks.after_the_first()
            with opened_cache(directory, opened.matrices) as results_cache:
                if ranks is not None:
                    ranks.opened()
                run = Run(opened, options, executor, results_cache, ranks)
                try:
                    with run.reporting(progress):
                        run.resolve(order)
                    if ranks is not None:
                        ranks.finished(results_cache)
                except KeyboardInterrupt as stop:
                    raise run.interrupted(time.perf_counter() - started) from stop
        ranking = run.ranking(time.perf_counter() - started)
    _warn_unproven(ranking, certify)
    return ranking


def _joined(process_group: ProcessGroup | None) -> contextlib.AbstractContextManager[Ranks | None]:
    """The ranks of a group for the body of one call, see distributed.ranks.joined(); None without a group."""
    if process_group is None:
        return contextlib.nullcontext()
    from .distributed.ranks import joined  # most runs are of one process, and need none of this

    return joined(process_group)


def _what_must_agree(options: Options, executor: Executor, cache: Path | None) -> dict[str, Any]:
    """What decides the bits of a result, or the order of the steps."""
    kinds = sorted({device.partition(":")[0] for device in executor.devices})
    used = {"backend": executor.backend_name, "device": kinds, "threads": torch.get_num_threads()}
    return {**options.settings(), **used, "cache": cache is not None}


def _warn_unproven(entries: Iterable[TensorKappa], certify: object) -> None:
    if certify is not True:
        return
    unproven = [e.key for e in entries if e.status in ("ok", "rank_deficient") and not e.certified]
    if unproven:
        warn(
            f"float64 cannot prove the interval of {len(unproven)} of the entries, {unproven[0]!r} among them: "
            "they keep certified=False and their best estimate",
        )


def _warn_absent(source: Source) -> None:
    if source.absent:
        first = source.absent[0]
        warn(
            f"{len(source.absent)} weights of the model have no values to read and are not ranked, {first.name!r} "
            f"among them ({first.reason}); ranking.skipped has them all, and shares of the parameters count them",
        )


def _warn_unfollowed(source: Source) -> None:
    if source.unfollowed:
        warn(
            f"{len(source.unfollowed)} weights are ranked as they are held, {source.unfollowed[0]!r} among them, "
            "though their layers may compute others from them (by a mask, a scale), in a forward() or a graph that "
            'cannot be followed: leave those out with exclude=; metadata["source"]["evidence"] has them all',
        )


def _warn_adapters(model: torch.nn.Module) -> None:
    if has_trained_adapters(model):
        warn(
            "the model has adapters of PEFT that change its weights, and the weights are ranked without them: "
            "adapters='merged' ranks what the model computes, and adapters='base' says that this is meant",
        )
