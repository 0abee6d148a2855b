"""Nodes and an upstream that play every trick on relay/wires/http.py over real sockets."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from relay import dialect
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.wireformat import encode_bytes
from relay.wires.http_request import WHOLE
from tests.sockets import PATIENCE, CutError, chunked, response, until
from tests.wires.conftest import (
    CHUNKED,
    SPECS,
    check_rendering,
    echo,
    in_chunks,
    path_of,
    request,
    source,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Call
    from tests.sockets import Message, Peer
    from tests.wires.conftest import Relayed, Served

    Serve = Callable[..., Awaitable[Served]]
    Relay = Callable[..., Awaitable[Relayed]]

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(30)


# -- exactness ------------------------------------------------------------------------------------------

SIZES = [0, 1, WHOLE - 1, WHOLE, WHOLE + 1, MIB]


@pytest.mark.parametrize("wire", list(SPECS))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("up", ["declared", "chunked"])
@pytest.mark.parametrize("down", ["declared", "chunked", "unframed"])
async def test_bodies_pass_byte_for_byte_both_ways(
    relayed: Relay, wire: Wire, size: int, up: str, down: str
) -> None:
    link = await relayed(wire=wire)
    there = (bytes(range(256)) * (size // 256 + 1))[:size]
    back = there[::-1]
    node = await link.served.node()
    method = Method.PUSH_MESSAGES
    if up == "declared":
        node.send(request(there, wire=wire, method=method))
    else:
        cuts = [there[at : at + 70_000] for at in range(0, size, 70_000)]
        node.send(request(wire=wire, method=method, framing=CHUNKED) + in_chunks(*cuts))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.body == there
    assert seen.all(b"content-length") == ([b"%d" % size] if up == "declared" else [])
    answer = await answered(node, peer, down, back)
    assert answer.body == back
    assert answer.start == b"HTTP/1.1 200 OK"
    ending = link.served.ended[0].ending
    assert (ending.outcome, ending.sent, ending.lost) == ("ok", size, False)
    assert link.served.calls[0].payload.passed == size


@pytest.mark.parametrize("wire", list(SPECS))
@pytest.mark.parametrize("size", [WHOLE, WHOLE + 1, MIB, 9 * MIB])
@pytest.mark.parametrize("framing", ["declared", "chunked", "unframed"])
async def test_an_object_passes_byte_for_byte(relayed: Relay, wire: Wire, size: int, framing: str) -> None:
    link = await relayed(wire=wire)
    body = object_of(size)
    node = await link.served.node()
    node.send(request(b"abc", wire=wire, method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    assert (await answered(node, peer, framing, body)).body == body
    ending = link.served.ended[0].ending
    assert (ending.outcome, ending.sent, ending.lost) == ("ok", size, False)


def object_of(size: int) -> bytes:
    """Return a PullObjectResponse of so many bytes."""
    content = (bytes(range(256)) * (size // 256))[: size - len(encode_bytes(3, bytes(size))) + size]
    return encode_bytes(3, content)


async def answered(node: Peer, peer: Peer, framing: str, body: bytes) -> Message:
    """Have the upstream answer, and return what the node got."""
    if framing == "declared":
        sent = response(body)
    elif framing == "chunked":
        sent = chunked(*[body[at : at + 50_000] for at in range(0, len(body), 50_000)])
    else:
        sent = b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n\r\n" + body
    sending = asyncio.ensure_future(peer.send_all(sent))
    if framing == "unframed":
        sending.add_done_callback(lambda _: peer.writer.close())
    message = await node.message()
    await sending
    return message


ODD = [
    (b"flwr-public-key", b"LS0tLS1CRUdJTi=="),
    (b"FLWR-Timestamp", b"2026-11-23T09:00:00+00:00"),
    (b"flwr-signature", b"a+/="),
    (b"Flwr-X", b"first"),
    (b"flwr-x", b"second, third"),
    (b"FLWR-X", b"first"),
    (b"flwr-empty", b""),
    (b"flwr-bytes", b"\xe9\xff \x80"),
    (b"flwr-tab", b"a\tb"),
    (b"flwr-quotes", b'"a\\"b", \'c\''),
    (b"Authorization", b"Basic dXNlcjprZXk="),
    (b"User-Agent", b"python-httpx/0.28.1"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"Content-Encoding", b"gzip"),
    (b"Cookie", b"a=b"),
    (b"Cookie", b"c=d"),
]


@pytest.mark.parametrize("wire", list(SPECS))
async def test_headers_reach_the_upstream_in_their_order_case_and_repetition(
    relayed: Relay, wire: Wire
) -> None:
    link = await relayed(wire=wire)
    node = await link.served.node()
    node.send(request(b"\x1f\x8b not gzip", wire=wire, headers=ODD))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.start == b"POST %b HTTP/1.1" % path_of(Method.PUSH_OBJECT, wire)
    names = [name for name, _ in seen.headers]
    assert names[0] == b"host"
    assert seen.headers[1:-7] == [(b"Content-Type", b"application/protobuf"), *ODD]
    assert names[-7:] == [
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-request-id",
        b"via",
        b"content-length",
    ]
    assert seen.one(b"host") == b"127.0.0.1:%d" % link.upstream.port
    assert seen.one(b"x-forwarded-host") == b"relay.example"
    assert seen.one(b"forwarded") == b"for=127.0.0.1;host=relay.example;proto=http"
    assert seen.one(b"via") == b"1.1 flwr-relay"
    assert seen.body == b"\x1f\x8b not gzip"


async def test_headers_and_status_come_back_in_their_order_case_and_repetition(relayed: Relay) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(method=Method.PULL_MESSAGES))
    peer = await link.upstream.accept()
    await peer.message()
    lines = b"".join(b"%b: %b\r\n" % pair for pair in ODD)
    peer.send(
        response(b'{"code":2007}', status=b"403 Odd Words", content_type=b"application/json", more=lines)
    )
    answer = await node.message()
    assert answer.start == b"HTTP/1.1 403 Forbidden"
    own = [(b"x-request-id", link.served.calls[0].request_id.encode()), (b"content-length", b"13")]
    assert answer.headers == [(b"Content-Type", b"application/json"), *ODD, *own]
    assert answer.body == b'{"code":2007}'
    assert link.served.outcomes() == ["upstream_403"]


async def test_headers_of_one_hop_do_not_reach_the_other_side(relayed: Relay) -> None:
    """RFC 9110 section 7.6.1, the ones that a Connection header names included."""
    link = await relayed()
    hop = [
        (b"Connection", b"keep-alive, X-Hop , close-not"),
        (b"connection", b"x-second"),
        (b"X-Hop", b"1"),
        (b"x-hop", b"2"),
        (b"X-Second", b"3"),
        (b"Keep-Alive", b"timeout=5"),
        (b"TE", b"trailers"),
        (b"Trailer", b"x"),
        (b"Proxy-Connection", b"keep-alive"),
        (b"Proxy-Authorization", b"Basic c2VjcmV0"),
        (b"Proxy-Authenticate", b"Basic"),
        (b"X-Stays", b"yes"),
    ]
    node = await link.served.node()
    node.send(request(headers=hop))
    peer = await link.upstream.accept()
    seen = await peer.message()
    names = {name.lower() for name, _ in seen.headers}
    assert names.isdisjoint({name.lower() for name, _ in hop} - {b"x-stays"})
    assert seen.one(b"x-stays") == b"yes"
    assert b"c2VjcmV0" not in repr(seen.headers).encode()
    lines = b"".join(b"%b: %b\r\n" % pair for pair in hop)
    peer.send(response(b"", more=lines.replace(b"close-not", b"x")))
    answer = await node.message()
    names = {name.lower() for name, _ in answer.headers}
    # of these, only the credentials are of a request alone
    assert names - {b"proxy-authorization"} == {
        b"content-type",
        b"x-stays",
        b"x-request-id",
        b"content-length",
    }


@pytest.mark.parametrize("header", [b"Content-Type", b"content-length", b"host", b"x-forwarded-for", b"via"])
async def test_a_connection_header_cannot_take_away_what_the_relay_relies_on(
    relayed: Relay, header: bytes
) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(b"abc", headers=[(b"Connection", header)]))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.body == b"abc"
    assert seen.one(b"host")
    assert seen.one(b"x-forwarded-for") == b"127.0.0.1"
    assert seen.one(b"via")


async def test_a_given_request_id_goes_up_and_comes_back(relayed: Relay) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(headers=[(b"X-Request-ID", b"abc-123.x:y_z")]))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.one(b"x-request-id") == b"abc-123.x:y_z"
    peer.send(response(b"", more=b"X-Request-Id: theirs\r\n"))
    assert (await node.message()).one(b"x-request-id") == b"abc-123.x:y_z"


@pytest.mark.parametrize(
    "given",
    [[], [b""], [b"a b"], [b"x" * 129], [b"one", b"two"], [b"a\xe9"], [b'"q"'], [b"a,b"], [b"a;b"]],
    ids=["none", "empty", "space", "long", "two", "latin", "quoted", "comma", "semicolon"],
)
async def test_an_unsound_request_id_is_replaced(serve: Serve, given: list[bytes]) -> None:
    served = await serve()
    made = set()
    for _ in range(3):
        answer = await served.ask(request(headers=[(b"x-request-id", value) for value in given]))
        made.add(answer.one(b"x-request-id"))
    assert len(made) == 3
    assert {call.request_id.encode() for call in served.calls} == made
    assert made.isdisjoint(given)


# -- refusals as the node sees them ---------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("wire", list(SPECS))
async def test_each_reason_is_rendered_as_the_dialect_says(serve: Serve, wire: Wire, reason: Reason) -> None:
    async def handler(call: Call) -> Reply:
        raise Refusal(reason, "secret detail", by="somebody")

    served = await serve(handler)
    for method in Method:
        node = await served.node()
        node.send(request(b"abc", wire=wire, method=method))
        answer = await check_rendering(node, dialect.answer(wire, reason, method))
        assert answer is None or b"secret" not in answer.body
    assert served.outcomes() == [reason.value] * len(Method)
    assert all(ended.ending.refusal is not None for ended in served.ended)


async def test_a_refusal_leaves_the_connection_in_use(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        if call.method is Method.PUSH_OBJECT:
            raise Refusal(Reason.OVERLOADED)
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    for _ in range(3):
        node.send(request(b"abc"))
        assert (await node.message()).status == 503
        node.send(request(b"def", method=Method.PUSH_MESSAGES))
        assert (await node.message()).body == b"def"


async def test_a_refusal_before_the_body_was_read_closes_and_still_arrives(serve: Serve) -> None:
    """The rest of the body is taken, or a reset would overtake the answer."""

    async def handler(call: Call) -> Reply:
        raise Refusal(Reason.RATE_LIMITED)

    served = await serve(handler)
    node = await served.node()
    node.send(request(framing=b"Content-Length: %d" % (8 * MIB)))
    await node.send_all(bytes(8 * MIB))
    answer = await node.message()
    assert answer.status == 503
    assert answer.one(b"connection") == b"close"
    assert await node.rest() == (b"", "closed")


async def test_a_dropped_call_leaves_nothing_behind(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN)

    served = await serve(handler)
    before = asyncio.all_tasks()
    node = await served.node()
    node.send(
        request(wire=Wire.REST_V0, method=Method.PULL_OBJECT, framing=b"Content-Length: 100000") + b"part"
    )
    assert await node.rest() == (b"", "reset")
    await until(lambda: not served.server.connections)
    await until(lambda: asyncio.all_tasks() <= before, patience=5.0)


async def test_a_node_that_asks_on_and_takes_no_answer_is_given_up(serve: Serve) -> None:
    """Its answers would fill the memory."""

    async def handler(call: Call) -> Reply:
        return Reply(Payload(b"x" * 60_000), Source.UPSTREAM)

    served = await serve(handler, idle_timeout=0.3)
    node = await served.node(receive_buffer=4096, segment=500)
    node.writer.transport.pause_reading()  # type: ignore[attr-defined]
    node.send(request() * 100)
    await until(lambda: served.calls)
    await until(served.gone)
    assert len(served.calls) < 20
    await until(lambda: not served.server.connections)
    assert not served.front.busy


async def test_a_bug_in_the_chain_is_an_internal_refusal_and_is_logged(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        raise KeyError("secret")

    served = await serve(handler)
    for method in (Method.PULL_MESSAGES, Method.PUSH_OBJECT):
        node = await served.node()
        node.send(request(b"abc", method=method))
        answer = await check_rendering(node, dialect.answer(Wire.HTTP_V1, Reason.INTERNAL, method))
        assert answer is None or b"secret" not in answer.body
    assert served.outcomes() == ["internal", "internal"]
    with capture_logs() as lines:
        assert (await served.ask(request(b"abc"))).status == 503
    assert [(line["event"], line["log_level"]) for line in lines] == [("call failed", "error")]


# -- answers that break off -----------------------------------------------------------------------------

CUTS = {
    "declared": response(b"x" * 100, size=9 * MIB),  # more than any wire awaits whole
    "chunked": chunked(b"x" * 100, last=b""),
    "before the last chunk": chunked(b"x" * 100, last=b"0\r\n"),
    "in a chunk": chunked(b"x" * 100, last=b"50\r\nyy"),
}


@pytest.mark.parametrize(
    ("cut", "how"),
    [
        *((cut, how) for cut in CUTS for how in ("close", "reset")),
        # within a declared body or a chunk any byte is a good one
        ("chunked", "garbage"),
        ("before the last chunk", "garbage"),
    ],
)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("wire", list(SPECS))
async def test_an_answer_that_the_upstream_cuts_never_looks_complete(
    relayed: Relay, wire: Wire, version: bytes, cut: str, how: str
) -> None:
    link = await relayed(wire=wire)
    node = await link.served.node()
    node.send(request(b"abc", wire=wire, version=version, method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    peer.send(CUTS[cut])
    awaited = wire is Wire.REST_V0 and cut != "declared"
    if not awaited:
        assert (await node.head()).status == 200
    if how == "close":
        await peer.close()
    elif how == "reset":
        peer.reset()
    else:
        peer.send(b"\x00garbage\r\n")
    rest, ending = await node.rest()
    assert ending == "reset"
    assert not rest.endswith(b"0\r\n\r\n")
    assert len(rest) < 120
    await until(lambda: link.served.ended)
    ended = link.served.ended[0].ending
    if awaited:
        assert rest == b""
        assert ended.outcome == ("upstream_bad_answer" if how == "garbage" else "upstream_down")
    else:
        assert (ended.outcome, ended.lost) == ("cut", True)
    await until(lambda: link.books() == (0, 0))


@pytest.mark.parametrize("size", [WHOLE, 5 * MIB, 8 * MIB])
async def test_a_legacy_node_gets_an_object_whole_or_no_byte_of_it(relayed: Relay, size: int) -> None:
    """It does not survive an answer that breaks off; Flower cuts arrays into pieces of 5 MiB."""
    link = await relayed(wire=Wire.REST_V0)
    body = object_of(size)
    for cut in (size - 1, size):
        node = await link.served.node()
        node.send(request(wire=Wire.REST_V0, method=Method.PULL_OBJECT))
        peer = await link.upstream.accept()
        await peer.message()
        await peer.send_all(response(body[:cut], size=size))
        if cut < size:
            assert await node.is_silent(0.02)
            await peer.close()
            assert await node.rest() == (b"", "reset")
        else:
            assert (await node.message()).body == body
    assert link.served.outcomes() == ["upstream_down", "ok"]


@pytest.mark.parametrize("size", [None, 100])
async def test_a_bug_in_the_middle_of_an_answer_never_makes_it_look_complete(
    serve: Serve, size: int | None
) -> None:
    async def handler(call: Call) -> Reply:
        return Reply(source([b"x" * 10, ValueError("a bug")], size=size), Source.LOCAL)

    served = await serve(handler)
    node = await served.node()
    node.send(request())
    await node.head()
    rest, ending = await node.rest()
    assert ending == "reset"
    assert b"HTTP/1.1" not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    await until(lambda: served.ended)
    assert served.outcomes() == ["cut"]


@pytest.mark.parametrize("pieces", [[b"short"], [b"x" * 60, b"x" * 60]], ids=["short", "long"])
async def test_a_body_that_differs_from_its_declared_size_never_looks_complete(
    serve: Serve, pieces: list[bytes]
) -> None:
    async def handler(call: Call) -> Reply:
        return Reply(source(list(pieces), size=100), Source.LOCAL)

    served = await serve(handler)
    node = await served.node()
    node.send(request() + request(b"next"))
    await node.head()
    _, ending = await node.rest()
    assert ending == "reset"
    assert served.outcomes() == ["cut"]


# -- nodes that leave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "part",
    [
        request(framing=b"Content-Length: %d" % (WHOLE * 2)) + b"x" * 1000,
        request(framing=CHUNKED) + in_chunks(b"x" * 1000, last=b""),
        request(framing=CHUNKED) + in_chunks(b"x" * 1000, last=b"0\r\n"),
        request(framing=CHUNKED) + in_chunks(b"x" * 1000, last=b"ff\r\nabc"),
    ],
    ids=["declared", "between chunks", "before the end", "in a chunk"],
)
async def test_a_node_that_leaves_within_its_body_leaves_a_truncated_request_upstream(
    relayed: Relay, part: bytes, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(part)
    peer = await link.upstream.accept()
    await peer.head()
    if how == "close":
        await node.close()
    else:
        node.reset()
    rest, _ = await peer.rest()
    assert not rest.endswith(b"0\r\n\r\n")
    assert len(rest) < WHOLE * 2
    await until(lambda: link.served.ended)
    assert link.served.outcomes() == ["node_gone"]
    assert not link.served.ended[0].ending.lost
    await until(lambda: link.books() == (0, 0))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_small_call_whose_node_leaves_within_its_body_does_not_reach_the_upstream(
    relayed: Relay,
) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(framing=b"Content-Length: 100") + b"part")
    await asyncio.sleep(0.01)
    node.reset()
    await until(lambda: not link.served.server.connections)
    assert link.upstream.peers == []


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_node_that_leaves_while_the_upstream_works_is_noted_as_a_lost_answer(
    relayed: Relay, how: str
) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(method=Method.PULL_MESSAGES))
    peer = await link.upstream.accept()
    await peer.message()
    if how == "close":
        await node.close()
    else:
        node.reset()
    await until(link.served.gone)
    peer.send(response(b"\x08\x01"))
    await until(lambda: link.served.ended)
    ended = link.served.ended[0].ending
    assert (ended.outcome, ended.lost, ended.sent) == ("node_gone", True, 0)
    await until(lambda: link.books() == (1, 1))


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_call_whose_node_has_left_is_not_sent_any_more(relayed: Relay, how: str) -> None:
    """pull-messages would take a message from the SuperLink for nobody."""
    link = await relayed(max_connections=1)
    first, second = await link.served.node(), await link.served.node()
    first.send(request(b"first"))
    peer = await link.upstream.accept()
    await peer.message()
    second.send(request(b"second", method=Method.PULL_MESSAGES))
    await until(lambda: link.pool._queue)
    if how == "close":
        await second.close()
    else:
        second.reset()
    await until(lambda: None in [connection.transport for connection in link.served.server.connections])
    peer.send(response(b"ok"))
    assert (await first.message()).body == b"ok"
    await until(lambda: len(link.served.ended) == 2)
    assert not link.served.ended[1].ending.lost
    await until(lambda: link.books() == (1, 1))
    first.send(request(b"third"))
    assert (await peer.message()).body == b"third"
    peer.send(response(b"ok"))
    await first.message()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("answer", ["declared", "chunked"])
async def test_a_node_that_leaves_within_its_answer_ends_the_upstreams(
    relayed: Relay, how: str, answer: str
) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    peer.send(CUTS[answer])
    await node.head()
    if how == "close":
        await node.close()
    else:
        node.reset()
    await until(link.served.gone)
    peer.send(b"x" * 1000 if answer == "declared" else in_chunks(b"x" * 1000, last=b""))
    await peer.rest()
    await until(lambda: link.served.ended)
    ended = link.served.ended[0].ending
    assert (ended.outcome, ended.lost) == ("node_gone", True)
    await until(lambda: link.books() == (0, 0))


# -- slow ones ------------------------------------------------------------------------------------------


async def test_a_node_that_takes_nothing_is_given_up_and_leaves_nothing_behind(relayed: Relay) -> None:
    link = await relayed(idle_timeout=0.2)
    node = await link.served.node(receive_buffer=4096)
    node.send(request(method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    size = 64 * MIB
    peer.send(response(b"", size=size))
    sending = asyncio.ensure_future(peer.send_all(bytes(size)))
    await until(lambda: link.served.ended)
    ended = link.served.ended[0].ending
    assert (ended.outcome, ended.lost) == ("node_gone", True)
    await until(lambda: link.books() == (0, 0))
    # a close that waits until the node has taken what is left would wait for ever
    await until(lambda: not link.served.server.connections)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_node_that_takes_a_little_at_a_time_gets_all_of_it(relayed: Relay) -> None:
    link = await relayed(idle_timeout=1.5)
    node = await link.served.node(receive_buffer=4096, segment=536)
    node.send(request(method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    size = 320 * 1024  # over the high-water mark of the node's side, so that it is waited for
    body = bytes(range(256)) * (size // 256)
    sending = asyncio.ensure_future(peer.send_all(response(body)))
    head = await node.head()
    assert head.one(b"content-length") == b"%d" % size
    started = asyncio.get_running_loop().time()
    taken = b""
    while len(taken) < size:
        taken += await node.reader.read(8192)
        if asyncio.get_running_loop().time() - started < 4.0:
            await asyncio.sleep(0.1)
    await sending
    assert taken == body
    assert asyncio.get_running_loop().time() - started > 3.0  # far more than a silent node is given
    await until(lambda: link.served.ended)
    assert link.served.outcomes() == ["ok"]


async def test_a_node_that_sends_one_byte_at_a_time_is_served(relayed: Relay) -> None:
    link = await relayed(idle_timeout=1.5)
    node = await link.served.node()
    body = b"0123456789"
    node.send(request(body)[: -len(body)])
    for at in range(len(body)):
        await asyncio.sleep(0.2)
        node.send(body[at : at + 1])
    peer = await link.upstream.accept()
    assert (await peer.message()).body == body
    peer.send(response(b"ok"))
    assert (await node.message()).body == b"ok"


@pytest.mark.parametrize("size", [100, WHOLE * 2], ids=["small", "long"])
async def test_a_node_whose_body_stalls_is_told_to_come_again(relayed: Relay, size: int) -> None:
    link = await relayed(idle_timeout=0.05)
    node = await link.served.node()
    node.send(request(framing=b"Content-Length: %d" % size) + b"part")
    answer = await node.message()
    assert (answer.status, answer.body) == (503, b"malformed")
    assert answer.one(b"connection") == b"close"
    for peer in link.upstream.peers:
        with pytest.raises(CutError):
            await peer.message()
    assert len(link.upstream.peers) == (size > WHOLE)
    await until(lambda: link.books() == (0, 0))


async def test_a_slow_upstream_bounds_what_is_held_of_an_upload(relayed: Relay) -> None:
    link = await relayed()
    node = await link.served.node()
    size = 64 * MIB
    sent = 0

    async def send() -> None:
        nonlocal sent
        node.send(request(framing=b"Content-Length: %d" % size))
        block = bytes(256 * 1024)
        while sent < size:
            await node.send_all(block)
            sent += len(block)

    sending = asyncio.ensure_future(send())
    peer = await link.upstream.accept()
    await peer.head()
    await asyncio.sleep(0.3)
    held = sent
    await asyncio.sleep(0.1)
    assert sent == held < 24 * MIB  # most of it in the kernel's buffers
    connection = next(iter(link.pool._connections))._transport
    assert connection is not None
    assert connection.get_write_buffer_size() < 2 * MIB
    taken = 0
    while taken < size:
        taken += len(await peer.exactly(min(MIB, size - taken)))
    await sending
    peer.send(response(b"ok"))
    assert (await node.message()).body == b"ok"


async def test_a_slow_node_bounds_what_is_held_of_a_download(relayed: Relay) -> None:
    link = await relayed()
    node = await link.served.node(receive_buffer=4096)
    node.send(request(method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    size = 48 * MIB
    block = bytes(range(256)) * 1024

    async def send() -> None:
        peer.send(response(b"", size=size))
        for _ in range(size // len(block)):
            await peer.send_all(block)

    sending = asyncio.ensure_future(send())
    head = await node.head()
    await asyncio.sleep(0.3)
    assert not sending.done()
    (upstream,) = link.pool._connections
    assert upstream._buffered < 2 * MIB
    (connection,) = link.served.server.connections
    assert connection.transport is not None
    assert connection.transport.get_write_buffer_size() < 2 * MIB
    digest = hashlib.sha256()
    taken = 0
    while taken < size:
        piece = await node.reader.read(MIB)
        assert piece
        digest.update(piece)
        taken += len(piece)
    await sending
    assert head.one(b"content-length") == b"%d" % size
    assert digest.digest() == hashlib.sha256(block * (size // len(block))).digest()


@pytest.mark.parametrize("kind", ["answers", "refusals"])
async def test_a_node_that_asks_and_asks_and_takes_no_answer_fills_no_memory(serve: Serve, kind: str) -> None:
    body = b"x" * 60_000

    async def handler(call: Call) -> Reply:
        if kind == "refusals":
            raise Refusal(Reason.OVERLOADED)
        return Reply(Payload(body), Source.LOCAL)

    served = await serve(handler, idle_timeout=PATIENCE)
    node = await served.node(receive_buffer=4096)
    batch = request(method=Method.PULL_OBJECT) * 50
    (connection,) = served.server.connections
    most = 0
    for _ in range(400):
        node.send(batch)
        await asyncio.sleep(0)
        if connection.transport is not None:
            most = max(most, connection.transport.get_write_buffer_size())
        if node.writer.transport.get_write_buffer_size() > MIB:
            break
    await asyncio.sleep(0.2)
    assert connection.transport is not None
    most = max(most, connection.transport.get_write_buffer_size())
    assert most < MIB
    gc.collect()
