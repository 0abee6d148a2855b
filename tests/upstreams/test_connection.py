"""One connection to an upstream that plays every trick: relay/upstreams/connection.py over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import pytest

from relay.call import Payload
from relay.refusal import NodeGone, Reason, Refusal
from relay.upstreams.connection import HIGH_WATER, MAX_HEAD
from tests.sockets import PATIENCE, CutError, chunked, response, until
from tests.upstreams.conftest import CHUNKED, EMPTY, HEAD, Endless, Pieces, answered, body, read_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.sockets import Listener
    from tests.upstreams.conftest import Watched

    Dial = Callable[..., Awaitable[Watched]]

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(20)


# -- what is sent ---------------------------------------------------------------------------------------


async def test_a_body_at_hand_is_sent_behind_its_head_byte_for_byte(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    sent = bytes(range(256)) * 1000
    head = HEAD + b"content-length: 256000\r\n\r\n"
    exchange = asyncio.ensure_future(watched.connection.exchange(head, Payload(sent), PATIENCE))
    peer = await upstream.accept()
    request = await peer.message()
    peer.send(response())
    await exchange
    assert request.start == b"POST /v1/fleet/pull-messages HTTP/1.1"
    assert request.headers == [(b"host", b"sl"), (b"content-length", b"256000")]
    assert request.body == sent


async def test_a_body_of_unknown_size_is_sent_in_chunks_as_it_comes(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    pieces = Pieces(b"first")
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, Payload(body=pieces), PATIENCE))
    peer = await upstream.accept()
    await peer.head()
    assert await peer.exactly(10) == b"5\r\nfirst\r\n"  # before there is more
    pieces.add(b"x" * 300, b"")
    assert await peer.exactly(7 + 300 + 5) == b"12c\r\n" + b"x" * 300 + b"\r\n0\r\n\r\n"
    peer.send(response())
    await exchange


async def test_a_body_of_known_size_is_sent_without_chunks(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    pieces = Pieces(b"abc")
    head = HEAD + b"content-length: 6\r\n\r\n"
    exchange = asyncio.ensure_future(
        watched.connection.exchange(head, Payload(body=pieces, size=6), PATIENCE)
    )
    peer = await upstream.accept()
    await peer.head()
    assert await peer.exactly(3) == b"abc"
    pieces.add(b"def", b"")
    assert await peer.exactly(3) == b"def"
    peer.send(response(b"ok"))
    await exchange
    assert watched.connection.take() == b"ok"
    assert watched.freed == [watched.connection]


@pytest.mark.parametrize(
    "error",
    [NodeGone(), Refusal(Reason.TOO_LARGE), RuntimeError("a bug")],
    ids=["node-gone", "refusal", "bug"],
)
async def test_a_body_that_breaks_off_reaches_the_upstream_as_a_truncated_request(
    dial: Dial, upstream: Listener, error: Exception
) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, body(b"part", error), PATIENCE))
    peer = await upstream.accept()
    with pytest.raises(CutError):
        await peer.message()
    with pytest.raises(type(error)):
        await exchange
    await until(lambda: watched.lost == [watched.connection])
    assert watched.freed == []


async def test_a_declared_body_that_ends_early_is_not_answered_from_the_next_request(
    dial: Dial, upstream: Listener
) -> None:
    """The upstream would take the next request for the rest of this one."""
    watched = await dial()
    head = HEAD + b"content-length: 10\r\n\r\n"
    exchange = asyncio.ensure_future(
        watched.connection.exchange(head, body(b"short", b"", size=10), PATIENCE)
    )
    peer = await upstream.accept()
    await peer.head()
    await peer.exactly(5)
    peer.send(response())  # an upstream that does not care
    with pytest.raises(Refusal) as caught:
        await exchange
    assert caught.value.reason is Reason.INTERNAL
    assert watched.freed == []
    await until(lambda: watched.lost)


# -- an answer before the request is complete -----------------------------------------------------------


@pytest.mark.parametrize("ending", ["takes the rest", "takes no more"])
async def test_an_answer_that_precedes_the_end_of_its_request_stands_and_ends_the_connection(
    dial: Dial, upstream: Listener, ending: str
) -> None:
    watched = await dial()
    endless = Endless(b"x" * 65536)
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, Payload(body=endless), PATIENCE))
    peer = await upstream.accept()
    await until(lambda: watched.connection._paused_writing)
    peer.send(response(b"no", status=b"503 Service Unavailable"))
    await exchange
    assert watched.connection.status == 503
    read = endless.read_bytes
    await asyncio.sleep(0.01)
    assert endless.read_bytes == read  # nobody goes on asking the node for more
    taking = asyncio.ensure_future(peer.rest()) if ending == "takes the rest" else None
    assert await read_all(watched.connection) == b"no"
    assert watched.freed == []
    # also if the upstream never reads on: otherwise a place in the pool would be lost for ever
    await until(lambda: watched.lost == [watched.connection])
    if taking is not None:
        await taking


async def test_an_early_answer_whose_body_follows_later_is_read_whole(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, body(b"part"), PATIENCE))
    peer = await upstream.accept()
    await peer.head()
    peer.send(response(b"", size=4, status=b"403 Forbidden"))
    await exchange
    peer.send(b"late")
    assert await read_all(watched.connection) == b"late"
    await until(lambda: watched.lost == [watched.connection])
    assert watched.freed == []


async def test_an_answer_to_a_request_that_still_lies_here_ends_the_connection(
    dial: Dial, upstream: Listener
) -> None:
    """The whole request was handed to the kernel's buffers and ours, not to the upstream."""
    watched = await dial()
    size = 16 * MIB
    head = HEAD + b"content-length: %d\r\n\r\n" % size
    exchange = asyncio.ensure_future(watched.connection.exchange(head, Payload(bytes(size)), PATIENCE))
    peer = await upstream.accept()
    await peer.head()
    peer.send(response(b"early"))
    await exchange
    assert watched.connection.take() == b"early"
    assert watched.freed == []
    await until(lambda: watched.lost == [watched.connection])


