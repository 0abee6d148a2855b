"""A call becomes a request, its answer a reply or a refusal: relay/upstreams/http.py over real sockets."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from relay.call import Payload, Source
from relay.fleet import Kind, Method
from relay.refusal import NodeGone, Reason, Refusal
from relay.upstreams import http_v1, rest_v0
from relay.upstreams.http import LONGEST, WHOLE, HttpUpstream, Timeouts, judge, makes_sense
from relay.wireformat import encode_bytes
from tests.sockets import PATIENCE, CutError, chunked, response, until
from tests.upstreams.conftest import body

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Call, Reply
    from relay.upstreams.pool import Pool
    from tests.sockets import Listener, Message, Peer

    MakeCall = Callable[..., Call]
    MakePool = Callable[..., Pool]

PROTOBUF = b"application/protobuf"
#: A message of 400,000 bytes.
OBJECT = encode_bytes(3, b"x" * 399_996)

pytestmark = pytest.mark.timeout(20)


class Link:
    """A handler, its pool, and the listener at the other end."""

    def __init__(self, handler: HttpUpstream, listener: Listener) -> None:
        self.handler = handler
        self.pool = handler.pool
        self.listener = listener

    async def asked(self, call: Call) -> tuple[asyncio.Task[Reply], Peer, Message]:
        """Start the call; return it with the upstream's end and the request that came there."""
        task = asyncio.ensure_future(self.handler(call))
        peer = await self.listener.accept()
        return task, peer, await peer.message()

    async def answered(self, call: Call, answer: bytes) -> Reply:
        task, peer, _ = await self.asked(call)
        peer.send(answer)
        return await task


@pytest.fixture
async def link(make_pool: MakePool, upstream: Listener) -> Link:
    return Link(http_v1.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE)), upstream)


async def whole(reply: Reply) -> bytes:
    return b"".join([piece async for piece in reply.payload.stream()])


# -- the request ----------------------------------------------------------------------------------------


async def test_a_request_is_its_line_the_metadata_as_it_is_and_the_body(
    link: Link, make_call: MakeCall
) -> None:
    metadata = [(b"Flwr-X", b"1"), (b"b", b""), (b"FLWR-X", b"\xff\x80 2")]
    call = make_call(Method.PULL_MESSAGES, b"\x00\xffbody", metadata=metadata)
    task, peer, request = await link.asked(call)
    assert request.start == b"POST /v1/fleet/pull-messages HTTP/1.1"
    assert request.headers == [
        (b"host", f"127.0.0.1:{link.listener.port}".encode()),
        *metadata,
        (b"content-length", b"6"),
    ]
    assert request.body == b"\x00\xffbody"
    peer.send(response())
    await task


async def test_a_body_without_a_size_is_chunked_and_one_with_a_size_is_not(
    link: Link, make_call: MakeCall
) -> None:
    task, peer, request = await link.asked(make_call(Method.PUSH_OBJECT, body(b"abc", b"defg", b"")))
    assert request.all(b"transfer-encoding") == [b"chunked"]
    assert request.all(b"content-length") == []
    assert request.body == b"abcdefg"
    peer.send(response())
    await task
    task = asyncio.ensure_future(
        link.handler(make_call(Method.PUSH_OBJECT, body(b"abc", b"de", b"", size=5)))
    )
    request = await peer.message()
    assert request.all(b"transfer-encoding") == []
    assert request.one(b"content-length") == b"5"
    assert request.body == b"abcde"
    peer.send(response())
    await task


async def test_a_body_that_was_peeked_at_is_sent_whole(link: Link, make_call: MakeCall) -> None:
    payload = body(b"abc", b"def", b"", size=6)
    assert await payload.peek(4) == b"abcd"
    task, peer, request = await link.asked(make_call(Method.PUSH_OBJECT, payload))
    assert request.body == b"abcdef"
    peer.send(response())
    await task


@pytest.mark.parametrize("method", list(Method))
async def test_each_method_is_asked_for_at_its_path(link: Link, make_call: MakeCall, method: Method) -> None:
    task, peer, request = await link.asked(make_call(method))
    assert request.start == f"POST /v1/fleet/{method.path} HTTP/1.1".encode()
    peer.send(response(b"\x08\x01"))
    await task


