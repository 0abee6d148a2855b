"""Nodes and an upstream that play every trick on relay/wires/http.py and http_server.py over real sockets."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import socket
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from relay import dialect
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.wires.http_request import WHOLE
from relay.worker import drain
from tests.sockets import PATIENCE, CutError, Message, Peer, chunked, response, until
from tests.wires.conftest import CHUNKED, echo, in_chunks, path_of, request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from relay.call import Call
    from tests.wires.conftest import Relayed, Served

    Serve = Callable[..., Awaitable[Served]]
    Relay = Callable[..., Awaitable[Relayed]]

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(30)


def source(pieces: Sequence[bytes | BaseException], *, size: int | None = None) -> Payload:
    return Payload(body=Listed(pieces), size=size)


class Listed:
    """A body at hand in pieces."""

    def __init__(self, pieces: Sequence[bytes | BaseException]) -> None:
        self.pieces = list(pieces)
        self.closed = False

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        if not self.pieces:
            return b""
        piece = self.pieces.pop(0)
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self) -> None:
        self.closed = True


async def refuse(node: Peer, patience: float = PATIENCE) -> tuple[bytes, str]:
    """Return what a node gets, and how its connection ends."""
    return await node.rest(patience)


# -- exactness ------------------------------------------------------------------------------------------

SIZES = [0, 1, WHOLE - 1, WHOLE, WHOLE + 1, MIB]


@pytest.mark.parametrize("wire", list(Wire))
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
    if up == "declared":
        node.send(request(there, wire=wire))
    else:
        cuts = [there[at : at + 70_000] for at in range(0, size, 70_000)]
        node.send(request(wire=wire, framing=CHUNKED) + in_chunks(*cuts))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.body == there
    assert seen.all(b"content-length") == ([b"%d" % size] if up == "declared" else [])
    if down == "declared":
        peer.send(response(back))
    elif down == "chunked":
        peer.send(chunked(*[back[at : at + 50_000] for at in range(0, size, 50_000)]))
    else:
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n\r\n" + back)
        await peer.writer.drain()
        peer.writer.close()
    answer = await node.message()
    assert answer.body == back
    assert answer.start == b"HTTP/1.1 200 OK"
    ending = link.served.ended[0].ending
    assert (ending.outcome, ending.sent, ending.lost) == ("ok", size, False)
    assert link.served.calls[0].payload.passed == size


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


@pytest.mark.parametrize("wire", list(Wire))
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


# -- HTTP as it may be spoken ---------------------------------------------------------------------------


async def test_one_connection_carries_many_calls(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    for number in range(50):
        body = b"%d" % number
        node.send(request(body) if number % 2 else request(framing=CHUNKED) + in_chunks(body))
        assert (await node.message()).body == body
    assert served.outcomes() == ["ok"] * 50


async def test_pipelined_calls_are_answered_in_their_order(serve: Serve) -> None:
    delays = [0.01, 0.0, 0.005, 0.0]

    async def handler(call: Call) -> Reply:
        await asyncio.sleep(delays.pop(0))
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    node.send(
        request(b"one")
        + request(framing=CHUNKED)
        + in_chunks(b"tw", b"o")
        + request(b"x" * (WHOLE + 1))
        + request(b"four")
    )
    bodies = [(await node.message()).body for _ in range(4)]
    assert bodies == [b"one", b"two", b"x" * (WHOLE + 1), b"four"]


async def test_a_request_may_come_split_at_any_byte(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    for data in (
        request(b"body", headers=[(b"A", b"b")]),
        request(framing=CHUNKED) + in_chunks(b"bo", b"dy"),
    ):
        for split in range(1, len(data)):
            await node.send_all(data[:split])
            await asyncio.sleep(0.0005)
            await node.send_all(data[split:])
            assert (await node.message()).body == b"body"
    assert served.strays == []


async def test_chunk_extensions_and_trailers_are_no_part_of_the_body(relayed: Relay) -> None:
    link = await relayed()
    node = await link.served.node()
    body = b'3;name=value;q="x"\r\nabc\r\n2 ;x\r\nde\r\n0\r\nX-Trailer: smuggled\r\n\r\n'
    node.send(request(framing=CHUNKED) + body.replace(b"2 ;x", b"2;x"))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.body == b"abcde"
    assert seen.all(b"x-trailer") == []
    peer.send(response(b"ok"))
    assert (await node.message()).body == b"ok"


@pytest.mark.parametrize(
    "target", [b"http://relay.example:8080%b", b"HTTP://user:pass@other%b", b"%b?query=1", b"%b#x"]
)
async def test_a_target_may_be_absolute_or_carry_a_query(relayed: Relay, target: bytes) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(b"abc", path=target % path_of(Method.PUSH_OBJECT)))
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.start == b"POST /v1/fleet/push-object HTTP/1.1"
    assert seen.body == b"abc"
    peer.send(response(b"ok"))
    assert (await node.message()).body == b"ok"


@pytest.mark.parametrize("size", [5, WHOLE + 1], ids=["small", "long"])
async def test_a_node_that_waits_for_leave_to_send_gets_it(relayed: Relay, size: int) -> None:
    link = await relayed()
    node = await link.served.node()
    body = b"x" * size
    node.send(request(body, headers=[(b"Expect", b"100-continue")])[: -len(body)])
    assert await node.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    node.send(body)
    peer = await link.upstream.accept()
    seen = await peer.message()
    assert seen.body == body
    assert seen.all(b"expect") == []
    peer.send(response(b"ok"))
    answer = await node.message()
    assert (answer.status, answer.body) == (200, b"ok")


async def test_a_node_that_does_not_wait_for_leave_gets_one_answer(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", headers=[(b"Expect", b"100-continue")]))
    answer = await node.message()
    assert (answer.status, answer.body) == (200, b"abc")
    node.send(request(b"again"))
    assert (await node.message()).body == b"again"


async def test_an_old_client_is_never_told_to_continue(serve: Serve) -> None:
    """RFC 9110 section 10.1.1: HTTP/1.0 knows no 1xx; the client would take it for the answer."""
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", version=b"1.0", headers=[(b"Expect", b"100-continue")])[:-3])
    await asyncio.sleep(0.02)
    node.send(b"abc")
    answer = await node.message()
    assert (answer.status, answer.body) == (200, b"abc")


async def test_a_call_that_is_refused_for_its_head_gets_no_leave_to_send(serve: Serve) -> None:
    served = await serve(max_body=100)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 101", headers=[(b"Expect", b"100-continue")]))
    answer = await node.message()
    assert answer.status == 403
    assert answer.one(b"connection") == b"close"


async def test_an_old_client_is_answered_and_closed(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", version=b"1.0"))
    answer = await node.message()
    assert answer.start == b"HTTP/1.1 200 OK"
    assert answer.body == b"abc"
    assert answer.one(b"connection") == b"close"
    assert await refuse(node) == (b"", "closed")


async def test_an_old_client_may_keep_its_connection(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    for _ in range(3):
        node.send(request(b"abc", version=b"1.0", headers=[(b"Connection", b"keep-alive")]))
        answer = await node.message()
        assert answer.body == b"abc"
        assert answer.one(b"connection") == b"keep-alive"


async def test_an_old_client_gets_an_undeclared_answer_unframed_and_closed(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        return Reply(source([b"one", b"two"]), Source.LOCAL)

    served = await serve(handler)
    node = await served.node()
    node.send(request(version=b"1.0", headers=[(b"Connection", b"keep-alive")]))
    head = await node.head()
    assert head.all(b"transfer-encoding") == head.all(b"content-length") == []
    assert head.one(b"connection") == b"close"
    assert await refuse(node) == (b"onetwo", "closed")


async def test_a_node_that_says_close_is_answered_and_closed(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", headers=[(b"Connection", b"close")]))
    answer = await node.message()
    assert answer.body == b"abc"
    assert answer.one(b"connection") == b"close"
    assert (await refuse(node))[0] == b""
    assert len(served.calls) == 1


async def test_an_idle_connection_is_closed_in_its_time_and_not_while_it_is_busy(serve: Serve) -> None:
    go = asyncio.Event()

    async def handler(call: Call) -> Reply:
        await go.wait()
        return await echo(call)

    served = await serve(handler, keepalive=0.1)
    silent, talking = await served.node(), await served.node()
    talking.send(request(b"abc"))
    started = asyncio.get_running_loop().time()
    assert await refuse(silent) == (b"", "closed")
    assert asyncio.get_running_loop().time() - started > 0.05
    await asyncio.sleep(0.15)
    go.set()
    assert (await talking.message()).body == b"abc"
    assert await refuse(talking) == (b"", "closed")


async def test_a_head_that_trickles_does_not_hold_its_connection_for_ever(serve: Serve) -> None:
    served = await serve(keepalive=0.2)
    node = await served.node()
    data = request(b"abc", headers=[(b"X-Long", b"y" * 1000)])
    sent = 0
    while sent < len(data) and not node.reader.at_eof():
        node.send(data[sent : sent + 1])
        sent += 1
        await asyncio.sleep(0.01)
    assert sent < len(data)
    assert served.calls == []


# -- what is not HTTP, or no call -----------------------------------------------------------------------

OK = request(b"abc")
BROKEN = {
    "text": b"hello\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version 3": OK.replace(b"HTTP/1.1", b"HTTP/3.0"),
    "lower case": OK.replace(b"POST", b"post"),
    "unknown method": OK.replace(b"POST", b"FETCH"),
    "space in target": OK.replace(b"push-object", b"push object"),
    "no host": OK.replace(b"Host: relay.example\r\n", b""),
    "two hosts": OK.replace(b"Host:", b"Host: a\r\nHost:"),
    "two lengths": request(framing=b"Content-Length: 3\r\nContent-Length: 4") + b"abcd",
    "same length twice": request(framing=b"Content-Length: 3\r\nContent-Length: 3") + b"abc",
    "length list": request(framing=b"Content-Length: 3, 3") + b"abc",
    "negative length": request(framing=b"Content-Length: -3") + b"abc",
    "signed length": request(framing=b"Content-Length: +3") + b"abc",
    "hex length": request(framing=b"Content-Length: 0x3") + b"abc",
    "empty length": request(framing=b"Content-Length: ") + b"abc",
    "huge length": request(framing=b"Content-Length: 99999999999999999999999") + b"abc",
    "length and chunked": request(framing=b"Content-Length: 3\r\n" + CHUNKED) + in_chunks(b"abc"),
    "chunked and length": request(framing=CHUNKED + b"\r\nContent-Length: 3") + in_chunks(b"abc"),
    "chunked twice": request(framing=CHUNKED + b"\r\n" + CHUNKED) + in_chunks(b"abc"),
    "chunked not last": request(framing=b"Transfer-Encoding: chunked, gzip") + in_chunks(b"abc"),
    "unknown coding": request(framing=b"Transfer-Encoding: xchunked") + in_chunks(b"abc"),
    "identity": request(framing=b"Transfer-Encoding: identity") + b"abc",
    "obs-fold": OK.replace(b"\r\nContent-Type", b"\r\n folded\r\nContent-Type"),
    "folded length": OK.replace(b"Content-Length: 3", b"Content-Length:\r\n 3"),
    "space before colon": OK.replace(b"Content-Length: 3", b"Content-Length : 3"),
    "no colon": OK.replace(b"Content-Type: ", b"Content-Type "),
    "empty name": OK.replace(b"Content-Type: ", b": "),
    "nul in value": OK.replace(b"relay.example", b"relay\x00example"),
    "nul in name": OK.replace(b"Content-Type", b"Content\x00Type"),
    "cr in value": OK.replace(b"relay.example", b"relay\rexample"),
    "bare lf": OK.replace(b"\r\n", b"\n"),
    "lf in value": OK.replace(b"relay.example", b"relay\nX-Evil: 1"),
    "control in value": OK.replace(b"relay.example", b"relay\x01example"),
    "delete in value": OK.replace(b"relay.example", b"relay\x7fexample"),
    "giant header": OK.replace(b"relay.example", b"x" * 100_000),
    "giant target": OK.replace(b"push-object", b"x" * 100_000),
    "giant name": OK.replace(b"Content-Type", b"x" * 100_000),
    "many headers": request(b"abc", headers=[(b"A%d" % n, b"b") for n in range(1000)]),
    "endless header": b"POST / HTTP/1.1\r\nX: " + b"y" * 3_000_000,
    "leading garbage": b"\x00\x00" + OK,
}


@pytest.mark.parametrize("name", list(BROKEN))
async def test_what_is_no_sound_http_is_closed_without_an_answer_and_counted_once(
    serve: Serve, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A 400 would end a node whose call was mangled on its way; a close makes it try again."""
    caplog.set_level(logging.WARNING)
    served = await serve()
    node = await served.node()
    node.send(BROKEN[name])
    data, _ = await refuse(node)
    assert data == b""
    await until(lambda: not served.server.connections)
    assert served.strays == ["dropped"]
    assert served.ended == []
    assert await served.works()
    assert not caplog.records


