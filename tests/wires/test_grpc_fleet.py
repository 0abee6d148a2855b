"""A node's gRPC call becomes a Call, and what comes of it a status that its node survives."""

from __future__ import annotations

import asyncio
import math
import re
from base64 import b64encode
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest

from drills.http2 import DATA, RST_STREAM, frame, message
from relay import dialect
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Kind, Method
from relay.quota import GUESS, STEP, Share
from relay.refusal import NodeGone, Reason, Refusal
from relay.wires import grpc_adapter
from relay.wires.http2_stream import AHEAD
from tests.grpc_ends import GrpcNode
from tests.grpc_served import Line, Served, serve_grpc
from tests.security import http2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from relay.call import Call

pytestmark = pytest.mark.timeout(60)

REQUEST = b"\x0a\x02\x08\x07"
#: More than is received before the chain starts.
LONG = 100_000


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    async with AsyncExitStack() as stack:
        yield partial(serve_grpc, stack)


async def echo(call: Call) -> Reply:
    return Reply(Payload(await call.payload.read(1 << 30)), Source.UPSTREAM)


# -- the call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(Method))
async def test_bytes_pass_as_they_are_for_each_method(
    serve: Callable[..., Awaitable[Served]], method: Method
) -> None:
    served = await serve(echo)
    data = b"\xff\x00no message" + REQUEST
    answered = await served.node.ask(method, data)
    assert (answered.code, answered.data) == ("OK", data)
    ending = await served.ending()
    call = served.calls[0]
    assert (call.method, call.wire) == (method, Wire.GRPC)
    assert (ending.outcome, ending.source, ending.sent) == ("ok", Source.UPSTREAM, len(data))
    assert call.payload.passed == len(data)
    assert served.front.in_flight == served.held.held == 0


async def test_a_call_knows_its_node_as_over_http(serve: Callable[..., Awaitable[Served]]) -> None:
    served = await serve(echo)
    metadata: list[tuple[str, str | bytes]] = [
        ("flwr-public-key-bin", b"\x00key"),
        ("flwr-timestamp", "2026-11-23T12:00:00+00:00"),
        ("flwr-signature-bin", b"\xffsig"),
        ("flwr-package-version", "1.39.0"),
        ("x-forwarded-for", "203.0.113.9"),
        ("content-length", "5"),
    ]
    await served.node.ask(Method.PULL_MESSAGES, REQUEST, metadata)
    call = served.calls[0]
    assert call.peer == "127.0.0.1"
    headers = dict(call.metadata)
    assert headers[b"flwr-public-key"] == b64encode(b"\x00key")
    assert headers[b"flwr-signature"] == b64encode(b"\xffsig")
    assert headers[b"flwr-timestamp"] == b"2026-11-23T12:00:00+00:00"
    assert headers[b"flwr-package-version"] == b"1.39.0"
    assert headers[b"content-type"] == headers[b"accept"] == b"application/protobuf"
    assert headers[b"x-forwarded-for"] == b"127.0.0.1", "what a stranger says of its way is not believed"
    assert b"for=127.0.0.1" in headers[b"forwarded"]
    assert headers[b"x-request-id"].decode() == call.request_id
    assert headers[b"via"] == b"2 flwr-relay"
    assert b"content-length" not in headers
    assert len(headers) == len(call.metadata), "no header twice"


async def test_a_known_proxy_is_believed(serve: Callable[..., Awaitable[Served]]) -> None:
    served = await serve(echo, trusted="127.0.0.0/8")
    await served.node.ask(Method.PULL_MESSAGES, REQUEST, [("x-forwarded-for", "203.0.113.9")])
    assert served.calls[0].peer == "203.0.113.9"
    assert dict(served.calls[0].metadata)[b"x-forwarded-for"] == b"203.0.113.9, 127.0.0.1"