# -- the reply ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, WHOLE - 1, WHOLE])
async def test_a_small_declared_answer_is_at_hand_when_the_reply_is(
    link: Link, make_call: MakeCall, size: int
) -> None:
    task, peer, _ = await link.asked(make_call(Method.PUSH_MESSAGES))
    peer.send(response(b"x" * (size // 2), size=size))
    if size:
        await asyncio.sleep(0.02)
        assert not task.done()
    else:
        await task
    peer.send(b"x" * (size - size // 2))
    reply = await task
    assert reply.payload.data == b"x" * size
    assert reply.payload.size == size
    assert reply.source is Source.UPSTREAM
    assert link.pool.state()["connections"] == len(link.pool._idle) == 1


@pytest.mark.parametrize(
    "answer",
    [response(b"x" * 100, size=WHOLE + 1), chunked(b"x" * 100, last=b"")],
    ids=["longer", "chunked"],
)
async def test_a_long_or_undeclared_answer_is_passed_on_while_it_comes(
    link: Link, make_call: MakeCall, answer: bytes
) -> None:
    task, peer, _ = await link.asked(make_call(Method.PULL_OBJECT))
    peer.send(answer)
    reply = await task
    assert reply.payload.data is None
    stream = aiter(reply.payload.stream())
    assert await anext(stream) == b"x" * 100
    if reply.payload.size is None:
        peer.send(b"1\r\ny\r\n0\r\n\r\n")
        assert await whole(reply) == b"y"
    else:
        peer.send(b"y" * (WHOLE - 99))
        assert await whole(reply) == b"y" * (WHOLE - 99)
    assert len(link.pool._idle) == 1


async def test_an_undeclared_answer_that_is_already_whole_gets_a_size(
    link: Link, make_call: MakeCall
) -> None:
    reply = await link.answered(make_call(Method.PUSH_MESSAGES), chunked(b"ab", b"c"))
    assert reply.payload.data == b"abc"
    assert reply.payload.size == 3


async def test_a_cut_in_a_small_answer_is_a_refusal_and_in_a_long_one_breaks_the_stream(
    link: Link, make_call: MakeCall
) -> None:
    task, peer, _ = await link.asked(make_call(Method.GET_FAB))
    peer.send(response(b"x", size=WHOLE))
    await asyncio.sleep(0.01)
    await peer.close()
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    task, peer, _ = await link.asked(make_call(Method.PULL_OBJECT))
    peer.send(response(b"x", size=WHOLE + 1))
    reply = await task
    await peer.close()
    with pytest.raises(Refusal) as caught:
        await whole(reply)
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    await until(lambda: link.pool.state()["connections"] == 0)


SHORT = [method for method in Method if method is not Method.PULL_OBJECT]


@pytest.mark.parametrize("method", SHORT)
async def test_an_answer_in_chunks_is_checked_when_it_is_whole(
    link: Link, make_call: MakeCall, method: Method
) -> None:
    """Without a length, in segments of their own: head, garbage, end."""
    for part, last in (b"\x08", b"\x01"), (b"gar", b"bage"):
        task, peer, _ = await link.asked(make_call(method))
        for segment in (chunked(last=b""), b"%x\r\n%b\r\n" % (len(part), part)):
            peer.send(segment)
            await asyncio.sleep(0.01)
            assert not task.done()
        peer.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))
        if part == b"\x08" or makes_sense(method, part + last):
            assert (await task).payload.data == part + last
        else:
            with pytest.raises(Refusal, match="7 bytes that are no") as caught:
                await task
            assert caught.value.reason is Reason.UPSTREAM_BAD_ANSWER
        await link.pool.close()
        link.pool._closed = False


@pytest.mark.parametrize("method", SHORT)
async def test_an_answer_in_chunks_that_breaks_off_is_a_refusal(
    link: Link, make_call: MakeCall, method: Method
) -> None:
    task, peer, _ = await link.asked(make_call(method))
    peer.send(chunked(b"\x08\x01", last=b""))
    await asyncio.sleep(0.01)
    await peer.close()
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.UPSTREAM_DOWN


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("method", SHORT)
async def test_an_answer_that_is_too_long_for_its_method_is_none(
    link: Link, make_call: MakeCall, method: Method, *, sized: bool
) -> None:
    long = method in (Method.PULL_MESSAGES, Method.PUSH_MESSAGES, Method.GET_RUN, Method.GET_FAB)
    most = LONGEST if long else WHOLE
    task, peer, _ = await link.asked(make_call(method))
    if sized:
        peer.send(response(size=most + 1))
    else:
        peer.send(chunked(last=b"") + b"%x\r\n" % (most + 1) + b"x" * (most + 1))
    if method in (Method.PULL_MESSAGES, Method.GET_FAB):
        reply = await task
        assert reply.payload.data is None
        reply.payload.close()
    else:
        with pytest.raises(Refusal, match=f"more than {most} bytes") as caught:
            await task
        assert caught.value.reason is Reason.UPSTREAM_BAD_ANSWER
    await until(lambda: link.pool.state()["connections"] == 0)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_MESSAGES, Method.GET_RUN])
async def test_a_list_of_many_objects_is_awaited_and_checked(
    link: Link, make_call: MakeCall, method: Method, *, sized: bool
) -> None:
    for last, good in (b"x", True), (b"", False):
        body = OBJECT[:-1] + last
        task, peer, _ = await link.asked(make_call(method))
        peer.send(response(body[:9], size=len(body)) if sized else chunked(body[:9], last=b""))
        await asyncio.sleep(0.01)
        assert not task.done()
        rest = body[9:]
        peer.send(rest if sized else b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))
        if good or makes_sense(method, body):
            assert (await task).payload.data == body
        else:
            with pytest.raises(Refusal) as caught:
                await task
            assert caught.value.reason is Reason.UPSTREAM_BAD_ANSWER
        assert link.handler._awaited == 0
        await link.pool.close()
        link.pool._closed = False