@pytest.mark.parametrize("name", ["text", "length and chunked", "nul in value", "giant header"])
async def test_garbage_behind_a_good_call_does_not_harm_it(serve: Serve, name: str) -> None:
    go = asyncio.Event()

    async def handler(call: Call) -> Reply:
        await go.wait()
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    node.send(OK)
    await until(lambda: served.calls)
    node.send(BROKEN[name])
    await until(lambda: go.is_set() or next(iter(served.server.connections))._messages)
    go.set()
    assert (await node.message()).body == b"abc"
    assert (await refuse(node))[0] == b""
    assert served.strays == ["dropped"]
    assert served.outcomes() == ["ok"]


@pytest.mark.parametrize(
    "framing",
    [
        b"zz\r\n",
        b"-1\r\n",
        b"fffffffffffffffff\r\n",
        b"3\r\nabcdef\r\n",
        b"3\nabc\n",
        b"0x3\r\nabc\r\n",
        b"3\r\nabc0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("first", [b"", b"good"], ids=["at once", "later"])
async def test_a_broken_chunk_ends_the_call_at_once_and_reaches_the_upstream_as_a_truncated_request(
    relayed: Relay, framing: bytes, first: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    link = await relayed()
    node = await link.served.node()
    head = request(framing=CHUNKED)
    if first:
        node.send(head + in_chunks(first, last=b""))
        peer = await link.upstream.accept()
        await peer.head()
        assert await peer.exactly(9) == b"4\r\ngood\r\n"
        node.send(framing + b"x" * 20 + in_chunks())
        rest, _ = await peer.rest()
        assert not rest.endswith(b"0\r\n\r\n")
    else:
        node.send(head + framing + b"x" * 20 + in_chunks())
        for peer in link.upstream.peers:
            with pytest.raises(CutError):
                await peer.message()
    started = asyncio.get_running_loop().time()
    data, _ = await refuse(node)
    assert asyncio.get_running_loop().time() - started < 1.0
    assert data == b"" or data.startswith(b"HTTP/1.1 503 ")
    await until(lambda: link.books() == (0, 0))
    await until(lambda: not link.served.server.connections)
    assert set(link.served.outcomes()) <= {"malformed"}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("codings", [b"gzip, chunked", b"gzip,chunked", b"deflate, gzip, chunked"])
async def test_a_coding_that_nobody_undoes_is_not_passed_on_as_if_it_were_none(
    relayed: Relay, codings: bytes
) -> None:
    link = await relayed()
    node = await link.served.node()
    node.send(request(framing=b"Transfer-Encoding: " + codings) + in_chunks(b"zipped"))
    answer = await node.message()
    assert (answer.status, answer.body) == (503, b"malformed")
    assert link.upstream.peers == []


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"TLS/1.0"])
@pytest.mark.parametrize("body", [b"", b"abc"])
async def test_a_wish_to_upgrade_is_refused_and_nothing_behind_it_is_read(
    relayed: Relay, protocol: bytes, body: bytes
) -> None:
    link = await relayed()
    headers = [(b"Connection", b"Upgrade"), (b"Upgrade", protocol)]
    node = await link.served.node()
    node.send(request(body, headers=headers) + b"\x81\x05hello" + request(b"smuggled"))
    answer = await node.message()
    assert answer.status == 503
    await refuse(node)
    assert link.upstream.peers == []
    assert [call.method for call in link.served.calls] == [Method.PUSH_OBJECT]
    assert link.served.outcomes() == ["malformed"]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/1.1", 404),
        (b"GET /health HTTP/1.1", 404),
        (b"POST / HTTP/1.1", 404),
        (b"POST /v1/control/list-runs HTTP/1.1", 404),
        (b"POST /v1/runtime/acquire-task HTTP/1.1", 404),
        (b"POST //v1/fleet/pull-messages HTTP/1.1", 404),
        (b"POST /v1/fleet/../control/start-run HTTP/1.1", 404),
        (b"POST /v1/fleet/pull-messages/x HTTP/1.1", 404),
        (b"POST /V1/FLEET/pull-messages HTTP/1.1", 404),
        (b"GET /v1/fleet/pull-messages HTTP/1.1", 405),
        (b"PUT /v1/fleet/pull-messages HTTP/1.1", 405),
        (b"DELETE /api/v0/fleet/pull-messages HTTP/1.1", 405),
        (b"OPTIONS /v1/fleet/pull-messages HTTP/1.1", 405),
        (b"OPTIONS * HTTP/1.1", 404),
        (b"CONNECT relay.example:443 HTTP/1.1", 404),
        (b"CONNECT ", 404),
        (b"TRACE /v1/fleet/pull-messages HTTP/1.1", 405),
    ],
)
async def test_a_stray_request_is_told_so_and_closed(serve: Serve, line: bytes, status: int) -> None:
    served = await serve()
    node = await served.node()
    node.send(line + b"\r\nHost: x\r\n\r\n")
    answer = await node.message()
    assert answer.status == status
    assert answer.one(b"connection") == b"close"
    assert answer.one(b"content-type") == b"text/plain; charset=utf-8"
    assert answer.all(b"allow") == ([b"POST"] if status == 405 else [])
    assert await refuse(node) == (b"", "closed")
    assert served.strays == [str(status)]
    assert served.calls == []


