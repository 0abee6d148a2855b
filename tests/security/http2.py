"""gRPC calls that no gRPC library would send, byte by byte, and what comes back."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from drills.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEAD_SIZE,
    HEADERS,
    MOST,
    PREFACE,
    Head,
    answer_to,
    frame,
    literal,
    read_head,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType


class Frame(NamedTuple):
    """A frame that has come, with what it carries."""

    head: Head
    payload: bytes


class Connection:
    """One connection to a gRPC port, within a `with`."""

    def __init__(self, port: int) -> None:
        """Connect to `port` of this machine."""
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self._stream = 1
        self._buffer = b""
        self.send(PREFACE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send these bytes."""
        self.socket.sendall(data)

    def call(
        self,
        path: str | bytes,
        metadata: Iterable[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        *,
        end: bool = True,
    ) -> int:
        """Send a call whose DATA is `body`, and say whether that was all; return its stream."""
        stream, self._stream = self._stream, self._stream + 2
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode() if isinstance(path, str) else path),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *metadata,
        ]
        block = b"".join(literal(name, value) for name, value in headers)
        starts = range(0, len(block), MOST)
        frames = [
            frame(
                CONTINUATION if start else HEADERS,
                END_HEADERS if start == starts[-1] else 0,
                stream,
                block[start : start + MOST],
            )
            for start in starts
        ]
        self.send(b"".join(frames) + frame(DATA, END_STREAM if end else 0, stream, body))
        return stream

    def read(self, stream: int, seconds: float = 5.0) -> list[Frame]:
        """Return the frames that come until this stream, or the connection, ends; at most for so long."""
        found: list[Frame] = []
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(65536)
            except OSError:
                break
            if not data:
                break
            self._buffer += data
            for one in self._frames():
                found.append(one)
                if one.head.stream == stream and one.head.ends:
                    return found
        return found

    def _frames(self) -> list[Frame]:
        found = []
        while len(self._buffer) >= HEAD_SIZE:
            head = read_head(self._buffer)
            end = HEAD_SIZE + head.size
            if len(self._buffer) < end:
                break
            found.append(Frame(head, self._buffer[HEAD_SIZE:end]))
            self._buffer = self._buffer[end:]
            if answer := answer_to(head, found[-1].payload):
                with suppress(OSError):  # what came before the other end left is still read
                    self.send(answer)
        return found
