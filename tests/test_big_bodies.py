"""Bodies larger than memory should have to hold, through a real worker, whose memory is measured."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.relay_process import RelayProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

MIB = 1024 * 1024
#: Most resident memory that the worker may ever have had.
MOST = 100 * MIB
#: Longest that one of these may take.
SECONDS = 60
POOL = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(3 * MIB // 32))


def blocks(size: int) -> Iterator[memoryview]:
    """Yield a body of so many bytes in which every MiB is another one."""
    pool = memoryview(POOL)
    for number in range(size // MIB):
        at = number * 4099 % (2 * MIB)
        yield pool[at : at + MIB]
    if size % MIB:
        yield pool[: size % MIB]


def digest_of(size: int) -> bytes:
    digest = hashlib.sha1(usedforsecurity=False)
    for block in blocks(size):
        digest.update(block)
    return digest.digest()


class Wire:
    """One blocking connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(SECONDS)
        self.sock = sock
        self._file = io.BufferedReader(socket.SocketIO(sock, "r"), MIB)
        self._buffer = memoryview(bytearray(MIB))

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def more(self) -> bool:
        """Wait for a byte; return False at the end."""
        return bool(self._file.peek(1))

    def head(self) -> bytes:
        """Read a head; return it in lower case, with a line end behind each line."""
        lines = []
        while (line := self._file.readline(65536)) != b"\r\n":
            assert line.endswith(b"\r\n"), "closed before a head was complete"
            lines.append(line.lower())
        return b"".join(lines)

    def body(self, head: bytes) -> tuple[int, bytes]:
        """Read the body behind `head`; return its size and its hash."""
        digest = hashlib.sha1(usedforsecurity=False)
        size = 0
        declared = re.search(rb"\r\ncontent-length: (\d+)", head)
        if declared is not None:
            return self._read(int(declared[1]), digest), digest.digest()
        assert b"\r\ntransfer-encoding: chunked\r\n" in head
        while chunk := int(self._file.readline(), 16):
            size += self._read(chunk, digest)
            assert self._file.readline() == b"\r\n"
        assert self._file.readline() == b"\r\n"
        return size, digest.digest()

    def _read(self, size: int, digest: hashlib._Hash) -> int:
        left = size
        while left:
            got = self._file.readinto1(self._buffer[: min(left, MIB)])
            assert got, f"closed with {left} bytes to come"
            digest.update(self._buffer[:got])
            left -= got
        return size

    def send(self, head: bytes, size: int, *, chunked: bool) -> None:
        """Send a message: `head` without its framing, and the body of this size."""
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        self.sock.sendall(head + framing + b"\r\n\r\n")
        for block in blocks(size):
            if chunked:
                self.sock.sendall(b"%x\r\n" % len(block))
            self.sock.sendall(block)
            if chunked:
                self.sock.sendall(b"\r\n")
        if chunked:
            self.sock.sendall(b"0\r\n\r\n")


class BigSuperlink:
    """Takes what is pushed and gives what is pulled, in blocking threads.

    Attributes:
        pushed: size and hash of each body that came.
    """

    def __init__(self, size: int, *, chunked: bool) -> None:
        self._size = size
        self._chunked = chunked
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listening.getsockname()[1]
        self.pushed: list[tuple[int, bytes]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.closing(Wire(sock)) as wire, contextlib.suppress(OSError):
            while wire.more():
                head = wire.head()
                asked = wire.body(head)
                push = b"/push-object " in head
                if push:
                    self.pushed.append(asked)
                wire.send(ANSWER, 0 if push else self._size, chunked=self._chunked)

    def close(self) -> None:
        self._listening.close()


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n"
REQUEST = b"POST /v1/fleet/%b HTTP/1.1\r\nHost: relay\r\nContent-Type: application/protobuf\r\n"


def carry(port: int, method: bytes, size: int, *, chunked: bool) -> tuple[int, bytes]:
    """Ask one call with a body of this size; return size and hash of the answer."""
    with contextlib.closing(Wire(socket.create_connection(("127.0.0.1", port)))) as wire:
        wire.send(REQUEST % method, size, chunked=chunked)
        head = wire.head()
        assert head.startswith(b"http/1.1 200 ")
        return wire.body(head)


def peak(relay: RelayProcess) -> int:
    """Return the most resident memory that the one worker ever had, in bytes."""
    (worker,) = relay.workers()
    status = Path("/proc", str(worker.pid), "status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize(
    ("size", "times", "chunked"),
    [(2048 * MIB + 7, 1, False), (64 * MIB + 7, 8, False), (64 * MIB + 7, 8, True)],
    ids=["2GiB", "8x64MiB", "8x64MiB-chunked"],
)
def test_a_big_body_arrives_whole_and_is_never_held(
    tmp_path: Path, way: str, size: int, times: int, chunked: bool
) -> None:
    superlink = BigSuperlink(size, chunked=chunked)
    up = way == "up"
    try:
        with RelayProcess(tmp_path, superlink.port, workers=1) as relay, ThreadPoolExecutor(times) as pool:
            before = peak(relay)
            started = time.monotonic()
            method, asked = (b"push-object", size) if up else (b"pull-object", 0)
            calls = [pool.submit(carry, relay.port, method, asked, chunked=chunked) for _ in range(times)]
            answers = [call.result() for call in calls]
            seconds = time.monotonic() - started
            after = peak(relay)
            big, small = (size, digest_of(size)), (0, digest_of(0))
            assert answers == [small if up else big] * times
            assert superlink.pushed == ([big] * times if up else [])
            assert relay.complaints() == []
    finally:
        superlink.close()
    print(f"{seconds:.1f} s, peak {before / MIB:.1f} -> {after / MIB:.1f} MiB")
    assert after < MOST
    assert seconds < SECONDS
