"""Headers of a model on a hub, in byte ranges: what a plan needs of a model that nobody has downloaded.

For every file of weights there is a stand-in of the same size in a temporary directory: its header, and a hole behind
it, for the code that reads checkpoints to look at. Values that somebody asks for come from the hub, not from the hole.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import SourceError
from .base import Inventory
from .checkpoint import INDEX_ENDING, read_checkpoint, stays_inside
from .files import DataFile
from .hub import CONFIG, HubId, explained, library, listed_shards, look_in_cache, wanted_files

FIRST = 100_000  # bytes of a file that are asked for at once: most headers are shorter
LONGEST = 100_000_000  # the longest header that safetensors reads
AT_ONCE = 8

Fetch = Callable[[int, int], bytes]  # bytes from an offset on, at most so many


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
    try:
        return _Remote(hub, wanted).inventory()
    except SourceError:
        raise
    except Exception as error:  # of huggingface_hub, of the HTTP client that it happens to use, of the disk
        if cached.path is not None and cached.lacking is None:
            return None  # it may be complete: ranked, it would be used with a warning
        raise explained(wanted, cached.lacking, error) from error


class _Remote:
    """The files of one commit, and the directory of their stand-ins, which goes when nobody holds a file of it."""

    def __init__(self, hub: Any, wanted: HubId) -> None:
        self._hub, self._wanted = hub, wanted
        info = hub.HfApi().model_info(wanted.name, revision=wanted.revision)
        self.commit = str(info.sha)
        self._listed = [sibling.rfilename for sibling in info.siblings or ()]
        self.folder = Path(tempfile.mkdtemp(prefix="kappa_fast-headers-")).resolve()
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._cached = look_in_cache(hub, HubId(wanted.name, self.commit)).path
        self._headers: dict[str, int] = {}  # how many bytes of a stand-in are not hole

    def inventory(self) -> Inventory | None:
        """What the headers say; None if all files of weights are in the cache."""
        try:
            names = self._files_of_weights()
            lacking = [name for name in names if self._cached is None or not (self._cached / name).is_file()]
            if names and not lacking:
                return None
            sizes = dict(zip(names, self._stand_ins(names), strict=True))
            found = self._read()
        except BaseException:
            self.close()  # or the traceback would keep it
            raise
        known = {"path": str(self._wanted), "id": self._wanted.name, "revision": self.commit}
        sized = {"size": sum(sizes.values()), "to_download": sum(sizes[name] for name in lacking)}
        return replace(found, metadata={**found.metadata, **known, **sized})

    def _read(self) -> Inventory:
        try:
            return read_checkpoint(self.folder, self._file)
        except SourceError as error:  # it speaks of the stand-ins
            raise type(error)(str(error).replace(str(self.folder), str(self._wanted))) from error

    def _files_of_weights(self) -> list[str]:
        """The shards; what is small and no weights is taken from the cache, or downloaded to it, as ranking does."""
        names = wanted_files(self._wanted, self._listed)
        for name in {CONFIG, *names} & set(self._listed):
            if name == CONFIG or name.endswith(INDEX_ENDING):
                # By the name that was given, or the cache would not know what the branch points to.
                revision = self._wanted.revision
                small = Path(self._hub.hf_hub_download(self._wanted.name, name, revision=revision))
                (self.folder / name).write_bytes(small.read_bytes())
        indices = [name for name in names if name.endswith(INDEX_ENDING)]
        found = listed_shards(self.folder / indices[0], self._listed) if indices else names
        return [name for name in found if stays_inside(name, self.folder)]  # the reader of the index refuses others

    def _stand_ins(self, names: Sequence[str]) -> list[int]:
        """Write the headers of files, and return how large each file is.

        Raises:
            SourceError: the hub sends whole files only.
        """
        # The first alone: a hub that sends whole files should not send eight at once.
        first = [self._stand_in(name) for name in names[:1]]
        with ThreadPoolExecutor(AT_ONCE, "kappa_fast-headers") as threads:
            return first + list(threads.map(self._stand_in, names[1:]))

    def _stand_in(self, name: str) -> int:
        content, size = self._range(name, 0, FIRST)
        length = 8 + int.from_bytes(content[:8], "little") if len(content) >= 8 else 0
        if len(content) < length <= min(size, LONGEST):
            content += self._range(name, len(content), length - len(content))[0]
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content[:length] if 8 < length <= len(content) else content)  # no header: for others to refuse
            self._headers[name] = file.tell()
            file.truncate(size)
        return size

    def _file(self, path: Path) -> DataFile:
        """Where the bytes of a file come from."""
        name = path.relative_to(self.folder).as_posix()
        return _RemoteFile(path, self._headers[name], lambda offset, length: self._range(name, offset, length)[0])

    def _range(self, name: str, offset: int, length: int) -> tuple[bytes, int]:
        """``length`` bytes from ``offset`` on, or what there is of them, and how large the file is."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = self._hub.hf_hub_url(self._wanted.name, name, revision=self.commit)
        headers = {**build_hf_headers(), "range": f"bytes={offset}-{offset + length - 1}"}
        response = get_session().get(url, headers=headers, timeout=30)
        hf_raise_for_status(response)
        _, slash, size = response.headers.get("content-range", "").rpartition("/")
        if response.status_code != 206 or not slash or not size.isdecimal():
            raise SourceError(
                f"{self._wanted} cannot be planned from its headers: the hub sends no parts of {name}; download the "
                "model, and give its directory"
            )
        return response.content, int(size)


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
            raise OSError(f"the hub did not give it: {error}") from error
        if len(content) != len(view):
            raise OSError(f"the hub gave {len(content)} bytes of {len(view)}")
        view[:] = content

    def prefetch(self, offset: int, size: int) -> None:
        """Nothing: what is asked for at all is small."""
