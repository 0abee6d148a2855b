"""How a worker comes to its end: whom it waits for, whom it closes and when, whom it cuts."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol, cast

import pytest
import structlog.testing
import uvloop

from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.settings import load
from relay.wires.http_sockets import ACCEPTS
from relay.worker import RelayWorker, drain
from tests.certificates import make_pair
from tests.served import PATIENCE, Served, echo, request
from tests.sockets import CutError, Peer, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future
    from pathlib import Path

    from relay.app import Relay
    from relay.call import Call
    from relay.settings import Settings
    from relay.shared import Shared
    from relay.wires.grpc_server import GrpcServer
    from relay.wires.http_server import NodeServer

pytestmark = pytest.mark.timeout(60)

ASK = request(Method.GET_RUN, b"abc")
#: Long enough that nothing else in these tests takes as long, but for a machine that stands still.
LONG = 600.0


class Gate:
    """A handler whose calls wait until it is opened.

    Attributes:
        waiting: calls that wait.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._open = asyncio.Event()

    async def __call__(self, call: Call) -> Reply:
        self.waiting += 1
        await self._open.wait()
        self.waiting -= 1
        return await echo(call)

    def open(self, server: Served) -> None:
        server.soon(self._open.set)


class Slow:
    """A body whose pieces are as long as its pause lets them wait."""

    def __init__(self, pieces: int, pause: float) -> None:
        self._pieces, self._pause = pieces, pause

    async def read(self) -> bytes:
        if self._pieces == 0:
            return b""
        self._pieces -= 1
        await asyncio.sleep(self._pause)
        return b"x" * 1000

    def close(self) -> None:
        pass


class Draining:
    """A drain that goes on in the loop of its server.

    Attributes:
        begun: when.
    """

    def __init__(self, served: Served, *, timeout: float = LONG, idle_grace: float = LONG) -> None:
        served.run(served.stop_listening())
        self.begun = time.monotonic()
        draining = drain(served.servers, timeout, idle_grace)
        self._future: Future[None] = asyncio.run_coroutine_threadsafe(draining, served.loop)
        served.run(asyncio.sleep(0))  # by then it has begun

    @property
    def over(self) -> bool:
        return self._future.done()

    async def end(self) -> float:
        """Wait for the end; return how many seconds the drain took."""
        await asyncio.wait_for(asyncio.wrap_future(self._future), PATIENCE)
        return time.monotonic() - self.begun


class Dial(Protocol):
    """Opens a connection to a server, which knows it when this returns."""

    async def __call__(self, served: Served, *, port: int = 0) -> Peer: ...


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    nodes: list[Peer] = []

    async def dial(served: Served, *, port: int = 0) -> Peer:
        before = served.connections()
        nodes.append(await connect(served.ports[port]))
        await until(lambda: served.connections() > before)
        return nodes[-1]

    yield dial
    for node in nodes:
        node.writer.transport.abort()
    await asyncio.sleep(0.01)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_drain_of_nobody_is_over_at_once() -> None:
    with Served() as served:
        await Draining(served).end()
        assert served.front.draining


async def test_a_drain_waits_for_the_call_in_flight_and_not_a_moment_longer(dial: Dial) -> None:
    gate = Gate()
    with Served(gate) as served:
        node = await dial(served)
        node.send(ASK)
        await until(lambda: gate.waiting)
        # An idle grace of nothing: the call alone keeps the connection.
        draining = Draining(served, idle_grace=0.0)
        assert await node.is_silent(0.5)
        assert not draining.over
        gate.open(served)
        assert (await node.message()).body == b"abc"
        assert await node.rest() == (b"", "closed")
        await draining.end()


async def test_an_answer_given_in_a_drain_says_that_it_is_the_last(dial: Dial) -> None:
    with Served() as served:
        node = await dial(served)
        node.send(ASK)
        assert (await node.message()).all(b"connection") == []
        draining = Draining(served)
        node.send(ASK)
        answer = await node.message()
        assert (answer.body, answer.one(b"connection")) == (b"abc", b"close")
        assert await node.rest() == (b"", "closed")
        await draining.end()


@pytest.mark.parametrize(
    ("wire", "method", "status"),
    [(Wire.HTTP_V1, Method.PULL_MESSAGES, 200), (Wire.HTTP_V1, Method.SEND_NODE_HEARTBEAT, 503)],
    ids=["nothing now", "come back later"],
)
async def test_a_refusal_given_in_a_drain_says_that_it_is_the_last(
    dial: Dial, wire: Wire, method: Method, status: int
) -> None:
    async def refuse(_: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN)

    with Served(refuse) as served:
        node = await dial(served)
        draining = Draining(served)
        node.send(request(method, wire=wire))
        answer = await node.message()
        assert (answer.status, answer.one(b"connection")) == (status, b"close")
        assert await node.rest() == (b"", "closed")
        await draining.end()