# -- what breaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "part", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nA: b\r\n"], ids=["0", "status", "header"]
)
async def test_a_cut_before_the_end_of_the_head_is_an_upstream_that_is_down(
    dial: Dial, upstream: Listener, part: bytes, how: str
) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(EMPTY, Payload(), PATIENCE))
    peer = await upstream.accept()
    await peer.message()
    await peer.send_all(part)
    await asyncio.sleep(0.005)
    if how == "close":
        await peer.close()
    else:
        peer.reset()
    with pytest.raises(Refusal) as caught:
        await exchange
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert caught.value.by == "sl"
    await until(lambda: watched.lost == [watched.connection])


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "answer",
    [response(b"abc", size=10), chunked(b"abc", last=b""), chunked(b"abc", last=b"0\r\n")],
    ids=["length", "chunk", "last-chunk"],
)
async def test_a_cut_in_the_body_is_told_after_the_pieces_before_it(
    dial: Dial, upstream: Listener, answer: bytes, how: str
) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, answer)
    assert await watched.connection.read() == b"abc"
    if how == "close":
        await peer.close()
    else:
        peer.reset()
    for _ in range(2):  # and again, whoever asks again
        with pytest.raises(Refusal) as caught:
            await watched.connection.read()
        assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert watched.freed == []
    await until(lambda: watched.lost == [watched.connection])


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x15\x03\x03\x00\x02\x02\x16",  # a TLS alert
        b"\x00" * 64,
        b"HTTP/3.0 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: a\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_response_is_a_bad_answer_at_once(
    dial: Dial, upstream: Listener, garbage: bytes
) -> None:
    watched = await dial()
    with pytest.raises(Refusal) as caught:
        await answered(watched, upstream, garbage)
    assert caught.value.reason is Reason.UPSTREAM_BAD_ANSWER
    await until(lambda: watched.lost == [watched.connection])
    assert watched.freed == []