@pytest.mark.parametrize(("given", "kept"), [("id-1", True), ("a b", False), ("x" * 129, False)])
async def test_a_request_id_is_kept_if_it_is_sound_and_comes_back_with_a_failure(
    serve: Callable[..., Awaitable[Served]], given: str, kept: bool
) -> None:
    async def refuse(call: Call) -> Reply:
        raise Refusal(Reason.OVERLOADED)

    served = await serve(refuse)
    answered = await served.node.ask(Method.PULL_MESSAGES, REQUEST, [("x-request-id", given)])
    assert answered.trailing["x-request-id"] == served.calls[0].request_id
    assert (served.calls[0].request_id == given) is kept
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", served.calls[0].request_id)


@pytest.mark.parametrize(
    ("method", "given", "low", "high"),
    [
        (Method.SEND_NODE_HEARTBEAT, None, 4.0, 5.0),
        (Method.SEND_NODE_HEARTBEAT, 4.0, 1.0, 4.0),
        (Method.PULL_MESSAGES, None, 50.0, 60.0),
        (Method.PULL_MESSAGES, 7.0, 1.0, 7.0),
        (Method.PUSH_OBJECT, None, 160.0, 180.0),
    ],
)
async def test_a_call_ends_before_its_node_gives_up(
    serve: Callable[..., Awaitable[Served]], method: Method, given: float | None, low: float, high: float
) -> None:
    served = await serve(echo)
    await served.node.ask(method, REQUEST, timeout=given)
    assert low < served.calls[0].deadline - served.calls[0].started < high
    assert math.isfinite(served.calls[0].started)


async def test_metadata_of_the_answer_reaches_the_node_but_not_what_is_of_http(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    async def answer(call: Call) -> Reply:
        metadata = [
            (b"content-type", b"application/protobuf"),
            (b"date", b"today"),
            (b"Server", b"uvicorn"),
            (b"flwr-version-incompatibility-message", b"update"),
        ]
        return Reply(Payload(b""), Source.UPSTREAM, metadata=metadata)

    served = await serve(answer)
    answered = await served.node.ask(Method.PULL_MESSAGES, REQUEST)
    assert answered.trailing == {"flwr-version-incompatibility-message": "update"}


@pytest.mark.parametrize(
    "metadata",
    [
        [("x-long", "a" * 1995)],
        [(f"x-{number}", "a" * 900) for number in range(4)],
        [(f"x-{number}", "a") for number in range(30)],
    ],
    ids=["size", "head", "count"],
)
async def test_a_head_beyond_the_limits_is_refused_as_over_http(
    serve: Callable[..., Awaitable[Served]], metadata: list[tuple[str, str | bytes]]
) -> None:
    """What the client's library says of itself counts as well: here half a dozen, of some 150 bytes."""
    served = await serve(echo, header_count=30, header_size=2000, head_size=3700)
    assert (await served.node.ask(Method.PUSH_OBJECT, REQUEST, metadata)).code == "PERMISSION_DENIED"
    assert (await served.ending()).outcome == "too_large"
    metadata = [(key, value[:-40]) for key, value in metadata[:24]]
    assert (await served.node.ask(Method.PUSH_OBJECT, REQUEST, metadata)).code == "OK"


async def test_an_answer_of_unknown_length_takes_its_share_as_it_comes(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    seen: list[int] = []

    class Pieces:
        async def read(self) -> bytes:
            seen.append(served.held.held)
            return b"x" * (1 << 20) if len(seen) <= 20 else b""

        def close(self) -> None:
            pass

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=Pieces()), Source.UPSTREAM)

    served = await serve(answer)
    assert len((await served.node.ask(Method.PULL_OBJECT, REQUEST)).data) == 20 << 20
    assert seen[0] == 0
    assert all(number << 20 <= held <= (number << 20) + STEP for number, held in enumerate(seen))
    await served.ending()
    assert served.held.held == 0


async def test_an_answer_of_unknown_length_that_finds_no_room_is_put_off(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    body = Pieces(*[b"x" * (1 << 20)] * 20)

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=body), Source.UPSTREAM)

    served = await serve(answer, held=GUESS)
    served.held.outgrown = Share(served.held)
    answered = await served.node.ask(Method.PULL_OBJECT, REQUEST, timeout=2.0)
    assert (answered.code, answered.details) == ("UNAVAILABLE", "overloaded"), "told before its time is up"
    assert len(body.pieces) > 10
    assert body.closed
    await served.ending()
    assert served.held.held == 0