async def test_idle_connections_are_kept_for_the_grace_and_then_closed_in_good_order(dial: Dial) -> None:
    with Served() as served:
        fresh, used = await dial(served), await dial(served)
        used.send(ASK)
        await used.message()
        draining = Draining(served, idle_grace=2.0)
        assert await fresh.is_silent(0.3)
        assert not draining.over
        assert await fresh.rest() == (b"", "closed")
        assert time.monotonic() - draining.begun >= 2.0
        assert await used.rest() == (b"", "closed")
        await draining.end()


async def test_connections_that_leave_by_themselves_end_the_drain_before_the_grace(dial: Dial) -> None:
    with Served() as served:
        nodes = [await dial(served) for _ in range(3)]
        draining = Draining(served)
        for node in nodes:
            assert not draining.over
            await node.close()
        await draining.end()


async def test_a_call_that_is_still_being_sent_is_not_idle(dial: Dial) -> None:
    with Served() as served:
        node = await dial(served)
        head, body = ASK[:-3], ASK[-3:]
        node.send(head + body[:1])
        await until(lambda: served.front.busy)
        draining = Draining(served, idle_grace=0.0)
        assert await node.is_silent(0.3)
        node.send(body[1:])
        assert (await node.message()).body == b"abc"
        await draining.end()


async def test_an_answer_that_is_on_its_way_is_not_cut_at_the_grace(dial: Dial) -> None:
    async def slowly(_: Call) -> Reply:
        return Reply(Payload(body=Slow(10, 0.05), size=10_000), Source.LOCAL)

    with Served(slowly) as served:
        node = await dial(served)
        node.send(ASK)
        await node.head()
        draining = Draining(served, idle_grace=0.1)
        assert await node.exactly(10_000) == b"x" * 10_000
        assert await draining.end() > 0.1


async def test_calls_that_outlast_the_timeout_are_cut_and_the_log_says_how_many(dial: Dial) -> None:
    gate = Gate()
    with structlog.testing.capture_logs() as logs, Served(gate) as served:
        nodes = [await dial(served), await dial(served)]
        for node in nodes:
            node.send(ASK)
        await until(lambda: gate.waiting == 2)
        await dial(served)  # has no call, so there is none to cut
        took = await Draining(served, timeout=0.4).end()
        assert 0.4 <= took < 15.0
        for node in nodes:
            # A reset: a FIN could pass for the end of an answer.
            assert await node.rest() == (b"", "reset")
    said = {"log_level": "warning", "event": "drain timed out; calls are cut", "calls": 2, "seconds": 0.4}
    assert logs == [said]


async def test_a_drain_in_time_warns_of_nothing(dial: Dial) -> None:
    with structlog.testing.capture_logs() as logs, Served() as served:
        node = await dial(served)
        draining = Draining(served, timeout=LONG)
        node.send(ASK)
        await node.message()
        await draining.end()
    assert logs == []