@pytest.mark.parametrize("method", [Method.PUSH_MESSAGES, Method.PULL_MESSAGES])
async def test_what_there_is_no_room_for_is_passed_on_if_it_may_be(
    link: Link, make_call: MakeCall, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.upstreams.http.AWAITED", 100_000)
    task, _, _ = await link.asked(make_call(method))
    link.listener.peers[0].send(response(b"x", size=100_001))
    if method is Method.PULL_MESSAGES:
        (await task).payload.close()
    else:
        with pytest.raises(Refusal) as caught:
            await task
        assert caught.value.reason is Reason.OVERLOADED


async def test_end_to_end_headers_come_back_as_they_were(link: Link, make_call: MakeCall) -> None:
    more = b"X-A: 1\r\nflwr-b: \xe9\r\nx-a: 2\r\nDate: today\r\nserver: uvicorn\r\n"
    reply = await link.answered(make_call(Method.PUSH_MESSAGES), response(b"", more=more))
    assert reply.metadata == [
        (b"Content-Type", PROTOBUF),
        (b"X-A", b"1"),
        (b"flwr-b", b"\xe9"),
        (b"x-a", b"2"),
        (b"Date", b"today"),
        (b"server", b"uvicorn"),
    ]


async def test_headers_of_this_hop_stay_here(link: Link, make_call: MakeCall) -> None:
    more = (
        b"Connection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nx-hop: 1\r\nProxy-Connection: x\r\n"
        b"TE: trailers\r\nTrailer: x\r\nUpgrade: h2c\r\nProxy-Authenticate: Basic\r\nX-Request-Id: theirs\r\n"
        b"X-Hop2: 1\r\nconnection: x-hop2\r\nX-Stays: 1\r\n"
    )
    reply = await link.answered(make_call(Method.PUSH_MESSAGES), response(b"", more=more))
    assert reply.metadata == [(b"Content-Type", PROTOBUF), (b"X-Stays", b"1")]


# -- what may reach a node ------------------------------------------------------------------------------

GROUPS = {
    Kind.JOIN: "join",
    Kind.LEAVE: "leave",
    Kind.HEARTBEAT: "heartbeat",
    Kind.PULL: "pull",
    Kind.FETCH: "object",
    Kind.PUSH: "object",
    Kind.CONFIRM: "confirm",
}
DOWN, OVER, REJECTED, BAD = (
    Reason.UPSTREAM_DOWN,
    Reason.OVERLOADED,
    Reason.UPSTREAM_REJECTED,
    Reason.UPSTREAM_BAD_ANSWER,
)
CLIENT_ERRORS = (400, 402, 404, 405, 408, 409, 410, 413, 415, 418, 422, 431, 451, 499)
#: What becomes of each status, per group of methods, behind a SuperLink of HTTP v1: None is passed on.
V1: dict[int, dict[str, Reason | None]] = {
    200: {"join": None, "leave": None, "heartbeat": None, "pull": None, "object": None},
    401: {"join": None, "leave": None, "heartbeat": None, "pull": None, "object": None},
    403: {"join": BAD, "leave": None, "heartbeat": BAD, "pull": None, "object": None},
    412: {"join": None, "leave": BAD, "heartbeat": BAD, "pull": BAD, "object": REJECTED},
    429: dict.fromkeys(GROUPS.values(), OVER),
    502: dict.fromkeys(GROUPS.values(), DOWN),
    503: dict.fromkeys(GROUPS.values(), DOWN),
    504: dict.fromkeys(GROUPS.values(), DOWN),
    **{
        status: {"join": BAD, "leave": BAD, "heartbeat": BAD, "pull": BAD, "object": REJECTED}
        for status in (
            400,
            402,
            404,
            405,
            408,
            409,
            410,
            413,
            415,
            418,
            422,
            431,
            451,
            499,
            500,
            501,
            505,
            599,
        )
    },
    **{
        status: dict.fromkeys(GROUPS.values(), BAD)
        for status in (201, 202, 204, 206, 299, 301, 302, 304, 307, 308)
    },
}
for _row in V1.values():
    _row["confirm"] = _row["object"]
# After a 403 on a confirmation a node holds its last reply back.
V1[403]["confirm"] = REJECTED
#: Behind a SuperLink of REST v0 no status but 200 is passed on.
V0 = V1 | {
    status: {
        "join": BAD,
        "leave": BAD,
        "heartbeat": BAD,
        "pull": BAD,
        "object": REJECTED,
        "confirm": REJECTED,
    }
    for status in (401, 403, 412)
}


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize(("passes", "table"), [(http_v1.PASSES, V1), ({}, V0)], ids=["http_v1", "rest_v0"])
def test_each_status_has_one_meaning_per_kind_of_method(
    method: Method, passes: dict[int, set[Kind]], table: dict[int, dict[str, Reason | None]]
) -> None:
    frozen = {status: frozenset(kinds) for status, kinds in passes.items()}
    for status, row in table.items():
        assert judge(method, status, PROTOBUF, frozen) is row[GROUPS[method.kind]], status


@pytest.mark.parametrize(
    "content_type",
    [b"Application/Protobuf", b"application/protobuf; charset=utf-8", b" application/protobuf"],
)
def test_the_type_is_taken_to_the_letter_as_legacy_nodes_do(content_type: bytes) -> None:
    assert judge(Method.PULL_MESSAGES, 200, PROTOBUF, {}) is None
    assert judge(Method.PULL_MESSAGES, 200, content_type, {}) is Reason.UPSTREAM_BAD_ANSWER


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"text/html",
        b"application/json",
        b"application/protobuf2",
        b"application/x-protobuf",
        b"; application/protobuf",
    ],
)
@pytest.mark.parametrize("method", list(Method))
def test_an_error_page_with_status_200_is_a_bad_answer(method: Method, content_type: bytes) -> None:
    assert judge(method, 200, content_type, {}) is Reason.UPSTREAM_BAD_ANSWER


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response(b"<html>secret", content_type=b"text/html"), Reason.UPSTREAM_BAD_ANSWER),
        (response(b"secret", status=b"500 Oops"), Reason.UPSTREAM_BAD_ANSWER),
        (response(b"secret", status=b"429 Slow"), Reason.OVERLOADED),
        (response(b"secret", status=b"504 Down"), Reason.UPSTREAM_DOWN),
    ],
)
async def test_a_judged_answer_is_a_refusal_that_says_what_it_was_but_not_its_body(
    link: Link, make_call: MakeCall, answer: bytes, reason: Reason
) -> None:
    with pytest.raises(Refusal) as caught:
        await link.answered(make_call(Method.PULL_MESSAGES), answer)
    assert caught.value.reason is reason
    assert caught.value.status == int(answer[9:12])
    assert answer[9:12].decode() in caught.value.detail
    assert "secret" not in str(caught.value)


