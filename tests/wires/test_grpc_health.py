"""Health checks of gRPC, as grpcio's own client makes them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from drills.http2 import DATA, RST_STREAM, SETTINGS, frame, message
from relay.call import Payload, Reply, Source
from relay.wires.grpc_health import SERVING
from tests.grpc_ends import GrpcNode
from tests.grpc_served import Line, Served, serve_grpc
from tests.security import http2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from relay.call import Call

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(60)

Response = health_pb2.HealthCheckResponse


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:
        yield partial(serve_grpc, stack)


async def nothing(_: Call) -> Reply:
    return Reply(Payload(b""), Source.UPSTREAM)


@pytest.mark.parametrize("service", ["", "flwr.proto.Fleet"])
async def test_a_check_is_told_until_the_relay_is_about_to_stop(serve: Serve, service: str) -> None:
    served = await serve(nothing)
    stub = health_pb2_grpc.HealthStub(served.node.channel)
    question = health_pb2.HealthCheckRequest(service=service)
    assert (await stub.Check(question)).status == Response.SERVING
    served.server.not_ready()
    assert (await stub.Check(question)).status == Response.NOT_SERVING
    assert served.strays == []


async def test_what_is_asked_is_not_received(serve: Serve) -> None:
    served = await serve(nothing, max_body=1 << 30)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        answer = await node.ask("/grpc.health.v1.Health/Check", b"x" * (50 << 20))
        assert answer.data == Response(status=Response.SERVING).SerializeToString()
        assert line.carried < 32 << 10


async def test_a_watch_hears_of_the_change_and_ends_with_the_listener(serve: Serve) -> None:
    served = await serve(nothing)
    stub = health_pb2_grpc.HealthStub(served.node.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == Response.SERVING
    served.server.not_ready()
    assert (await watch.read()).status == Response.NOT_SERVING
    draining = asyncio.ensure_future(served.server.drain(30.0))
    async with asyncio.timeout(10):
        assert await watch.read() is aio.EOF
    await draining


async def test_a_listener_that_ends_for_another_one_does_not_say_that_the_relay_is_ill(serve: Serve) -> None:
    """Neither on the connections that it still has, nor to those who watch."""
    served = await serve(nothing)
    stub = health_pb2_grpc.HealthStub(served.node.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == Response.SERVING
    with http2.Connection(served.server.port) as node:
        await served.until(lambda: len(served.server.connections) == 2)
        draining = asyncio.ensure_future(served.server.drain(30.0))
        await asyncio.sleep(0.1)
        stream = node.call("/grpc.health.v1.Health/Check", (), message(b""))
        frames = await asyncio.to_thread(node.read, stream)
    assert [frame.payload for frame in frames if frame.head.kind == DATA] == [message(SERVING)]
    assert await watch.read() is aio.EOF
    await draining


async def test_who_watches_and_leaves_leaves_nothing_behind(serve: Serve) -> None:
    served = await serve(nothing)
    stub = health_pb2_grpc.HealthStub(served.node.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == Response.SERVING
    assert len(served.server._tasks) == 1
    watch.cancel()
    await served.until(lambda: not served.server._tasks)


@pytest.mark.parametrize("name", ["Check", "Watch"])
async def test_who_takes_no_answer_gets_none_and_harms_nobody(serve: Serve, name: str) -> None:
    served = await serve(nothing)
    with http2.Connection(served.server.port) as node:
        node.send(frame(SETTINGS, 0, 0, (4).to_bytes(2) + bytes(4)))  # streams begin without a window
        stream = node.call(f"/grpc.health.v1.Health/{name}", (), message(b""))
        frames = await asyncio.to_thread(node.read, stream)
        assert frames[-1].head.kind == RST_STREAM
    await served.until(lambda: not served.server._tasks)
    stub = health_pb2_grpc.HealthStub(served.node.channel)
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == Response.SERVING
