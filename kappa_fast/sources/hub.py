"""Models on the hub: turns ids such as org/name or org/name@revision into directories of the local cache.

A model that is complete in the cache needs no connection; if the names of its files do not prove that it is complete,
the hub is asked. Only files that ranking reads are downloaded: the index, its shards, config.json and quantization
configs, but no pickles and no copies of the weights in other formats.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import KappaError, SourceError, SourceNotFoundError, missing_extra
from ..io.documents import read_document
from ..io.limits import LARGEST_INDEX, MOST_VALUES_OF_INDEX
from ..texts import warn, without_secrets
from .checkpoint import INDEX, PICKLED, SINGLE, check_files
from .quantized.config import FILES as QUANTIZATION_FILES
from .shards import is_index

CONFIG = "config.json"
SMALL = (CONFIG, *QUANTIZATION_FILES)  # small files that say how to read the weights

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_ID = re.compile(rf"(?P<name>{_WORD}/{_WORD})(?:@(?P<revision>[^\s@]+))?")
_FILES = (".safetensors", ".gguf", ".json", *PICKLED)  # endings of paths, not of ids


class HubId(NamedTuple):
    """A model on the hub and its revision: a branch, a tag or a commit; None for the main branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def hub_id(text: str) -> HubId | None:
    """Return ``text`` as an id, or None if it cannot be one; an id is two words with a slash between them."""
    found = _ID.fullmatch(text)
    if found is None or text.endswith(_FILES) or "--" in found["name"] or ".." in text:
        return None
    return HubId(found["name"], found["revision"])


def snapshot(wanted: HubId, quiet: bool = False) -> Path:
    """Return the directory of the model in the local cache; download the model if it is not complete there.

    Args:
        wanted: the model.
        quiet: draw no progress bars.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        SourceNotFoundError: there is no such model or revision, or it is not in the cache and the hub is unreachable.
        SourceError: the model is gated, is incomplete while the hub is unreachable, or has no safetensors.

    Warns:
        UserWarning: it is unknown whether the files in the cache are complete.
    """
    hub = import_hub(wanted)
    cached = look_in_cache(hub, wanted)
    if cached.complete:
        assert cached.path is not None
        return cached.path
    # Files without an index or numbers may be incomplete, if a download has stopped; they are used only if the hub does
    # not answer.
    usable = cached.path if cached.lacking is None else None
    try:
        target = wanted if usable is None else HubId(wanted.name, usable.name)
        return _download(hub, target, _silent_bars() if quiet else None)
    except KappaError:
        raise
    except Exception as error:  # raised by huggingface_hub, by its HTTP client, or by the disk
        if usable is None:
            raise hub_error(wanted, cached.lacking, error) from safe_cause(error)
        warn(
            f"{wanted} is ranked as it is in the cache ({usable}): its files have neither an index nor numbers, so "
            "only the hub can say whether a file is missing, and the hub did not answer",
        )
        return usable


