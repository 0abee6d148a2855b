"""A SuperLink that is played byte by byte, and connections and pools to it, on both event loops."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import TYPE_CHECKING

import pytest
import uvloop

from relay.call import Payload
from relay.upstreams.connection import Connection
from relay.upstreams.pool import Pool, Target
from tests.sockets import PATIENCE, Listener

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from tests.sockets import Peer

#: The head of a request, without its framing and the empty line; one without a body; one in chunks.
HEAD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: sl\r\n"
EMPTY = HEAD + b"content-length: 0\r\n\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop is what workers run on; asyncio's own loop keeps to the letter of the protocol rules."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


class Pieces:
    """A body that the test brings piece by piece; see `relay.call.Body`."""

    def __init__(self, *pieces: bytes | BaseException) -> None:
        self.pieces: deque[bytes | BaseException] = deque(pieces)
        self.read_bytes = 0
        self.closed = 0
        self._more = asyncio.Event()

    def add(self, *pieces: bytes | BaseException) -> None:
        """Bring more; b"" ends the body, an exception breaks it."""
        self.pieces.extend(pieces)
        self._more.set()

    async def read(self) -> bytes:
        while not self.pieces:
            self._more.clear()
            await self._more.wait()
        piece = self.pieces.popleft()
        if isinstance(piece, BaseException):
            raise piece
        self.read_bytes += len(piece)
        return piece

    def close(self) -> None:
        self.closed += 1


class Endless:
    """A body without an end that counts what was read of it."""

    def __init__(self, piece: bytes) -> None:
        self.piece = piece
        self.read_bytes = 0

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        self.read_bytes += len(self.piece)
        return self.piece

    def close(self) -> None:
        """Nothing is held."""


def body(*pieces: bytes | BaseException, size: int | None = None) -> Payload:
    """Return a payload that is still arriving, in these pieces; its end is not implied."""
    return Payload(body=Pieces(*pieces), size=size)


class Watched:
    """A connection to the listener, and what it told its pool."""

    def __init__(self, connection: Connection, freed: list[Connection], lost: list[Connection]) -> None:
        self.connection = connection
        self.freed = freed
        self.lost = lost


async def read_all(connection: Connection) -> bytes:
    """Return the body of a response, read piece by piece."""
    pieces = []
    while piece := await connection.read():
        pieces.append(piece)
    return b"".join(pieces)


async def answered(watched: Watched, upstream: Listener, answer: bytes) -> Peer:
    """Have `answer` given to an empty request; return the upstream's end once the head is here."""
    exchange = asyncio.ensure_future(watched.connection.exchange(EMPTY, Payload(), PATIENCE))
    peer = await upstream.accept()
    await peer.message()
    peer.send(answer)
    await exchange
    return peer


@pytest.fixture
async def upstream() -> AsyncIterator[Listener]:
    """Return a listener that accepts connections and answers nothing by itself."""
    async with Listener() as listener:
        yield listener


@pytest.fixture
async def dial(upstream: Listener) -> AsyncIterator[Callable[..., Awaitable[Watched]]]:
    """Return a function that opens one connection to `upstream`."""
    opened: list[Connection] = []

    async def dial(idle_timeout: float = PATIENCE) -> Watched:
        freed: list[Connection] = []
        lost: list[Connection] = []
        loop = asyncio.get_running_loop()
        sock = socket.socket(proto=socket.IPPROTO_TCP)  # or asyncio sets no TCP_NODELAY
        sock.setblocking(False)
        # So that what an upstream does not take lies with the connection and not with the kernel.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        await loop.sock_connect(sock, ("127.0.0.1", upstream.port))
        _, connection = await loop.create_connection(
            lambda: Connection("sl", idle_timeout, on_free=freed.append, on_lost=lost.append), sock=sock
        )
        opened.append(connection)
        return Watched(connection, freed, lost)

    yield dial
    for connection in opened:
        connection.abort()
    await asyncio.sleep(0.001)


@pytest.fixture
async def make_pool(upstream: Listener) -> AsyncIterator[Callable[..., Pool]]:
    """Return a factory of pools to `upstream`, with times that suit a test."""
    made: list[Pool] = []

    def make(
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = PATIENCE,
        idle_timeout: float = PATIENCE,
        keepalive: float = PATIENCE,
        max_connections: int = 8,
        queue_timeout: float = PATIENCE,
    ) -> Pool:
        port = upstream.port if port is None else port
        pool = Pool(
            Target(host, port, f"{host}:{port}", tls),
            connect_timeout=connect_timeout,
            idle_timeout=idle_timeout,
            keepalive=keepalive,
            max_connections=max_connections,
            queue_timeout=queue_timeout,
        )
        made.append(pool)
        return pool

    yield make
    for pool in made:
        await pool.close()
        for connection in list(pool._connections):
            connection.abort()
    await asyncio.sleep(0.001)
