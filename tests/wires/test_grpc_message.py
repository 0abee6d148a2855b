"""A message is not received before somebody may send it, nor waited for without an end."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import grpc
import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from drills.http2 import DATA, END_STREAM, MOST, RST_STREAM, frame, message
from relay.call import Identity, Payload, Reply, Source
from relay.fleet import Method
from relay.limits import Pace
from relay.quota import GUESS, STEP, Share
from relay.refusal import Reason, Refusal
from relay.wires import grpc_adapter
from relay.wires.grpc_message import WHOLE, NodeMessage, at_hand, length
from relay.wires.http2_stream import UNASKED
from tests.grpc_ends import GrpcNode
from tests.grpc_served import Line, Served, serve_grpc
from tests.security import http2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from relay.call import Call
    from relay.wires.http2_stream import Stream

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(60)

REQUEST = b"\x0a\x02\x08\x07"
LONG = 20 << 20
#: What goes over a line beside a message: its head, and that of the connection.
HEADS = 4096


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:
        yield partial(serve_grpc, stack)


async def length_of(call: Call) -> Reply:
    """Answer with how long the message was."""
    return Reply(Payload(b"%d" % len(await call.payload.read(1 << 30))), Source.UPSTREAM)


def refuse(_: Call) -> None:
    raise Refusal(Reason.UNAUTHENTICATED, by="auth")


async def silent(node: GrpcNode, path: str = Method.PUSH_OBJECT.grpc) -> aio.StreamUnaryCall[bytes, bytes]:
    """Begin a call and send no message."""
    call: aio.StreamUnaryCall[bytes, bytes] = node.channel.stream_unary(path)()
    await call.wait_for_connection()
    return call


async def code_of(call: aio.StreamUnaryCall[bytes, bytes]) -> str:
    name: str = (await call.code()).name
    return name


def contained(method: Method, data: bytes = REQUEST) -> bytes:
    name = method.request.encode()
    return b"\x12" + bytes([len(name)]) + name + b"\x1a" + bytes([len(data)]) + data


# -- what stands in a stream ----------------------------------------------------------------------------


class Sent:
    """A stream whose bytes are here, or come when asked for."""

    def __init__(self, *pieces: bytes, ended: bool = True) -> None:
        self.pieces = list(pieces)
        self.ended = ended

    def at_hand(self) -> bytes:
        return b"".join(self.pieces)

    async def read(self) -> bytes:
        if not self.pieces and not self.ended:
            await asyncio.sleep(60)
        return self.pieces.pop(0) if self.pieces else b""


def of(sent: Sent) -> Stream:
    return cast("Stream", sent)


def arriving(
    *pieces: bytes, ended: bool = True, limit: int = 1 << 20, seconds: float = 20.0, rate: int = 0
) -> NodeMessage:
    return NodeMessage(of(Sent(*pieces, ended=ended)), limit, seconds, Pace(rate, 0.01))


async def gathered(body: NodeMessage) -> bytes:
    return await Payload(body=body).read(1 << 30)


async def why(body: NodeMessage) -> tuple[Reason, str]:
    with pytest.raises(Refusal) as caught:
        await gathered(body)
    assert (caught.value.by, caught.value.sent) == ("wire", False)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * WHOLE])
@pytest.mark.parametrize("ended", [True, False])
def test_a_short_message_is_at_hand_once_it_is_here_to_its_last_byte(data: bytes, ended: bool) -> None:
    sent = message(data)
    assert at_hand(of(Sent(sent[:7], sent[7:], ended=ended))) == data
    for missing in range(1, len(sent), 1009):
        assert at_hand(of(Sent(sent[:-missing], ended=False))) is None
        with pytest.raises(Refusal, match="no message"):
            at_hand(of(Sent(sent[:-missing])))


def test_a_long_message_is_not_though_it_is_here() -> None:
    assert at_hand(of(Sent(message(b"x" * (WHOLE + 1))))) is None


@pytest.mark.parametrize("sent", [b"", message(b"abc") + b"x", b"\0\0\0"])
def test_neither_is_what_is_no_message_or_more_than_one(sent: bytes) -> None:
    assert at_hand(of(Sent(sent, ended=False))) is None


def test_the_length_stands_before_it() -> None:
    assert [length(message(b"x" * 258)[:size]) for size in (0, 4, 5, 9)] == [None, None, 258, 258]
    assert length(b"\0\xff\xff\xff\xff") == (1 << 32) - 1


@pytest.mark.parametrize("flag", [b"\1", b"\2", b"\xff"])
async def test_what_is_compressed_is_not_taken(flag: bytes) -> None:
    sent = flag + message(b"abc")[1:]
    with pytest.raises(Refusal, match="compressed"):
        at_hand(of(Sent(sent)))
    assert await why(arriving(sent)) == (Reason.MALFORMED, "a compressed message")


@given(st.binary(max_size=40), st.lists(st.integers(0, 45), max_size=6))
async def test_it_comes_as_it_is_however_it_was_cut_into_pieces(data: bytes, cuts: list[int]) -> None:
    sent = message(data)
    ends = sorted({cut for cut in cuts if 0 < cut < len(sent)} | {0, len(sent)})
    pieces = [sent[start:end] for start, end in pairwise(ends)]
    assert await gathered(arriving(*pieces)) == data


async def test_it_is_over_when_it_is_here_and_not_when_its_stream_ends() -> None:
    body = arriving(message(b"abc"), ended=False, seconds=0.05)
    assert await gathered(body) == b"abc"
    assert await body.read() == b""
    empty = arriving(message(b""), ended=False, seconds=0.05)
    assert [await empty.read(), await empty.read()] == [b"", b""]


@pytest.mark.parametrize(
    ("sent", "detail"),
    [
        ((), "no message"),
        ((b"\0\0",), "no message"),
        ((message(b"abcd")[:-1],), "the message ended 1 bytes early"),
        ((message(b"abcd")[:5],), "the message ended 4 bytes early"),
        ((message(b"abcd") + b"x",), "more than one message"),
        ((message(b"abcd")[:7], b"cdx"), "more than one message"),
        ((message(b"") + b"x",), "more than one message"),
    ],
)
async def test_less_or_more_than_one_is_malformed(sent: tuple[bytes, ...], detail: str) -> None:
    assert await why(arriving(*sent)) == (Reason.MALFORMED, detail)


async def test_one_that_is_too_long_is_not_read() -> None:
    sent = Sent(message(b"x" * 101)[:6], b"x" * 100)
    assert await why(NodeMessage(of(sent), 100, 20.0, Pace(0, 1.0))) == (
        Reason.TOO_LARGE,
        "101 bytes, at most 100",
    )
    assert sent.pieces == [b"x" * 100]
    assert await gathered(arriving(message(b"x" * 100), limit=100)) == b"x" * 100


async def test_one_that_stalls_is_given_up() -> None:
    for sent in ((), (b"\0\0",), (message(b"abcd")[:7],)):
        body = arriving(*sent, ended=False, seconds=0.01)
        assert await why(body) == (Reason.MALFORMED, "the message stalled for 0.01 s")


async def test_one_that_comes_too_slowly_is_given_up() -> None:
    class Slow(Sent):
        async def read(self) -> bytes:
            await asyncio.sleep(0.02)
            return await super().read()

    stream = of(Slow(message(b"abcd")[:7], b"cd"))
    reason, detail = await why(NodeMessage(stream, 100, 20.0, Pace(1000, 0.01)))
    assert (reason, "min_rate" in detail) == (Reason.MALFORMED, True)


# -- before auth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PUSH_OBJECT, Method.PUSH_MESSAGES, Method.PULL_MESSAGES])
async def test_a_stranger_is_told_so_before_his_message_is_received_and_costs_no_quota(
    serve: Serve, method: Method
) -> None:
    served = await serve(length_of, guard=refuse, max_body=1 << 30, held=GUESS, holds=True)
    await served.held.take(GUESS)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        answered = await node.ask(method, b"x" * LONG)
        assert (answered.code, answered.details) == ("UNAUTHENTICATED", "unauthenticated")
        assert line.carried < UNASKED + HEADS
    await served.ending()
    assert served.calls[0].payload.passed == 0
    assert served.held.held == GUESS


async def test_pushes_of_strangers_that_send_nothing_hold_nobody_up(serve: Serve) -> None:
    def by_key(call: Call) -> None:
        if (b"x-api-key", b"good") not in call.metadata:
            refuse(call)

    served = await serve(length_of, guard=by_key, held=2 * GUESS, holds=True)
    pushes = [await silent(served.node) for _ in range(20)]
    answered = await served.node.ask(Method.PUSH_OBJECT, b"x" * 100_000, [("x-api-key", "good")])
    assert answered.data == b"100000"
    assert [await code_of(push) for push in pushes] == ["UNAUTHENTICATED"] * 20


async def carried(line: Line) -> int:
    """Return the bytes that a line has carried, once it carries no more."""
    before = -1
    while before != line.carried or not before:
        before = line.carried
        await asyncio.sleep(0.3)
    return before


async def test_what_nobody_asks_for_stays_with_its_sender(serve: Serve) -> None:
    go = asyncio.Event()

    async def wait(call: Call) -> Reply:
        await go.wait()
        return await length_of(call)

    served = await serve(wait, max_body=1 << 30, looks=False)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        pushes = [node.call(Method.PUSH_OBJECT, b"x" * (2 * LONG)) for _ in range(8)]
        assert await carried(line) < 8 * (UNASKED + HEADS)
        assert len(served.calls) == 8
        go.set()
        assert [await push for push in pushes] == [b"%d" % (2 * LONG)] * 8


async def test_what_is_not_read_on_stays_with_its_sender(serve: Serve) -> None:
    """Who looks at the beginning of a message lets in a MiB of it, and no more before he reads on."""
    go = asyncio.Event()

    async def wait(call: Call) -> Reply:
        await go.wait()
        return await length_of(call)

    served = await serve(wait, max_body=1 << 30)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        pushes = [node.call(Method.PUSH_OBJECT, b"x" * (2 * LONG)) for _ in range(8)]
        assert await carried(line) < 8 * ((1 << 20) + (64 << 10))
        go.set()
        assert [await push for push in pushes] == [b"%d" % (2 * LONG)] * 8


async def test_compressed_messages_are_refused_before_they_are_here(serve: Serve) -> None:
    served = await serve(length_of, max_body=1 << 30)
    async with Line(served.server.port) as line:
        target = f"127.0.0.1:{line.port}"
        async with aio.insecure_channel(target, compression=grpc.Compression.Gzip) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await channel.unary_unary(Method.PUSH_OBJECT.grpc)(b"\0" * 50_000_000, timeout=20)
        assert (caught.value.code().name, caught.value.details()) == ("UNAVAILABLE", "malformed")
        assert line.carried < 3 * UNASKED
    assert served.calls[0].payload.passed == 0


# -- after it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
async def test_the_share_of_a_push_is_what_its_message_has(serve: Serve, begins: bool) -> None:
    """Whether that comes with the head of its call or after it."""
    shares = []

    async def look(call: Call) -> Reply:
        shares.append(served.held.held)
        return await length_of(call)

    served = await serve(look, max_body=1 << 30, holds=True)
    data = message(b"x" * 300_000)
    with http2.Connection(served.server.port) as node:
        first = data[:1000] if begins else b""
        stream = node.call(Method.PUSH_OBJECT.grpc, (), first, end=False)
        await served.until(lambda: served.calls)
        await asyncio.to_thread(send, node, stream, data[len(first) :])
        await served.ending()
    assert shares == [300_000]
    assert served.held.held == 0


def send(node: http2.Connection, stream: int, data: bytes) -> None:
    """Send the rest of a message."""
    for at in range(0, len(data), MOST):
        piece = data[at : at + MOST]
        node.send(frame(DATA, END_STREAM if at + MOST >= len(data) else 0, stream, piece))


@pytest.mark.parametrize(
    ("method", "max_body"),
    [(Method.PUSH_OBJECT, 1 << 20), (Method.PULL_MESSAGES, 1 << 20), (Method.SEND_NODE_HEARTBEAT, 10_000)],
    ids=["long", "short", "small"],
)
async def test_a_call_that_sends_nothing_is_ended(serve: Serve, method: Method, max_body: int) -> None:
    served = await serve(length_of, idle_timeout=0.2, max_body=max_body, holds=True)
    call = await silent(served.node, method.grpc)
    await served.ending()
    if method is Method.PULL_MESSAGES:
        assert (await call) == b""
    else:
        assert await code_of(call) == "UNAVAILABLE"
    assert (await served.ending()).outcome == "malformed"
    assert served.held.held == served.front.in_flight == 0


async def test_a_push_that_ends_without_a_message_is_malformed(serve: Serve) -> None:
    served = await serve(length_of, holds=True)
    push = served.node.channel.stream_unary(Method.PUSH_OBJECT.grpc)(iter(()))
    assert await code_of(push) == "UNAVAILABLE"
    assert (await served.ending()).outcome == "malformed"
    assert served.held.held == 0


@pytest.mark.parametrize(
    ("method", "max_body", "size"),
    [(Method.PUSH_OBJECT, 1 << 20, 1_000_000), (Method.SEND_NODE_HEARTBEAT, WHOLE, WHOLE)],
)
async def test_a_message_that_comes_slower_than_it_must_is_given_up(
    serve: Serve, method: Method, max_body: int, size: int
) -> None:
    served = await serve(
        length_of, idle_timeout=10.0, min_rate=200_000, rate_window=0.6, max_body=max_body, holds=True
    )
    async with Line(served.server.port, 20_000) as line, GrpcNode(line.port) as node:
        push = asyncio.ensure_future(node.ask(method, b"x" * size, timeout=None))
        refusal = (await served.ending()).refusal
        assert (await push).code == "UNAVAILABLE"
        assert line.carried < 50_000
    assert refusal is not None
    assert "min_rate" in refusal.detail
    assert served.held.held == 0


async def test_a_message_that_takes_long_and_keeps_to_the_rate_is_waited_for(serve: Serve) -> None:
    served = await serve(length_of, idle_timeout=0.5, min_rate=20_000, rate_window=0.5)
    async with Line(served.server.port, 400_000) as line, GrpcNode(line.port) as node:
        assert (await node.ask(Method.PUSH_OBJECT, b"x" * 800_000, timeout=None)).data == b"800000"


async def test_patience_begins_when_a_small_message_was_sent(serve: Serve) -> None:
    served = await serve(length_of, max_body=WHOLE)
    async with Line(served.server.port, 40_000) as line, GrpcNode(line.port) as node:
        started = time.monotonic()
        assert (await node.ask(Method.SEND_NODE_HEARTBEAT, b"x" * 50_000, timeout=None)).data == b"50000"
        took = time.monotonic() - started
    call = served.calls[0]
    assert took > 1.0
    assert 0.95 * 5.0 + 0.5 < call.deadline - call.started < 0.95 * 5.0 + took


async def test_the_traffic_of_one_message_is_not_that_of_another(serve: Serve) -> None:
    """Else one that moves would keep any number of silent ones on its connection alive."""
    served = await serve(length_of, idle_timeout=0.3, max_body=16 << 20)
    async with Line(served.server.port, 400_000) as line, GrpcNode(line.port) as node:
        pushes = [await silent(node) for _ in range(20)]
        push = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x" * 8_000_000, timeout=None))
        await served.until(lambda: len(served.ended) >= 20)
        assert {each.ending.outcome for each in served.ended} == {"malformed"}
        assert line.carried < 8_000_000, "it still moved"
        assert not push.done()
        for call in pushes:
            call.cancel()
        push.cancel()
        await asyncio.gather(push, return_exceptions=True)


@pytest.mark.parametrize(
    ("path", "size"),
    [(Method.PUSH_OBJECT.grpc, 90_000), (Method.SEND_NODE_HEARTBEAT.grpc, 9000), (grpc_adapter.PATH, 9000)],
    ids=["long", "small", "adapter"],
)
@pytest.mark.parametrize("how", ["call", "connection"])
async def test_a_node_that_leaves_within_its_message_is_gone_and_counted_once(
    serve: Serve, path: str, size: int, how: str
) -> None:
    served = await serve(length_of, holds=True)
    await served.held.take(5)
    node = http2.Connection(served.server.port)
    with node:
        stream = node.call(path, (), message(b"x" * size)[:100], end=False)
        await served.until(lambda: served.calls or served.server._tasks)
        await asyncio.sleep(0.1)
        if how == "call":
            node.send(frame(RST_STREAM, 0, stream, bytes(4)))
            await served.until(lambda: served.ended or served.strays)
    await served.until(lambda: served.ended or served.strays)
    assert bool(served.calls) is (size > WHOLE)
    if served.calls:  # a chain has run, which counts it
        assert (await served.ending()).outcome == "node_gone"
        assert served.strays == []
    else:
        assert served.strays == ["node_gone"]
        assert served.ended == []
    assert served.held.held == 5
    assert served.front.in_flight == 0


# -- the adapter ----------------------------------------------------------------------------------------


async def test_an_adapter_of_a_stranger_is_refused_before_its_message_is_received(serve: Serve) -> None:
    seen: list[Call] = []

    async def admit(call: Call) -> None:
        seen.append(call)
        refuse(call)

    served = await serve(length_of, admit=admit, max_body=1 << 30)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        assert (await node.ask(grpc_adapter.PATH, b"x" * LONG)).code == "UNAVAILABLE"
        assert line.carried < UNASKED + HEADS
    assert served.strays == ["unauthenticated"]
    assert seen[0].payload.passed == 0
    assert not served.calls


async def test_who_was_admitted_is_known_to_the_chain(serve: Serve) -> None:
    who = Identity("site-a")

    async def admit(call: Call) -> None:
        call.identity = who

    served = await serve(length_of, admit=admit)
    assert (await served.node.ask(grpc_adapter.PATH, contained(Method.PULL_MESSAGES))).code == "OK"
    await served.ending()
    assert (served.calls[0].method, served.calls[0].identity) == (Method.PULL_MESSAGES, who)
    assert served.strays == []


async def test_an_adapter_that_sends_nothing_is_ended(serve: Serve) -> None:
    served = await serve(length_of, idle_timeout=0.2)
    call = await silent(served.node, grpc_adapter.PATH)
    assert await code_of(call) == "UNAVAILABLE"
    assert served.strays == ["malformed"]
    assert served.held.held == 0


async def test_a_container_takes_its_share_as_it_comes_and_until_its_call_is_over(serve: Serve) -> None:
    held: list[int] = []

    async def look(call: Call) -> Reply:
        held.append(served.held.held)
        return Reply(Payload(b""), Source.UPSTREAM)

    served = await serve(look, max_body=64 << 20)
    name = Method.PUSH_OBJECT.request.encode()
    container = b"\x12" + bytes([len(name)]) + name + b"\x1a" + b"\x80\x80\x80\x0a" + b"x" * LONG
    async with Line(served.server.port, 40e6) as line, GrpcNode(line.port) as node:
        push = asyncio.ensure_future(node.ask(grpc_adapter.PATH, container))
        seen = set()
        while not held and not push.done():
            seen.add(served.held.held)
            assert line.carried < served.held.held + (2 << 20)
            await asyncio.sleep(0.005)
        assert len(seen) >= 3, "it grew"
        assert (await push).code == "OK"
    await served.ending()
    assert LONG <= held[0] <= LONG + STEP
    assert served.held.held == 0


async def test_a_container_that_finds_no_room_stays_with_its_sender_and_is_put_off_in_time(
    serve: Serve,
) -> None:
    served = await serve(length_of, max_body=64 << 20, held=GUESS)
    await served.held.take(GUESS)
    served.held.outgrown = Share(served.held)  # another one exceeds the limit
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        answered = await node.ask(grpc_adapter.PATH, b"x" * LONG, timeout=2.0)
        assert (answered.code, answered.details) == ("UNAVAILABLE", "overloaded"), "before its time is up"
        assert line.carried < 3 << 20
    assert served.strays == ["overloaded"]
    assert served.held.held == GUESS
