"""Random frames, sound and broken, to one HTTP/2 connection: it ends in good order, or goes on.

Nothing is ever raised out of it, no stream outlives it, and an ordinary call beside is answered. Every case
comes from a seed that stands in the name of its test.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from drills.http2 import frame
from relay.limits import Pace
from relay.refusal import NodeGone
from relay.wires import http2
from tests.http2_ends import ASKS, GREETING, HEAD, TRAILERS, Client, Server, block

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.wires.http2_stream import Stream

CASES = 150
KINDS = (
    *(http2.HEADERS, http2.DATA, http2.DATA, http2.WINDOW_UPDATE, http2.RST_STREAM),
    *(http2.SETTINGS, http2.PING, http2.PRIORITY),
)
EXTREMES = (0, 1, 2, 16_383, 16_384, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
SOUND = block(ASKS)


def number(order: random.Random, highest: int) -> int:
    """Return a stream, mostly one that was begun."""
    if order.random() < 0.02:
        return order.choice((0, 2, highest + 2, 2**31 - 1))
    return max(order.choice((1, highest, highest - 2, highest - 4)), 1)


def payload(order: random.Random, kind: int) -> bytes:
    """Return what may stand in a frame of this kind, mostly sound."""
    if order.random() < 0.01:
        return order.randbytes(order.randrange(40))
    match kind:
        case http2.HEADERS | http2.CONTINUATION:
            cut = order.randrange(len(SOUND)) if order.random() < 0.2 else len(SOUND)
            return order.choice(
                (SOUND[:cut], SOUND[:cut], b"", block([(b"x", b"y")]), b"\x3f\xe1\x1f" + SOUND)
            )
        case http2.SETTINGS:
            pairs = [(order.randrange(8), order.choice(EXTREMES)) for _ in range(order.randrange(3))]
            if order.random() < 0.8:
                pairs = [(4, order.choice((0, 10, 65_535))), (5, 16_384), (1, 0)]
            return b"".join(struct.pack(">HL", *pair) for pair in pairs)
        case http2.WINDOW_UPDATE | http2.RST_STREAM:
            return order.choice(EXTREMES if order.random() < 0.1 else (1, 100, 30_000)).to_bytes(4)
        case http2.PING | http2.GOAWAY:
            return order.choice((bytes(8), b"leaving\0"))
        case http2.PRIORITY:
            return bytes(5)
        case _:
            return bytes(order.choice((0, 1, 5, 100, 3000)))


def one(order: random.Random, highest: int) -> tuple[bytes, int]:
    """Return a frame, and the highest stream after it."""
    kind = order.choice(KINDS)
    if order.random() < 0.02 and highest > 0:
        kind = order.randrange(12)
    flags = order.choice(
        (http2.END_HEADERS, http2.END_HEADERS | http2.END_STREAM, 0, 1, order.randrange(256))
    )
    stream = number(order, highest)
    if kind in {http2.SETTINGS, http2.PING, http2.GOAWAY} and order.random() < 0.9:
        stream = 0
    if kind == http2.HEADERS or highest < 0:
        kind = http2.HEADERS
        flags = flags | http2.END_HEADERS if order.random() < 0.95 else flags
        if order.random() < 0.8:
            stream = highest = highest + 2
            flags &= http2.END_HEADERS | http2.END_STREAM
    return frame(kind, flags, stream, payload(order, kind)), highest


async def answer(stream: Stream, way: int, length: int) -> None:
    """Do what a call may do."""
    pace = Pace(0, 1.0)
    with suppress(NodeGone):
        await stream.caught_up(pace, 0.05)
        if way == 0:
            while await stream.read():
                pass
        if way == 1 and stream.answer(HEAD, bytes(length), TRAILERS):
            return
        if way == 2:
            stream.reset(http2.Code.REFUSED_STREAM)
            return
        stream.head(HEAD)
        await stream.send(bytes(length), bytes(3), pace=pace, idle_timeout=0.05)
        stream.head(TRAILERS, last=True)


class Answering(Server):
    """Answers in any way."""

    order: random.Random
    failed: list[BaseException]

    def start_stream(self, stream: Stream) -> None:
        task = asyncio.ensure_future(
            answer(stream, self.order.randrange(4), self.order.choice((0, 9, 80_000)))
        )
        stream.on_gone = task.cancel
        self._tasks.add(task)
        task.add_done_callback(self._note)

    def _note(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed.append(error)


async def fuzz(order: random.Random) -> bool:
    """Send one client's frames; return whether the connection lives."""
    server = Answering(age=1000.0)
    server.order, server.failed = order, []
    client = Client(server, greets=False)
    data, highest, now = GREETING, -1, time.monotonic()
    for _ in range(order.randrange(1, 40)):
        more, highest = one(order, highest)
        data += more
    deeds: list[Callable[[], object]] = [
        client.connection.pause_writing,
        client.connection.resume_writing,
        client.connection.leave,
        lambda: client.connection.tick(now + 1.5),
    ]
    while data and not client.is_closed():
        size = order.choice((1, 9, 50, 1000, len(data)))
        client.send(data[:size])
        data = data[size:]
        if order.random() < 0.1:
            order.choice(deeds)()
        if order.random() < 0.3:
            await asyncio.sleep(0)
    lived = not client.is_closed()
    if lived and order.random() < 0.3:
        await asyncio.sleep(0.002)
    written = client.got()  # whole frames, all of them
    assert all(frame.kind != http2.PUSH_PROMISE for frame in written)
    client.lose()
    if server._tasks:
        await asyncio.wait(server._tasks)
    await asyncio.sleep(0)
    assert server.failed == []
    assert client.is_done()
    assert server.connections == set()
    return lived


@pytest.mark.parametrize("seed", range(8))
async def test_random_frames_end_in_good_order(seed: int) -> None:
    order = random.Random(seed)
    lived = [await fuzz(order) for _ in range(CASES)]
    assert 0.05 < sum(lived) / CASES < 0.95  # or what is sent is all alike
