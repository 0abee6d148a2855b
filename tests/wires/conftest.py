"""A node-facing server over loopback, in front of a handler or of a whole upstream that the test plays."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import uvloop

from relay import dialect
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.limits import Limits, bodies
from relay.upstreams import http_v1 as upstream_http_v1
from relay.upstreams import rest_v0 as upstream_rest_v0
from relay.upstreams.http import Timeouts
from relay.upstreams.pool import Pool, Target
from relay.wires.forwarded import Forwarding
from relay.wires.http import Front, Route
from relay.wires.http_request import Receiver
from relay.wires.http_server import NodeServer
from relay.wires.http_v1 import HTTP_V1
from relay.wires.rest_v0 import REST_V0
from tests.sockets import PATIENCE, Listener, Message, Peer, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from relay.call import Call, Ending, Metadata
    from relay.pipeline import Handler

SPECS = {Wire.HTTP_V1: HTTP_V1, Wire.REST_V0: REST_V0}


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Workers run on uvloop, so its way with buffers and closing is what counts."""
    return {"uvloop": uvloop.new_event_loop}


def path_of(method: Method, wire: Wire = Wire.HTTP_V1) -> bytes:
    return (SPECS[wire].prefix + method.path).encode()


def request(
    body: bytes = b"",
    *,
    method: Method = Method.PUSH_OBJECT,
    wire: Wire = Wire.HTTP_V1,
    path: bytes | None = None,
    headers: Metadata | None = None,
    framing: bytes | None = None,
    version: bytes = b"1.1",
    content_type: bytes | None = b"application/protobuf",
) -> bytes:
    """Return the bytes of a request; framed by Content-Length if `framing` says nothing else."""
    lines = [b"POST %b HTTP/%b" % (path or path_of(method, wire), version), b"Host: relay.example"]
    if content_type is not None:
        lines.append(b"Content-Type: " + content_type)
    lines += [b"%b: %b" % pair for pair in headers or []]
    lines.append(b"Content-Length: %d" % len(body) if framing is None else framing)
    return b"\r\n".join([*(line for line in lines if line), b"", b""]) + body


def in_chunks(*pieces: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    """Return a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last


CHUNKED = b"Transfer-Encoding: chunked"


class Ended(NamedTuple):
    """A call, and how it ended."""

    call: Call
    ending: Ending


class Served:
    """A server that runs.

    Attributes:
        front, server, port: what runs, and where.
        calls: what reached the handler.
        ended: the endings, in their order.
        strays: what was counted as no call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ended: list[Ended] = []
        self.strays: list[str] = []
        self.nodes: list[Peer] = []
        self.front: Front
        self.server: NodeServer
        self.listening: asyncio.AbstractServer
        self.port = 0

    async def node(self, *, receive_buffer: int | None = None, segment: int | None = None) -> Peer:
        """Open a connection as a node would."""
        peer = await connect(self.port, receive_buffer=receive_buffer, segment=segment)
        self.nodes.append(peer)
        return peer

    async def ask(self, data: bytes) -> Message:
        """Send `data` on a new connection and return the answer."""
        node = await self.node()
        node.send(data)
        return await node.message()

    async def works(self) -> bool:
        """Return whether an ordinary call is still answered; for servers with the `echo` handler."""
        return (await self.ask(request(b"\x08\x01"))).body == b"\x08\x01"

    def gone(self) -> bool:
        """Return whether the server has noticed that all its nodes have left."""
        return all(connection.transport is None for connection in self.server.connections)

    def outcomes(self) -> list[str]:
        return [ended.ending.outcome for ended in self.ended]


async def echo(call: Call) -> Reply:
    """Answer with the body that was sent."""
    return Reply(Payload(await call.payload.read(1 << 24)), Source.LOCAL)


def echo_when(go: asyncio.Event) -> Handler:
    """Return a handler that answers with the body that was sent, once `go` is set."""

    async def handle(call: Call) -> Reply:
        await go.wait()
        return await echo(call)

    return handle


class Listed:
    """A body at hand in pieces, one a turn of the loop; what is an exception is raised."""

    def __init__(self, pieces: Sequence[bytes | BaseException]) -> None:
        self._pieces = list(pieces)

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self) -> None:
        pass


def source(pieces: Sequence[bytes | BaseException], *, size: int | None = None) -> Payload:
    """Return a payload that comes in these pieces."""
    return Payload(body=Listed(pieces), size=size)


