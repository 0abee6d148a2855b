"""Reloads of nginx and restarts of relays under load: no call is lost, none is sent twice."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.load import Node, Tally, superlink
from tests.nginx.edge import OK, PULL, PUSH, Played, answers, play, replace, request
from tests.relay_process import RelayProcess
from tests.sockets import CutError, Peer, response, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.nginx.edge import Edge

    StartEdge = Callable[..., Edge]

MIB = 1024 * 1024


async def numbers(relay: Played, peer: Peer) -> None:
    """Answer each call with its own body."""
    while True:
        relay.seen.append(message := await peer.message())
        peer.send(response(message.body))


@pytest.mark.parametrize("tls", [False, True])
async def test_new_connections(start_edge: StartEdge, tls: bool) -> None:
    """Legacy REST nodes open one for each call; not one is refused or cut."""
    count = 400 if tls else 2000
    async with play(numbers) as relay:
        edge = start_edge(relay.port)

        async def node(name: int) -> None:
            for number in range(name, count, 8):
                body = b"%d" % number
                assert (await edge.ask(request(PUSH, body), tls=tls)).body == body

        reloading = asyncio.create_task(reloads(edge, 4))
        await asyncio.gather(*(node(name) for name in range(8)))
        await reloading
        assert Counter(message.body for message in relay.seen) == {b"%d" % n: 1 for n in range(count)}


async def reloads(edge: Edge, count: int) -> None:
    for _ in range(count):
        await asyncio.to_thread(edge.reload)
        await asyncio.sleep(0.05)


async def test_kept_connections(start_edge: StartEdge, version: tuple[int, ...]) -> None:
    """A call on a connection that nginx closes as idle was not read by it, and a node may repeat it.

    nginx 1.27.4 and newer need not even close them.
    """
    lost = 0

    async def node(edge: Edge, name: int) -> None:
        nonlocal lost
        peer = await edge.connect()
        for number in range(250):
            body = b"%d/%d" % (name, number)
            while True:
                peer.send(request(PUSH, body))
                try:
                    message = await peer.message()
                except CutError as error:
                    if error.partial:
                        raise
                    lost += 1
                    peer = await edge.connect()
                    continue
                assert message.body == body
                if message.all(b"connection") == [b"close"]:
                    peer = await edge.connect()
                break
            await asyncio.sleep(0.002)

    async with play(numbers) as relay:
        keeps = version >= (1, 27, 4)
        edge = start_edge(relay.port, server="keepalive_min_timeout 5s;" if keeps else "")
        reloading = asyncio.create_task(reloads(edge, 4))
        await asyncio.gather(*(node(edge, name) for name in range(16)))
        await reloading
        seen = Counter(message.body for message in relay.seen)
        assert seen == {b"%d/%d" % (name, number): 1 for name in range(16) for number in range(250)}
        assert lost == 0 or not keeps


async def test_calls_in_flight(start_edge: StartEdge) -> None:
    """A held poll, an upload and a TLS handshake that began before a reload come to their end after it."""
    go = asyncio.Event()

    async def holds(relay: Played, peer: Peer) -> None:
        relay.seen.append(await peer.message())
        await go.wait()
        await peer.send_all(response(b"ok"))

    async with play(holds) as relay:
        edge = start_edge(relay.port)
        old = {worker.pid for worker in edge.workers()}
        poll, upload, silent = [await edge.connect() for _ in range(3)]
        poll.send(request(PULL))
        data = request(PUSH, bytes(4 * MIB))
        await upload.send_all(data[:MIB])
        shaking = Handshake(edge.certificates.client("http/1.1"))
        raw = Peer(*await asyncio.open_connection("127.0.0.1", edge.tls_port))
        edge.peers.append(raw)
        raw.send(shaking.step(b"")[:100])
        await until(lambda: relay.seen)
        await asyncio.to_thread(edge.reload)
        assert old & {worker.pid for worker in edge.workers()}, "the old workers are still there"
        upload.send(data[MIB:])
        silent.send(request(PUSH))
        raw.send(shaking.rest)
        while not shaking.done:
            raw.send(shaking.step(await raw.reader.read(16_384)))
        raw.send(shaking.encrypted(request(PULL)))
        go.set()
        for peer in (poll, upload, silent):
            message = await peer.message()
            assert (message.status, message.one(b"connection")) == (200, b"close")
        got = b""
        while b"\r\n\r\n" not in got:
            got += shaking.decrypted(await raw.reader.read(16_384))
        assert got.startswith(b"HTTP/1.1 200 OK")
        edge.hang_up()
        await until(lambda: not old & {worker.pid for worker in edge.workers()})


class Handshake:
    """The client's side of TLS, as bytes."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        self.done = False
        self.rest = b""

    def step(self, data: bytes) -> bytes:
        """Take what came; return what is to be sent, of which `rest` is all but the first 100 bytes."""
        self._in.write(data)
        try:
            self._tls.do_handshake()
            self.done = True
        except ssl.SSLWantReadError:
            pass
        out = self._out.read()
        self.rest = out[100:]
        return out

    def encrypted(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._out.read()

    def decrypted(self, data: bytes) -> bytes:
        self._in.write(data)
        pieces = b""
        try:
            while piece := self._tls.read(16_384):
                pieces += piece
        except ssl.SSLWantReadError:
            pass
        return pieces


async def test_bad_configuration(start_edge: StartEdge) -> None:
    """A reload with an error in it changes nothing."""
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, workers=2)
        await until(lambda: len(edge.workers()) == 2)  # one may serve before the other is there
        before = {worker.pid for worker in edge.workers()}
        replace(edge.folder / "nginx" / "nginx.conf", ("least_conn;", "most_conn;"))
        edge.process.send_signal(signal.SIGHUP)
        await until(lambda: "most_conn" in edge.errors())
        assert {worker.pid for worker in edge.workers()} == before
        assert await edge.ask(request(PULL)) == OK


