"""Clients that have a gRPC port do much for little: what they cost is bounded, and other nodes are served.

What such a connection may hold and do is tested frame by frame in tests/wires/test_http2_connection.py; here
are whole attacks over real connections, for as long as the attacker likes.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from contextlib import AsyncExitStack, suppress
from itertools import count, repeat
from typing import TYPE_CHECKING

import psutil
import pytest
import uvloop

from drills.http2 import frame, message
from relay.call import Payload, Reply, Source
from relay.fleet import Method
from relay.wires import http2
from relay.wires.grpc_health import CHECK
from tests.grpc_served import serve_grpc
from tests.http2_ends import ASKS, GREETING, KNOWN, asks, block, reset, settings, window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from relay.call import Call

pytestmark = pytest.mark.timeout(60)

#: Seconds of an attack, and how long an ordinary call may take beside it on a busy machine.
SECONDS, PATIENCE = 1.0, 5.0
#: Bytes by which the process may grow: one connection's 1000 streams with 16 KiB each, and this test's own.
GROWTH = 150 * 1024 * 1024
ANSWER = bytes(300_000)
MANY = 999


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Workers run on uvloop."""
    return {"uvloop": uvloop.new_event_loop}


def numbers() -> Iterator[int]:
    return count(1, 2)


def call_of(number: int) -> bytes:
    body = frame(http2.DATA, http2.END_STREAM, number, message(b"x"))
    return asks(number, ended=False) + body


def health(number: int) -> bytes:
    fields = [(name, CHECK if name == b":path" else value) for name, value in ASKS]
    return frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, number, block(fields))


def waiting(room: int = 0) -> bytes:
    """Begin as many calls as may be, whose answers find no room but `room` bytes each."""
    return settings(initial_window_size=room) + b"".join(call_of(2 * at + 1) for at in range(MANY))


def bomb(number: int) -> bytes:
    """Return a head that refers 8000 times to a field of 4 KB."""
    entry = b"\x40\x01x" + b"\x7f\x81\x1e" + b"v" * 3968
    return frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, number, entry + b"\xbe" * 8000)


ATTACKS: dict[str, Iterator[bytes]] = {
    "rapid reset": (asks(number) + reset(number) for number in numbers()),
    "rapid reset of calls": (call_of(number) + reset(number) for number in numbers()),
    "continuation": iter(
        [frame(http2.HEADERS, 0, 1), *[frame(http2.CONTINUATION, 0, 1, b"\0" * 10)] * 10**5]
    ),
    "hpack bomb": map(bomb, numbers()),
    "settings": repeat(settings(initial_window_size=5) * 100),
    "settings with many streams": iter(
        [waiting(), *[settings(initial_window_size=5, max_frame_size=2**15)] * 10**4]
    ),
    "settings of many windows": iter([waiting(), *[frame(4, 0, 0, struct.pack(">HL", 4, 7) * 2700)] * 10**4]),
    "pings": repeat(frame(http2.PING, 0, 0, bytes(8)) * 100),
    "priorities": repeat(frame(http2.PRIORITY, 0, 1, bytes(5)) * 100),
    "empty data": iter([asks(1, ended=False), *[frame(http2.DATA, 0, 1) * 100] * 10**4]),
    "streams that send nothing": (asks(number, ended=False) for number in numbers()),
    "streams that send what they may": (
        asks(number, ended=False) + frame(http2.DATA, 0, number, message(bytes(60_000))[: 16 * 1024])
        for number in numbers()
    ),
    "answers that are never read": iter([window(0, 2**30) + waiting(2**30), *repeat(b"", 1000)]),
    "answers that find no room": iter([waiting(), *repeat(b"", 1000)]),
    "windows by a byte": iter(
        [waiting(), *(window(2 * at + 1, 1) for at in range(MANY)), *repeat(window(0, 1), 10**5)]
    ),
    "windows by a byte for all": iter(
        [waiting(1 << 20), window(0, 2**20), *repeat(window(0, 1) * 10, 10**4)]
    ),
    "health checks that are never read": map(health, numbers()),
    "calls that are never read": map(call_of, numbers()),
    "late data": iter([asks(1) + reset(1), *[frame(http2.DATA, 0, 1, b"x") * 100] * 10**4]),
}


async def attack(port: int, parts: Iterator[bytes]) -> float:
    """Send `parts` and read nothing; return the seconds until the connection was cut, at most `SECONDS`."""
    loop, started = asyncio.get_running_loop(), time.monotonic()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(SECONDS):
                await loop.sock_sendall(sock, GREETING + KNOWN)
                for at, part in enumerate(parts):
                    await loop.sock_sendall(sock, part) if part else await asyncio.sleep(0.01)
                    if at % 10 == 0:
                        await asyncio.sleep(0)
                await asyncio.sleep(SECONDS)
    return time.monotonic() - started


async def answer(call: Call) -> Reply:
    await call.payload.read(1 << 20)
    return Reply(Payload(ANSWER), Source.LOCAL)


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_is_bounded_and_others_are_served(name: str) -> None:
    async with AsyncExitStack() as stack:
        served = await serve_grpc(stack, answer)
        node, server = served.node, served.server
        await node.ask(Method.PULL_MESSAGES, b"x")
        before = psutil.Process().memory_info().rss
        attacking = asyncio.ensure_future(attack(server.port, ATTACKS[name]))
        slowest, held = 0.0, 0
        while not attacking.done():
            began = time.monotonic()
            answered = await node.ask(Method.PULL_MESSAGES, b"x")
            slowest = max(slowest, time.monotonic() - began)
            assert answered.code == "OK"
            held = max(held, *(one.transport.get_write_buffer_size() for one in server.connections))
            server.tick()
            await asyncio.sleep(0.01)
        grown = psutil.Process().memory_info().rss - before
        print(
            f"{name}: {attacking.result():.2f} s, a call {slowest:.3f} s, {grown >> 20} MB, {held >> 10} KiB"
        )
        assert slowest < PATIENCE
        assert grown < GROWTH
        assert held < 1 << 20
        await served.until(lambda: len(server.connections) == 1)
        await served.until(lambda: not server._tasks)
        assert not any(connection.streams for connection in server.connections)


async def test_connections_that_say_nothing_are_cut_in_time() -> None:
    async with AsyncExitStack() as stack:
        served = await serve_grpc(stack, answer, head_timeout=0.3)
        loop = asyncio.get_running_loop()
        for start in (b"", GREETING[:10], GREETING, GREETING + KNOWN + asks(1)[:-3]):
            for _ in range(50):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                await loop.sock_connect(sock, ("127.0.0.1", served.server.port))
                if start:
                    await loop.sock_sendall(sock, start)
        await served.until(lambda: len(served.server.connections) == 200)
        assert (await served.node.ask(Method.PULL_MESSAGES, b"x")).code == "OK"
        await served.until(lambda: len(served.server.connections) == 1, ticks=True)
        assert (await served.node.ask(Method.PULL_MESSAGES, b"x")).code == "OK"