async def test_a_refused_answer_that_is_whole_leaves_the_connection_in_use(
    link: Link, make_call: MakeCall
) -> None:
    with pytest.raises(Refusal) as caught:
        await link.answered(make_call(Method.PULL_MESSAGES), response(b"secret", status=b"503 Down"))
    assert caught.value.status == 503
    assert len(link.pool._idle) == 1


@pytest.mark.parametrize(
    "answer",
    [
        response(b"x", size=WHOLE + 1, status=b"500 Oops"),
        chunked(b"x", last=b"").replace(b"200 OK", b"503 Down"),
        b"HTTP/1.1 404 Not Found\r\n\r\n<html>",
    ],
    ids=["long", "chunked", "unframed"],
)
async def test_a_refused_answer_that_goes_on_is_not_waited_for(
    link: Link, make_call: MakeCall, answer: bytes
) -> None:
    with pytest.raises(Refusal):
        await link.answered(make_call(Method.PULL_MESSAGES), answer)
    await until(lambda: link.pool.state()["connections"] == 0)


async def test_statuses_that_mean_something_are_passed_on_with_their_body(
    link: Link, make_call: MakeCall
) -> None:
    reply = await link.answered(
        make_call(Method.PULL_MESSAGES),
        response(b'{"code":2007}', status=b"403 Forbidden", content_type=b"application/json"),
    )
    assert reply.status == 403
    assert reply.payload.data == b'{"code":2007}'
    assert reply.metadata == [(b"Content-Type", b"application/json")]


