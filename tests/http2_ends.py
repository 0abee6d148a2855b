"""A connection of the HTTP/2 server without a socket: a client that sends what a test says, by frames."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from drills.http2 import HEAD_SIZE, frame, literal, read_head
from relay.fleet import Method
from relay.limits import Limits
from relay.quota import Quota
from relay.wires import http2
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_fleet import GrpcFront
from relay.wires.grpc_request import Receiver
from relay.wires.grpc_server import GrpcServer
from relay.wires.http2 import Code, Setting
from relay.wires.http2_connection import Connection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay.wires.http2_stream import Stream

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GREETING = PREFACE + frame(http2.SETTINGS, 0, 0)
KNOWN = frame(http2.SETTINGS, http2.ACK, 0)
ASKS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", Method.PULL_MESSAGES.grpc.encode()),
    (b":authority", b"localhost"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)
#: What the tests answer.
HEAD = b"\x88"
TRAILERS = literal(b"grpc-status", b"0")


class Frame(NamedTuple):
    """A frame that has come."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> Code:
        """Why a stream or a connection ends."""
        return Code(int.from_bytes(self.payload[0:4] if self.kind == http2.RST_STREAM else self.payload[4:8]))


class Pipe(asyncio.Transport):
    """What the connection writes to.

    Attributes:
        written: what was, in the pieces in which it was.
        held: bytes of it that the client has not taken.
        closed, aborted: whether it was.
    """

    def __init__(self, **extra: object) -> None:
        super().__init__({"peername": ("192.0.2.7", 1), **extra})
        self.written: list[bytes] = []
        self.held = 0
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.written.extend(map(bytes, list_of_data))

    def get_write_buffer_size(self) -> int:
        return self.held

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


class Server(GrpcServer):
    """A server that leaves the answers to the test.

    Attributes:
        begun: the streams that came.
        strays: what was counted as no call.
    """

    def __init__(self, *, age: float = 1000.0, keepalive: float = 1000.0, **limits: Any) -> None:
        self.begun: list[Stream] = []
        self.strays: list[str] = []
        front = GrpcFront(
            {},
            Receiver(Forwarding([]), Limits(dict.fromkeys(Method, 1 << 24), **limits), 20.0),
            Quota(1 << 30),
            idle_timeout=20.0,
            on_stray=self.strays.append,
        )
        super().__init__(front, "127.0.0.1", 0, keepalive=keepalive, age=age)

    def start_stream(self, stream: Stream) -> None:
        self.begun.append(stream)


class Client:
    """The other end of a connection.

    Attributes:
        server, connection, pipe: what it is connected to.
    """

    def __init__(
        self, server: Server | None = None, *, greets: bool = True, tls: bool = False, **of_server: Any
    ) -> None:
        """Connect; `greets`: and send preface and settings, and take those of the server."""
        self.server = server or Server(**of_server)
        self.pipe = Pipe(sslcontext=object()) if tls else Pipe()
        self.connection = Connection(self.server)
        self.connection.connection_made(self.pipe)
        self._buffer = b""
        if greets:
            self.send(GREETING, KNOWN)
            self.got()

    @property
    def begun(self) -> list[Stream]:
        return self.server.begun

    @property
    def last(self) -> Stream:
        """The stream that came last."""
        return self.server.begun[-1]

    def send(self, *data: bytes) -> None:
        """Send these bytes at once."""
        self.connection.data_received(b"".join(data))

    def ask(
        self, number: int = 1, *fields: tuple[bytes, bytes], body: bytes = b"", ended: bool = True
    ) -> Stream:
        """Begin a call; return its stream."""
        self.send(asks(number, *fields, ended=ended and not body))
        if body:
            self.send(frame(http2.DATA, http2.END_STREAM if ended else 0, number, body))
        return self.last

    def got(self) -> list[Frame]:
        """Return the frames that came since this was asked last."""
        self._buffer += b"".join(self.pipe.written)
        self.pipe.written.clear()
        frames = []
        while len(self._buffer) >= HEAD_SIZE:
            head = read_head(self._buffer)
            end = HEAD_SIZE + head.size
            assert len(self._buffer) >= end
            frames.append(Frame(head.kind, head.flags, head.stream, self._buffer[HEAD_SIZE:end]))
            self._buffer = self._buffer[end:]
        assert not self._buffer
        return frames

    def kinds(self) -> list[int]:
        """Return the kinds of the frames that came."""
        return [one.kind for one in self.got()]

    def resets(self) -> list[tuple[int, Code]]:
        """Return the streams that were reset since this was asked last, and why."""
        return [(one.stream, one.code) for one in self.got() if one.kind == http2.RST_STREAM]

    def goaway(self) -> tuple[int, Code]:
        """Return what the only GOAWAY frame says that came since."""
        (one,) = (one for one in self.got() if one.kind == http2.GOAWAY)
        return int.from_bytes(one.payload[:4]), one.code

    def lose(self) -> None:
        """Go."""
        self.connection.connection_lost(None)

    def is_closed(self) -> bool:
        """Return whether the connection was ended in any way."""
        return self.pipe.closed

    def is_cut(self) -> bool:
        """Return whether it was reset."""
        return self.pipe.aborted

    def is_done(self) -> bool:
        """Return whether nothing of any call is left."""
        connection = self.connection
        return not (
            connection.streams or connection.turns.asking or connection.turns.waiting or self.server._tasks
        )


def asks(number: int, *fields: tuple[bytes, bytes], ended: bool = True) -> bytes:
    """Return the HEADERS frame of a call."""
    flags = http2.END_HEADERS | (http2.END_STREAM if ended else 0)
    return frame(http2.HEADERS, flags, number, block((*ASKS, *fields)))


def block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a header block."""
    return b"".join(literal(*field) for field in fields)


def settings(**values: int) -> bytes:
    """Return a SETTINGS frame."""
    pairs = (Setting[name.upper()].to_bytes(2) + value.to_bytes(4) for name, value in values.items())
    return frame(http2.SETTINGS, 0, 0, b"".join(pairs))


def window(number: int, more: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame(http2.WINDOW_UPDATE, 0, number, more.to_bytes(4))


def reset(number: int, code: Code = Code.CANCEL) -> bytes:
    """Return an RST_STREAM frame."""
    return frame(http2.RST_STREAM, 0, number, code.to_bytes(4))


def data_of(frames: Iterable[Frame], number: int = 1) -> bytes:
    """Return the data of a stream."""
    return b"".join(one.payload for one in frames if one.kind == http2.DATA and one.stream == number)