async def test_an_answer_that_is_cut_by_the_timeout_cannot_pass_for_a_whole_one(dial: Dial) -> None:
    async def endless(_: Call) -> Reply:
        return Reply(Payload(body=Slow(100_000, 0.02)), Source.LOCAL)

    with Served(endless) as served:
        node = await dial(served)
        # An answer to HTTP/1.0 without a length ends where the connection ends.
        node.send(ASK.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await node.head()
        draining = Draining(served, timeout=0.3)
        with pytest.raises(CutError):
            await node.exactly(1 << 30)
        assert (await node.rest())[1] == "reset"
        await draining.end()


async def test_every_listener_is_drained_and_the_last_call_decides_how_long_it_takes(dial: Dial) -> None:
    gate = Gate()
    with Served(gate, listeners=3) as served:
        idle, busy = await dial(served, port=0), await dial(served, port=1)
        busy.send(ASK)
        await until(lambda: gate.waiting)
        draining = Draining(served, idle_grace=0.1)
        assert await idle.rest() == (b"", "closed")
        assert await busy.is_silent(0.2)
        assert not draining.over
        gate.open(served)
        assert (await busy.message()).one(b"connection") == b"close"
        await draining.end()


async def test_the_calls_of_every_listener_are_cut_and_counted_at_the_timeout(dial: Dial) -> None:
    gate = Gate()
    with structlog.testing.capture_logs() as logs, Served(gate, listeners=2) as served:
        nodes = [await dial(served, port=0), await dial(served, port=1), await dial(served, port=1)]
        for node in nodes:
            node.send(ASK)
        await until(lambda: gate.waiting == 3)
        await Draining(served, timeout=0.2).end()
        for node in nodes:
            assert await node.rest() == (b"", "reset")
    assert [line["calls"] for line in logs] == [3]


async def test_a_handshake_that_nobody_goes_on_with_does_not_hold_a_drain_up(tmp_path: Path) -> None:
    with Served(pair=make_pair(tmp_path)) as served:
        node = await connect(served.port)
        node.send(b"\x16\x03\x01")
        await asyncio.sleep(0.2)
        await Draining(served).end()
        assert served.open_sockets() == 1
        node.writer.transport.abort()
        await asyncio.sleep(0.01)


# -- a worker without a process ------------------------------------------------------------------------


class Telling(RelayWorker):
    """A worker without a process, that notes how often it told its master that it is alive."""

    def __init__(self, master: int) -> None:
        self.ppid = master
        self.told = 0
        self.ticks = 0
        self.stop = asyncio.Event()

    def notify(self) -> None:
        self.told += 1

    def tick(self) -> None:
        self.ticks += 1


async def beat(worker: Telling, seconds: float) -> None:
    relay = cast("Relay", worker)  # `tick` is all that is asked of it
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await worker._beat(relay)


async def test_a_worker_tells_its_master_every_second_that_it_lives_also_while_it_drains() -> None:
    worker = Telling(os.getppid())
    await beat(worker, 1.5)
    assert not worker.stop.is_set()
    assert worker.told == worker.ticks == 2
    worker.stop.set()
    await beat(worker, 1.5)
    assert worker.told == worker.ticks == 4


async def test_a_worker_whose_master_is_gone_stops_and_says_so_once() -> None:
    worker = Telling(os.getppid() + 1)
    with structlog.testing.capture_logs() as logs:
        await beat(worker, 1.5)
    assert worker.stop.is_set()
    assert [line["event"] for line in logs] == ["the master is gone; stopping"]


async def test_a_worker_tells_that_it_lives_whatever_becomes_of_its_other_chores() -> None:
    ticks = 0

    def fail() -> None:
        nonlocal ticks
        ticks += 1
        raise OSError

    class Failing(Telling):
        def tick(self) -> None:
            super().tick()
            raise OSError

    worker, failing = Failing(os.getppid()), SimpleNamespace(tick=fail)
    worker.shared = cast("Shared", SimpleNamespace(stopping=False))
    with structlog.testing.capture_logs() as logs, pytest.raises(TimeoutError):
        async with asyncio.timeout(2.5):
            await worker._beat(cast("Relay", worker), (), [cast("GrpcServer", failing)])
    assert worker.told == worker.ticks == ticks >= 2
    assert [line["chore"] for line in logs] == ["tick", "grpc"]


def without_pepper(directory: Path) -> tuple[Settings, Path]:
    """Return settings that were right until the file with the pepper was taken away, and its path."""
    pepper = directory / "pepper"
    pepper.write_bytes(b"0123456789abcdef")
    keys = {"RELAY_KEYS__FILE": f"{directory}/keys.jsonl", "RELAY_KEYS__PEPPER_FILE": str(pepper)}
    settings = load(None, {**keys, "RELAY_LISTENERS__0__AUTH__ACCEPT": "[api_key]"})
    pepper.unlink()
    return settings, pepper


async def test_a_worker_whose_pepper_cannot_be_read_waits_for_it_alive(tmp_path: Path) -> None:
    """Ended by the error, it would end the whole relay: gunicorn does so with a worker that cannot start."""
    settings, pepper = without_pepper(tmp_path)
    worker = Telling(os.getppid())
    with structlog.testing.capture_logs() as logs:
        waiting = asyncio.create_task(worker._files_are_sound(settings))
        await until(lambda: worker.told == 2)
        assert not waiting.done()
        pepper.write_bytes(b"0123456789abcdef")
        assert await waiting
    assert [(line["event"], line["problem"]) for line in logs] == [
        ("files refused; waiting for others", f"{pepper}: No such file or directory")
    ]


async def test_a_worker_that_is_told_to_stop_waits_for_no_file(tmp_path: Path) -> None:
    settings, _ = without_pepper(tmp_path)
    worker = Telling(os.getppid())
    worker.stop.set()
    assert not await worker._files_are_sound(settings)


# -- who comes ----------------------------------------------------------------------------------------


class Accepted:
    """Makes the protocols of a port, and counts who was accepted."""

    def __init__(self) -> None:
        self.tls: object = None
        self.count = 0

    def __call__(self) -> asyncio.Protocol:
        self.count += 1
        return asyncio.Protocol()


def test_those_who_come_at_once_wait_few_turns_of_a_busy_loop() -> None:
    """An end of the time for its handshake is fatal to a node."""
    many = 64

    async def turns() -> int:
        loop = asyncio.get_running_loop()
        server = Accepted()
        worker = SimpleNamespace(loop=loop)
        with socket.create_server(("127.0.0.1", 0), backlog=many) as port:
            listen = RelayWorker._listen
            listening = await listen(cast("RelayWorker", worker), cast("NodeServer", server), port, None)
            assert len(listening) == ACCEPTS
            come = [socket.create_connection(port.getsockname()) for _ in range(many)]
            count = 0
            while server.count < many:
                await asyncio.sleep(0)
                count += 1
                assert count <= many
            for each in listening:
                each.close()
            for one in come:
                one.close()
            return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(turns()) <= many / ACCEPTS + 3