@pytest.mark.parametrize("status", [200, 403])
async def test_a_long_head_of_an_answer_ends_no_node(
    serve: Callable[..., Awaitable[Served]], status: int
) -> None:
    """gRPC fails a call with RESOURCE_EXHAUSTED for it, by chance beyond 8 KiB and always beyond 16 KiB."""

    async def answer(call: Call) -> Reply:
        metadata = [(b"x-big-%d" % number, b"a" * 3000) for number in range(8)]
        metadata.append((b"flwr-version-incompatibility-message", b"update"))
        return Reply(Payload(b"\xff" * 4096), Source.UPSTREAM, status=status, metadata=metadata)

    served = await serve(answer)
    answered = await served.node.ask(Method.PUSH_OBJECT, REQUEST)
    assert answered.code == ("OK" if status == 200 else "PERMISSION_DENIED")
    assert answered.trailing["flwr-version-incompatibility-message"] == "update"
    assert len(answered.details) <= 1024


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (412, "FAILED_PRECONDITION"), (500, "INTERNAL")],
)
async def test_a_status_that_is_passed_on_keeps_its_meaning_and_its_text(
    serve: Callable[..., Awaitable[Served]], status: int, code: str
) -> None:
    async def answer(call: Call) -> Reply:
        return Reply(Payload(b'{"code":2004}'), Source.UPSTREAM, status=status)

    served = await serve(answer)
    answered = await served.node.ask(Method.ACTIVATE_NODE, REQUEST)
    assert (answered.code, answered.details) == (code, '{"code":2004}')
    assert (await served.ending()).outcome == f"upstream_{status}"


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_nothing_that_is_unavailable_speaks_of_a_handshake(
    serve: Callable[..., Awaitable[Served]], status: int
) -> None:
    """flwr gives up on UNAVAILABLE with "handshake failed" in its details."""

    async def answer(call: Call) -> Reply:
        return Reply(Payload(b"Ssl handshake failed"), Source.UPSTREAM, status=status)

    served = await serve(answer)
    answered = await served.node.ask(Method.PULL_MESSAGES, REQUEST)
    assert answered.code == "UNAVAILABLE"
    assert "handshake" not in answered.details.lower()


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("reason", list(Reason))
async def test_a_refusal_is_told_as_the_dialect_says(
    serve: Callable[..., Awaitable[Served]], reason: Reason, method: Method
) -> None:
    async def refuse(call: Call) -> Reply:
        raise Refusal(reason, "handshake failed, and a secret", by="test")

    served = await serve(refuse)
    for wire in (Wire.GRPC, Wire.GRPC_ADAPTER):
        given = dialect.answer(wire, reason, method)
        path = method.grpc if wire is Wire.GRPC else grpc_adapter.PATH
        answered = await served.node.ask(path, REQUEST if wire is Wire.GRPC else contained(method))
        if isinstance(given, dialect.Abort):
            assert (answered.code, answered.details) == (given.code, reason.value)
        else:
            assert answered.code == "OK"
            assert answered.data == (b"" if wire is Wire.GRPC else grpc_adapter.head(method, 0))
        assert answered.trailing["x-request-id"] == served.calls[-1].request_id
    ending = await served.ending(2)
    assert (ending.outcome, ending.source) == (reason.value, None)
    assert ending.refusal is not None
    assert served.front.in_flight == served.held.held == 0


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_OBJECT])
async def test_a_bug_of_ours_is_survived(serve: Callable[..., Awaitable[Served]], method: Method) -> None:
    async def fail(call: Call) -> Reply:
        raise ZeroDivisionError

    served = await serve(fail)
    answered = await served.node.ask(method, REQUEST)
    assert answered.code == {Kind.PULL: "OK", Kind.PUSH: "UNAVAILABLE"}[method.kind]
    assert (await served.ending()).outcome == "internal"


class Pieces:
    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = list(pieces)
        self.closed = False

    async def read(self) -> bytes:
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        self.closed = True


