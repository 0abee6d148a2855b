"""Nodes that speak HTTP in every way it may be and may not be spoken to relay/wires/http_connection.py."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from relay import dialect
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.refusal import Reason
from relay.wires.http_connection import NodeConnection
from relay.wires.http_request import WHOLE
from tests.sockets import PATIENCE, CutError, response, until
from tests.wires.conftest import (
    CHUNKED,
    SPECS,
    check_rendering,
    echo,
    echo_when,
    in_chunks,
    path_of,
    request,
    source,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Call
    from tests.sockets import Peer
    from tests.wires.conftest import Relayed, Served

    Serve = Callable[..., Awaitable[Served]]
    Relay = Callable[..., Awaitable[Relayed]]

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(30)


def gone(node: Peer) -> bool:
    """Return whether nothing can be sent to the other end any more."""
    return node.reader.at_eof() or node.writer.is_closing()


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


async def test_far_more_calls_may_come_at_once_than_are_parsed_ahead(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    bodies = [b"%d" % number * 100 for number in range(1000)]
    sending = asyncio.ensure_future(node.send_all(b"".join(map(request, bodies))))
    assert [(await node.message()).body for _ in bodies] == bodies
    await sending


async def test_calls_that_came_in_parts_leave_room_for_as_many_as_before(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    data = request(b"body")
    for _ in range(50):
        await node.send_all(data[:-2])
        await asyncio.sleep(0.001)
        await node.send_all(data[-2:])
        assert (await node.message()).body == b"body"
    await node.send_all(data[:-2])
    await asyncio.sleep(0.001)
    await node.send_all(data[-2:] + data * 99)
    assert [(await node.message()).body for _ in range(100)] == [b"body"] * 100


async def test_bytes_are_parsed_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp would have the connection parse on after each body that was read, paused or not."""
    received: list[bytes] = []
    plain = NodeConnection.data_received

    def noting(self: NodeConnection, data: bytes) -> None:
        received.append(data)
        plain(self, data)

    monkeypatch.setattr(NodeConnection, "data_received", noting)
    served = await serve()
    node = await served.node()
    for _ in range(3):
        node.send(request(b"body"))
        assert (await node.message()).body == b"body"
    assert received == [request(b"body")] * 3


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
    assert await node.rest() == (b"", "closed")


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
    assert await node.rest() == (b"onetwo", "closed")