# -- time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "seconds"), [(Method.SEND_NODE_HEARTBEAT, "0.05"), (Method.PULL_MESSAGES, "0.2")]
)
async def test_a_heartbeat_has_a_time_of_its_own(
    make_pool: MakePool, upstream: Listener, make_call: MakeCall, method: Method, seconds: str
) -> None:
    handler = http_v1.upstream(make_pool(), Timeouts(response=0.2, heartbeat=0.05))
    with pytest.raises(Refusal) as caught:
        await handler(make_call(method))
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    assert caught.value.sent
    assert caught.value.detail.endswith(f" for {seconds} s")


async def test_a_call_is_given_up_at_its_deadline(link: Link, make_call: MakeCall) -> None:
    started = time.monotonic()
    with pytest.raises(Refusal) as caught:
        await link.handler(make_call(Method.PULL_MESSAGES, deadline=started + 0.1))
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    assert 0.08 < time.monotonic() - started < PATIENCE - 1


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("method", SHORT)
async def test_head_and_body_have_one_deadline(
    link: Link, make_call: MakeCall, method: Method, *, sized: bool
) -> None:
    """Each piece comes in time, the whole does not: the place in the queue is given back, the node told."""
    started = time.monotonic()
    task, peer, _ = await link.asked(make_call(method, deadline=started + 1.0))
    await asyncio.sleep(0.15)
    peer.send(response(b"\x08", size=2000) if sized else chunked(b"\x08", last=b""))
    await asyncio.sleep(0.1)
    peer.send(b"\x08" if sized else b"1\r\n\x08\r\n")
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    assert caught.value.sent
    assert 0.98 < time.monotonic() - started < PATIENCE - 1
    await until(lambda: link.pool.state()["connections"] == 0)


@pytest.mark.parametrize(
    ("method", "passed_on"),
    [(Method.PULL_MESSAGES, True), (Method.GET_FAB, True), (Method.GET_RUN, False)],
)
async def test_a_long_answer_that_is_late_is_passed_on_if_it_may_be(
    link: Link, make_call: MakeCall, method: Method, *, passed_on: bool
) -> None:
    """A message that was handed out would else be lost, and its node still waits for a first byte."""
    task, peer, _ = await link.asked(make_call(method, deadline=time.monotonic() + 1.0))
    peer.send(response(OBJECT[:9], size=len(OBJECT)))
    if passed_on:
        reply = await task
        peer.send(OBJECT[9:])
        assert await whole(reply) == OBJECT
    else:
        with pytest.raises(Refusal) as caught:
            await task
        assert caught.value.reason is Reason.UPSTREAM_TIMEOUT


async def test_an_early_answer_to_an_upload_has_time_to_end(link: Link, make_call: MakeCall) -> None:
    task = asyncio.ensure_future(link.handler(make_call(Method.PUSH_OBJECT, body(b"part"))))
    peer = await link.listener.accept()
    await peer.head()
    peer.send(response(b"\x08", size=2))
    await asyncio.sleep(0.02)
    peer.send(b"\x01")
    assert (await task).payload.data == b"\x08\x01"