async def test_an_answer_of_known_length_passes_as_it_comes_and_takes_no_share(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    go, held = asyncio.Event(), []

    class Halves(Pieces):
        async def read(self) -> bytes:
            held.append(served.held.held)
            if len(self.pieces) == 1:
                await go.wait()
            return await super().read()

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=Halves(b"x" * 200_000, b"y" * 200_000), size=400_000), Source.UPSTREAM)

    served = await serve(answer)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        asking = asyncio.ensure_future(node.ask(Method.PULL_OBJECT, REQUEST))
        await served.until(lambda: line.returned > 200_000)
        assert not asking.done()
        go.set()
        assert (await asking).data == b"x" * 200_000 + b"y" * 200_000
    assert (await served.ending()).sent == 400_000
    assert set(held) == {0}


@pytest.mark.parametrize("size", [0, 4])
async def test_an_answer_that_comes_in_pieces_is_put_together(
    serve: Callable[..., Awaitable[Served]], size: int
) -> None:
    pieces = (b"ab", b"cd") if size else ()

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=Pieces(*pieces), size=size), Source.UPSTREAM)

    served = await serve(answer)
    assert (await served.node.ask(Method.PULL_OBJECT, REQUEST)).data == b"".join(pieces)
    assert (await served.ending()).sent == size


BROKEN = {
    "short": lambda: Pieces(b"ab"),
    "long": lambda: Pieces(b"ab", b"cd", b"ef"),
    "broken": lambda: Pieces(b"ab", Refusal(Reason.UPSTREAM_DOWN, "broke off")),
    "bug": lambda: Pieces(b"ab", ZeroDivisionError()),
}


@pytest.mark.parametrize("wire", [Wire.GRPC, Wire.GRPC_ADAPTER])
@pytest.mark.parametrize("how", BROKEN)
async def test_a_part_never_passes_for_the_whole(
    serve: Callable[..., Awaitable[Served]], how: str, wire: Wire
) -> None:
    """Its node is told UNAVAILABLE behind what came of it, which passes any proxy and is survived."""
    body = BROKEN[how]()

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=body, size=4), Source.UPSTREAM)

    served = await serve(answer)
    path = Method.PULL_OBJECT.grpc if wire is Wire.GRPC else grpc_adapter.PATH
    data = REQUEST if wire is Wire.GRPC else contained(Method.PULL_OBJECT)
    assert (await served.node.ask(path, data)).code == "UNAVAILABLE"
    assert body.closed or not body.pieces, "nobody would wait for the rest"
    ending = await served.ending()
    assert (ending.outcome, ending.lost, ending.refusal) == ("cut", True, None)
    assert len(served.calls) == 1, "its gRPC does not ask again by itself"
    assert served.front.in_flight == served.held.held == 0


@pytest.mark.parametrize("size", [2**31, 2**32 + 2])
@pytest.mark.parametrize("wire", [Wire.GRPC, Wire.GRPC_ADAPTER])
async def test_an_answer_that_is_too_long_for_grpc_is_refused(
    serve: Callable[..., Awaitable[Served]], size: int, wire: Wire
) -> None:
    body = Pieces(b"ab")

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=body, size=size), Source.UPSTREAM)

    served = await serve(answer)
    path = Method.PULL_OBJECT.grpc if wire is Wire.GRPC else grpc_adapter.PATH
    data = REQUEST if wire is Wire.GRPC else contained(Method.PULL_OBJECT)
    told = dialect.answer(wire, Reason.TOO_LARGE, Method.PULL_OBJECT)
    assert isinstance(told, dialect.Abort)
    assert (await served.node.ask(path, data)).code == told.code
    assert body.closed
    assert (await served.ending()).outcome == "too_large"