@pytest.mark.parametrize("path", [b"/", b"/v1/fleet/pull-messages"])
async def test_the_answer_to_head_has_no_body(serve: Serve, path: bytes) -> None:
    served = await serve()
    node = await served.node()
    node.send(b"HEAD %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
    head = await node.head()
    assert head.status in (404, 405)
    assert await refuse(node) == (b"", "closed")


async def test_a_stray_upload_is_answered_although_nobody_reads_it(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(path=b"/upload", framing=b"Content-Length: %d" % (4 * MIB)))
    await node.send_all(bytes(4 * MIB))
    assert (await node.message()).status == 404
    assert await refuse(node) == (b"", "closed")


@pytest.mark.parametrize("method", [*Method, None])
@pytest.mark.parametrize("wire", list(Wire))
async def test_a_fleet_call_of_an_unknown_version_or_name_is_answered_as_the_dialect_says(
    serve: Serve, wire: Wire, method: Method | None
) -> None:
    served = await serve()
    prefix = {Wire.HTTP_V1: b"/v2/fleet/", Wire.REST_V0: b"/api/v7/fleet/"}[wire]
    node = await served.node()
    node.send(request(b"abc", path=prefix + (method.path.encode() if method else b"ping")))
    await check_rendering(node, dialect.answer(wire, Reason.UNSUPPORTED, method))
    assert served.strays == ["unsupported"]
    assert served.calls == []


async def test_a_wire_that_a_listener_does_not_serve_is_answered_as_the_dialect_says(serve: Serve) -> None:
    served = await serve(wires=(Wire.HTTP_V1,))
    node = await served.node()
    node.send(request(path=path_of(Method.PULL_MESSAGES, Wire.REST_V0)))
    await check_rendering(node, dialect.answer(Wire.REST_V0, Reason.UNSUPPORTED, Method.PULL_MESSAGES))
    assert served.strays == ["unsupported"]


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        b"",
        b"application/json",
        b"text/html",
        b"application/grpc",
        b"application/protobuf2",
        b"multipart/form-data",
    ],
)
async def test_a_call_of_another_content_type_is_malformed(serve: Serve, content_type: bytes | None) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", content_type=content_type))
    answer = await node.message()
    assert (answer.status, answer.body) == (503, b"malformed")
    assert served.outcomes() == ["malformed"]