async def test_restarts_of_relays(start_edge: StartEdge, tmp_path: Path) -> None:
    """Two real relays: one is reloaded, then the other is stopped and started again. No node notices."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    drain = {"idle_grace": 5, "timeout": 20}
    async with superlink(delay=0.01) as (port, seen):
        one = RelayProcess(tmp_path / "one", port, workers=1, drain=drain)
        other = RelayProcess(tmp_path / "other", port, workers=1, drain=drain)
        with one, other:
            edge = start_edge(one.port, other.port)
            tally = Tally()
            nodes = [Node(edge.port, f"node-{number}", tally) for number in range(24)]
            async with asyncio.TaskGroup() as group:
                for node in nodes:
                    group.create_task(node.run(pause=0.005))
                await asyncio.sleep(0.3)
                one.signal(signal.SIGHUP)
                await asyncio.to_thread(one.until, lambda: one.count("worker serves") == 2)
                other.signal(signal.SIGTERM)
                assert await asyncio.to_thread(other.exit_code) == 0
                await asyncio.to_thread(other.start)
                began = tally.answered
                async with asyncio.timeout(60):
                    while tally.answered < max(1000, began + 100):
                        await asyncio.sleep(0.05)
                for node in nodes:
                    node.stopped = True
        assert (tally.lost, tally.reset, tally.refused) == (Counter(), [], 0)
        assert tally.answered >= 1000
        assert set(seen.values()) == {1}


@pytest.mark.timeout(180)
async def test_three_reloads_of_a_relay(start_edge: StartEdge, tmp_path: Path) -> None:
    """20,000 calls and more through nginx: each is answered, and reaches the SuperLink once."""
    async with superlink() as (port, seen):
        relay = RelayProcess(tmp_path, port, workers=2, drain={"idle_grace": 5, "timeout": 20})
        with relay:
            edge = start_edge(relay.port)
            tally = Tally()
            nodes = [Node(edge.port, f"node-{number}", tally) for number in range(16)]
            async with asyncio.TaskGroup() as group:
                for node in nodes:
                    group.create_task(node.run())
                for turn in range(1, 4):
                    old = {worker.pid for worker in relay.workers()}
                    relay.signal(signal.SIGHUP)
                    await asyncio.to_thread(
                        relay.until, lambda turn=turn: relay.count("worker serves") == 2 + 2 * turn
                    )
                    await asyncio.to_thread(relay.until, lambda: len(relay.workers()) == 2, 60)
                    assert old.isdisjoint(worker.pid for worker in relay.workers())
                while tally.answered < 20_000:
                    await asyncio.sleep(0.05)
                for node in nodes:
                    node.stopped = True
            assert relay.complaints() == []
        assert (tally.lost, tally.reset, tally.refused) == (Counter(), [], 0)
        assert tally.answered == seen.total()
        assert set(seen.values()) == {1}