async def test_an_answer_of_unknown_length_that_breaks_off_is_refused(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    async def answer(call: Call) -> Reply:
        body = Pieces(b"ab", Refusal(Reason.UPSTREAM_DOWN, "broke off"))
        return Reply(Payload(body=body), Source.UPSTREAM)

    served = await serve(answer)
    assert (await served.node.ask(Method.PULL_OBJECT, REQUEST)).code == "UNAVAILABLE"
    assert (await served.ending()).outcome == "upstream_down"


# -- nodes that go --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in Method if method.kind is not Kind.PULL])
async def test_a_node_that_leaves_ends_its_call(
    serve: Callable[..., Awaitable[Served]], method: Method
) -> None:
    came = asyncio.Event()

    async def hang(call: Call) -> Reply:
        came.set()
        await asyncio.sleep(60)
        raise AssertionError

    served = await serve(hang)
    call = served.node.call(method, REQUEST)
    await came.wait()
    call.cancel()
    ending = await served.ending()
    assert (ending.outcome, ending.lost) == ("node_gone", False)
    assert served.front.in_flight == 0


async def test_an_answer_that_was_on_its_way_when_its_node_left_is_lost(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    came = asyncio.Event()

    class Slow(Pieces):
        async def read(self) -> bytes:
            came.set()
            await asyncio.sleep(60)
            raise AssertionError

    body = Slow()

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=body, size=4), Source.UPSTREAM)

    served = await serve(answer)
    call = served.node.call(Method.PULL_MESSAGES, REQUEST)
    await came.wait()
    call.cancel()
    ending = await served.ending()
    assert (ending.outcome, ending.lost, ending.sent) == ("node_gone", True, 0)
    assert body.closed
    assert served.front.in_flight == 0


