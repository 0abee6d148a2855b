"""Real relays under load: stops, reloads, killed workers, wrong settings; every call accounted for."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.load import Node, Tally, superlink
from tests.relay_process import RelayProcess, free_port
from tests.sockets import CutError, Listener, Peer, connect, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Dial = Callable[..., Awaitable[Peer]]

pytestmark = [pytest.mark.timeout(60), pytest.mark.xdist_group("relay-processes")]

CALL = (
    b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: relay\r\n"
    b"Content-Type: application/protobuf\r\nContent-Length: 3\r\n\r\nabc"
)
#: The answer to it is an object, which is passed on as it comes.
PULL = CALL.replace(b"push-object", b"pull-object")
#: The relay with a master that takes a worker for dead after 4 s instead of 60.
IMPATIENT = """
import sys
from pathlib import Path
from relay import server
from relay.settings import load
original = server.RelayApplication.load_config
def impatient(self):
    original(self)
    self.cfg.set("timeout", 4)
server.RelayApplication.load_config = impatient
server.serve(lambda: load(Path(sys.argv[1]), {}))
"""

off = asyncio.to_thread


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Return a function that opens a connection to a port; all of them are closed in the end."""
    nodes: list[Peer] = []

    async def dial(port: int, *, receive_buffer: int | None = None) -> Peer:
        nodes.append(await connect(port, receive_buffer=receive_buffer))
        return nodes[-1]

    yield dial
    for node in nodes:
        node.writer.transport.abort()
    await asyncio.sleep(0.01)


@asynccontextmanager
async def relay_to(directory: Path, upstream: int, **settings: Any) -> AsyncIterator[RelayProcess]:
    """Run a relay; whatever happens, nothing of it is left."""
    relay = RelayProcess(directory, upstream, **settings)
    try:
        await off(relay.start)
        yield relay
    finally:
        await off(relay.end)


class Load:
    """Nodes that ask one call after the other."""

    def __init__(self, port: int, nodes: int) -> None:
        self.tally = Tally()
        self.nodes = [Node(port, f"node-{number}", self.tally) for number in range(nodes)]
        self._tasks = [asyncio.create_task(node.run()) for node in self.nodes]

    async def answered(self, more: int) -> None:
        """Wait until so many more calls were answered."""
        goal = self.tally.answered + more
        async with asyncio.timeout(30):
            while self.tally.answered < goal:
                await asyncio.sleep(0.01)

    async def ended(self, *, stop: bool) -> Tally:
        """Wait until the nodes have ended: on their own, or when they are told to `stop`."""
        for node in self.nodes:
            node.stopped = node.stopped or stop
        async with asyncio.timeout(30):
            await asyncio.gather(*self._tasks)
        return self.tally


