"""Bodies of any size pass through the edge as they come, both ways."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from tests.nginx.edge import (
    PULL,
    PUSH,
    Played,
    answer,
    answers,
    play,
    request,
)
from tests.sockets import CutError, Peer, chunked, response, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.nginx.edge import Edge

    StartEdge = Callable[..., Edge]

MIB = 1024 * 1024


@pytest.mark.parametrize("tls", [False, True])
async def test_upload(start_edge: StartEdge, tls: bool) -> None:
    """It reaches the relay as it comes, and nothing of it touches the disk."""
    got: list[bytes] = []

    async def digests(_: Played, peer: Peer) -> None:
        size = int((await peer.head()).one(b"content-length"))
        digest = hashlib.sha256()
        while size:
            piece = await peer.reader.read(256 * 1024)
            digest.update(piece)
            size -= len(piece)
            got.append(piece[:1])
        await peer.send_all(response(digest.hexdigest().encode()))

    async with play(digests) as relay:
        edge = start_edge(relay.port)
        peer = await (edge.connect_tls() if tls else edge.connect())
        body = os.urandom(48 * MIB)
        data = request(PUSH, body)
        await peer.send_all(data[: MIB // 2])
        await until(lambda: got)
        await peer.send_all(data[MIB // 2 :])
        assert (await answer(peer)).body == hashlib.sha256(body).hexdigest().encode()
        assert edge.spooled() == []
        assert edge.resident() < 40 * MIB


@pytest.mark.parametrize("tls", [False, True])
async def test_download(start_edge: StartEdge, tls: bool) -> None:
    body = os.urandom(48 * MIB)
    begun = asyncio.Event()

    async def sends(_: Played, peer: Peer) -> None:
        await peer.message()
        data = response(body)
        await peer.send_all(data[: MIB // 2])
        await begun.wait()
        await peer.send_all(data[MIB // 2 :])

    async with play(sends) as relay:
        edge = start_edge(relay.port)
        peer = await (edge.connect_tls() if tls else edge.connect())
        peer.send(request("/v1/fleet/pull-object"))
        size = int((await peer.head()).one(b"content-length"))
        first = await peer.exactly(100_000)
        begun.set()
        assert first + await peer.exactly(size - len(first)) == body
        assert edge.spooled() == []
        assert edge.resident() < 40 * MIB


async def test_chunked_both_ways(start_edge: StartEdge) -> None:
    pieces = [os.urandom(size) for size in (1, 10, 20_000, 300_000)]

    async with play(answers(chunked(*pieces))) as relay:
        edge = start_edge(relay.port)
        peer = await edge.connect()
        framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        peer.send(b"POST %b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" % PUSH.encode())
        peer.send(framed + b"0\r\n\r\n")
        message = await peer.message()
        assert message.body == b"".join(pieces)
        assert message.chunks > 0
        assert relay.seen[0].body == b"".join(pieces)
        assert relay.seen[0].chunks > 0


async def test_slow_relay_slows_the_node_down(start_edge: StartEdge) -> None:
    async def takes_nothing(_: Played, peer: Peer) -> None:
        await peer.head()
        await asyncio.sleep(60)

    async with play(takes_nothing) as relay:
        edge = start_edge(relay.port)
        peer = await edge.connect()
        size = 64 * MIB
        peer.send(request(PUSH, bytes(size)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await peer.writer.drain()
        assert peer.writer.transport.get_write_buffer_size() > size / 2, "the kernels hold a few MB"
        assert edge.spooled() == []
        assert edge.resident() < 40 * MIB


async def test_slow_node_slows_the_relay_down(start_edge: StartEdge) -> None:
    async def sends(_: Played, peer: Peer) -> None:
        await peer.message()
        peer.send(response(bytes(64 * MIB)))
        await asyncio.sleep(60)

    async with play(sends) as relay:
        edge = start_edge(relay.port)
        peer = await edge.connect()
        peer.send(request("/v1/fleet/pull-object"))
        await peer.head()
        await asyncio.sleep(1.0)
        assert relay.peers[0].writer.transport.get_write_buffer_size() > 32 * MIB
        assert edge.spooled() == []
        assert edge.resident() < 40 * MIB


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    "data",
    [response(b"half", size=100_000), chunked(b"half", last=b""), chunked(b"half", last=b"400\r\nmore")],
    ids=["length", "chunks", "chunk"],
)
async def test_answer_that_breaks_off(start_edge: StartEdge, data: bytes, tls: bool) -> None:
    """It must not pass for a whole one."""

    async def breaks(_: Played, peer: Peer) -> None:
        await peer.message()
        await peer.send_all(data)
        peer.reset()

    async with play(breaks) as relay:
        edge = start_edge(relay.port)
        peer = await (edge.connect_tls() if tls else edge.connect())
        peer.send(request("/v1/fleet/pull-object"))
        with pytest.raises(CutError):
            await peer.message()


async def test_answer_before_the_end_of_an_upload(start_edge: StartEdge) -> None:
    async def refuses(_: Played, peer: Peer) -> None:
        size = int((await peer.head()).one(b"content-length"))
        await peer.exactly(1000)
        await peer.send_all(response(b"no", status=b"403 Forbidden"))
        await peer.exactly(size - 1000)  # as the relay does

    async with play(refuses) as relay:
        edge = start_edge(relay.port)
        for _ in range(5):
            assert (await edge.ask(request(PUSH, bytes(8 * MIB)))).status == 403


async def test_node_that_leaves(start_edge: StartEdge) -> None:
    """The relay is told, by the end of the connection, when there is nobody left to answer."""
    gone = asyncio.Event()

    async def notices(relay: Played, peer: Peer) -> None:
        relay.seen.append(await peer.message())
        await peer.reader.read()
        gone.set()

    async with play(notices) as relay:
        edge = start_edge(relay.port)
        peer = await edge.connect()
        peer.send(request(PULL))
        await until(lambda: relay.seen)
        await peer.close()
        async with asyncio.timeout(5.0):
            await gone.wait()