@pytest.mark.parametrize(
    "framing", [b"zz\r\n", b"-5\r\nabcde\r\n", b"3\r\nabcdef\r\n", b"ffffffffffffffffff\r\n"]
)
async def test_a_broken_chunk_is_a_bad_answer_after_the_pieces_before_it(
    dial: Dial, upstream: Listener, framing: bytes
) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, chunked(b"good", last=b""))
    assert await watched.connection.read() == b"good"
    peer.send(framing)
    with pytest.raises(Refusal) as caught:
        await read_all(watched.connection)
    assert caught.value.reason is Reason.UPSTREAM_BAD_ANSWER
    await until(lambda: watched.lost == [watched.connection])


@pytest.mark.parametrize(
    "line", [b"X-Filler: " + b"x" * 1000 + b"\r\n", b"y" * 1000, b"HTTP/1.1 100 Continue\r\n\r\n"]
)
async def test_a_head_without_an_end_is_given_up_before_it_fills_the_memory(
    dial: Dial, upstream: Listener, line: bytes
) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(EMPTY, Payload(), PATIENCE))
    peer = await upstream.accept()
    await peer.message()
    sent = 0
    peer.send(b"" if line.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\nX: ")
    while sent < 64 * MAX_HEAD and not exchange.done():
        peer.send(line * 16)
        sent += len(line) * 16
        await asyncio.sleep(0)
    with pytest.raises(Refusal) as caught:
        await exchange
    assert caught.value.reason is Reason.UPSTREAM_BAD_ANSWER
    await until(lambda: watched.lost == [watched.connection])


@pytest.mark.parametrize("unasked", [b"x", response(b"nobody asked")], ids=["byte", "response"])
async def test_bytes_without_a_request_end_the_connection(
    dial: Dial, upstream: Listener, unasked: bytes
) -> None:
    watched = await dial()
    peer = await upstream.accept()
    peer.send(unasked)
    await until(lambda: watched.lost == [watched.connection])
    assert not watched.connection.usable


@pytest.mark.parametrize("unasked", [b"x", response(b"second")], ids=["byte", "response"])
async def test_bytes_after_a_response_end_the_connection(
    dial: Dial, upstream: Listener, unasked: bytes
) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, response(b"first"))
    assert watched.connection.take() == b"first"
    peer.send(unasked)
    await until(lambda: watched.lost == [watched.connection])


@pytest.mark.parametrize("unasked", [b"x", response(b"second")], ids=["byte", "response"])
async def test_what_follows_a_response_in_the_same_segment_does_not_harm_it(
    dial: Dial, upstream: Listener, unasked: bytes
) -> None:
    watched = await dial()
    await answered(watched, upstream, response(b"first") + unasked)
    assert watched.connection.status == 200
    assert await read_all(watched.connection) == b"first"
    assert watched.freed == []
    await until(lambda: watched.lost == [watched.connection])


async def test_a_response_that_says_close_is_whole_and_the_last(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, response(b"bye", more=b"Connection: close\r\n"))
    assert watched.connection.take() == b"bye"
    assert watched.freed == []
    assert await peer.rest() == (b"", "closed")
    await until(lambda: watched.lost == [watched.connection])


