"""Reads only the headers of a model on the hub, for a plan of a model that has not been downloaded.

The headers are downloaded as byte ranges. For every file of weights a temporary directory has a sparse file of the same
size with only the header, which the reader of checkpoints can read. Values that are needed are downloaded too.
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
from .hub import HubId, hub_error, import_hub, listed_shards, look_in_cache, safe_cause, small_files, wanted_files
from .shards import is_index

FIRST = 100_000  # bytes of a file in the first request: most headers are shorter
LONGEST = 100_000_000  # bytes; the library safetensors does not read longer headers
AT_ONCE = 8  # requests at a time
PART, BEYOND_THE_END = 206, 416  # status codes of HTTP
# Tensors of these dtypes up to this size in bytes may describe codes: bitsandbytes has one for every weight.
SETTINGS_SIZE, SETTINGS_DTYPES = 4096, ("U8", "I32", "I64")
Fetch = Callable[[int, int], bytes]  # returns the bytes at an offset, of a length

# Advice in messages of the reader of checkpoints, and the advice for a model on the hub that replaces it.
_ADVICE = (
    ("finish the download", "look for another revision of the model"),
    ("truncated or damaged, download it again", "look for another revision of the model"),
    ("download it again", "look for another revision of the model"),
    ("repair it, or move it away to rank without it", "look for another revision of the model"),
)


def headers_of(wanted: HubId) -> Inventory | None:
    """Return the tensors of a model by its headers; None if the model is complete in the local cache.

    ``metadata["size"]`` is the size of the files of weights in bytes, ``metadata["to_download"]`` the size of those
    that are not in the cache.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        SourceNotFoundError: there is no such model or revision, or the hub is unreachable.
        SourceError: the model is gated or damaged, has no safetensors, or the hub cannot send parts of files.
    """
    hub = import_hub(wanted)
    cached = look_in_cache(hub, wanted)
    if cached.complete:
        return None
    # If the files in the cache may be complete, the plan is for their commit, as ranking would use it.
    usable = cached.path if cached.lacking is None else None
    try:
        return _Remote(hub, wanted, wanted.revision if usable is None else usable.name).inventory()
    except SourceError:
        raise
    except Exception as error:  # raised by huggingface_hub, by its HTTP client, or by the disk
        if usable is not None:
            return None  # ranking would use the files in the cache, with a warning
        raise hub_error(wanted, cached.lacking, error) from safe_cause(error)


class _Remote:
    """The files of one commit on the hub, and a directory of sparse files, which is removed with the last reference."""

    def __init__(self, hub: Any, wanted: HubId, revision: str | None) -> None:
        self._hub, self._wanted = hub, wanted
        info = hub.HfApi().model_info(wanted.name, revision=revision)
        self.commit = str(info.sha)
        self._listed = [sibling.rfilename for sibling in info.siblings or ()]
        self._cached = look_in_cache(hub, HubId(wanted.name, self.commit)).path
        self._headers: dict[str, int] = {}  # the size of the header in each sparse file
        self._values: dict[tuple[str, int, int], bytes] = {}  # by file, offset and length
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="kappa_fast-headers-")).resolve()
        except OSError as error:
            raise _write_error(tempfile.gettempdir(), error) from error
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def inventory(self) -> Inventory | None:
        """Return the tensors by the headers; None if all files of weights are in the cache."""
        try:
            names = self._files_of_weights()
            lacking = [name for name in names if self._cached is None or not (self._cached / name).is_file()]
            if names and not lacking:
                return None
            sizes = dict(zip(names, self._write_headers(names), strict=True))
            found = self._with_hub_advice(read_checkpoint(self.folder, self._file))
        except BaseException as error:
            self.close()  # the traceback would keep the directory
            if isinstance(error, SourceError):
                raise type(error)(self._hub_message(str(error))) from error
            raise
        known = {"path": str(self._wanted), "id": self._wanted.name, "revision": self.commit}
        sized = {"size": sum(sizes.values()), "to_download": sum(sizes[name] for name in lacking)}
        return replace(found, metadata={**found.metadata, **known, **sized})

    def _with_hub_advice(self, found: Inventory) -> Inventory:
        tensors = [
            t if t.error is None else replace(t, error=type(t.error)(self._hub_message(str(t.error))))
            for t in found.tensors
        ]
        return replace(found, tensors=tensors)

    def _hub_message(self, message: str) -> str:
        for here, there in (*_ADVICE, (str(self.folder), str(self._wanted))):
            message = message.replace(here, there)
        return message

    def _files_of_weights(self) -> list[str]:
        """Return the names of the files of weights; copy the other needed files from the cache, or download them."""
        names = wanted_files(self._wanted, self._listed)
        for name in small_files(self._listed, names):
            # By the commit: the cache must not record a new commit of the branch before its weights are downloaded.
            small = Path(self._hub.hf_hub_download(self._wanted.name, name, revision=self.commit))
            self._write(name, small.read_bytes())
        indices = [name for name in names if is_index(name)]
        found = listed_shards(self.folder / indices[0], self._listed) if indices else names
        return [name for name in found if stays_inside(name, self.folder)]  # the reader of the index refuses others

    def _write_headers(self, names: Sequence[str]) -> list[int]:
        """Download the headers of files and write the sparse files; return the size of each file.

        Raises:
            SourceError: the hub sends whole files only.
        """
        # One file first: a hub that sends whole files should not send eight of them.
        first = [self._write_header(name) for name in names[:1]]
        with ThreadPoolExecutor(AT_ONCE, "kappa_fast-headers") as threads:
            sizes = first + list(threads.map(self._write_header, names[1:]))
            ranges = [found for name in names for found in self._settings_ranges(name)]
            self._values |= zip(ranges, threads.map(lambda found: self._range(*found)[0], ranges), strict=True)
        return sizes

    def _write_header(self, name: str) -> int:
        content, size = self._range(name, 0, FIRST)
        length = 8 + int.from_bytes(content[:8], "little") if len(content) >= 8 else 0
        if len(content) < length <= min(size, LONGEST):
            content += self._range(name, len(content), length - len(content))[0]
        # The reader of checkpoints refuses a file without a header.
        self._headers[name] = self._write(name, content[:length] if 8 < length <= len(content) else content, size)
        return size

    def _write(self, name: str, content: bytes, size: int | None = None) -> int:
        """Write a sparse file of ``size`` bytes that begins with ``content``; return the length of ``content``."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                if size is not None:
                    file.truncate(size)
        except (OSError, OverflowError) as error:
            raise _write_error(str(self.folder.parent), error) from error
        return len(content)

    def _settings_ranges(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Yield the ranges of small tensors of a file that may describe codes, as arguments of ``_range``."""
        try:
            with open(self.folder / name, "rb") as file:
                content = file.read(self._headers[name])
            header = json.loads(content[8:])
            for tensor, entry in header.items():
                start, end = entry["data_offsets"] if tensor != "__metadata__" else (0, 0)
                if 0 < end - start <= SETTINGS_SIZE and entry["dtype"] in SETTINGS_DTYPES:
                    yield name, len(content) + start, end - start
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return  # the reader of checkpoints refuses the header

    def _file(self, path: Path) -> DataFile:
        """Return the object that reads the bytes of a file."""
        name = path.relative_to(self.folder).as_posix()

        def fetch(offset: int, length: int) -> bytes:
            return self._values.get((name, offset, length)) or self._range(name, offset, length)[0]

        return _RemoteFile(path, self._headers[name], fetch)

    def _range(self, name: str, offset: int, length: int) -> tuple[bytes, int]:
        """Download up to ``length`` bytes at ``offset``; return them and the size of the file."""
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
                    f"{self._wanted} cannot be planned from its headers: the hub does not send parts of {name}; "
                    "download the model, and give its directory"
                )
            return b"".join(response.iter_bytes()), int(size)


def _write_error(folder: str, error: Exception) -> SourceError:
    reason = getattr(error, "strerror", None) or error
    return SourceError(
        f"the headers of the model could not be written to {folder} ({reason}): set TMPDIR to a directory on a file "
        "system with sparse files"
    )


class _RemoteFile(DataFile):
    """A file of which the header is read from the sparse file, and values from the hub."""

    def __init__(self, path: Path, header: int, fetch: Fetch) -> None:
        super().__init__(path)
        self._header, self._fetch = header, fetch

    def read(self, offset: int, out: torch.Tensor) -> None:
        if offset + out.nbytes <= self._header:
            return super().read(offset, out)
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            content = self._fetch(offset, len(view))
        except Exception as error:  # raised by the HTTP client
            raise OSError(f"the hub did not send it: {without_secrets(str(error))}") from safe_cause(error)
        if len(content) != len(view):
            raise OSError(f"the hub sent {len(content)} bytes of {len(view)}")
        view[:] = content

    def prefetch(self, offset: int, size: int) -> None:
        """Do nothing: the values that a plan needs are small."""
