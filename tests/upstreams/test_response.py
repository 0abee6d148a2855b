"""What an upstream answers, in each form that HTTP has: relay/upstreams/response.py over real sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.call import Payload
from relay.refusal import Reason, Refusal
from tests.sockets import PATIENCE, chunked, response, until
from tests.upstreams.conftest import EMPTY, answered, read_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.sockets import Listener, Peer
    from tests.upstreams.conftest import Watched

    Dial = Callable[..., Awaitable[Watched]]

pytestmark = pytest.mark.timeout(20)


async def test_status_and_headers_come_as_they_were_but_for_the_framing(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    more = b"Flwr-A: 1\r\nflwr-a:\t2  \r\nX-Empty:\r\nFLWR-A: 1\r\n"
    await answered(watched, upstream, response(b"abc", status=b"403 Whatever", more=more))
    connection = watched.connection
    assert connection.status == 403
    assert connection.headers == [
        (b"Content-Type", b"application/protobuf"),
        (b"Flwr-A", b"1"),
        (b"flwr-a", b"2  "),
        (b"X-Empty", b""),
        (b"FLWR-A", b"1"),
    ]
    assert connection.size == 3
    assert connection.take() == b"abc"


async def test_a_connection_carries_one_exchange_after_the_other(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    serving = asyncio.ensure_future(
        upstream.serve(response(b"one", more=b"A: 1\r\n"), chunked(b"two"), response(b"three"))
    )
    for turn, expected in enumerate((b"one", b"two", b"three"), start=1):
        await watched.connection.exchange(EMPTY, Payload(), PATIENCE)
        assert await read_all(watched.connection) == expected
        assert len(watched.freed) == turn
        assert watched.connection.usable
    assert watched.connection.headers == [(b"Content-Type", b"application/protobuf")]
    await serving
    assert len(upstream.peers) == 1


async def test_pieces_of_a_body_are_handed_on_before_its_end(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, response(b"first", size=11))
    assert await watched.connection.read() == b"first"
    assert watched.connection.take() is None
    peer.send(b"second")
    assert await watched.connection.read() == b"second"
    assert await watched.connection.read() == b""
    assert await watched.connection.read() == b""  # the end stays the end
    assert watched.freed == [watched.connection]


async def test_chunks_are_unwrapped_and_have_no_size(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    peer = await answered(
        watched, upstream, chunked(b"a" * 10, b"b" * 300, last=b"0\r\nX-Trailer: 1\r\n\r\n")
    )
    assert watched.connection.size is None
    assert await read_all(watched.connection) == b"a" * 10 + b"b" * 300
    assert watched.freed == [watched.connection]
    assert watched.connection.headers == [(b"Content-Type", b"application/protobuf")]
    assert await peer.is_silent(0.02)


async def test_a_body_without_framing_ends_with_its_connection(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert await watched.connection.read() == b"abc"
    assert watched.connection.size is None
    peer.send(b"def")
    assert await watched.connection.read() == b"def"
    await peer.close()
    assert await watched.connection.read() == b""
    await until(lambda: watched.lost)
    assert watched.freed == []


async def test_a_body_without_framing_that_is_reset_is_no_whole_body(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, b"HTTP/1.1 200 OK\r\n\r\nabc")
    peer.reset()
    with pytest.raises(Refusal) as caught:
        await read_all(watched.connection)
    assert caught.value.reason is Reason.UPSTREAM_DOWN


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_status_without_a_body_is_complete_with_its_head(
    dial: Dial, upstream: Listener, status: bytes
) -> None:
    watched = await dial()
    await answered(watched, upstream, b"HTTP/1.1 %b\r\nDate: x\r\n\r\n" % status)
    assert watched.connection.size == 0
    assert watched.connection.take() == b""
    assert watched.freed == [watched.connection]


@pytest.mark.parametrize(
    "informational",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\nx: y\r\n\r\n",
    ],
    ids=["100", "103", "102-100"],
)
async def test_informational_answers_are_passed_over(
    dial: Dial, upstream: Listener, informational: bytes
) -> None:
    watched = await dial()
    await answered(watched, upstream, informational + response(b"real"))
    assert watched.connection.status == 200
    assert watched.connection.headers == [(b"Content-Type", b"application/protobuf")]
    assert watched.connection.take() == b"real"
    assert watched.freed == [watched.connection]


@pytest.mark.parametrize(
    "answer",
    [
        response(b"body", more=b"A: b\r\n"),
        chunked(b"bo", b"dy"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + response(b"body"),
    ],
    ids=["length", "chunked", "100"],
)
async def test_an_answer_may_come_split_at_any_byte(dial: Dial, upstream: Listener, answer: bytes) -> None:
    watched = await dial()
    connection = watched.connection
    peer: Peer | None = None
    for split in range(1, len(answer)):
        exchange = asyncio.ensure_future(connection.exchange(EMPTY, Payload(), PATIENCE))
        peer = peer or await upstream.accept()
        await peer.message()
        await peer.send_all(answer[:split])
        await asyncio.sleep(0.001)
        await peer.send_all(answer[split:])
        await exchange
        assert connection.status == 200
        assert await read_all(connection) == b"body"
    assert len(watched.freed) == len(answer) - 1


async def test_an_answer_of_single_bytes_is_an_answer(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(EMPTY, Payload(), PATIENCE))
    peer = await upstream.accept()
    await peer.message()
    for byte in chunked(b"bo", b"dy"):
        await peer.send_all(bytes([byte]))
        await asyncio.sleep(0)
    await exchange
    assert await read_all(watched.connection) == b"body"


@pytest.mark.parametrize("unasked", [b"x", response(b"second")], ids=["byte", "response"])
async def test_what_follows_the_last_piece_of_a_long_response_does_not_harm_it(
    dial: Dial, upstream: Listener, unasked: bytes
) -> None:
    """The rest of a declared body passes around the parser."""
    watched = await dial()
    peer = await answered(watched, upstream, response(b"first,", size=10))
    assert await watched.connection.read() == b"first,"
    peer.send(b"last" + unasked)
    assert await read_all(watched.connection) == b"last"
    assert watched.freed == []
    await until(lambda: watched.lost == [watched.connection])