def checked(served: Served, handler: Handler) -> Handler:
    """Do what the policies `metrics` and `validate` do: note the call and its end, and raise its fault."""

    async def handle(call: Call) -> Reply:
        served.calls.append(call)
        call.on_end(lambda call, ending: served.ended.append(Ended(call, ending)))
        if call.fault is not None:
            raise call.fault
        return await handler(call)

    return handle


Serve = "Callable[..., Awaitable[Served]]"


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Return a function that starts a server for a handler."""
    made: list[Served] = []

    async def serve(
        handler: Handler = echo,
        *,
        wires: tuple[Wire, ...] = tuple(SPECS),
        max_body: int = 1 << 24,
        idle_timeout: float = PATIENCE,
        keepalive: float = 75.0,
        trusted: tuple[str, ...] = (),
        certificate_header: bytes = b"",
        **limits: Any,
    ) -> Served:
        served = Served()
        handle = checked(served, handler)
        routes = {
            SPECS[wire].prefix + method.path: Route(SPECS[wire], method, handle)
            for wire in wires
            for method in Method
        }
        forwarding = Forwarding([ipaddress.ip_network(network) for network in trusted], certificate_header)
        limits.setdefault("bodies", bodies(max_body, {}))  # of any method
        receiver = Receiver(forwarding, Limits(**limits), idle_timeout)
        served.front = Front(routes, receiver, idle_timeout=idle_timeout, on_stray=served.strays.append)
        served.server = NodeServer(served.front, keepalive)
        loop = asyncio.get_running_loop()
        sock = socket.socket(proto=socket.IPPROTO_TCP)
        # Inherited by what is accepted, so that what a slow node leaves lies with the relay.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        served.listening = await loop.create_server(served.server, sock=sock)
        served.port = sock.getsockname()[1]
        made.append(served)
        return served

    yield serve
    for served in made:
        for node in served.nodes:
            node.writer.transport.abort()
        served.listening.close()
        await served.server.shutdown(0.01)
    await asyncio.sleep(0.002)


class Relayed(NamedTuple):
    """A server in front of an upstream that the test plays."""

    served: Served
    upstream: Listener
    pool: Pool

    def books(self) -> tuple[object, int]:
        """Return how many upstream connections there are, and how many of them are idle."""
        return self.pool.state()["connections"], len(self.pool._idle)


@pytest.fixture
async def relayed(
    serve: Callable[..., Awaitable[Served]],
) -> AsyncIterator[Callable[..., Awaitable[Relayed]]]:
    """Return a function that starts a server in front of a listener."""
    async with AsyncExitStack() as stack:

        async def relayed(
            *,
            wire: Wire = Wire.HTTP_V1,
            response_timeout: float = PATIENCE,
            idle_timeout: float = PATIENCE,
            max_body: int = 1 << 32,
            max_connections: int = 8,
        ) -> Relayed:
            upstream = await stack.enter_async_context(Listener())
            pool = Pool(
                Target("127.0.0.1", upstream.port, f"127.0.0.1:{upstream.port}", None),
                connect_timeout=PATIENCE,
                idle_timeout=idle_timeout,
                keepalive=PATIENCE,
                max_connections=max_connections,
                queue_timeout=PATIENCE,
            )
            stack.push_async_callback(pool.close)
            make = {Wire.HTTP_V1: upstream_http_v1.upstream, Wire.REST_V0: upstream_rest_v0.upstream}
            handler = make[wire](pool, Timeouts(response_timeout, response_timeout))
            served = await serve(handler, idle_timeout=idle_timeout, max_body=max_body)
            return Relayed(served, upstream, pool)

        yield relayed


async def check_rendering(node: Peer, expected: dialect.Answer, *, keeps: bool = True) -> Message | None:
    """Check that the next thing on the connection is `expected`, and what becomes of the connection."""
    match expected:
        case dialect.Empty() | dialect.Hold():
            answer = await node.message()
            assert answer.start == b"HTTP/1.1 200 OK"
            assert answer.one(b"content-type") == b"application/protobuf"
            assert answer.one(b"content-length") == b"0"
            assert answer.body == b""
        case dialect.Status(code):
            answer = await node.message()
            assert answer.status == code
            assert answer.one(b"content-type").startswith(b"text/plain")
            assert len(answer.body) < 40
        case dialect.Drop():
            assert await node.rest() == (b"", "reset")
            return None
    assert answer.one(b"x-request-id")
    assert answer.all(b"connection") == ([] if keeps else [b"close"])
    if keeps:
        assert await node.is_silent(0.01)
    else:
        assert await node.rest() == (b"", "closed")
    return answer