def import_hub(wanted: HubId) -> Any:
    """Import huggingface_hub.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        what = f"there is no file or directory {str(wanted)!r}, and looking for a model of that name on the hub"
        raise missing_extra("huggingface-hub", "hub", what) from error
    return huggingface_hub


class Cached(NamedTuple):
    """The state of a model in the local cache.

    path: the directory of the snapshot; None if there is none.  complete: True if the files prove that none is missing.
    lacking: an error that says what is missing; None if only the hub knows.
    """

    path: Path | None
    complete: bool
    lacking: SourceError | None


def look_in_cache(hub: Any, wanted: HubId) -> Cached:
    """Return the state of a model in the local cache, without using the network."""
    try:
        found = hub.snapshot_download(wanted.name, revision=wanted.revision, local_files_only=True, allow_patterns=[])
    except (OSError, ValueError):
        return Cached(None, False, None)
    path = Path(found)
    try:
        return Cached(path, check_files(path), None)
    except SourceError as error:
        return Cached(path, False, error.with_traceback(None))  # a traceback would keep the callers' objects alive


def _download(hub: Any, wanted: HubId, bars: type[Any] | None) -> Path:
    files = hub.HfApi().list_repo_files(wanted.name, revision=wanted.revision)
    weights = wanted_files(wanted, files)

    def fetch(names: Collection[str], revision: str | None) -> Path:
        patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
        return Path(
            hub.snapshot_download(wanted.name, revision=revision, allow_patterns=patterns, tqdm_class=bars)
            if bars
            else hub.snapshot_download(wanted.name, revision=revision, allow_patterns=patterns)
        )

    small = small_files(files, weights)
    directory = fetch(small or weights, wanted.revision)  # by the name of the branch, so that the cache records it
    for name in weights:
        if is_index(name):
            weights = listed_shards(directory / name, files)
    fetch(weights, directory.name)
    return directory


def small_files(files: Collection[str], weights: Collection[str]) -> list[str]:
    """Return the small files of a repository that are needed: configs, and an index among ``weights``."""
    return [name for name in files if name in SMALL or (name in weights and is_index(name))]


def wanted_files(wanted: HubId, files: Collection[str]) -> list[str]:
    """Return the index or the files of weights of a repository, chosen as in a directory on the disk.

    Raises:
        SourceError: there are several indices, or no .safetensors file.
    """
    top = [name for name in files if "/" not in name]
    indices = [name for name in top if is_index(name)]
    single = [name for name in (INDEX, SINGLE) if name in top]
    if single:
        return single[:1]
    if len(indices) > 1:
        raise SourceError(
            f"{wanted} has several indices ({', '.join(indices)}): download the model and give the path of one of them"
        )
    weights = indices or [name for name in top if name.endswith(".safetensors")]
    if weights:
        return weights
    inner = sorted({name.rpartition("/")[0] for name in files if name.endswith(".safetensors")})
    if inner:
        raise SourceError(
            f"{wanted} has no .safetensors file itself, but {inner[0]} has: download it and give that directory"
        )
    others = sorted(name for name in files if name.endswith((*PICKLED, ".gguf")))
    if others and others[0].endswith(".gguf"):
        raise SourceError(f"{wanted} has GGUF files ({others[0]}): download the one you want and give its path")
    if others:
        raise SourceError(
            f"{wanted} has no .safetensors file, only pickled weights ({others[0]}), which can run code when they "
            f"are read: look for a converted revision on its page (often {wanted.name}@refs/pr/1), or convert it"
        )
    raise SourceError(f"{wanted} has no .safetensors file: is it a model?")


def listed_shards(index: Path, files: Collection[str]) -> list[str]:
    """Return the files that an index lists and the repository has; reading the index refuses missing ones later.

    Raises:
        SourceError: the index is not valid.
    """
    try:
        listed = set(read_document(index, LARGEST_INDEX, MOST_VALUES_OF_INDEX)["weight_map"].values())
        return sorted(name for name in files if name in listed)
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index} is not an index of a sharded checkpoint ({error!r}): remove it and try again; if that does not "
            "help, look for another revision of the model"
        ) from error


def hub_error(wanted: HubId, lacking: SourceError | None, error: Exception) -> SourceError:
    """Return the SourceError for an error of the hub; ``lacking`` says what the local cache lacks."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{wanted.name}"
    if isinstance(error, errors.GatedRepoError):
        return SourceError(f"{wanted} is gated: accept its conditions at {page}, then log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceNotFoundError(f"{wanted.name} has no revision {wanted.revision!r}: {page} lists them")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceNotFoundError(
            f"there is neither a file or directory {str(wanted)!r} nor a model of that name at {constants.ENDPOINT}: "
            "check the name; if it is private, log in with `hf auth login`"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        away = "HF_HUB_OFFLINE is set: unset it, or download the model elsewhere and give its directory"
    elif isinstance(error, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError)) or not isinstance(error, OSError):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        away = f"{constants.ENDPOINT} did not send it ({reason}): try again later; downloaded files are kept"
    else:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "free disk space there" if full else "check its permissions, or set HF_HOME to another directory"
        away = f"it could not be written to {constants.HF_HUB_CACHE} ({error.strerror or error}): {what}"
    if lacking is not None:
        return SourceError(f"{wanted} is not complete in the cache ({lacking}), and {away}")
    return SourceNotFoundError(f"{wanted} is neither a path nor a model in the cache of the hub, and {away}")


def safe_cause(error: Exception) -> Exception | None:
    """Return the error for use as a cause; None if its text has a password or token, which tracebacks would show."""
    seen: BaseException | None = error
    while seen is not None:
        if without_secrets(str(seen)) != str(seen):
            return None
        seen = seen.__cause__ or seen.__context__
    return error


def _silent_bars() -> type[Any]:
    """Return a class of progress bars that draws nothing."""
    from tqdm import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)  # an argument that huggingface_hub adds
            super().__init__(*arguments, **{**options, "disable": True})

    return SilentBar
