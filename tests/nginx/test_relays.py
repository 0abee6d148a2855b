"""To which relay a call goes, and that it goes to one only."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from relay.call import Wire
from relay.fleet import Method
from tests.nginx.edge import (
    CLOSED,
    COME_BACK,
    OK,
    PULL,
    PUSH,
    SHIPPED,
    Played,
    answers,
    drops,
    never_answers,
    path_of,
    play,
    request,
)
from tests.relay_process import free_port
from tests.sockets import CutError, Peer, response, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.nginx.edge import Edge

    StartEdge = Callable[..., Edge]

MIB = 1024 * 1024


async def takes_half(relay: Played, peer: Peer) -> None:
    """Read the head and some of the body, and close."""
    relay.seen.append(await peer.head())
    await peer.exactly(1000)
    peer.reset()


async def breaks_off(relay: Played, peer: Peer) -> None:
    """Answer with less than was announced, and close."""
    relay.seen.append(await peer.message())
    await peer.send_all(response(b"half", size=100))
    await peer.close()


SAYS_502 = answers(response(b"", status=b"502 Bad Gateway"))


@pytest.mark.parametrize(
    "part",
    [drops, takes_half, never_answers, breaks_off, SAYS_502],
    ids=["drop", "half", "hang", "cut", "502"],
)
@pytest.mark.parametrize("path", [PULL, PUSH, path_of(Wire.REST_V0, Method.PULL_MESSAGES)])
async def test_a_call_is_sent_once(
    start_edge: StartEdge, part: Callable[[Played, Peer], Awaitable[None]], path: str
) -> None:
    """What has reached a relay goes to no other, whatever happens."""
    async with play(part) as one, play(part) as other:
        edge = start_edge(one.port, other.port, server="proxy_read_timeout 1s;")

        async def ask(number: int) -> None:
            peer = await edge.connect()
            peer.send(request(path, 30_000 * b"x", more=b"x-number: %d\r\n" % number))
            with suppress(CutError):
                await peer.message()

        await asyncio.gather(*(ask(number) for number in range(10)))
        seen = Counter(message.one(b"x-number") for message in (*one.seen, *other.seen))
        assert seen == {b"%d" % number: 1 for number in range(10)}


async def test_a_call_is_sent_once_on_a_stale_connection(start_edge: StartEdge) -> None:
    async def answers_once(relay: Played, peer: Peer) -> None:
        relay.seen.append(await peer.message())
        await peer.send_all(response(b"ok"))
        relay.seen.append(await peer.message())
        peer.reset()

    async with play(answers_once) as one, play(answers_once) as other:
        edge = start_edge(one.port, other.port, workers=1)
        got = [await edge.ask(request(PUSH)) for _ in range(8)]
        assert set(got) == {OK, COME_BACK}
        assert len(one.seen) + len(other.seen) == 8


async def test_one_relay_is_down(start_edge: StartEdge) -> None:
    """Its calls go to the other, bodies and all, and no node notices."""

    async def digests(relay: Played, peer: Peer) -> None:
        while True:
            relay.seen.append(message := await peer.message())
            await peer.send_all(response(hashlib.sha256(message.body).hexdigest().encode()))

    async with play(digests) as relay:
        edge = start_edge(free_port(), relay.port, free_port())
        for size in (0, 10, 60_000, MIB):
            body = os.urandom(size)
            for _ in range(10):
                got = await edge.ask(request(PUSH, body))
                assert got.body == hashlib.sha256(body).hexdigest().encode()
        assert len(relay.seen) == 40


def test_servers_in_the_shipped_file() -> None:
    servers = re.findall(r"^(?:# )?server .*", (SHIPPED / "site" / "relays.conf").read_text(), re.MULTILINE)
    assert len(servers) > 1
    assert all(server.endswith(" max_fails=0;") for server in servers)


async def test_a_relay_that_drops_is_not_put_aside(start_edge: StartEdge) -> None:
    async def drops_pushes(relay: Played, peer: Peer) -> None:
        while True:
            relay.seen.append(message := await peer.message())
            if b"push" in message.start:
                peer.reset()
                return
            await peer.send_all(response(b"ok"))

    async with play(drops_pushes) as one, play(drops_pushes) as other:
        edge = start_edge(one.port, other.port)
        for _ in range(10):
            for _ in range(5):
                assert await edge.ask(request("/api/v0/fleet/push-object")) == CLOSED
            assert await edge.ask(request(PULL)) == OK
        assert min(len(one.seen), len(other.seen)) > 15


async def test_least_connections(start_edge: StartEdge) -> None:
    """Counted over all workers of nginx: while one relay holds a call, the other gets all that come."""
    async with play(never_answers) as one, play(answers(response(b"ok"))) as other:
        edge = start_edge(one.port, other.port)
        for number in range(1, 41):
            held = len(one.seen)
            node = await edge.connect()
            node.send(request(PULL))
            await until(lambda count=number: len(one.seen) + len(other.seen) == count)  # type: ignore[misc]
            if len(one.seen) == held:
                await node.message()
                await asyncio.sleep(0.02)  # nginx counts the call until it has passed on its answer
        assert len(one.seen) == 1


async def test_connections_to_a_relay(start_edge: StartEdge) -> None:
    """They are kept, and closed before a draining relay closes them (drain.idle_grace, 5 s)."""
    idle: list[float] = []

    async def notes_the_end(relay: Played, peer: Peer) -> None:
        last = time.monotonic()
        try:
            while True:
                relay.seen.append(await peer.message())
                await peer.send_all(response(b"ok"))
                last = time.monotonic()
        except CutError:
            idle.append(time.monotonic() - last)

    async with play(notes_the_end) as relay:
        edge = start_edge(relay.port)
        for _ in range(200):
            assert await edge.ask(request(PULL)) == OK
        made = len(relay.peers)
        assert made <= 2, "one a worker"
        await until(lambda: len(idle) == made, patience=15.0)
        assert all(seconds > 3.5 for seconds in idle)
        assert min(idle) < 5.0  # one may be late on a busy machine
