"""Pieces of sharded weights on their way between ranks: each rank gives what it holds to whoever asks for it.

A rank that works on a matrix asks for the pieces that it lacks when it needs them, so that no rank need know what
another does, and nobody waits for an order. It does so over connections of its own (TCP), not through
torch.distributed: a receive of gloo cannot be ended when its sender is gone, and one of nccl ends the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import KappaError, ProcessGroupError
from ..sources.spread import Box
from .line import AGAIN, Line

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

Give = Callable[[str, Box], torch.Tensor]  # what of a tensor, by its name, is here

GLANCE = 0.25  # seconds between two looks at whether the others are still there
BLOCK = 4 << 20  # bytes that are copied at a time, where they do not lie in a row in the memory of the host
NONCE = 32
FAILED = (1 << 64) - 1  # in place of a number of bytes: what follows is the reason
LONGEST_REQUEST = 1 << 20


class Transfer:
    """One rank's end of it, for one call of rank(): a server in threads of its own, and connections to the others."""

    def __init__(self, line: Line, store: Store, give: Give) -> None:
        """All ranks make one; it waits for none of them."""
        self.received = 0  # bytes of weights
        self._line, self._give = line, give
        self._secret = b""
        self._ended = False
        self._connections: dict[int, _Connection] = {}
        self._opening = threading.Lock()
        if line.rank == 0:
            line.post("transfer/secret", secrets.token_hex(NONCE))
        address, family = own_address(store)
        self._listener = socket.socket(family)
        self._listener.bind((address, 0))
        self._listener.listen(128)
        self._listener.settimeout(GLANCE)
        self._secret = bytes.fromhex(line.expect("transfer/secret"))
        threading.Thread(target=self._serve, name="kappa_fast_pieces", daemon=True).start()
        line.post(f"transfer/{line.rank}", [address, self._listener.getsockname()[1]])

    def fetch(self, rank: int, name: str, box: Box) -> torch.Tensor:
        """That part of what a rank of the group holds of a tensor, as bytes on the CPU.

        Raises:
            ProcessGroupError: the rank is gone, cannot be reached, or cannot give it.
        """
        with self._opening:
            if rank not in self._connections:
                self._connections[rank] = _Connection(self._line, rank)
            connection = self._connections[rank]
        found = connection.ask(self._secret, json.dumps([name, [[r.start, r.stop, r.step] for r in box]]).encode())
        self.received += found.numel()
        return found

    def close(self) -> None:
        """Serve no more. Never raises."""
        self._ended = True
        for connection in self._connections.values():
            connection.close()
        with contextlib.suppress(OSError):
            self._listener.close()

    # What follows runs in threads of the server.

    def _serve(self) -> None:
        while not self._ended:
            try:
                connected, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed
                return
            threading.Thread(target=self._serve_one, args=(connected,), daemon=True).start()

    def _serve_one(self, connected: socket.socket) -> None:
        with connected, contextlib.suppress(OSError, _Ended):
            connected.settimeout(GLANCE)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = _Wire(connected, self._check)
            if not _admitted(line, self._secret, self._line.rank):
                return
            while True:
                (length,) = struct.unpack("!I", line.read(4))
                if length > LONGEST_REQUEST:
                    return
                self._answer(line, *json.loads(bytes(line.read(length))))

    def _answer(self, line: _Wire, name: str, box: list[list[int]]) -> None:
        try:
            part = self._give(name, tuple(range(*sizes) for sizes in box))
            size = part.numel() * part.itemsize
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[:1000]
            line.write(struct.pack("!QI", FAILED, len(text)) + text)
            return
        line.write(struct.pack("!Q", size))
        whole = part.device.type == "cpu" and part.is_contiguous()
        rows = len(part) if part.dim() else 1
        step = rows if whole else max(1, BLOCK * rows // max(1, size))
        for start in range(0, rows if size else 0, max(1, step)):
            block = part[start : start + step] if part.dim() else part
            line.write(_bytes_of(block.contiguous().cpu()))

    def _check(self) -> None:
        if self._ended:
            raise _Ended


class _Ended(Exception):
    """This rank needs no more, or has failed."""


class _Wire:
    """A socket that is read and written to in whole messages; ``check`` is asked while the other side is silent."""

    def __init__(self, connected: socket.socket, check: Callable[[], None]) -> None:
        self._socket, self._check = connected, check

    def read(self, size: int) -> bytearray:
        """So many bytes."""
        found = bytearray(size)
        self.read_into(memoryview(found))
        return found

    def read_into(self, view: memoryview) -> None:
        """Fill it. Raises OSError where the connection ends."""
        while view:
            try:
                count = self._socket.recv_into(view)
            except TimeoutError:
                self._check()
                continue
            if not count:
                raise ConnectionResetError("the connection has ended")
            view = view[count:]

    def write(self, data: Any) -> None:
        """All of it. Raises OSError where the connection ends."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except TimeoutError:
                self._check()


class _Connection:
    """To the server of one rank; one question at a time."""

    def __init__(self, line: Line, rank: int) -> None:
        self._line, self._rank = line, rank
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def ask(self, secret: bytes, request: bytes) -> torch.Tensor:
        while not self._lock.acquire(timeout=GLANCE):
            self._line.moved()
        try:
            wire = self._opened(secret)
            wire.write(struct.pack("!I", len(request)) + request)
            (size,) = struct.unpack("!Q", wire.read(8))
            if size == FAILED:
                (length,) = struct.unpack("!I", wire.read(4))
                reason = bytes(wire.read(length)).decode(errors="replace")
                raise ProcessGroupError(f"rank {self._rank} cannot give a piece of a weight ({reason})", self._rank)
            found = torch.empty(size, dtype=torch.uint8)
            if size:
                wire.read_into(_bytes_of(found))
            return found
        except OSError as error:
            raise self._gone(error) from error
        finally:
            self._lock.release()

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()

    def _opened(self, secret: bytes) -> _Wire:
        if self._socket is None:
            host, port = self._line.expect(f"transfer/{self._rank}")
            self._socket = socket.create_connection((host, port), timeout=max(1.0, self._line.timeout / 4))
            self._socket.settimeout(GLANCE)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _introduced(_Wire(self._socket, self._line.moved), secret, self._rank)
        return _Wire(self._socket, self._line.moved)

    def _gone(self, error: OSError) -> ProcessGroupError:
        """Why, as the line has it within the timeout; what the connection says if the line knows of nothing."""
        deadline = time.monotonic() + self._line.timeout
        while time.monotonic() < deadline:
            self._line.moved()
            time.sleep(GLANCE / 5)
        return ProcessGroupError(
            f"rank {self._rank}, which holds pieces of the weights, cannot be reached ({error}): ranks connect to each "
            f"other at addresses of their own; GLOO_SOCKET_IFNAME names the network interface to use; {AGAIN}",
            self._rank,
        )


def _admitted(wire: _Wire, secret: bytes, rank: int) -> bool:
    """Whether whoever has connected knows the secret of this call, and wants this rank; proves the same to them."""
    mine = secrets.token_bytes(NONCE)
    wire.write(mine)
    theirs, proof = bytes(wire.read(NONCE)), bytes(wire.read(NONCE))
    if not hmac.compare_digest(proof, _proof(secret, b"asks", rank, mine)):
        return False
    wire.write(_proof(secret, b"gives", rank, theirs))
    return True


def _introduced(wire: _Wire, secret: bytes, rank: int) -> None:
    theirs, mine = bytes(wire.read(NONCE)), secrets.token_bytes(NONCE)
    wire.write(mine + _proof(secret, b"asks", rank, theirs))
    if not hmac.compare_digest(bytes(wire.read(NONCE)), _proof(secret, b"gives", rank, mine)):
        raise ConnectionRefusedError("something else answers there")


def _proof(secret: bytes, role: bytes, rank: int, nonce: bytes) -> bytes:
    return hmac.digest(secret, b"%s %d " % (role, rank) + nonce, hashlib.sha256)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def own_address(store: Any) -> tuple[str, socket.AddressFamily]:
    """The address at which other ranks reach this one: that of GLOO_SOCKET_IFNAME, else towards the store.

    Raises:
        KappaError: there is no such interface.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        return _address_of(named), socket.AF_INET
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    host, port = getattr(inner, "host", None), getattr(inner, "port", None)
    if not host or not port:  # a store in a file, or in this process
        return "127.0.0.1", socket.AF_INET
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # of datagrams: nothing is sent, the way there is found
        return probe.getsockname()[0], family


def _address_of(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError as error:
            raise KappaError(f"GLOO_SOCKET_IFNAME={interface!r} has no address ({error}): name another") from error
    return socket.inet_ntoa(found[20:24])
