"""The other end of a connection, as bytes: a test plays a SuperLink or a node with it and says every byte.

Nothing here uses the HTTP code that the relay uses, so that both cannot be wrong in the same way.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from relay.call import Metadata

#: Longest wait for anything that should happen at once: a test that waits for nothing fails after this.
PATIENCE = 10.0
#: What this end holds of what it was sent and nobody reads; small, so that back-pressure is felt early.
READ_LIMIT = 16 * 1024


class CutError(Exception):
    """The other end closed in the middle of a message."""

    def __init__(self, partial: bytes) -> None:
        super().__init__(f"cut after {len(partial)} bytes: {partial[-200:]!r}")
        self.partial = partial


@dataclass(frozen=True, slots=True)
class Message:
    """A request or a response as it stood on the wire.

    Attributes:
        start: its first line.
        headers: names and values as they came.
        body: without its chunking.
        chunks: how many chunks that was; 0 if it was not chunked.
    """

    start: bytes
    headers: Metadata
    body: bytes = b""
    chunks: int = 0

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])

    def all(self, name: bytes) -> list[bytes]:
        """Return the values of every header of this name, in any case."""
        return [value for key, value in self.headers if key.lower() == name]

    def one(self, name: bytes) -> bytes:
        """Return the value of the only header of this name."""
        (value,) = self.all(name)
        return value


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._broken_by: Exception | None = None
        # A stream forgets what came before a reset unless it was read before the reset was seen.
        reader.set_exception = self._broken  # type: ignore[method-assign]

    def _broken(self, exc: Exception) -> None:
        self._broken_by = exc
        self.reader.feed_eof()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def send_all(self, data: bytes) -> None:
        """Send, and wait until the kernel has it."""
        self.writer.write(data)
        await self.writer.drain()

    async def message(self) -> Message:
        """Return the next message, body and all. Raises CutError if it does not come whole."""
        head = await self.head()
        if b"chunked" in b"".join(head.all(b"transfer-encoding")):
            body, chunks = await self._chunked()
            return Message(head.start, head.headers, body, chunks)
        if head.all(b"content-length"):
            return Message(head.start, head.headers, await self.exactly(int(head.one(b"content-length"))))
        if head.start.startswith(b"HTTP/"):
            body, ending = await self.rest()
            if ending == "reset":
                raise CutError(body)
            return Message(head.start, head.headers, body)
        return head

    async def head(self) -> Message:
        """Return the next message up to its empty line."""
        async with asyncio.timeout(PATIENCE):
            try:
                data = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                raise CutError(error.partial) from (self._broken_by or error)
        start, *lines = data[:-4].split(b"\r\n")
        pairs = (line.partition(b":") for line in lines)
        return Message(start, [(name, value.strip(b" \t")) for name, _, value in pairs])

    async def exactly(self, size: int) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise CutError(error.partial) from (self._broken_by or error)

    async def _chunked(self) -> tuple[bytes, int]:
        pieces: list[bytes] = []
        try:
            while size := int((await self.until(b"\r\n"))[:-2], 16):
                pieces.append(await self.exactly(size))
                assert await self.exactly(2) == b"\r\n"
            assert await self.exactly(2) == b"\r\n"
        except CutError as error:
            raise CutError(b"".join(pieces) + error.partial) from error
        return b"".join(pieces), len(pieces)

    async def until(self, separator: bytes) -> bytes:
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.readuntil(separator)
        except asyncio.IncompleteReadError as error:
            raise CutError(error.partial) from (self._broken_by or error)

    async def rest(self, patience: float = PATIENCE) -> tuple[bytes, str]:
        """Read to the end; return what came, and whether it ended by `closed` (FIN) or `reset` (RST)."""
        async with asyncio.timeout(patience):
            came = await self.reader.read()
        return came, "reset" if self._broken_by else "closed"

    async def is_silent(self, seconds: float) -> bool:
        """Return whether neither a byte nor an end comes for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    def finish(self) -> None:
        """Say that this end has nothing more to send (FIN)."""
        self.writer.write_eof()

    def reset(self) -> None:
        """End the connection with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@dataclass
class Listener:
    """A server on a free loopback port whose connections the test accepts and plays one by one."""

    tls: ssl.SSLContext | None = None
    peers: list[Peer] = field(default_factory=list)
    port: int = 0
    _server: asyncio.Server | None = None
    _new: asyncio.Queue[Peer] = field(default_factory=asyncio.Queue)

    async def __aenter__(self) -> Self:
        sock = socket.socket(proto=socket.IPPROTO_TCP)  # or asyncio sets no TCP_NODELAY
        # Inherited by what is accepted; the kernel must not hide a slow reader.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self._server = await asyncio.start_server(self._accepted, sock=sock, ssl=self.tls, limit=READ_LIMIT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for peer in self.peers:
            peer.writer.transport.abort()
        await asyncio.sleep(0)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.peers.append(peer)
        self._new.put_nowait(peer)

    async def accept(self) -> Peer:
        async with asyncio.timeout(PATIENCE):
            return await self._new.get()

    async def play(self, part: Callable[[Peer], Awaitable[None]]) -> None:
        """Play `part` on every connection until cancelled."""
        playing = set()
        try:
            while True:
                playing.add(asyncio.ensure_future(part(await self._new.get())))
        finally:
            for task in playing:
                task.cancel()
            await asyncio.gather(*playing, return_exceptions=True)

    async def serve(self, *answers: bytes) -> None:
        """Answer each request of the next connection with the next of `answers`."""
        peer = await self.accept()
        for answer in answers:
            await peer.message()
            await peer.send_all(answer)


async def connect(port: int, *, receive_buffer: int | None = None, segment: int | None = None) -> Peer:
    """Open a connection to a loopback port.

    Args:
        port: which.
        receive_buffer: bytes that the kernel may hold for this end.
        segment: TCP's segment size; the window of a slow reader opens in steps of it.
    """
    sock = socket.socket(proto=socket.IPPROTO_TCP)  # or asyncio sets no TCP_NODELAY
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if segment is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return Peer(*await asyncio.open_connection(sock=sock, limit=READ_LIMIT))


def response(
    body: bytes = b"",
    *,
    status: bytes = b"200 OK",
    content_type: bytes = b"application/protobuf",
    more: bytes = b"",
    size: int | None = None,
) -> bytes:
    """Return the bytes of a response with a Content-Length, which may lie."""
    return (
        b"HTTP/1.1 %b\r\nContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n"
        % (status, content_type, more, len(body) if size is None else size)
    ) + body


def chunked(*pieces: bytes, more: bytes = b"", last: bytes = b"0\r\n\r\n") -> bytes:
    """Return the bytes of a chunked response."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n%bTransfer-Encoding: chunked\r\n\r\n"
        % more
    )
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last


async def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait until `condition()` is true; fail after `patience` seconds."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.002)
