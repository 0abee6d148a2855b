"""A message is not received before somebody may send it, nor waited for without an end."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from relay.call import Identity, Payload, Reply, Source, View, ViewError
from relay.fleet import Method
from relay.quota import GUESS
from relay.refusal import Reason, Refusal
from relay.wires import grpc_adapter
from relay.wires.grpc_message import Expected, Message
from tests.grpc_ends import GrpcNode
from tests.grpc_served import Line, Served, serve_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from relay.call import Call

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(60)

REQUEST = b"\x0a\x02\x08\x07"
LONG = 20 << 20


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:
        yield partial(serve_grpc, stack)


async def length(call: Call) -> Reply:
    """Answer with how long the message was."""
    return Reply(Payload(b"%d" % len(await call.payload.read(1 << 30))), Source.UPSTREAM)


def refuse(_: Call) -> None:
    raise Refusal(Reason.UNAUTHENTICATED, by="auth")


async def silent_push(node: GrpcNode) -> aio.StreamUnaryCall[bytes, bytes]:
    """Begin a push and send no message."""
    push: aio.StreamUnaryCall[bytes, bytes] = node.channel.stream_unary(Method.PUSH_OBJECT.grpc)()
    await push.wait_for_connection()
    return push


async def code_of(call: aio.StreamUnaryCall[bytes, bytes]) -> str:
    name: str = (await call.code()).name
    return name


# -- the payload ----------------------------------------------------------------------------------------


class OnePiece:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = 0

    async def read(self) -> bytes:
        self.reads += 1
        return self.data

    def close(self) -> None:
        pass


@pytest.mark.parametrize("data", [b"", b"abcdef"])
async def test_a_look_at_a_part_receives_the_whole_and_keeps_it(data: bytes) -> None:
    body = OnePiece(data)
    message = Message(body)
    assert (message.data, message.size, message.passed, message.replayable) == (None, None, 0, False)
    assert await message.peek(3) == data[:3]
    assert (message.data, message.size, message.passed, message.replayable) == (
        data,
        len(data),
        len(data),
        True,
    )
    assert await message.read(6) == data
    assert b"".join([piece async for piece in message.stream()]) == data
    assert body.reads == 1


@pytest.mark.parametrize("way", ["read", "stream"])
async def test_it_is_received_whoever_asks_first(way: str) -> None:
    message = Message(OnePiece(b"abcdef"))
    if way == "read":
        with pytest.raises(Refusal) as caught:
            await message.read(5)
        assert caught.value.reason is Reason.TOO_LARGE
    else:
        assert [piece async for piece in message] == [b"abcdef"]


async def test_nobody_looks_at_more_than_he_may() -> None:
    message = Message(OnePiece(b"abcdef"))
    message.allowed = View.HEAD
    with pytest.raises(ViewError):
        await message.peek(1)
    message.allowed = View.PEEK
    assert await message.peek(1) == b"a"
    with pytest.raises(ViewError):
        await message.read(6)


# -- before auth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PUSH_OBJECT, Method.PUSH_MESSAGES, Method.PULL_MESSAGES])
async def test_a_stranger_is_told_so_before_his_message_is_received_and_costs_no_quota(
    serve: Serve, method: Method
) -> None:
    served = await serve(length, guard=refuse, max_body=1 << 30, held=GUESS)
    await served.held.take(GUESS)
    answered = await served.node.ask(method, b"x" * LONG)
    assert (answered.code, answered.details) == ("UNAUTHENTICATED", "unauthenticated")
    await served.ending()
    assert served.calls[0].payload.passed == 0
    assert served.held.held == GUESS


async def test_pushes_of_strangers_that_send_nothing_hold_nobody_up(serve: Serve) -> None:
    def by_key(call: Call) -> None:
        if (b"x-api-key", b"good") not in call.metadata:
            refuse(call)

    served = await serve(length, guard=by_key, held=2 * GUESS)
    pushes = [await silent_push(served.node) for _ in range(20)]
    answered = await served.node.ask(Method.PUSH_OBJECT, b"x" * 100, [("x-api-key", "good")])
    assert answered.data == b"100"
    assert [await code_of(push) for push in pushes] == ["UNAUTHENTICATED"] * 20


async def test_what_nobody_asks_for_stays_with_its_sender(serve: Serve) -> None:
    """But for what flow control lets in unasked; by itself gRPC would let in what the line can carry."""
    served = await serve(length, max_body=1 << 30, held=GUESS)
    await served.held.take(GUESS)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        pushes = [node.call(Method.PUSH_OBJECT, b"x" * (2 * LONG)) for _ in range(8)]
        await served.until(lambda: line.carried)
        carried = -1
        while carried != line.carried:
            carried = line.carried
            await asyncio.sleep(0.5)
        assert 0 < carried < 10 << 20
        for push in pushes:
            push.cancel()
    served.held.give(GUESS)


async def test_compressed_messages_are_not_taken(serve: Serve) -> None:
    served = await serve(length, max_body=1 << 30)
    target = f"127.0.0.1:{served.server.port}"
    async with aio.insecure_channel(target, compression=grpc.Compression.Gzip) as channel:
        with pytest.raises(aio.AioRpcError):
            await channel.unary_unary(Method.PUSH_OBJECT.grpc)(b"\0" * 1_000_000, timeout=20)
    assert all(call.payload.passed == 0 for call in served.calls)


# -- after it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 3 << 20])
async def test_the_share_of_a_push_is_what_its_message_has(serve: Serve, size: int) -> None:
    shares = []

    async def look(call: Call) -> Reply:
        shares.append(served.held.held)
        return Reply(Payload(b""), Source.UPSTREAM)

    served = await serve(look, max_body=1 << 30)
    assert (await served.node.ask(Method.PUSH_OBJECT, b"x" * size)).code == "OK"
    await served.ending()
    assert shares == [size]
    assert served.held.held == 0


async def test_a_push_that_gets_no_share_in_its_time_is_told_to_come_back(serve: Serve) -> None:
    served = await serve(length, held=GUESS)
    await served.held.take(GUESS)
    answered = await served.node.ask(Method.PUSH_OBJECT, b"x", timeout=4.0)
    assert (answered.code, answered.details) == ("UNAVAILABLE", "overloaded"), "told before its time is up"
    assert served.held.held == GUESS


async def test_a_push_that_sends_nothing_is_ended_and_gives_its_share_back(serve: Serve) -> None:
    served = await serve(length, idle_timeout=0.2)
    push = await silent_push(served.node)
    await served.until(lambda: served.held.held == GUESS)
    await served.until(lambda: served.ended, ticks=True)
    assert await code_of(push) == "UNAVAILABLE"
    assert (await served.ending()).outcome == "malformed"
    assert served.held.held == served.front.in_flight == 0
    assert not served.front.messages.waiting


async def test_a_push_that_ends_without_a_message_is_malformed(serve: Serve) -> None:
    served = await serve(length)
    push = served.node.channel.stream_unary(Method.PUSH_OBJECT.grpc)(iter(()))
    assert await code_of(push) == "UNAVAILABLE"
    assert (await served.ending()).outcome == "malformed"
    assert served.held.held == 0


async def test_a_message_that_comes_slower_than_it_must_is_given_up(serve: Serve) -> None:
    served = await serve(length, idle_timeout=0.3, min_rate=200_000, rate_window=0.6)
    async with Line(served.server.port, 20_000) as line, GrpcNode(line.port) as node:
        push = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x" * 1_000_000, timeout=None))
        await served.until(lambda: served.ended, ticks=True)
        assert (await push).code == "UNAVAILABLE"
    refusal = (await served.ending()).refusal
    assert refusal is not None
    assert "min_rate" in refusal.detail
    assert served.held.held == 0


async def test_a_message_that_takes_long_and_keeps_to_the_rate_is_waited_for(serve: Serve) -> None:
    served = await serve(length, idle_timeout=1.0, min_rate=20_000, rate_window=1.0)
    async with Line(served.server.port, 400_000) as line, GrpcNode(line.port) as node:
        push = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x" * 800_000, timeout=None))
        await served.until(push.done, ticks=True)
        assert (await push).data == b"800000"
    call = served.calls[0]
    assert call.deadline - call.started > 1.5 + 0.95 * 180, "patience begins when the call was sent"
    assert call.deadline - time.monotonic() < 0.95 * 180


async def test_the_traffic_of_one_message_is_not_that_of_another(serve: Serve) -> None:
    """Else one that moves would keep any number of silent ones on its connection alive."""
    served = await serve(length, idle_timeout=0.3, min_rate=100_000, rate_window=0.6)
    async with Line(served.server.port, 400_000) as line, GrpcNode(line.port) as node:
        silent = [await silent_push(node) for _ in range(20)]
        push = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x" * 8_000_000, timeout=None))
        await served.until(lambda: len(served.ended) >= 20, ticks=True)
        assert line.carried < 8_000_000, "it still moved"
        for call in silent:
            call.cancel()
        push.cancel()
        await asyncio.gather(push, return_exceptions=True)


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.SEND_NODE_HEARTBEAT])
async def test_a_small_message_comes_soon_or_not_at_all(serve: Serve, method: Method) -> None:
    """Whatever else its connection brings."""
    served = await serve(length, idle_timeout=0.3, max_body=10_000)
    async with Line(served.server.port, 20_000) as line, GrpcNode(line.port) as node:
        call = asyncio.ensure_future(node.ask(method, b"x" * 19_000, timeout=None))
        await served.until(lambda: served.ended, ticks=True)
        await call
    assert (await served.ending()).outcome == "malformed"


async def test_a_small_message_that_is_long_is_refused_before_it_is_here(serve: Serve) -> None:
    served = await serve(length, max_body=1 << 30)
    limits = replace(served.front.messages.limits, bodies=dict.fromkeys(Method, 10_000))
    served.front.messages.limits = limits
    async with Line(served.server.port, 2e6) as line, GrpcNode(line.port) as node:
        answer = await node.ask(Method.SEND_NODE_HEARTBEAT, b"x" * 12_000_000)
        assert answer.code == "UNAVAILABLE"
        assert (await served.ending()).outcome == "too_large"
        assert line.carried < 6_000_000


async def test_heads_of_other_calls_do_not_refuse_a_message(serve: Serve) -> None:
    served = await serve(length)
    limits = replace(served.front.messages.limits, bodies=dict.fromkeys(Method, 10_000))
    served.front.messages.limits = limits
    waiting = served.node.channel.stream_unary(Method.SEND_NODE_HEARTBEAT.grpc)()
    await waiting.wait_for_connection()
    await served.until(lambda: len(served.front.messages.arrivals._known) == 1)
    for number in range(20):
        await asyncio.gather(
            *(
                served.node.ask(Method.PULL_MESSAGES, metadata=[("x-some", f"{number}{i}" * 400)])
                for i in range(50)
            )
        )
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await waiting.write(b"four")
    await waiting.done_writing()
    assert await waiting == b"4"


def test_what_is_expected_is_taken_once() -> None:
    expected = Expected()
    expected.put("a", 1)
    expected.put("a", 2)
    assert [expected.take("a"), expected.take("a")] == [2, GUESS]


def test_those_who_do_not_come_again_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Expected()
    for number in range(3000):
        expected.put(str(number), number)
    assert len(expected._sizes) == 1024
    assert [expected.take("2999"), expected.take("0")] == [2999, GUESS]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 200.0)
    assert expected.take("2998") == GUESS, "long ago"
    expected.put("a", 7)
    assert list(expected._sizes) == ["a"]


async def test_what_was_put_off_takes_what_it_needs_when_it_comes_again(serve: Serve) -> None:
    served = await serve(length)
    served.front.messages.expected.put("ipv4:127.0.0.1", GUESS + 1)
    push = await silent_push(served.node)
    await served.until(lambda: served.held.held == GUESS + 1)
    push.cancel()
    await served.ending()
    push = await silent_push(served.node)
    await served.until(lambda: served.held.held == GUESS)
    push.cancel()


async def test_a_node_that_leaves_within_its_message_is_gone(serve: Serve) -> None:
    served = await serve(length)
    push = await silent_push(served.node)
    await served.until(lambda: served.held.held == GUESS)
    push.cancel()
    assert (await served.ending()).outcome == "node_gone"
    assert served.held.held == 0
    assert not served.front.messages.waiting


# -- the adapter ----------------------------------------------------------------------------------------


async def test_an_adapter_of_a_stranger_is_refused_before_its_message_is_received(serve: Serve) -> None:
    seen: list[Call] = []

    async def admit(call: Call) -> None:
        seen.append(call)
        refuse(call)

    served = await serve(length, admit=admit, max_body=1 << 30)
    assert (await served.node.ask(grpc_adapter.PATH, b"x" * LONG)).code == "UNAVAILABLE"
    assert served.strays == ["unauthenticated"]
    assert seen[0].payload.passed == 0
    assert not served.calls


async def test_who_was_admitted_is_known_to_the_chain(serve: Serve) -> None:
    who = Identity("site-a")

    async def admit(call: Call) -> None:
        call.identity = who

    served = await serve(length, admit=admit)
    name = Method.PULL_MESSAGES.request.encode()
    container = b"\x12" + bytes([len(name)]) + name + b"\x1a" + bytes([len(REQUEST)]) + REQUEST
    assert (await served.node.ask(grpc_adapter.PATH, container)).code == "OK"
    await served.ending()
    assert (served.calls[0].method, served.calls[0].identity) == (Method.PULL_MESSAGES, who)
    assert served.strays == []


async def test_an_adapter_that_sends_nothing_is_ended(serve: Serve) -> None:
    served = await serve(length, idle_timeout=0.2)
    call = served.node.channel.stream_unary(grpc_adapter.PATH)()
    await call.wait_for_connection()
    await served.until(lambda: served.strays, ticks=True)
    assert await code_of(call) == "UNAVAILABLE"
    assert served.strays == ["malformed"]
    assert served.held.held == 0
