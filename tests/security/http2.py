"""HTTP/2 as bytes: gRPC calls that no gRPC library would send, and what comes back."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM = ACK = 1
END_HEADERS = 4
_LONGEST_FRAME = 16384


class Frame(NamedTuple):
    """One frame: its type, its flags, its stream (0: the connection) and what it carries."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    def encode(self) -> bytes:
        """Return it as it is sent."""
        head = struct.pack(">I", len(self.payload))[1:] + bytes([self.kind, self.flags])
        return head + struct.pack(">I", self.stream) + self.payload


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header that neither end has to remember (RFC 7541, 6.2.2), without Huffman's code."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    length = len(text)
    if length < 127:
        return bytes([length]) + text
    head, length = b"\x7f", length - 127
    while length >= 128:
        head, length = head + bytes([length % 128 + 128]), length // 128
    return head + bytes([length]) + text


def message(data: bytes) -> bytes:
    """Return a gRPC message as it stands in DATA frames."""
    return b"\x00" + struct.pack(">I", len(data)) + data


class Connection:
    """One connection to a gRPC port, within a `with`."""

    def __init__(self, port: int) -> None:
        """Connect to `port` of this machine."""
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self._stream = 1
        self._buffer = b""
        self.send(PREFACE + Frame(SETTINGS, 0, 0, b"").encode())

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
        self, path: str, metadata: Iterable[tuple[bytes, bytes]] = (), body: bytes = b"", *, end: bool = True
    ) -> int:
        """Send a call whose DATA is `body`, and say whether that was all; return its stream."""
        stream, self._stream = self._stream, self._stream + 2
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *metadata,
        ]
        block = b"".join(literal(name, value) for name, value in headers)
        frames = [
            Frame(HEADERS if at == 0 else CONTINUATION, 0, stream, block[at : at + _LONGEST_FRAME])
            for at in range(0, len(block), _LONGEST_FRAME)
        ]
        frames[-1] = frames[-1]._replace(flags=END_HEADERS)
        frames.append(Frame(DATA, END_STREAM if end else 0, stream, body))
        self.send(b"".join(frame.encode() for frame in frames))
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
            for frame in self._frames():
                found.append(frame)
                last = frame.kind in (DATA, HEADERS) and frame.flags & END_STREAM
                if frame.stream == stream and (last or frame.kind == RST_STREAM):
                    return found
        return found

    def _frames(self) -> list[Frame]:
        found = []
        while len(self._buffer) >= 9:
            end = 9 + int.from_bytes(self._buffer[:3])
            if len(self._buffer) < end:
                break
            kind, flags = self._buffer[3], self._buffer[4]
            frame = Frame(kind, flags, int.from_bytes(self._buffer[5:9]), self._buffer[9:end])
            self._buffer = self._buffer[end:]
            found.append(frame)
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.send(
                    frame._replace(flags=ACK, payload=b"" if kind == SETTINGS else frame.payload).encode()
                )
        return found
