from __future__ import annotations

import asyncio
import time

from drills.http2 import frame
from relay.wires import http2, http2_leaving
from relay.wires.http2 import Code
from tests.http2_ends import HEAD, TRAILERS, Client, asks


def data(number: int, body: bytes) -> bytes:
    return frame(http2.DATA, 0, number, body)


async def test_a_client_that_is_to_leave_gets_its_answers_also_to_what_was_on_its_way() -> None:
    client = Client()
    client.ask(1)
    client.connection.leave()
    client.connection.leave()
    goaway, ping = client.got()
    assert (goaway.kind, goaway.payload[:4], goaway.code) == (
        http2.GOAWAY,
        b"\x7f\xff\xff\xff",
        Code.NO_ERROR,
    )
    client.ask(3)  # it was on its way
    assert client.last.number == 3
    client.send(frame(http2.PING, http2.ACK, 0, ping.payload), asks(5), data(5, b"x"))
    assert client.goaway() == (3, Code.NO_ERROR)
    assert client.last.number == 3
    for stream in list(client.begun):
        assert stream.answer(HEAD, b"", TRAILERS)
    *_, ping = client.got()
    assert (ping.kind, ping.flags) == (http2.PING, 0)
    await asyncio.sleep(3 * http2_leaving._LOOK)
    assert not client.is_closed()  # it must have read what was written
    client.send(frame(http2.PING, http2.ACK, 0, ping.payload))
    await asyncio.sleep(3 * http2_leaving._LOOK)
    assert client.is_closed()
    assert not client.is_cut()
    client.lose()
    assert client.is_done()


async def test_a_client_that_never_says_that_it_heard_is_told_the_last_call_nevertheless() -> None:
    client = Client()
    client.ask(1)
    client.connection.leave()
    client.got()
    client.connection.tick(time.monotonic() + 0.5)
    assert client.got() == []
    client.connection.tick(time.monotonic() + 1.5)
    assert client.goaway() == (1, Code.NO_ERROR)
    client.send(asks(3))
    assert client.last.number == 1


async def test_a_client_that_does_not_take_the_end_is_cut() -> None:
    client = Client()
    client.connection.leave()
    client.send(frame(http2.PING, http2.ACK, 0, http2_leaving.PING))
    client.pipe.held = 100
    now = time.monotonic()
    client.connection.tick(now)
    client.connection.tick(now + 19)
    assert not client.is_cut()
    client.pipe.held = 50  # it takes some
    client.connection.tick(now + 21)
    client.connection.tick(now + 40)
    assert not client.is_cut()
    client.connection.tick(now + 42)
    assert client.is_cut()
    client.lose()


async def test_a_client_that_answers_no_ping_is_closed_when_the_kernel_has_its_answer() -> None:
    client = Client()
    client.connection.leave()
    client.connection.tick(time.monotonic() + 1.5)
    assert not client.is_closed()
    await asyncio.sleep(3 * http2_leaving._LOOK)
    assert client.is_closed()
    assert not client.is_cut()
    client.lose()


async def test_a_client_that_does_not_go_is_cut() -> None:
    client = Client()
    client.connection.leave()
    client.connection.tick(time.monotonic() + 1.5)
    await asyncio.sleep(3 * http2_leaving._LOOK)
    client.connection.tick(time.monotonic() + 1.0)
    assert not client.is_cut()
    client.connection.tick(time.monotonic() + 3.0)
    assert client.is_cut()
    client.lose()