async def test_a_call_whose_deadline_has_passed_is_not_sent(link: Link, make_call: MakeCall) -> None:
    """pull-messages would hand a message out to nobody."""
    with pytest.raises(Refusal) as caught:
        await link.handler(make_call(Method.PULL_MESSAGES, deadline=time.monotonic() - 0.001))
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    assert not caught.value.sent
    peer = await link.listener.accept()
    assert await peer.is_silent(0.02)
    serving = asyncio.ensure_future(peer.message())
    task = asyncio.ensure_future(link.handler(make_call(Method.PULL_MESSAGES)))
    await serving
    peer.send(response())
    await task
    assert len(link.listener.peers) == 1  # and its connection was given back


# -- what breaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NodeGone(), Refusal(Reason.TOO_LARGE)], ids=["gone", "refusal"])
async def test_a_node_that_breaks_its_body_off_breaks_the_request_off(
    link: Link, make_call: MakeCall, error: Exception
) -> None:
    task = asyncio.ensure_future(
        link.handler(make_call(Method.PUSH_OBJECT, body(b"x" * 100, error, size=200)))
    )
    peer = await link.listener.accept()
    with pytest.raises(CutError) as cut:
        await peer.message()
    assert cut.value.partial in (b"", b"x" * 100)
    with pytest.raises(type(error)):
        await task
    await until(lambda: link.pool.state()["connections"] == 0)


async def test_a_full_pool_is_overload(make_pool: MakePool, upstream: Listener, make_call: MakeCall) -> None:
    pool = make_pool(max_connections=1, queue_timeout=0.02)
    handler = http_v1.upstream(pool, Timeouts(PATIENCE, PATIENCE))
    first = asyncio.ensure_future(handler(make_call(Method.PULL_MESSAGES)))
    peer = await upstream.accept()
    await peer.message()
    with pytest.raises(Refusal) as caught:
        await handler(make_call(Method.PULL_MESSAGES))
    assert caught.value.reason is Reason.OVERLOADED
    peer.send(response())
    await first


async def test_a_reply_that_nobody_reads_costs_its_connection_and_no_more(
    link: Link, make_call: MakeCall
) -> None:
    reply = await link.answered(make_call(Method.PULL_OBJECT), response(b"x", size=WHOLE + 1))
    reply.payload.close()
    reply.payload.close()
    await until(lambda: link.pool.state()["connections"] == 0)


async def test_a_reply_read_to_its_end_has_no_hold_on_the_next_exchange(
    link: Link, make_call: MakeCall
) -> None:
    """Closing it again must not end that one, reading it again must not take from it."""
    task, peer, _ = await link.asked(make_call(Method.PULL_OBJECT))
    peer.send(chunked(b"mine", last=b""))
    first = await task
    peer.send(b"0\r\n\r\n")
    assert await whole(first) == b"mine"
    task = asyncio.ensure_future(link.handler(make_call(Method.PULL_OBJECT)))
    await peer.message()
    peer.send(chunked(b"other", last=b""))
    second = await task
    assert await whole(first) == b""
    first.payload.close()
    peer.send(b"0\r\n\r\n")
    assert await whole(second) == b"other"
    assert len(link.listener.peers) == 1


async def test_calls_cancelled_at_any_step_leave_no_connection_behind(
    make_pool: MakePool, upstream: Listener, make_call: MakeCall
) -> None:
    async def answer(peer: Peer) -> None:
        with suppress(CutError, ConnectionError):
            await peer.message()
            await peer.send_all(response(b"x", size=100))
            await asyncio.sleep(0)
            await peer.send_all(b"x" * 99)

    serving = asyncio.ensure_future(upstream.play(answer))
    done = 0
    for steps in range(1000):
        handler = http_v1.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
        call = asyncio.ensure_future(handler(make_call(Method.PUSH_OBJECT, body(b"a", b"b", b""))))
        for _ in range(steps):
            await asyncio.sleep(0)
        done += call.done()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        pool = handler.pool
        await until(lambda pool=pool: pool.state()["connections"] == len(pool._idle))  # type: ignore[misc]
        await pool.close()
        if done > 2:
            break
    assert done > 2
    serving.cancel()


