"""Headers of a model on a hub, in byte ranges: what a plan needs of a model that nobody has downloaded.

For every file of weights there is a stand-in of the same size in a temporary directory: its header, and a hole behind
it, for the code that reads checkpoints to look at. Values that somebody asks for come from the hub, not from the hole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import SourceError
from ..texts import without_secrets
from .base import Inventory
from .checkpoint import read_checkpoint, stays_inside
from .files import DataFile
from .hub import HubId, explained, library, listed_shards, look_in_cache, small_files, wanted_files, without_secret
from .shards import is_index

FIRST = 100_000  # bytes of a file that are asked for at once: most headers are shorter
LONGEST = 100_000_000  # the longest header that safetensors reads
AT_ONCE = 8
PART, BEYOND_THE_END = 206, 416  # of HTTP
# Tensors of bytes and integers up to this size may say what codes mean: bitsandbytes has one for every weight.
TELLING, TELLING_DTYPES = 4096, ("U8", "I32", "I64")
Fetch = Callable[[int, int], bytes]  # bytes from an offset on, so many

# What the reader of checkpoints advises for files on a disk, and what helps with those on a hub.
_ADVICE = (
    ("finish the download", "look for another revision of the model"),
    ("truncated or damaged, download it again", "look for another revision of the model"),
    ("download it again", "look for another revision of the model"),
    ("repair it, or move it away to rank without it", "look for another revision of the model"),
)


def headers_of(wanted: HubId) -> Inventory | None:
    """What the model holds, from its headers alone; None if it is complete in the local cache.

    ``metadata["size"]`` says how many bytes the files of weights have, ``"to_download"`` how many are not in the cache.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        SourceNotFoundError: there is no such model or revision, or the hub is out of reach.
        SourceError: it is gated, damaged or has no safetensors, or the hub cannot send parts of files.
    """
    hub = library(wanted)
    cached = look_in_cache(hub, wanted)
    if cached.complete:
        return None
    # Files that nobody can call complete stay those of their commit, as when they are ranked.
    usable = cached.path if cached.lacking is None else None
    try:
        return _Remote(hub, wanted, wanted.revision if usable is None else usable.name).inventory()
    except SourceError:
        raise
    except Exception as error:  # of huggingface_hub, of the HTTP client that it happens to use, of the disk
        if usable is not None:
            return None  # it may be complete: ranked, it would be used with a warning
        raise explained(wanted, cached.lacking, error) from without_secret(error)


class _Remote:
    """The files of one commit, and the directory of their stand-ins, which goes when nobody holds a file of it."""

    def __init__(self, hub: Any, wanted: HubId, revision: str | None) -> None:
        self._hub, self._wanted = hub, wanted
        info = hub.HfApi().model_info(wanted.name, revision=revision)
        self.commit = str(info.sha)
        self._listed = [sibling.rfilename for sibling in info.siblings or ()]
        self._cached = look_in_cache(hub, HubId(wanted.name, self.commit)).path
        self._headers: dict[str, int] = {}  # how many bytes of a stand-in are not hole
        self._values: dict[tuple[str, int, int], bytes] = {}  # by file, offset and length
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="kappa_fast-headers-")).resolve()
        except OSError as error:
            raise _no_room(tempfile.gettempdir(), error) from error
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def inventory(self) -> Inventory | None:
        """What the headers say; None if all files of weights are in the cache."""
        try:
            names = self._files_of_weights()
            lacking = [name for name in names if self._cached is None or not (self._cached / name).is_file()]
            if names and not lacking:
                return None
            sizes = dict(zip(names, self._stand_ins(names), strict=True))
            found = self._explained(read_checkpoint(self.folder, self._file))
        except BaseException as error:
            self.close()  # or the traceback would keep it
            if isinstance(error, SourceError):
                raise type(error)(self._in_words_of_the_hub(str(error))) from error
            raise
        known = {"path": str(self._wanted), "id": self._wanted.name, "revision": self.commit}
        sized = {"size": sum(sizes.values()), "to_download": sum(sizes[name] for name in lacking)}
        return replace(found, metadata={**found.metadata, **known, **sized})

    def _explained(self, found: Inventory) -> Inventory:
        tensors = [
            t if t.error is None else replace(t, error=type(t.error)(self._in_words_of_the_hub(str(t.error))))
            for t in found.tensors
        ]
        return replace(found, tensors=tensors)

    def _in_words_of_the_hub(self, message: str) -> str:
        for here, there in (*_ADVICE, (str(self.folder), str(self._wanted))):
            message = message.replace(here, there)
        return message

    def _files_of_weights(self) -> list[str]:
        """The shards; what is small and no weights is taken from the cache, or downloaded to it."""
        names = wanted_files(self._wanted, self._listed)
        for name in small_files(self._listed, names):
            # By the commit: what the branch points to in the cache is for ranking to change, which needs the weights.
            small = Path(self._hub.hf_hub_download(self._wanted.name, name, revision=self.commit))
            self._write(name, small.read_bytes())
        indices = [name for name in names if is_index(name)]
        found = listed_shards(self.folder / indices[0], self._listed) if indices else names
        return [name for name in found if stays_inside(name, self.folder)]  # the reader of the index refuses others

    def _stand_ins(self, names: Sequence[str]) -> list[int]:
        """Write the headers of files, and return how large each file is.

        Raises:
            SourceError: the hub sends whole files only.
        """
        # The first alone: a hub that sends whole files should not be asked for eight of them.
        first = [self._stand_in(name) for name in names[:1]]
        with ThreadPoolExecutor(AT_ONCE, "kappa_fast-headers") as threads:
            sizes = first + list(threads.map(self._stand_in, names[1:]))
            telling = [place for name in names for place in self._telling(name)]
            self._values |= zip(telling, threads.map(lambda place: self._range(*place)[0], telling), strict=True)
        return sizes

    def _stand_in(self, name: str) -> int:
        content, size = self._range(name, 0, FIRST)
        length = 8 + int.from_bytes(content[:8], "little") if len(content) >= 8 else 0
        if len(content) < length <= min(size, LONGEST):
            content += self._range(name, len(content), length - len(content))[0]
        # What has no header is for the reader to refuse.
        self._headers[name] = self._write(name, content[:length] if 8 < length <= len(content) else content, size)
        return size

    def _write(self, name: str, content: bytes, size: int | None = None) -> int:
        """A file of ``size`` bytes, most of them a hole; how many bytes are none."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                if size is not None:
                    file.truncate(size)
        except (OSError, OverflowError) as error:
            raise _no_room(str(self.folder.parent), error) from error
        return len(content)

    def _telling(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Where small tensors of a file are whose values may be asked for, as arguments of ``_range``."""
        try:
            with open(self.folder / name, "rb") as file:
                content = file.read(self._headers[name])
            header = json.loads(content[8:])
            for tensor, entry in header.items():
                start, end = entry["data_offsets"] if tensor != "__metadata__" else (0, 0)
                if 0 < end - start <= TELLING and entry["dtype"] in TELLING_DTYPES:
                    yield name, len(content) + start, end - start
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return  # for the reader to refuse

    def _file(self, path: Path) -> DataFile:
        """Where the bytes of a file come from."""
        name = path.relative_to(self.folder).as_posix()

        def fetch(offset: int, length: int) -> bytes:
            return self._values.get((name, offset, length)) or self._range(name, offset, length)[0]

        return _RemoteFile(path, self._headers[name], fetch)

    def _range(self, name: str, offset: int, length: int) -> tuple[bytes, int]:
        """``length`` bytes from ``offset`` on, or what there is of them, and how large the file is."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = self._hub.hf_hub_url(self._wanted.name, name, revision=self.commit)
        headers = build_hf_headers() | {"range": f"bytes={offset}-{offset + length - 1}", "accept-encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers, timeout=30, follow_redirects=True) as response:
            said = response.headers.get("content-range", "")
            size = said.rpartition("/")[2]
            if response.status_code == BEYOND_THE_END and said.startswith("bytes */") and size.isdecimal():
                return b"", int(size)  # an empty file has no first byte
            hf_raise_for_status(response)
            if response.status_code != PART or not size.isdecimal():
                raise SourceError(
                    f"{self._wanted} cannot be planned from its headers: the hub sends no parts of {name}; download "
                    "the model, and give its directory"
                )
            return b"".join(response.iter_bytes()), int(size)


def _no_room(folder: str, error: Exception) -> SourceError:
    reason = getattr(error, "strerror", None) or error
    return SourceError(
        f"the headers of the model could not be written to {folder} ({reason}): set TMPDIR to a place with sparse files"
    )


class _RemoteFile(DataFile):
    """The header from the stand-in, values from the hub."""

    def __init__(self, path: Path, header: int, fetch: Fetch) -> None:
        super().__init__(path)
        self._header, self._fetch = header, fetch

    def read(self, offset: int, out: torch.Tensor) -> None:
        if offset + out.nbytes <= self._header:
            return super().read(offset, out)
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            content = self._fetch(offset, len(view))
        except Exception as error:  # of the HTTP client
            raise OSError(f"the hub did not give it: {without_secrets(str(error))}") from without_secret(error)
        if len(content) != len(view):
            raise OSError(f"the hub gave {len(content)} bytes of {len(view)}")
        view[:] = content

    def prefetch(self, offset: int, size: int) -> None:
        """Nothing: what is asked for at all is small."""
