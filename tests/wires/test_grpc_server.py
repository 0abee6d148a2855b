"""A gRPC listener as a worker has it: health, its end, and how many of them share a port."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from relay.call import Ending, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.limits import Limits
from relay.quota import Quota
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_fleet import MOST_BYTES, GrpcFront
from relay.wires.grpc_health import SERVING
from relay.wires.grpc_message import Messages
from relay.wires.grpc_server import GrpcServer, options
from relay.wires.grpc_sockets import Place, count_connections
from relay.wires.grpc_tls import server_credentials
from tests.certificates import make_pair
from tests.grpc_ends import GrpcNode
from tests.security import http2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from relay.call import Call
    from relay.pipeline import Handler

pytestmark = pytest.mark.timeout(60)


class Slow:
    """A handler that answers when it is told to."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.go = asyncio.Event()
        self.endings: list[Ending] = []

    async def __call__(self, call: Call) -> Reply:
        call.on_end(lambda _, ending: self.endings.append(ending))
        self.came.set()
        await self.go.wait()
        return Reply(Payload(b"answer"), Source.UPSTREAM)


def front(handler: Handler, *, tls: bool = False) -> GrpcFront:
    return GrpcFront(
        {(Wire.GRPC, method): handler for method in Method},
        Forwarding([]),
        Quota(1 << 30),
        Messages(Limits(dict.fromkeys(Method, 1 << 20)), 20.0),
        tls=tls,
        on_stray=lambda _: None,
    )


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def serve(
    stack: AsyncExitStack,
    handler: Handler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    age: float = 30.0,
    credentials: grpc.ServerCredentials | None = None,
) -> GrpcServer:
    server = GrpcServer(
        front(handler, tls=credentials is not None),
        f"{host}:{port}",
        max_body=1 << 20,
        keepalive=75.0,
        age=age,
        credentials=credentials,
    )
    await server.start()
    stack.push_async_callback(server.drain, 0.0)
    return server


async def test_a_drain_loses_no_call_and_takes_no_new_one(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler, age=0.5)
    node = await stack.enter_async_context(GrpcNode(server.port))
    late = await stack.enter_async_context(GrpcNode(server.port))
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    drained = asyncio.ensure_future(server.drain(20.0))
    await asyncio.sleep(0.1)
    assert (await late.ask(Method.PULL_MESSAGES)).code == "UNAVAILABLE"
    await asyncio.sleep(1.0)
    assert not drained.done(), "its connection was told to leave, and its call goes on"
    handler.go.set()
    assert (await asking).data == b"answer"
    async with asyncio.timeout(10):
        await drained
    assert [ending.outcome for ending in handler.endings] == ["ok"]


async def test_a_drain_ends_at_once_when_nothing_is_under_way(stack: AsyncExitStack) -> None:
    handler = Slow()
    handler.go.set()
    server = await serve(stack, handler)
    node = await stack.enter_async_context(GrpcNode(server.port))
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    await node.channel.close()
    async with asyncio.timeout(10):
        await server.drain(1000.0)


async def test_a_drain_cuts_what_does_not_end(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler)
    node = await stack.enter_async_context(GrpcNode(server.port))
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    await server.drain(0.3)
    answered = await asking
    assert answered.code == "UNAVAILABLE"
    while not handler.endings:
        await asyncio.sleep(0.01)
    assert [ending.outcome for ending in handler.endings] == ["cancelled"]
    assert server.front.in_flight == 0


async def test_a_drain_waits_for_no_connection_without_a_call(stack: AsyncExitStack) -> None:
    """With one that says nothing, one that says nothing of a call, and one that is watched."""

    async def read(call: Call) -> Reply:
        return Reply(Payload(await call.payload.peek(1)), Source.UPSTREAM)

    server = await serve(stack, read, age=2.0)
    server.front.messages.limits = Limits()
    silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
    stack.enter_context(http2.Connection(server.port))
    waiting = stack.enter_context(http2.Connection(server.port))
    waiting.call(Method.PULL_MESSAGES.grpc, end=False)
    watching = stack.enter_context(http2.Connection(server.port))
    watching.call("/grpc.health.v1.Health/Watch", body=bytes(5))
    async with asyncio.timeout(10):
        while server.front.in_flight != 1:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert server.front.in_flight == 1
    async with asyncio.timeout(12):
        await server.drain(1000.0)
        while server.front.in_flight:
            await asyncio.sleep(0.01)
    while await asyncio.to_thread(silent.recv, 4096):
        pass  # its greeting