async def test_an_answer_that_came_when_its_node_had_left_is_lost(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    came, go = asyncio.Event(), asyncio.Event()

    class Slow(Pieces):
        async def read(self) -> bytes:
            came.set()
            await go.wait()
            return await super().read()

    async def answer(call: Call) -> Reply:
        return Reply(Payload(body=Slow(b"four")), Source.UPSTREAM)

    served = await serve(answer)
    call = served.node.call(Method.PULL_MESSAGES, REQUEST)
    await came.wait()
    call.cancel()
    await served.until(lambda: served.front.left)
    go.set()
    ending = await served.ending()
    assert (ending.outcome, ending.lost, ending.sent) == ("node_gone", True, 0)


@pytest.mark.parametrize("known", [True, False])
async def test_an_answer_that_its_node_does_not_take_is_lost(
    serve: Callable[..., Awaitable[Served]], known: bool
) -> None:
    """It holds the call no longer than `idle_timeout`."""

    async def answer(call: Call) -> Reply:
        data = b"x" * (20 << 20)
        return Reply(Payload(body=Pieces(data), size=len(data)) if known else Payload(data), Source.UPSTREAM)

    served = await serve(answer, idle_timeout=0.3)
    with http2.Connection(served.server.port) as node:
        # It takes 64 KiB and never more: no WINDOW_UPDATE.
        stream = node.call(Method.PULL_OBJECT.grpc, (), message(REQUEST))
        frames = await asyncio.to_thread(node.read, stream)
        assert frames[-1].head.kind == RST_STREAM
        ending = await served.ending()
        assert (ending.outcome, ending.lost) == ("node_gone", True)
    assert served.front.in_flight == 0


async def test_a_node_that_takes_its_answer_slowly_gets_it(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    async def answer(call: Call) -> Reply:
        return Reply(Payload(b"x" * 600_000), Source.UPSTREAM)

    served = await serve(answer, idle_timeout=1.0)

    def take(node: http2.Connection, stream: int) -> int:
        size = 0
        while size < 605:  # in a time of several idle_timeouts
            for each in node.read(stream, 0.1):
                size += each.head.size // 1000 if each.head.kind == DATA else 0
                if each.head.ends:
                    return size
            node.send(frame(8, 0, stream, (20_000).to_bytes(4)) + frame(8, 0, 0, (20_000).to_bytes(4)))
        return -1

    with http2.Connection(served.server.port) as node:
        stream = node.call(Method.PULL_OBJECT.grpc, (), message(REQUEST))
        assert await asyncio.to_thread(take, node, stream) > 550
    assert (await served.ending()).outcome == "ok"


@pytest.mark.parametrize("method", [Method.SEND_NODE_HEARTBEAT, Method.PULL_MESSAGES])
async def test_a_node_whose_time_is_over_is_gone(
    serve: Callable[..., Awaitable[Served]], method: Method
) -> None:
    async def hang(call: Call) -> Reply:
        await asyncio.sleep(60)
        raise AssertionError

    served = await serve(hang)
    assert (await served.node.ask(method, REQUEST, timeout=0.2)).code == "DEADLINE_EXCEEDED"
    assert (await served.ending()).outcome == "node_gone"


# -- what is no call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CreateNode", "PullTaskIns", "Nonsense", ""])
async def test_an_unknown_fleet_method_is_survived_and_counted(
    serve: Callable[..., Awaitable[Served]], name: str
) -> None:
    served = await serve(echo)
    answered = await served.node.ask(f"/flwr.proto.Fleet/{name}", b"x" * 100_000)
    assert (answered.code, answered.details) == ("UNAVAILABLE", "unsupported")
    assert served.strays == ["unsupported"]
    assert not served.calls


async def test_a_wire_that_is_not_served_is_refused_by_its_dialect(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    served = await serve(echo, wires=(Wire.GRPC_ADAPTER,))
    assert (await served.node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
    assert (await served.node.ask(Method.GET_RUN, REQUEST)).code == "UNAVAILABLE"
    assert served.strays == ["unsupported", "unsupported"]
    assert not served.calls


async def test_a_stray_client_is_told_the_truth(serve: Callable[..., Awaitable[Served]]) -> None:
    served = await serve(echo)
    assert (await served.node.ask("/flwr.proto.Control/StartRun", b"")).code == "UNIMPLEMENTED"
    assert served.strays == ["unimplemented"]


# -- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PUSH_OBJECT, Method.PULL_MESSAGES])
async def test_a_message_over_the_limit_is_refused_in_a_way_that_is_survived(
    serve: Callable[..., Awaitable[Served]], method: Method
) -> None:
    served = await serve(echo, max_body=100_000)
    assert (await served.node.ask(method, b"x" * 100_000)).code == "OK"
    answered = await served.node.ask(method, b"x" * 100_001)
    assert answered.code == ("PERMISSION_DENIED" if method is Method.PUSH_OBJECT else "OK")
    ending = await served.ending(2)
    assert ending.outcome == "too_large"


@pytest.mark.parametrize("size", [100_001, 50 << 20])
async def test_a_message_over_the_limit_is_refused_before_it_is_here(
    serve: Callable[..., Awaitable[Served]], size: int
) -> None:
    """However much longer it is: no library's own refusal comes before the dialect's."""
    served = await serve(echo, max_body=100_000)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        answered = await node.ask(Method.PUSH_OBJECT, b"x" * size)
        assert (answered.code, answered.details) == ("PERMISSION_DENIED", "too_large")
        assert line.carried < 64 << 10
    assert (await served.node.ask(Method.PUSH_OBJECT, b"x")).code == "OK"
    await served.ending(2)
    assert served.held.held == 0


async def test_objects_pass_without_a_share(serve: Callable[..., Awaitable[Served]]) -> None:
    """Towards an HTTP SuperLink they are passed on as they come; towards another `held` takes it."""
    pieces: list[int] = []

    async def upstream(call: Call) -> Reply:
        assert call.payload.data is None
        async for piece in call.payload.stream():
            pieces.append(len(piece))
            assert served.held.held == 0
        return Reply(Payload(b"\x08\x01"), Source.UPSTREAM)

    served = await serve(upstream, max_body=64 << 20, held=1)
    assert (await served.node.ask(Method.PUSH_OBJECT, b"x" * (20 << 20))).code == "OK"
    assert sum(pieces) == 20 << 20
    assert max(pieces) <= AHEAD
    assert served.calls[0].payload.size in (None, 20 << 20)


# -- with `held`, as before a gRPC SuperLink ------------------------------------------------------------


async def test_objects_wait_for_their_share_and_small_calls_do_not(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    go = asyncio.Event()
    inside = 0
    most = 0

    async def slow(call: Call) -> Reply:
        nonlocal inside, most
        if call.method is Method.PULL_MESSAGES:
            return Reply(Payload(b""), Source.UPSTREAM)
        inside += 1
        most = max(most, inside)
        await go.wait()
        inside -= 1
        return Reply(Payload(b""), Source.UPSTREAM)

    served = await serve(slow, max_body=64 << 20, held=2 * GUESS, holds=True)
    pulls = [asyncio.ensure_future(served.node.ask(Method.PULL_OBJECT, REQUEST)) for _ in range(5)]
    while inside < 2:
        await asyncio.sleep(0.01)
    assert (await served.node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
    await asyncio.sleep(0.1)
    assert most == 2
    go.set()
    assert {answered.code for answered in await asyncio.gather(*pulls)} == {"OK"}
    assert most <= 2
    assert served.held.held == 0


async def test_a_pushed_object_is_not_read_before_it_has_its_share(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    served = await serve(echo, max_body=64 << 20, held=GUESS, holds=True)
    await served.held.take(GUESS)
    async with Line(served.server.port) as line, GrpcNode(line.port) as node:
        push = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x" * (20 << 20)))
        await asyncio.sleep(0.3)
        assert len(served.calls) == 1
        assert line.carried < AHEAD + (256 << 10), "what was peeked at let in no more than this"
        assert not push.done()
        served.held.give(GUESS)
        assert len((await push).data) == 20 << 20
    await served.ending()
    assert served.held.held == 0


async def test_a_node_that_leaves_while_it_waits_leaves_nothing_behind(
    serve: Callable[..., Awaitable[Served]],
) -> None:
    served = await serve(echo, held=GUESS, holds=True)
    await served.held.take(GUESS)
    push = served.node.call(Method.PUSH_OBJECT, b"x" * LONG)
    await asyncio.sleep(0.1)
    push.cancel()
    assert (await served.ending()).outcome == "node_gone"
    served.held.give(GUESS)
    assert (await served.node.ask(Method.PUSH_OBJECT, b"x" * LONG)).data == b"x" * LONG
    await served.ending(2)
    assert served.held.held == 0


# -- the adapter ----------------------------------------------------------------------------------------


def contained(method: Method, data: bytes = REQUEST) -> bytes:
    return (
        b"\x12" + bytes([len(method.request)]) + method.request.encode() + b"\x1a" + bytes([len(data)]) + data
    )


@pytest.mark.parametrize("method", list(Method))
async def test_the_adapter_carries_each_method(
    serve: Callable[..., Awaitable[Served]], method: Method
) -> None:
    served = await serve(echo)
    answered = await served.node.ask(grpc_adapter.PATH, contained(method))
    assert (answered.code, answered.data) == ("OK", grpc_adapter.head(method, len(REQUEST)) + REQUEST)
    await served.ending()
    call = served.calls[0]
    assert (call.method, call.wire, call.payload.data) == (method, Wire.GRPC_ADAPTER, REQUEST)
    assert served.held.held == 0


@pytest.mark.parametrize("container", [b"", b"\xff\xff", b"\x12\x0bCreateNodeX"])
async def test_what_is_no_container_is_refused(
    serve: Callable[..., Awaitable[Served]], container: bytes
) -> None:
    served = await serve(echo)
    assert (await served.node.ask(grpc_adapter.PATH, container)).code == "UNAVAILABLE"
    assert served.strays == ["unsupported"]


async def test_an_adapter_that_is_not_served_is_refused(serve: Callable[..., Awaitable[Served]]) -> None:
    served = await serve(echo, wires=(Wire.GRPC,))
    answered = await served.node.ask(grpc_adapter.PATH, contained(Method.PULL_MESSAGES))
    assert answered.code == "UNAVAILABLE"
    assert served.strays == ["unsupported"]


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_OBJECT])
async def test_a_node_that_is_taken_for_gone_and_is_not_lives_on(
    serve: Callable[..., Awaitable[Served]], method: Method
) -> None:
    async def gone(_: Call) -> Reply:
        raise NodeGone

    served = await serve(gone)
    answered = await served.node.ask(method, REQUEST)
    told = dialect.answer(Wire.GRPC, Reason.INTERNAL, method)
    assert answered.code == (told.code if isinstance(told, dialect.Abort) else "OK")
    assert (await served.ending()).outcome == "node_gone"
