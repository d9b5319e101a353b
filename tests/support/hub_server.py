"""A hub on the loopback interface: the few routes that downloading a model takes, over a real HTTP server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from models import weights
from safetensors.torch import save

COMMIT = "a" * 40
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MODEL = weights(model__layers__0__up__weight=(40, 24), model__layers__1__up__weight=(40, 24))
NAMES = list(MODEL)
SINGLE = {"model.safetensors": save(MODEL), "config.json": b'{"model_type": "tiny"}'}
SHARDED = {
    "config.json": SINGLE["config.json"],
    INDEX: json.dumps({"weight_map": dict(zip(NAMES, (FIRST, SECOND), strict=True))}).encode(),
    FIRST: save({NAMES[0]: MODEL[NAMES[0]]}),
    SECOND: save({NAMES[1]: MODEL[NAMES[1]]}),
}


class Hub:
    """Repositories by id, each a mapping of file names to contents; errors by id or file (status and error code).

    requests: method and path.  sent: bytes of contents by file name.  ranges: whether parts of files are sent.
    commit: of all repositories.  busy: how many requests for files are answered with 503 before one is served.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Mapping[str, bytes]] = {}
        self.errors: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()
        self.ranges = True
        self.commit = COMMIT
        self.busy = 0
        self.url = ""

    def downloaded(self) -> list[str]:
        """Names of the files whose contents were sent."""
        marker = f"/resolve/{self.commit}/"
        found = (line.removeprefix("GET ") for line in self.requests if line.startswith("GET "))
        return sorted({path.partition(marker)[2] for path in found if marker in path})


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            api = path.startswith("/api/models/")
            words = path.removeprefix("/api/models").strip("/").split("/")
            name, rest = "/".join(words[:2]), words[2:]
            files = hub.repositories.get(name)
            if error := hub.errors.get(name) or hub.errors.get("/".join(rest[2:])):
                self.send(error[0], b"{}", {"X-Error-Code": error[1]})
            elif files is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif api and rest[:1] == ["tree"]:
                self.send_json([entry(path, content) for path, content in files.items()])
            elif api and rest[:1] == ["revision"] and rest[1] not in ("main", "v1", COMMIT, hub.commit):
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif api:
                siblings = [{"rfilename": path} for path in files]
                sha = commit_of(rest[1:2])
                self.send_json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})
            elif rest[:1] == ["resolve"] and "/".join(rest[2:]) in files:
                self.send_file("/".join(rest[2:]), files["/".join(rest[2:])], commit_of(rest[1:2]))
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def send_file(self, name: str, content: bytes, commit: str) -> None:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(content)}"'}
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            status, body = 200, content
            if hub.ranges and first and int(first) >= len(content):
                status, body = 416, b""
                headers["Content-Range"] = f"bytes */{len(content)}"
            elif hub.ranges and first and last:
                status, body = 206, content[int(first) : int(last) + 1]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}"
            if hub.busy and "Range" in self.headers:
                hub.busy -= 1
                status, body = 503, b""
            self.send(status, body, headers, name)

        def send_json(self, document: object) -> None:
            self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: Mapping[str, str], name: str = "") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for start in range(0, len(body) if self.command == "GET" else 0, 1 << 20):
                try:
                    self.wfile.write(body[start : start + (1 << 20)])
                except OSError:  # whoever asked has seen enough
                    return
                hub.sent[name] += len(body[start : start + (1 << 20)])

    def commit_of(revision: list[str]) -> str:
        return revision[0] if revision and len(revision[0]) == len(COMMIT) else hub.commit

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": digest(content)}


def store_in_cache(cache: Path, name: str, files: Mapping[str, bytes], commit: str = COMMIT, ref: str = "main") -> Path:
    """What huggingface_hub keeps of a download: blobs, links to them in a snapshot, and what a branch points to."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    for path, content in files.items():
        (blobs / digest(content)).write_bytes(content)
        (snapshot / path).symlink_to(Path("..", "..", "blobs", digest(content)))
    return snapshot
