"""What a Call looks like that a node's request became: relay/wires/http_request.py over real sockets."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from relay.wires.http_request import WHOLE
from tests.sockets import PATIENCE, until
from tests.wires.conftest import CHUNKED, SPECS, echo, in_chunks, request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Call
    from tests.wires.conftest import Served

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(20)


async def call_of(serve: Serve, data: bytes, **settings: object) -> Call:
    """Return the Call that a request became."""
    served = await serve(**settings)
    await served.ask(data)
    (call,) = served.calls
    return call


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("wire", list(SPECS))
async def test_each_method_of_each_wire_has_its_path(serve: Serve, wire: Wire, method: Method) -> None:
    call = await call_of(serve, request(b"abc", wire=wire, method=method))
    assert (call.wire, call.method) == (wire, method)
    assert call.payload.data == b"abc"
    assert call.fault is None


async def test_a_call_knows_who_sent_it_and_when(serve: Serve) -> None:
    before = time.monotonic()
    call = await call_of(serve, request())
    assert call.peer == "127.0.0.1"
    assert before <= call.started <= time.monotonic()


async def test_a_trusted_proxy_is_believed_and_anybody_else_is_not(serve: Serve) -> None:
    data = request(
        headers=[(b"X-Forwarded-For", b"192.0.2.1, 198.51.100.7"), (b"X-Forwarded-Proto", b"https")]
    )
    call = await call_of(serve, data, trusted=("127.0.0.0/8",))
    assert call.peer == "198.51.100.7"
    assert (b"x-forwarded-for", b"192.0.2.1, 198.51.100.7, 127.0.0.1") in call.metadata
    assert (b"x-forwarded-proto", b"https") in call.metadata
    call = await call_of(serve, data)
    assert call.peer == "127.0.0.1"
    assert (b"x-forwarded-for", b"127.0.0.1") in call.metadata
    assert (b"x-forwarded-proto", b"http") in call.metadata


@pytest.mark.parametrize(
    "name", [b"Forwarded", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Proto"]
)
@pytest.mark.parametrize("times", [1, 3])
async def test_no_claim_of_a_stranger_reaches_the_upstream(serve: Serve, name: bytes, times: int) -> None:
    call = await call_of(serve, request(headers=[(name, b"evil")] * times))
    assert b"evil" not in b"".join(value for _, value in call.metadata)
    assert [pair[0].lower() for pair in call.metadata].count(name.lower()) == 1


async def test_request_ids_differ_within_and_between_servers(serve: Serve) -> None:
    ids = set()
    for _ in range(3):
        served = await serve()
        node = await served.node()
        for _ in range(5):
            node.send(request())
            ids.add((await node.message()).one(b"x-request-id"))
    assert len(ids) == 15


# -- bodies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, WHOLE])
@pytest.mark.parametrize("split", [False, True], ids=["with the head", "later"])
async def test_a_small_body_is_at_hand_before_the_chain_starts(serve: Serve, size: int, split: bool) -> None:
    replayable = []

    async def handler(call: Call) -> Reply:
        replayable.append(call.payload.replayable)
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    data = request(b"x" * size)
    if split:
        await node.send_all(data[: len(data) - size])
        await asyncio.sleep(0.01)
        await node.send_all(data[len(data) - size :])
    else:
        node.send(data)
    assert (await node.message()).body == b"x" * size
    assert replayable == [True]


@pytest.mark.parametrize("kind", ["long", "chunked"])
async def test_a_long_or_undeclared_body_reaches_the_chain_before_its_end(serve: Serve, kind: str) -> None:
    first: list[bytes] = []
    sizes: list[int | None] = []

    async def handler(call: Call) -> Reply:
        sizes.append(call.payload.size)
        stream = aiter(call.payload.stream())
        first.append(await anext(stream))
        rest = [piece async for piece in stream]
        return Reply(Payload(b"".join([*first, *rest])), Source.LOCAL)

    served = await serve(handler)
    node = await served.node()
    size = WHOLE + 1
    if kind == "long":
        node.send(request(framing=b"Content-Length: %d" % size) + b"x")
    else:
        node.send(request(framing=CHUNKED) + in_chunks(b"x", last=b""))
    await until(lambda: first)
    assert first == [b"x"]
    assert sizes == [size if kind == "long" else None]
    node.send(b"y" * (size - 1) if kind == "long" else in_chunks(b"y" * (size - 1)))
    assert (await node.message()).body == b"x" + b"y" * (size - 1)


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("framing", ["declared", "chunked"])
@pytest.mark.parametrize("limit", [10, WHOLE * 2])
async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(
    serve: Serve, limit: int, framing: str, over: int
) -> None:
    served = await serve(max_body=limit)
    body = b"x" * (limit + over)
    node = await served.node()
    node.send(request(body) if framing == "declared" else request(framing=CHUNKED) + in_chunks(body))
    answer = await node.message()
    if over:
        assert (answer.status, answer.body) == (403, b"too_large")
        assert served.outcomes() == ["too_large"]
    else:
        assert answer.body == body


async def test_a_body_that_is_declared_too_long_is_refused_before_it_comes(serve: Serve) -> None:
    served = await serve(max_body=100)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 101"))
    answer = await node.message()
    assert answer.body == b"too_large"
    assert answer.one(b"connection") == b"close"
    assert isinstance(served.calls[0].fault, Refusal)


@pytest.mark.parametrize("size", [3, 50_000], ids=["small", "largest"])
async def test_a_stalled_small_body_is_refused_by_the_chain_and_not_behind_its_back(
    serve: Serve, size: int
) -> None:
    """So that it is counted and logged like any other call."""
    served = await serve(idle_timeout=0.05)
    node = await served.node()
    node.send(request(framing=b"Content-Length: %d" % size, method=Method.PULL_MESSAGES) + b"x")
    answer = await node.message()
    assert (answer.status, answer.body) == (200, b"")
    assert answer.one(b"connection") == b"close"
    (call,) = served.calls
    assert call.fault is not None
    assert call.fault.reason is Reason.MALFORMED
    assert served.outcomes() == ["malformed"]


async def test_a_body_may_pause_less_than_the_idle_timeout_as_often_as_it_likes(serve: Serve) -> None:
    served = await serve(idle_timeout=0.5)
    node = await served.node()
    node.send(request(framing=CHUNKED))
    for _ in range(6):
        await asyncio.sleep(0.12)
        node.send(in_chunks(b"ab", last=b""))
    node.send(in_chunks())
    assert (await node.message()).body == b"ab" * 6


async def test_what_a_handler_does_not_read_does_not_reach_the_next_call(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        if call.method is Method.PUSH_OBJECT:
            return Reply(Payload(b"\x08\x01"), Source.LOCAL)
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    smuggled = request(b"smuggled", method=Method.PULL_OBJECT)
    body = smuggled * (WHOLE // len(smuggled) + 2)
    for data in (request(body), request(framing=CHUNKED) + in_chunks(body)):
        node.send(data + request(b"next", method=Method.PULL_MESSAGES))
        assert (await node.message()).body == b"\x08\x01"
        assert (await node.message()).body == b"next"
    assert [call.method for call in served.calls] == [Method.PUSH_OBJECT, Method.PULL_MESSAGES] * 2


# -- patience -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("wire", list(SPECS))
async def test_a_deadline_comes_a_little_before_the_node_gives_up(
    serve: Serve, wire: Wire, method: Method
) -> None:
    call = await call_of(serve, request(b"abc", wire=wire, method=method))
    patience = SPECS[wire].patience[method.kind is not Kind.HEARTBEAT]
    assert 0.9 * patience <= call.deadline - call.started < patience


async def test_the_patience_of_a_node_begins_when_it_has_sent_its_call(serve: Serve) -> None:
    """A slow line must not use up the time of the SuperLink."""
    left: list[float] = []

    async def handler(call: Call) -> Reply:
        left.append(call.deadline - time.monotonic())
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 4", method=Method.SEND_NODE_HEARTBEAT))
    for _ in range(4):
        await asyncio.sleep(0.1)
        node.send(b"\x00")
    await node.message()
    patience = SPECS[Wire.HTTP_V1].patience[0]
    assert 0.9 * patience < left[0] < patience
    assert served.calls[0].deadline - served.calls[0].started < patience + PATIENCE