async def test_a_node_that_says_close_is_answered_and_closed(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", headers=[(b"Connection", b"close")]))
    answer = await node.message()
    assert answer.body == b"abc"
    assert answer.one(b"connection") == b"close"
    assert (await node.rest())[0] == b""
    assert len(served.calls) == 1


async def test_an_idle_connection_is_closed_in_its_time_and_not_while_it_is_busy(serve: Serve) -> None:
    go = asyncio.Event()
    served = await serve(echo_when(go), keepalive=0.5)
    silent, talking = await served.node(), await served.node()
    talking.send(request(b"abc"))
    started = asyncio.get_running_loop().time()
    assert await silent.rest() == (b"", "closed")
    assert asyncio.get_running_loop().time() - started > 0.3
    await asyncio.sleep(0.6)
    go.set()
    assert (await talking.message()).body == b"abc"
    assert await talking.rest() == (b"", "closed")


async def test_a_head_that_trickles_does_not_hold_its_connection_for_ever(serve: Serve) -> None:
    served = await serve(keepalive=0.2)
    node = await served.node()
    data = request(b"abc", headers=[(b"X-Long", b"y" * 1000)])
    sent = 0
    while sent < len(data) and not gone(node):
        node.send(data[sent : sent + 1])
        sent += 1
        await asyncio.sleep(0.01)
    assert sent < len(data)
    assert served.calls == []


async def test_a_head_must_be_complete_in_its_time(serve: Serve) -> None:
    served = await serve(head_timeout=0.2)
    node = await served.node()
    data = request(b"abc", headers=[(b"X-Long", b"y" * 1000)])
    started = asyncio.get_running_loop().time()
    sent = 0
    while sent < len(data) and not gone(node):
        node.send(data[sent : sent + 1])
        sent += 1
        await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - started > 0.15
    assert sent < len(data)
    assert served.calls == []
    assert served.strays == ["dropped"]
    assert await node.rest() == (b"", "closed")
    assert await served.works()


async def test_the_time_of_a_head_begins_with_its_first_byte_and_ends_with_its_last(serve: Serve) -> None:
    """Neither a silent connection nor a call that takes long, nor its body, is a late head."""
    served = await serve(head_timeout=1.0)
    node = await served.node()
    for _ in range(2):
        await asyncio.sleep(1.2)
        data = request(b"abc")
        await node.send_all(data[:40])
        await asyncio.sleep(0)
        await node.send_all(data[40:-2])
        await asyncio.sleep(1.2)
        await node.send_all(data[-2:])
        assert (await node.message()).body == b"abc"
    assert served.strays == []


async def test_a_head_that_begins_behind_a_call_has_its_time_as_well(serve: Serve) -> None:
    served = await serve(head_timeout=0.2)
    node = await served.node()
    await node.send_all(OK)
    assert (await node.message()).body == b"abc"
    await node.send_all(OK[:20])
    assert await node.rest() == (b"", "closed")
    assert served.strays == ["dropped"]


@pytest.mark.parametrize("piece", [100, 4096])
async def test_a_head_without_end_is_given_up_at_its_size(serve: Serve, piece: int) -> None:
    served = await serve(head_size=8192)
    node = await served.node()
    sent = 0
    node.send(b"POST /v1/fleet/push-object HTTP/1.1\r\n")
    while sent < 1_000_000 and not gone(node):
        line = b"X%d: " % sent
        node.send(line + b"y" * (piece - len(line) - 2) + b"\r\n")
        sent += piece
        await asyncio.sleep(0.001)
    assert sent < 100_000
    assert (await node.rest())[0] == b""
    assert served.strays == ["dropped"]
    assert served.calls == []


@pytest.mark.parametrize("split", [False, True], ids=["at once", "in pieces"])
async def test_a_call_whose_head_is_too_long_is_refused_as_the_dialect_says(
    serve: Serve, split: bool
) -> None:
    served = await serve(head_size=4096)
    headers = [(b"X%d" % number, b"y" * 900) for number in range(5)]
    for method in (Method.PULL_MESSAGES, Method.PUSH_OBJECT, Method.SEND_NODE_HEARTBEAT):
        node = await served.node()
        data = request(b"abc", method=method, headers=headers)
        if split:  # its end comes with the piece that makes it too long
            await node.send_all(data[:4000])
            await asyncio.sleep(0.01)
            await node.send_all(data[4000:])
        else:
            node.send(data)
        await check_rendering(node, dialect.answer(Wire.HTTP_V1, Reason.TOO_LARGE, method), keeps=False)
    assert served.outcomes() == ["too_large"] * 3


async def test_a_long_body_is_no_long_head(serve: Serve) -> None:
    served = await serve(head_size=1024)
    node = await served.node()
    for _ in range(3):
        node.send(request(b"x" * 50_000, headers=[(b"X", b"y" * 600)]))
        assert (await node.message()).body == b"x" * 50_000


@pytest.mark.parametrize("over", [0, 1])
async def test_headers_are_limited_in_number_and_size(serve: Serve, over: int) -> None:
    served = await serve(header_count=20, header_size=2000)
    own = 3  # what `request` writes
    many = request(b"abc", headers=[(b"X%d" % number, b"y") for number in range(20 - own + over)])
    long = request(b"abc", headers=[(b"X", b"y" * (1999 + 2 * over))])  # the name may count or not
    for data in (many, long):
        node = await served.node()
        node.send(data)
        if over:
            assert (await node.rest())[0] == b""
        else:
            assert (await node.message()).body == b"abc"
    assert served.strays == ["dropped"] * (2 * over)


# -- how slow ------------------------------------------------------------------------------------------


async def test_a_node_that_takes_next_to_nothing_of_its_answer_is_given_up(serve: Serve) -> None:
    """Each read of it is progress; that it never ends is what counts."""

    async def handler(call: Call) -> Reply:
        return Reply(source([b"x" * 65_536] * 64, size=64 * 65_536), Source.UPSTREAM)

    served = await serve(handler, idle_timeout=0.5, min_rate=200_000, rate_window=1.0)
    node = await served.node(receive_buffer=4096, segment=500)
    node.writer.transport.pause_reading()  # type: ignore[attr-defined]
    sock = socket.socket(fileno=os.dup(node.writer.get_extra_info("socket").fileno()))
    sock.setblocking(False)
    node.send(request())
    await until(lambda: served.calls)
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not served.ended and loop.time() - started < PATIENCE:
        await asyncio.sleep(0.05)
        with suppress(BlockingIOError, ConnectionError):
            sock.recv(1500)
    sock.close()
    assert served.outcomes() == ["node_gone"]
    assert loop.time() - started > 0.9
    await until(lambda: not served.server.connections)


async def test_a_node_that_takes_its_answer_slowly_but_steadily_gets_it(serve: Serve) -> None:
    size = 900_000

    async def handler(call: Call) -> Reply:
        return Reply(source([b"x" * 300_000] * 3, size=size), Source.UPSTREAM)

    served = await serve(handler, idle_timeout=1.5, min_rate=10_000, rate_window=1.5)
    node = await served.node(receive_buffer=4096, segment=500)
    node.send(request())
    head = await node.head()
    assert head.status == 200
    left = size
    while left:  # takes twice those times and more
        await asyncio.sleep(0.02)
        left -= len(await node.exactly(min(left, 6000)))
    await until(lambda: served.outcomes() == ["ok"])


# -- what is not HTTP, or no call -----------------------------------------------------------------------

OK = request(b"abc")
BROKEN = {
    "text": b"hello\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "secret in a header": OK.replace(b"\r\n\r\n", b"\r\nAuthorization: SECRET\x00\r\n\r\n"),
    "secret in a long header": request(b"", headers=[(b"X-API-Key", b"SECRET" * 9000)]),
    "secret behind a call that closes": request(b"SECRET", headers=[(b"Connection", b"close")]) + b"SECRET",
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
    with capture_logs() as logs:
        node.send(BROKEN[name])
        data, _ = await node.rest()
    assert data == b""
    (line,) = [entry for entry in logs if entry["event"] == "not HTTP, or broken"]
    assert "SECRET" not in str(line)
    assert len(line["error"]) < 100
    await until(lambda: not served.server.connections)
    assert served.strays == ["dropped"]
    assert served.ended == []
    assert await served.works()
    assert not caplog.records


async def test_a_bug_of_the_front_costs_its_connection_and_no_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve()

    async def broken(_: object) -> bool:
        raise ValueError("a bug")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(served.front, "handle", broken)
        node = await served.node()
        node.send(OK)
        assert (await node.rest())[0] == b""
    assert [entry["event"] for entry in logs] == ["connection failed"]
    await until(lambda: not served.server.connections)
    assert not served.front.busy
    assert await served.works()


@pytest.mark.parametrize("name", ["text", "length and chunked", "nul in value", "giant header"])
async def test_garbage_behind_a_good_call_does_not_harm_it(serve: Serve, name: str) -> None:
    go = asyncio.Event()
    served = await serve(echo_when(go))
    node = await served.node()
    node.send(OK)
    await until(lambda: served.calls)
    node.send(BROKEN[name])
    await until(lambda: go.is_set() or next(iter(served.server.connections))._messages)
    go.set()
    assert (await node.message()).body == b"abc"
    assert (await node.rest())[0] == b""
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
    data, _ = await node.rest()
    assert asyncio.get_running_loop().time() - started < PATIENCE - 1
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
    await node.rest()
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
    assert await node.rest() == (b"", "closed")
    assert served.strays == [str(status)]
    assert served.calls == []


@pytest.mark.parametrize("path", [b"/", b"/v1/fleet/pull-messages"])
async def test_the_answer_to_head_has_no_body(serve: Serve, path: bytes) -> None:
    served = await serve()
    node = await served.node()
    node.send(b"HEAD %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
    head = await node.head()
    assert head.status in (404, 405)
    assert await node.rest() == (b"", "closed")


async def test_a_stray_upload_is_answered_although_nobody_reads_it(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(path=b"/upload", framing=b"Content-Length: %d" % (4 * MIB)))
    await node.send_all(bytes(4 * MIB))
    assert (await node.message()).status == 404
    assert await node.rest() == (b"", "closed")


@pytest.mark.parametrize("method", [*Method, None])
@pytest.mark.parametrize("wire", list(SPECS))
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


# -- the end of a call -----------------------------------------------------------------------------------


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
    await until(lambda: not served.server.connections)