async def test_an_http_1_0_upstream_is_not_asked_twice(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    await answered(watched, upstream, b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold")
    assert watched.connection.take() == b"old"
    assert watched.freed == []
    await until(lambda: watched.lost == [watched.connection])


async def test_an_exchange_on_a_lost_connection_says_that_the_upstream_is_down(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    (await upstream.accept()).reset()
    await until(lambda: watched.lost)
    assert not watched.connection.usable
    with pytest.raises(Refusal) as caught:
        await watched.connection.exchange(EMPTY, Payload(), PATIENCE)
    assert caught.value.reason is Reason.UPSTREAM_DOWN


# -- time -----------------------------------------------------------------------------------------------


async def test_an_upstream_that_does_not_answer_is_given_up_in_time(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    started = asyncio.get_running_loop().time()
    with pytest.raises(Refusal) as caught:
        await watched.connection.exchange(EMPTY, Payload(), 0.05)
    assert 0.04 < asyncio.get_running_loop().time() - started < PATIENCE - 1
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    await until(lambda: watched.lost == [watched.connection])


async def test_the_time_for_an_answer_starts_with_the_end_of_the_request(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    pieces = Pieces(b"slow")
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, Payload(body=pieces), 0.5))
    peer = await upstream.accept()
    await asyncio.sleep(0.7)
    assert not exchange.done()
    pieces.add(b"")
    await peer.message()
    peer.send(response())
    await exchange


async def test_an_upstream_that_takes_a_body_and_does_not_answer_is_given_up(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    with pytest.raises(Refusal) as caught:
        await watched.connection.exchange(CHUNKED, body(b"x", b""), 0.05)
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT


async def test_an_informational_answer_does_not_stretch_the_time(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(EMPTY, Payload(), 0.1))
    peer = await upstream.accept()
    await peer.message()
    peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    with pytest.raises(Refusal) as caught:
        await exchange
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT


async def test_a_body_that_stalls_is_given_up_and_one_that_trickles_is_not(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial(idle_timeout=1.5)
    peer = await answered(watched, upstream, response(b"", size=10))
    for _ in range(5):
        await asyncio.sleep(0.4)
        peer.send(b"x")
        assert await watched.connection.read() == b"x"
    with pytest.raises(Refusal) as caught:
        await watched.connection.read()
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    await until(lambda: watched.lost == [watched.connection])


async def test_an_upstream_that_takes_none_of_an_upload_is_given_up(dial: Dial, upstream: Listener) -> None:
    watched = await dial(idle_timeout=0.1)
    endless = Endless(b"x" * 65536)
    with pytest.raises(Refusal) as caught:
        await watched.connection.exchange(CHUNKED, Payload(body=endless), PATIENCE)
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
    await until(lambda: watched.lost == [watched.connection])


async def test_an_upstream_that_takes_an_upload_slowly_is_not_given_up(
    dial: Dial, upstream: Listener
) -> None:
    """256 uploads over one thin line are 256 slow ones."""
    watched = await dial(idle_timeout=1.0)
    size = 3 * MIB
    head = HEAD + b"content-length: %d\r\n\r\n" % size
    pieces = [b"x" * 65536] * (size // 65536)
    exchange = asyncio.ensure_future(
        watched.connection.exchange(head, body(*pieces, b"", size=size), PATIENCE)
    )
    peer = await upstream.accept()
    await peer.head()
    taken = 0
    while taken < size // 2:  # 64 KiB in 160 ms: from high to low water takes 2 s
        taken += len(await peer.exactly(65536))
        await asyncio.sleep(0.16)
    assert not exchange.done()
    await peer.exactly(size - taken)
    peer.send(response())
    await exchange


# -- memory ---------------------------------------------------------------------------------------------


async def test_a_slow_reader_bounds_what_is_held_of_a_response(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    size = 24 * MIB
    block = bytes(range(256)) * 4096  # 1 MiB
    peer = await answered(watched, upstream, response(b"", size=size))

    async def send() -> None:
        for _ in range(size // MIB):
            await peer.send_all(block)

    sending = asyncio.ensure_future(send())
    connection = watched.connection
    await until(lambda: connection._buffered > HIGH_WATER)
    await asyncio.sleep(0.1)
    assert connection._buffered == sum(map(len, connection._pieces))
    assert connection._buffered <= HIGH_WATER + 256 * 1024
    assert not sending.done()
    digest = hashlib.sha256()
    total = most = 0
    while piece := await connection.read():
        digest.update(piece)
        total += len(piece)
        most = max(most, connection._buffered)
    await sending
    assert total == size
    assert digest.digest() == hashlib.sha256(block * 24).digest()
    assert most <= HIGH_WATER + 256 * 1024
    assert watched.freed == [connection]


async def test_a_connection_whose_reading_was_paused_reads_the_next_response(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    connection = watched.connection
    big = response(bytes(2 * MIB))
    peer = await answered(watched, upstream, big)
    await until(lambda: connection._paused_reading)
    assert len(await read_all(connection)) == 2 * MIB
    exchange = asyncio.ensure_future(connection.exchange(EMPTY, Payload(), PATIENCE))
    await peer.message()
    peer.send(response(b"next"))
    await exchange
    assert connection.take() == b"next"


async def test_an_upstream_that_is_slow_to_take_an_upload_bounds_what_is_read_of_it(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    endless = Endless(b"x" * 65536)
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, Payload(body=endless), PATIENCE))
    peer = await upstream.accept()
    await peer.head()
    await asyncio.sleep(0.2)
    held = endless.read_bytes
    await asyncio.sleep(0.1)
    assert endless.read_bytes == held
    transport = watched.connection._transport
    assert transport is not None
    assert transport.get_write_buffer_size() <= HIGH_WATER + 2 * 65536
    await peer.exactly(4 * MIB)
    await until(lambda: endless.read_bytes > held)  # it goes on when the upstream does
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange


# -- giving up ------------------------------------------------------------------------------------------


async def test_a_cancelled_wait_for_an_answer_ends_the_connection(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    exchange = asyncio.ensure_future(watched.connection.exchange(EMPTY, Payload(), PATIENCE))
    peer = await upstream.accept()
    await peer.message()
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange
    await until(lambda: watched.lost == [watched.connection])
    assert (await peer.rest())[0] == b""


async def test_a_cancelled_upload_is_a_truncated_one_and_leaves_no_task(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    before = asyncio.all_tasks()
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, body(b"part"), PATIENCE))
    peer = await upstream.accept()
    await peer.head()
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange
    with pytest.raises(CutError):
        await peer._chunked()
    await until(lambda: watched.lost == [watched.connection])
    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_cancelled_upload_to_an_upstream_that_takes_nothing_leaves_no_task(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    await upstream.accept()
    before = asyncio.all_tasks()
    endless = Endless(b"x" * 65536)
    exchange = asyncio.ensure_future(watched.connection.exchange(CHUNKED, Payload(body=endless), PATIENCE))
    await until(lambda: watched.connection._paused_writing)
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange
    await until(lambda: watched.lost == [watched.connection])
    await until(
        lambda: asyncio.all_tasks() - before <= {t for t in asyncio.all_tasks() if "_accepted" in repr(t)}
    )


async def test_a_cancelled_read_of_a_body_ends_the_connection(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    await answered(watched, upstream, response(b"", size=5))
    reading = asyncio.ensure_future(watched.connection.read())
    await asyncio.sleep(0.005)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: watched.lost == [watched.connection])


async def test_closing_an_unread_response_ends_the_connection_once(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    peer = await answered(watched, upstream, response(b"abc", size=10))
    watched.connection.close()
    watched.connection.close()
    await until(lambda: watched.lost == [watched.connection])
    assert watched.freed == []
    assert (await peer.rest())[0] == b""


async def test_closing_a_whole_response_that_nobody_read_ends_the_connection(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    await answered(watched, upstream, response(b"abc"))
    watched.connection.close()
    await until(lambda: watched.lost == [watched.connection])
    assert watched.freed == []


async def test_closing_after_the_end_is_harmless(dial: Dial, upstream: Listener) -> None:
    watched = await dial()
    await answered(watched, upstream, response(b"abc"))
    assert watched.connection.take() == b"abc"
    watched.connection.close()
    assert watched.freed == [watched.connection]
    assert watched.connection.usable


async def test_a_retired_connection_ends_with_a_fin_and_an_aborted_one_at_once(
    dial: Dial, upstream: Listener
) -> None:
    for end in ("retire", "abort"):
        watched = await dial()
        peer = await upstream.accept()
        getattr(watched.connection, end)()
        getattr(watched.connection, end)()
        await peer.rest()
        await until(lambda lost=watched.lost: len(lost) == 1)  # type: ignore[misc]
        assert not watched.connection.usable


async def test_a_response_that_fills_the_buffer_with_its_last_byte_leaves_a_connection_that_reads(
    dial: Dial, upstream: Listener
) -> None:
    watched = await dial()
    connection = watched.connection
    size = HIGH_WATER + 1000
    peer = await answered(watched, upstream, response(bytes(size)))
    await until(lambda: connection._response_done)
    assert connection._paused_reading
    assert len(connection.take() or b"") == size
    exchange = asyncio.ensure_future(connection.exchange(EMPTY, Payload(), PATIENCE))
    await peer.message()
    peer.send(response(b"next"))
    await exchange
    assert connection.take() == b"next"