async def test_many_calls_at_once_get_each_its_own_answer(
    make_pool: MakePool, upstream: Listener, make_call: MakeCall
) -> None:
    handler = http_v1.upstream(make_pool(max_connections=5), Timeouts(PATIENCE, PATIENCE))

    async def echo(peer: Peer) -> None:
        while True:
            answer = b"re: " + (await peer.message()).body
            peer.send(chunked(answer[:4], answer[4:]) if len(answer) % 2 else response(answer))

    serving = asyncio.ensure_future(upstream.play(echo))

    async def one(number: int) -> None:
        sent = b"call %d " % number * (number % 7 + 1)
        payload = Payload(sent) if number % 3 else body(sent[:3], sent[3:], b"")
        reply = await handler(make_call(Method.PUSH_OBJECT, payload))
        assert await whole(reply) == b"re: " + sent

    await asyncio.gather(*(one(number) for number in range(300)))
    assert len(upstream.peers) == 5
    serving.cancel()


@pytest.mark.parametrize(
    ("method", "data", "expected"),
    [
        (Method.PULL_MESSAGES, b"", True),
        (Method.PULL_MESSAGES, b"<html>", False),
        (Method.ACTIVATE_NODE, b"", False),
        (Method.ACTIVATE_NODE, b"\x08\x07", True),
        (Method.ACTIVATE_NODE, b"\x08\x00", False),
        (Method.GET_RUN, b"", False),
        (Method.GET_FAB, b"", False),
        (Method.GET_FAB, b"\x0a\x00", True),
        (Method.PULL_OBJECT, b"", True),
        (Method.PULL_OBJECT, b"\x1a\xff", False),
        (Method.SEND_NODE_HEARTBEAT, b"\x08\x01", True),
        (Method.SEND_NODE_HEARTBEAT, b"{}", False),
        (Method.PUSH_OBJECT, b"{}", True),
        (Method.DEACTIVATE_NODE, b"{}", True),
    ],
)
def test_a_body_makes_sense_if_its_node_lives_through_it(method: Method, data: bytes, expected: bool) -> None:
    assert makes_sense(method, data) is expected


async def test_no_more_than_a_bound_is_awaited_of_all_answers_together(
    make_pool: MakePool, upstream: Listener, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.upstreams.http.AWAITED", 1_000_000)
    link = Link(rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE)), upstream)
    tasks, peers = [], []
    for _ in range(3):
        task, peer, _ = await link.asked(make_call(Method.PULL_OBJECT))
        peer.send(response(OBJECT[:1], size=len(OBJECT)))
        tasks.append(task)
        peers.append(peer)
    replies = [await tasks[2]]  # the two before it have taken what there is
    assert not tasks[0].done()
    assert not tasks[1].done()
    for peer in peers:
        peer.send(OBJECT[1:])
    replies += [await tasks[0], await tasks[1]]
    assert [reply.payload.data is None for reply in replies] == [True, False, False]
    for reply in replies:
        assert await whole(reply) == OBJECT
    assert link.handler._awaited == 0


@pytest.mark.parametrize("how", ["cut", "cancelled", "whole"])
async def test_what_was_awaited_is_given_back_however_it_ends(
    make_pool: MakePool, upstream: Listener, make_call: MakeCall, how: str
) -> None:
    link = Link(rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE)), upstream)
    task, peer, _ = await link.asked(make_call(Method.PULL_OBJECT))
    peer.send(response(OBJECT[:1], size=len(OBJECT)))
    await until(lambda: link.handler._awaited == 400_000)
    if how == "cut":
        await peer.close()
    elif how == "cancelled":
        task.cancel()
    else:
        peer.send(OBJECT[1:])
    await asyncio.gather(task, return_exceptions=True)
    assert link.handler._awaited == 0
    await until(lambda: link.pool.state()["connections"] == len(link.pool._idle))


async def test_the_rest_of_an_answer_of_no_use_is_not_waited_for_long(
    make_pool: MakePool, upstream: Listener, make_call: MakeCall
) -> None:
    """A 503 whose body does not come must not hold up the repeat of its call."""
    pool = make_pool(idle_timeout=PATIENCE)
    link = Link(http_v1.upstream(pool, Timeouts(PATIENCE, PATIENCE)), upstream)
    started = time.monotonic()
    task, peer, _ = await link.asked(make_call(Method.PULL_MESSAGES, deadline=started + 60))
    peer.send(b"HTTP/1.1 503 Down\r\nContent-Type: text/html\r\nContent-Length: 10\r\n\r\n")
    with pytest.raises(Refusal) as caught:
        await task
    assert (caught.value.reason, caught.value.status) == (Reason.UPSTREAM_DOWN, 503)
    assert time.monotonic() - started < PATIENCE - 1
    await until(lambda: link.pool.state()["connections"] == 0)