@pytest.mark.parametrize(
    "content_type", [b"application/protobuf", b"Application/Protobuf", b"application/protobuf; charset=utf-8"]
)
async def test_the_content_type_is_known_in_any_spelling(serve: Serve, content_type: bytes) -> None:
    served = await serve()
    assert (await served.ask(request(b"abc", content_type=content_type))).body == b"abc"


# -- refusals as the node sees them ---------------------------------------------------------------------


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


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("wire", list(Wire))
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
    assert await refuse(node) == (b"", "closed")


async def test_a_dropped_call_leaves_nothing_behind(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN)

    served = await serve(handler)
    before = asyncio.all_tasks()
    node = await served.node()
    node.send(
        request(wire=Wire.REST_V0, method=Method.PULL_OBJECT, framing=b"Content-Length: 100000") + b"part"
    )
    assert await refuse(node) == (b"", "reset")
    await until(lambda: not served.server.connections)
    await until(lambda: asyncio.all_tasks() <= before, patience=1.0)


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
@pytest.mark.parametrize("wire", list(Wire))
async def test_an_answer_that_the_upstream_cuts_never_looks_complete(
    relayed: Relay, wire: Wire, version: bytes, cut: str, how: str
) -> None:
    link = await relayed(wire=wire)
    node = await link.served.node()
    node.send(request(b"abc", wire=wire, version=version, method=Method.PULL_OBJECT))
    peer = await link.upstream.accept()
    await peer.message()
    peer.send(CUTS[cut])
    head = await node.head()
    assert head.status == 200
    if how == "close":
        await peer.close()
    elif how == "reset":
        peer.reset()
    else:
        peer.send(b"\x00garbage\r\n")
    rest, ending = await refuse(node)
    assert ending == "reset"
    assert not rest.endswith(b"0\r\n\r\n")
    assert len(rest) < 120
    await until(lambda: link.served.ended)
    ended = link.served.ended[0].ending
    assert (ended.outcome, ended.lost) == ("cut", True)
    await until(lambda: link.books() == (0, 0))


