"""The connections of one listener as a whole: how many they may be, and how they end."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from relay import dialect
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.worker import drain
from tests.sockets import PATIENCE, until
from tests.wires.conftest import SPECS, check_rendering, echo_when, request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Call
    from tests.sockets import Peer
    from tests.wires.conftest import Served

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(30)


# -- how many ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_OBJECT, Method.SEND_NODE_HEARTBEAT])
@pytest.mark.parametrize("wire", list(SPECS))
@pytest.mark.parametrize("limit", ["connections", "connections_per_peer"])
async def test_calls_on_one_connection_too_many_are_told_to_come_back(
    serve: Serve, wire: Wire, method: Method, limit: str
) -> None:
    served = await serve(**{limit: 2})
    first, second = await served.node(), await served.node()
    for node in (first, second):
        node.send(request(b"abc", wire=wire))
        assert (await node.message()).body == b"abc"
    third = await served.node()
    third.send(request(b"abc", wire=wire, method=method))
    await check_rendering(third, dialect.answer(wire, Reason.OVERLOADED, method), keeps=False)
    first.send(request(b"still served", wire=wire))
    assert (await first.message()).body == b"still served"
    second.reset()
    await until(lambda: len(served.server.connections) == 1)
    fourth = await served.node()
    fourth.send(request(b"served again", wire=wire))
    assert (await fourth.message()).body == b"served again"
    assert served.outcomes() == ["ok", "ok", "overloaded", "ok", "ok"]


async def test_far_too_many_connections_are_reset_at_once(serve: Serve) -> None:
    served = await serve(connections=3)
    nodes = [await served.node() for _ in range(10)]
    await until(lambda: len(served.server.connections) == 6)
    assert [await node.rest() for node in nodes[6:]] == [(b"", "reset")] * 4
    nodes[0].send(request(b"abc"))
    assert (await nodes[0].message()).body == b"abc"


async def test_a_connection_too_many_that_says_nothing_is_soon_closed(serve: Serve) -> None:
    served = await serve(connections=1, head_timeout=0.1)
    first, second = await served.node(), await served.node()
    assert await second.rest() == (b"", "closed")
    first.send(request(b"abc"))
    assert (await first.message()).body == b"abc"


async def test_behind_a_trusted_proxy_the_calls_in_flight_of_each_node_count(serve: Serve) -> None:
    go = asyncio.Event()
    served = await serve(echo_when(go), connections_per_peer=2, trusted=("127.0.0.0/8",))
    nodes = [await served.node() for _ in range(4)]

    def ask(node: Peer, address: bytes) -> None:
        node.send(request(b"abc", headers=[(b"X-Forwarded-For", address)]))

    ask(nodes[0], b"192.0.2.1")
    ask(nodes[1], b"192.0.2.1")
    await until(lambda: len(served.calls) == 2)
    ask(nodes[2], b"192.0.2.1")
    assert (await nodes[2].message()).body == b"overloaded"
    ask(nodes[3], b"192.0.2.2")
    await until(lambda: len(served.calls) == 4)
    go.set()
    for node in (nodes[0], nodes[1], nodes[3]):
        assert (await node.message()).body == b"abc"
    ask(nodes[0], b"192.0.2.1")
    assert (await nodes[0].message()).body == b"abc"
    assert served.front.peers is not None
    assert not served.front.peers._held


# -- stopping -------------------------------------------------------------------------------------------


async def test_a_draining_server_answers_and_tells_each_node_to_connect_anew(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"one"))
    assert (await node.message()).all(b"connection") == []
    served.front.draining = True
    node.send(request(b"two"))
    answer = await node.message()
    assert answer.body == b"two"
    assert answer.one(b"connection") == b"close"
    assert await node.rest() == (b"", "closed")


async def test_a_refusal_of_a_draining_server_closes_too(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN)

    served = await serve(handler)
    served.front.draining = True
    for method in (Method.PULL_MESSAGES, Method.PUSH_OBJECT):
        node = await served.node()
        node.send(request(method=method))
        await check_rendering(node, dialect.answer(Wire.HTTP_V1, Reason.UPSTREAM_DOWN, method), keeps=False)


async def test_a_connection_is_busy_exactly_while_a_call_is_answered(serve: Serve) -> None:
    go = asyncio.Event()
    served = await serve(echo_when(go))
    node = await served.node()
    await until(lambda: served.server.connections)
    assert served.front.busy == set()
    node.send(request(b"abc"))
    await until(lambda: served.calls)
    assert served.front.busy == set(served.server.connections)
    go.set()
    await node.message()
    assert served.front.busy == set()


async def test_a_shutdown_cuts_what_is_in_flight_and_says_so(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        await asyncio.sleep(PATIENCE)
        raise AssertionError

    served = await serve(handler)
    waiting, uploading, idle = [await served.node() for _ in range(3)]
    waiting.send(request(b"abc"))
    uploading.send(request(framing=b"Content-Length: 100") + b"part")
    await until(lambda: served.calls)
    await served.server.shutdown(0.05)
    for node in (waiting, uploading, idle):
        assert (await node.rest())[0] == b""
    assert served.outcomes() == ["cancelled"]
    assert served.front.busy == set()


async def test_a_shutdown_in_the_middle_of_an_answer_never_makes_it_look_complete(serve: Serve) -> None:
    class Hanging:
        async def read(self) -> bytes:
            await asyncio.sleep(0.01)
            if self.first:
                self.first = False
                return b"part"
            await asyncio.sleep(PATIENCE)
            raise AssertionError

        first = True

        def close(self) -> None:
            pass

    async def handler(call: Call) -> Reply:
        return Reply(Payload(body=Hanging()), Source.UPSTREAM)

    served = await serve(handler)
    nodes = []
    for version in (b"1.1", b"1.0"):
        node = await served.node()
        node.send(request(version=version))
        await node.head()
        await node.until(b"part")
        nodes.append(node)
    await served.server.shutdown(0.05)
    assert await nodes[0].rest() == (b"\r\n", "reset")
    assert await nodes[1].rest() == (b"", "reset")
    assert served.outcomes() == ["cancelled", "cancelled"]
    assert all(ended.ending.lost for ended in served.ended)


@pytest.mark.parametrize("turns", range(8))
async def test_a_drain_waits_for_what_was_accepted_in_its_last_turn(serve: Serve, turns: int) -> None:
    """Between accept and `connection_made` lies a turn of the loop, in which nobody knows the connection."""
    served = await serve()
    with socket.create_connection(("127.0.0.1", served.port)) as node:
        node.sendall(request(b"abc", headers=[(b"Connection", b"close")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        served.listening.close()
        await drain([served.server], timeout=PATIENCE, idle_grace=0.2)
        ended = len(served.ended)
        await asyncio.sleep(0.05)
        assert not served.server.connections
        assert len(served.ended) == ended  # nothing goes on behind its back
        node.setblocking(False)
        try:
            answer = node.recv(1000)
        except ConnectionResetError:
            assert served.calls == []  # it was never accepted
        else:
            assert answer.endswith(b"\r\n\r\nabc")


async def test_a_call_that_has_just_come_keeps_its_connection_from_being_closed_as_idle(serve: Serve) -> None:
    served = await serve()
    node, idle = await served.node(), await served.node()
    await until(lambda: len(served.server.connections) == 2)
    for connection in served.server.connections:
        peer = connection.transport.get_extra_info("peername")  # type: ignore[union-attr]
        if peer == node.writer.get_extra_info("sockname"):
            connection.data_received(request(b"abc"))  # it runs in the loop's next turn
    served.server.close_idle()
    assert (await node.message()).body == b"abc"
    assert await idle.rest() == (b"", "closed")