async def test_a_drain_waits_for_calls_however_old_their_connection_is(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler, age=0.3)
    node = await stack.enter_async_context(GrpcNode(server.port))
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    drained = asyncio.ensure_future(server.drain(1000.0))
    await asyncio.sleep(3.5)
    assert not drained.done()
    handler.go.set()
    assert (await asking).data == b"answer"
    async with asyncio.timeout(10):
        await drained


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::]"])
async def test_a_drain_finds_its_own_sockets_wherever_it_listens(stack: AsyncExitStack, host: str) -> None:
    handler = Slow()
    server = await serve(stack, handler, host=host)
    node = await stack.enter_async_context(GrpcNode(server.port))
    late = await stack.enter_async_context(GrpcNode(server.port))
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    drained = asyncio.ensure_future(server.drain(20.0))
    await asyncio.sleep(0.3)
    assert not drained.done()
    assert (await late.ask(Method.PULL_MESSAGES)).code == "UNAVAILABLE"
    handler.go.set()
    assert (await asking).data == b"answer"
    await node.channel.close()
    async with asyncio.timeout(10):
        await drained


async def test_workers_share_a_port(stack: AsyncExitStack) -> None:
    handler = Slow()
    handler.go.set()
    first = await serve(stack, handler)
    second = await serve(stack, handler, port=first.port)
    assert second.port == first.port
    node = await stack.enter_async_context(GrpcNode(first.port))
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"


async def test_a_port_of_another_program_is_not_shared(stack: AsyncExitStack) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RuntimeError):
            await serve(stack, Slow(), port=other.getsockname()[1])


async def test_tls(stack: AsyncExitStack, tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    handler = Slow()
    handler.go.set()
    server = await serve(stack, handler, credentials=server_credentials([(certificate, key)]))
    roots = certificate.read_bytes()
    node = await stack.enter_async_context(GrpcNode(server.port, roots=roots, host="localhost"))
    assert (await node.ask(Method.PULL_MESSAGES)).data == b"answer"
    plain = await stack.enter_async_context(GrpcNode(server.port))
    assert (await plain.ask(Method.PULL_MESSAGES, timeout=2.0)).code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize(("max_body", "most"), [(1 << 20, 2 << 20), (4 << 30, MOST_BYTES)])
def test_grpc_takes_more_than_the_limit_so_that_the_answer_is_ours(max_body: int, most: int) -> None:
    chosen = dict(options(max_body, 1 << 15, 75.0))
    assert chosen["grpc.max_receive_message_length"] == most
    assert chosen["grpc.max_send_message_length"] == MOST_BYTES
    assert chosen["grpc.max_connection_idle_ms"] == 75_000
    assert chosen["grpc.max_connection_age_ms"] == 30_000


async def test_who_watches_leaves_as_others_do(stack: AsyncExitStack) -> None:
    server = await serve(stack, Slow(), age=0.5)
    node = await stack.enter_async_context(GrpcNode(server.port))
    watching = node.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
    assert await watching.read() == SERVING
    place = Place.of(f"127.0.0.1:{server.port}", server.port)
    assert count_connections(place) == 1
    async with asyncio.timeout(15):
        assert await watching.read() is aio.EOF
        while count_connections(place):
            await asyncio.sleep(0.05)


async def test_idle_connections_are_told_to_close(stack: AsyncExitStack) -> None:
    handler = Slow()
    handler.go.set()
    server = GrpcServer(front(handler), "127.0.0.1:0", max_body=1 << 20, keepalive=0.3)
    await server.start()
    stack.push_async_callback(server.drain, 0.0)
    channel = aio.insecure_channel(f"127.0.0.1:{server.port}")
    stack.push_async_callback(channel.close)
    await channel.unary_unary(Method.PULL_MESSAGES.grpc)(b"")
    async with asyncio.timeout(20):
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    assert channel.get_state() is not grpc.ChannelConnectivity.READY
    await channel.unary_unary(Method.PULL_MESSAGES.grpc)(b"")  # and it opens another