@pytest.mark.parametrize("size", [WHOLE, 5 * MIB, 8 * MIB])
async def test_a_legacy_node_gets_an_object_whole_or_no_byte_of_it(relayed: Relay, size: int) -> None:
    """It does not survive an answer that breaks off; Flower cuts arrays into pieces of 5 MiB."""
    link = await relayed(wire=Wire.REST_V0)
    body = b"\x0a\x80\x80\x40" + bytes(size - 4)
    for cut in (size - 1, size):
        node = await link.served.node()
        node.send(request(wire=Wire.REST_V0, method=Method.PUSH_OBJECT))
        peer = await link.upstream.accept()
        await peer.message()
        await peer.send_all(response(body[:cut], size=size))
        if cut < size:
            assert await node.is_silent(0.02)
            await peer.close()
            assert await refuse(node) == (b"", "reset")
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
    rest, ending = await refuse(node)
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
    _, ending = await refuse(node)
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
    await until(lambda: not link.served.server.connections, patience=1.0)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_node_that_takes_a_little_at_a_time_gets_all_of_it(relayed: Relay) -> None:
    link = await relayed(idle_timeout=0.5)
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
        if asyncio.get_running_loop().time() - started < 3.0:
            await asyncio.sleep(0.04)
    await sending
    assert taken == body
    assert asyncio.get_running_loop().time() - started > 1.2  # far more than a silent node is given
    await until(lambda: link.served.ended)
    assert link.served.outcomes() == ["ok"]