async def once(port: int, body: bytes) -> bytes:
    """Ask one call on a connection of its own, as a REST node does; return what came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(CALL.replace(b"\r\n\r\nabc", b"\r\nConnection: close\r\n\r\n" + body))
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def accepts(port: int) -> bool:
    """Return whether a node can connect."""
    try:
        node = await connect(port)
    except ConnectionRefusedError:
        return False
    node.reset()
    return True


def nothing_left(relay: RelayProcess, processes: list[psutil.Process]) -> bool:
    return not relay.leftovers() and not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


# -- no call is lost ------------------------------------------------------------------------------------


async def test_a_stop_under_load_loses_no_call(tmp_path: Path) -> None:
    async with superlink() as (port, seen), relay_to(tmp_path, port) as relay:
        load = Load(relay.port, 16)
        await load.answered(3000)
        relay.signal(signal.SIGTERM)
        tally = await load.ended(stop=False)
        assert await off(relay.exit_code) == 0
    assert not tally.lost
    assert tally.refused == 16  # that is how each of them learned that it was over
    assert tally.answered >= 3000
    assert seen.total() == tally.answered
    assert set(seen.values()) == {1}
    # A node that was told to connect anew may do so in the last moment, before the sockets are closed: its
    # connection ends before a worker has seen it.
    assert len(tally.reset) <= 16
    assert not [body for body in tally.reset if body in seen]
    assert relay.complaints() == []
    assert relay.leftovers() == []


async def test_three_reloads_under_load_lose_no_call(tmp_path: Path) -> None:
    async with superlink() as (port, seen), relay_to(tmp_path, port) as relay:
        load = Load(relay.port, 16)
        await load.answered(2000)
        pids = {worker.pid for worker in relay.workers()}
        for turn in range(1, 4):
            relay.signal(signal.SIGHUP)
            await off(relay.until, lambda turn=turn: relay.count("worker serves") == 2 + 2 * turn)
            await load.answered(4000)
            await off(relay.until, lambda: len(relay.workers()) == 2)
            now = {worker.pid for worker in relay.workers()}
            assert now.isdisjoint(pids)
            pids |= now
        await load.answered(max(0, 20_000 - load.tally.answered))
        tally = await load.ended(stop=True)
        assert await off(relay.stop) == 0
    assert not tally.lost
    assert not tally.reset
    assert tally.refused == 0
    assert tally.answered >= 20_000
    assert seen.total() == tally.answered
    assert relay.complaints() == []


async def test_a_reload_loses_no_call_that_comes_on_a_connection_of_its_own(tmp_path: Path) -> None:
    """REST nodes do that, and a close kills the heartbeat thread of one."""
    async with superlink() as (port, seen), relay_to(tmp_path, port) as relay:
        stopped = asyncio.Event()
        answers: list[bytes] = []

        async def ask() -> None:
            while not stopped.is_set():
                answers.append(await once(relay.port, b"abc"))

        asking = [asyncio.create_task(ask()) for _ in range(16)]
        await asyncio.sleep(0.3)
        relay.signal(signal.SIGHUP)
        await off(relay.until, lambda: relay.count("worker serves") == 4 and len(relay.workers()) == 2)
        began = len(answers)
        async with asyncio.timeout(20):
            while len(answers) < began + 50 and not any(task.done() for task in asking):
                await asyncio.sleep(0.05)
        stopped.set()
        await asyncio.gather(*asking)
    wrong = [a for a in answers if not (a.startswith(b"HTTP/1.1 200 ") and a.endswith(b"\r\n\r\nabc"))]
    assert not wrong
    assert seen.total() == len(answers)


async def test_a_stop_resets_a_connection_that_waits_to_be_accepted_but_never_carries_its_call_out(
    tmp_path: Path,
) -> None:
    async with superlink() as (port, seen), relay_to(tmp_path, port) as relay:
        answered = unanswered = refused = 0

        async def ask() -> None:
            nonlocal answered, unanswered, refused
            while True:
                try:
                    answer = await once(relay.port, b"abc")
                except ConnectionRefusedError:
                    refused += 1
                    return
                except ConnectionError:
                    unanswered += 1
                else:
                    answered += answer.endswith(b"\r\n\r\nabc")
                    unanswered += not answer

        asking = [asyncio.create_task(ask()) for _ in range(16)]
        async with asyncio.timeout(20):
            while answered <= 30:
                await asyncio.sleep(0.05)
        relay.signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            await asyncio.gather(*asking)
        assert await off(relay.exit_code) == 0
    assert refused == 16
    assert answered > 30
    assert seen.total() == answered
    assert unanswered <= 32  # two listeners close, each with the 16 at most that wait in its queue


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
async def test_a_call_in_flight_is_answered_whatever_happens_to_its_worker(
    tmp_path: Path, dial: Dial, how: signal.Signals
) -> None:
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        node = await dial(relay.port)
        node.send(CALL)
        peer = await upstream.accept()
        await peer.message()
        relay.signal(how)
        if how is signal.SIGHUP:
            await off(relay.until, lambda: json.loads(relay.get("/readyz")[1])["serving"] == 1)
        else:
            await off(relay.until, lambda: relay.get("/readyz")[0] == 503, 15)
            await asyncio.sleep(0.2)
        peer.send(response(b"abc"))
        answer = await node.message()
        assert (answer.status, answer.body) == (200, b"abc")
        assert answer.one(b"connection") == b"close"
        assert await node.rest() == (b"", "closed")
        if how is signal.SIGHUP:
            await off(relay.until, lambda: relay.count("worker serves") == 4 and len(relay.workers()) == 2)
        else:
            assert await off(relay.exit_code) == 0


async def test_a_reload_leaves_a_long_call_to_its_old_worker(tmp_path: Path, dial: Dial) -> None:
    """The master must not take a worker for dead that only drains."""
    async with Listener() as upstream, relay_to(tmp_path, upstream.port, program=IMPATIENT) as relay:
        old = {worker.pid for worker in relay.workers()}
        node = await dial(relay.port)
        node.send(CALL)
        peer = await upstream.accept()
        await peer.message()
        relay.signal(signal.SIGHUP)
        await asyncio.sleep(7.0)
        await off(relay.until, lambda: len(old & {worker.pid for worker in relay.workers()}) == 1)
        peer.send(response(b"late"))
        answer = await node.message()
        assert (answer.status, answer.body) == (200, b"late")
        await off(relay.until, lambda: len(relay.workers()) == 2)
        assert not [line for line in relay.lines() if line.get("level") == "critical"]


async def test_a_call_that_outlasts_the_drain_is_cut_and_the_relay_ends(tmp_path: Path, dial: Dial) -> None:
    drain = {"timeout": 1, "idle_grace": 0.2}
    async with Listener() as upstream, relay_to(tmp_path, upstream.port, drain=drain) as relay:
        waiting, reading = await dial(relay.port), await dial(relay.port)
        waiting.send(CALL)
        await (await upstream.accept()).message()
        reading.send(PULL)
        peer = await upstream.accept()
        await peer.message()
        peer.send(response(b"part", size=100_000))
        assert (await reading.head()).status == 200
        started = time.monotonic()
        relay.signal(signal.SIGTERM)
        assert await off(relay.exit_code) == 0
        assert 0.9 < time.monotonic() - started < 15
        assert (await waiting.rest())[0] == b""
        assert (await reading.rest())[1] == "reset"
    assert {line["event"] for line in relay.complaints()} <= {
        "drain timed out; calls are cut",
        "answer lost",
        "answer broke off",
    }
    assert sum(line.get("calls", 0) for line in relay.complaints()) == 2
    assert relay.leftovers() == []


async def test_idle_connections_do_not_delay_a_stop(tmp_path: Path, dial: Dial) -> None:
    async with superlink() as (port, _), relay_to(tmp_path, port) as relay:
        silent = [await dial(relay.port) for _ in range(5)]
        used = await dial(relay.port)
        used.send(CALL)
        await used.message()
        started = time.monotonic()
        relay.signal(signal.SIGTERM)
        ends = await asyncio.gather(*(node.rest() for node in [*silent, used]))
        assert ends == [(b"", "closed")] * 6
        assert await off(relay.exit_code) == 0
        assert 0.4 < time.monotonic() - started < 15  # of 20


async def test_a_node_that_takes_nothing_of_its_answer_delays_a_stop_no_longer_than_the_drain(
    tmp_path: Path,
    dial: Dial,
) -> None:
    drain = {"timeout": 1, "idle_grace": 0.2}
    async with Listener() as upstream, relay_to(tmp_path, upstream.port, drain=drain, workers=1) as relay:
        node = await dial(relay.port, receive_buffer=4096)
        node.send(PULL)
        peer = await upstream.accept()
        await peer.message()
        sending = asyncio.create_task(peer.send_all(response(bytes(20_000_000))))
        await asyncio.sleep(0.3)
        node.reader._transport.pause_reading()  # type: ignore[attr-defined]
        started = time.monotonic()
        assert await off(relay.stop) == 0
        assert time.monotonic() - started < 10  # at 11, the master would end it
        sending.cancel()
        node.reset()


async def test_a_stop_in_the_middle_of_a_reload_is_heard(tmp_path: Path, dial: Dial) -> None:
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        node = await dial(relay.port)
        node.send(CALL)
        peer = await upstream.accept()
        await peer.message()
        relay.signal(signal.SIGHUP)
        await asyncio.sleep(0.3)
        relay.signal(signal.SIGTERM)
        await off(relay.until, lambda: relay.get("/readyz")[0] == 503, 15)
        peer.send(response(b"abc"))
        assert (await node.message()).body == b"abc"
        assert await off(relay.exit_code) == 0
        assert relay.leftovers() == []


async def test_nobody_can_connect_to_a_relay_that_drains(tmp_path: Path, dial: Dial) -> None:
    """A connection that is opened and then not served would keep its node waiting."""
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        node = await dial(relay.port)
        node.send(CALL)
        peer = await upstream.accept()
        await peer.message()
        relay.signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            while await accepts(relay.port):
                await asyncio.sleep(0.05)
        assert (await off(relay.get, "/readyz"))[0] == 503, "it is still there"
        peer.send(response())
        await node.message()


async def test_a_relay_accepts_for_a_while_after_it_has_reported_that_it_stops(tmp_path: Path) -> None:
    drain = {"delay": 25, "timeout": 10, "idle_grace": 0.2}
    async with superlink() as (port, _), relay_to(tmp_path, port, drain=drain) as relay:
        relay.signal(signal.SIGTERM)
        await off(relay.until, lambda: relay.get("/readyz")[0] == 503)
        answer = await once(relay.port, b"abc")
        assert answer.endswith(b"abc")
        relay.signal(signal.SIGTERM)  # ends the delay
        assert await off(relay.exit_code) == 0


async def test_a_worker_that_ends_does_not_shorten_the_time_that_a_balancer_is_given(tmp_path: Path) -> None:
    drain = {"delay": 6.0, "timeout": 10, "idle_grace": 0.2}
    async with superlink() as (port, _), relay_to(tmp_path, port, drain=drain) as relay:
        relay.signal(signal.SIGHUP)
        await off(relay.until, lambda: relay.count("worker serves") == 4)
        relay.workers()[0].kill()
        started = time.monotonic()
        relay.signal(signal.SIGTERM)
        await asyncio.sleep(1.5)
        assert (await once(relay.port, b"abc")).endswith(b"abc")
        assert await off(relay.exit_code) == 0
        assert time.monotonic() - started >= 6.0


# -- reloads --------------------------------------------------------------------------------------------


async def test_a_reload_takes_new_settings_over(tmp_path: Path) -> None:
    async with (
        superlink() as (port, first),
        superlink() as (other, second),
        relay_to(tmp_path, port) as relay,
    ):
        assert (await once(relay.port, b"abc")).endswith(b"abc")
        new = free_port()
        relay.settings["upstream"]["url"] = f"http://127.0.0.1:{other}"
        relay.settings["listeners"].append({"address": f"127.0.0.1:{new}"})
        relay.settings["workers"] = 1
        relay.write()
        relay.signal(signal.SIGHUP)
        await off(relay.until, lambda: relay.count("worker serves") == 3 and len(relay.workers()) == 1)
        assert (await once(relay.port, b"abd")).endswith(b"abd")
        assert (await once(new, b"abe")).endswith(b"abe")
    assert set(first) == {b"abc"}
    assert set(second) == {b"abd", b"abe"}


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("no_such_section", {}, "no_such_section"),
        ("workers", 0, "workers"),
        ("upstream", {"url": "gopher://x"}, "upstream.url"),
        ("upstream", {"url": "https://127.0.0.1:1", "ca_file": "/no/such/file.pem"}, "upstream.ca_file"),
        ("listeners", [{"address": "127.0.0.1:TAKEN"}], "TAKEN"),
        ("listeners", [{"address": "203.0.113.1:8080"}], "203.0.113.1:8080"),
        ("admin", {"address": "127.0.0.1:TAKEN"}, "TAKEN"),
    ],
    ids=["unknown", "range", "url", "file", "taken", "foreign", "admin"],
)
async def test_a_reload_with_wrong_settings_is_refused_and_the_old_ones_serve_on(
    tmp_path: Path, section: str, value: Any, told: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = str(taken.getsockname()[1])
        value = json.loads(json.dumps(value).replace("TAKEN", number))
        async with superlink() as (port, _), relay_to(tmp_path, port) as relay:
            workers = {worker.pid for worker in relay.workers()}
            good = relay.settings.get(section)
            relay.settings[section] = value
            relay.write()
            relay.signal(signal.SIGHUP)
            await off(relay.until, lambda: relay.count("reload refused; the old settings stay") > 0)
            (line,) = [line for line in relay.lines() if "reload refused" in str(line.get("event"))]
            assert told.replace("TAKEN", number) in line["problem"]
            assert line["level"] == "error"
            assert {worker.pid for worker in relay.workers()} == workers
            assert (await once(relay.port, b"abc")).endswith(b"abc")
            assert (await off(relay.get, "/readyz"))[0] == 200
            del relay.settings[section]
            if good is not None:
                relay.settings[section] = good
            relay.write()
            relay.signal(signal.SIGHUP)
            await off(relay.until, lambda: relay.count("worker serves") == 4 and len(relay.workers()) == 2)
            assert (await once(relay.port, b"abc")).endswith(b"abc")


async def test_a_configuration_file_that_is_gone_is_a_refused_reload(tmp_path: Path) -> None:
    async with superlink() as (port, _), relay_to(tmp_path, port) as relay:
        relay.config.unlink()
        relay.signal(signal.SIGHUP)
        await off(relay.until, lambda: relay.count("reload refused; the old settings stay") > 0)
        assert (await once(relay.port, b"abc")).endswith(b"abc")


async def test_a_burst_of_reloads_settles_on_the_last(tmp_path: Path) -> None:
    async with superlink() as (port, _), relay_to(tmp_path, port) as relay:
        load = Load(relay.port, 4)
        for _ in range(6):
            relay.signal(signal.SIGHUP)
            await asyncio.sleep(0.05)
        await load.answered(500)
        await off(relay.until, lambda: len(relay.workers()) == 2, 30)
        await load.answered(500)
        tally = await load.ended(stop=True)
        assert not tally.lost
        assert not tally.reset
        assert await off(relay.stop) == 0
        assert relay.complaints() == []


# -- workers that die -----------------------------------------------------------------------------------


async def test_a_killed_worker_is_replaced_and_its_counts_stay(tmp_path: Path) -> None:
    async with superlink() as (port, seen), relay_to(tmp_path, port) as relay:
        load = Load(relay.port, 8)
        await load.answered(500)
        victim = relay.workers()[0]
        victim.kill()
        await off(relay.until, lambda: relay.count("worker serves") == 3)
        await load.answered(500)
        tally = await load.ended(stop=True)
        assert tally.lost.total() <= 8  # each of its connections had at most one call in flight
        assert victim.pid not in {worker.pid for worker in relay.workers()}
        await asyncio.sleep(1.5)  # each worker writes once a second
        calls = await off(relay.metric, "relay_calls_total")
        assert 500 <= calls <= seen.total()  # but for the last second of the victim
        await off(relay.until, lambda: relay.metric("relay_calls_in_flight") == 0, 15)
        relay.workers()[0].kill()
        await off(relay.until, lambda: relay.count("worker serves") == 4)
        assert await off(relay.metric, "relay_calls_total") == calls
        assert await off(relay.stop) == 0
        assert relay.leftovers() == []


async def test_workers_end_with_a_master_that_was_killed_and_the_next_relay_sweeps_up(
    tmp_path: Path, dial: Dial
) -> None:
    async with superlink() as (port, _), relay_to(tmp_path, port) as relay:
        workers = relay.workers()
        node = await dial(relay.port)
        node.send(CALL)
        await node.message()
        relay.signal(signal.SIGKILL)
        await off(psutil.wait_procs, workers, 10)
        assert not [worker for worker in workers if worker.is_running()]
        assert [name.startswith("flwr-relay-metrics-") for name in relay.leftovers()] == [True]
        (old,) = relay.leftovers()
        await off(relay.exit_code)
        relay.log.write_text("")
        await off(relay.start)
        (new,) = relay.leftovers()
        assert new != old
        assert await off(relay.stop) == 0
        assert relay.leftovers() == []


# -- starting and ending --------------------------------------------------------------------------------


async def test_ctrl_c_ends_the_whole_group_in_good_order(tmp_path: Path, dial: Dial) -> None:
    async with superlink(delay=0.5) as (port, _), relay_to(tmp_path, port) as relay:
        processes = [relay.process, *relay.workers()]
        node = await dial(relay.port)
        node.send(CALL)
        await asyncio.sleep(0.1)
        os.killpg(relay.process.pid, signal.SIGINT)  # a terminal sends it to all of them
        assert (await node.message()).body == b"abc"
        assert await off(relay.exit_code) == 0
        assert nothing_left(relay, processes)
        assert relay.complaints() == []


async def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, dial: Dial) -> None:
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        processes = [relay.process, *relay.workers()]
        node = await dial(relay.port)
        node.send(CALL)
        await (await upstream.accept()).message()
        os.killpg(relay.process.pid, signal.SIGINT)
        await asyncio.sleep(0.5)
        assert relay.process.is_running()
        os.killpg(relay.process.pid, signal.SIGINT)
        started = time.monotonic()
        await off(relay.exit_code)
        assert time.monotonic() - started < 15  # of 20
        assert nothing_left(relay, processes)
        with suppress(CutError):
            await node.message()


async def test_a_stop_leaves_neither_a_process_nor_a_file(tmp_path: Path) -> None:
    async with superlink() as (port, _), relay_to(tmp_path, port) as relay:
        processes = [relay.process, *relay.workers()]
        assert len(processes) == 3
        assert len(relay.leftovers()) == 1
        assert await off(relay.stop) == 0
        assert nothing_left(relay, processes)


@pytest.mark.parametrize("which", ["listener", "admin"])
def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        relay = RelayProcess(tmp_path, 1)
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        if which == "listener":
            relay.settings["listeners"] = [{"address": address}]
        else:
            relay.settings["admin"] = {"address": address}
        try:
            relay.start(ready=False)
            assert relay.exit_code(30) != 0
        finally:
            relay.end()
    text = relay.log.read_text()
    assert address.partition(":")[2] in text
    assert "in use" in text
    assert "Traceback" not in text
    assert relay.leftovers() == []


def test_wrong_settings_are_a_clear_error_and_start_nothing(tmp_path: Path) -> None:
    relay = RelayProcess(tmp_path, 1, workers=0, limits={"max_body": "many"})
    try:
        relay.start(ready=False)
        assert relay.exit_code() == 2
    finally:
        relay.end()
    text = relay.log.read_text()
    assert "workers" in text
    assert "limits.max_body" in text
    assert "Traceback" not in text
    assert relay.leftovers() == []


# -- health and metrics ---------------------------------------------------------------------------------


async def test_a_relay_is_ready_until_it_is_told_to_stop_and_alive_until_it_ends(
    tmp_path: Path, dial: Dial
) -> None:
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        assert (await off(relay.get, "/livez"))[0] == 200
        status, text = await off(relay.get, "/readyz")
        assert (status, json.loads(text)["ready"]) == (200, True)
        node = await dial(relay.port)
        node.send(CALL)
        peer = await upstream.accept()
        await peer.message()
        relay.signal(signal.SIGTERM)
        await off(relay.until, lambda: relay.get("/readyz")[0] == 503, 15)
        status, text = await off(relay.get, "/readyz")
        assert json.loads(text)["ready"] is False
        assert (await off(relay.get, "/livez"))[0] == 200
        await off(relay.until, lambda: relay.metric("relay_calls_in_flight") == 1, 15)
        peer.send(response(b"abc"))
        assert (await node.message()).body == b"abc"
        assert await off(relay.exit_code) == 0


async def test_an_upstream_that_is_down_does_not_make_the_relay_unready(tmp_path: Path) -> None:
    async with relay_to(tmp_path, free_port(), retry={"enabled": False}) as relay:
        answer = await once(relay.port, b"abc")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert (await off(relay.get, "/readyz"))[0] == 200


async def test_metrics_are_the_sum_over_all_workers(tmp_path: Path) -> None:
    async with superlink() as (port, seen), relay_to(tmp_path, port, workers=3) as relay:
        load = Load(relay.port, 24)
        await load.answered(1500)
        tally = await load.ended(stop=True)
        assert not tally.lost
        # each worker writes once a second
        await off(relay.until, lambda: relay.metric("relay_calls_total") == seen.total(), 15)
        for _ in range(6):  # whichever worker is asked
            assert await off(relay.metric, "relay_calls_total") == seen.total()
        assert (
            await off(lambda: relay.metric("relay_calls_total", method="PushObject", outcome="ok"))
            == seen.total()
        )
        passed = sum(map(len, seen))
        for way in ("in", "out"):
            assert await off(partial(relay.metric, "relay_bytes_total", direction=way)) == passed
        assert await off(relay.metric, "relay_calls_in_flight") == 0
        assert await off(relay.metric, "relay_call_duration_seconds_count") == seen.total()


def test_no_metric_is_made_before_the_workers() -> None:
    """One without labels would count in the memory of its process, and no scrape would show it."""
    code = "import sys, relay.__main__, relay.server; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_metrics_without_labels_are_shown(tmp_path: Path) -> None:
    async with relay_to(tmp_path, free_port(), workers=2) as relay:
        await off(relay.until, lambda: relay.metric("relay_concurrency_limit") == 2 * 16, 15)
        assert "relay_queue_seconds_count" in (await off(relay.get, "/metrics"))[1]


async def test_counts_survive_a_reload(tmp_path: Path) -> None:
    async with superlink() as (port, seen), relay_to(tmp_path, port) as relay:
        for _ in range(10):
            await once(relay.port, b"abc")
        relay.signal(signal.SIGHUP)
        await off(relay.until, lambda: relay.count("worker serves") == 4 and len(relay.workers()) == 2)
        for _ in range(10):
            await once(relay.port, b"abc")
        assert seen.total() == 20
        await off(relay.until, lambda: relay.metric("relay_calls_total") == 20)


async def test_strays_are_counted_by_what_they_got(tmp_path: Path, dial: Dial) -> None:
    async with relay_to(tmp_path, free_port()) as relay:
        for data, times in ((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 3), (b"\x16\x03\x01garbage\r\n\r\n", 2)):
            for _ in range(times):
                peer = await dial(relay.port)
                peer.send(data)
                await peer.rest()
        assert await off(lambda: relay.metric("relay_strays_total", answer="404")) == 3
        assert await off(lambda: relay.metric("relay_strays_total", answer="dropped")) == 2