async def test_a_node_that_sends_one_byte_at_a_time_is_served(relayed: Relay) -> None:
    link = await relayed(idle_timeout=0.5)
    node = await link.served.node()
    body = b"0123456789"
    node.send(request(body)[: -len(body)])
    for at in range(len(body)):
        await asyncio.sleep(0.08)
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
    assert await refuse(node) == (b"", "closed")


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

    async def handler(call: Call) -> Reply:
        await go.wait()
        return await echo(call)

    served = await serve(handler)
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
        assert (await refuse(node))[0] == b""
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
    assert [await refuse(nodes[0])][0][0] == b"\r\n"
    assert await refuse(nodes[1]) == (b"", "reset")
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


async def test_a_call_ends_once_and_only_after_its_last_byte_was_written(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        return Reply(source([b"x" * 100] * 3), Source.UPSTREAM)

    served = await serve(handler)
    answer = await served.ask(request())
    assert answer.body == b"x" * 300
    assert answer.chunks == 3
    (ended,) = served.ended
    assert ended.ending.sent == 300
    assert ended.ending.source is Source.UPSTREAM
    assert 0 < ended.ending.seconds < PATIENCE


@pytest.mark.parametrize("last", [b"", b"close"], ids=["keep-alive", "close"])
async def test_a_node_that_never_takes_the_end_of_its_answer_is_given_up(serve: Serve, last: bytes) -> None:
    async def handler(call: Call) -> Reply:
        return Reply(Payload(bytes(WHOLE)), Source.LOCAL)

    served = await serve(handler, keepalive=0.2, idle_timeout=0.2)
    node = await served.node(receive_buffer=4096)
    node.writer.transport.pause_reading()  # type: ignore[attr-defined]
    node.send(request(headers=[(b"Connection", last)] if last else []))
    await until(lambda: served.ended)
    (connection,) = served.server.connections
    assert connection.transport is None or connection.transport.get_write_buffer_size() > 0
    await until(lambda: not served.server.connections, patience=3.0)
