"""The master outlives what happens to its workers and its host."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from relay.master import pause_after
from tests.relay_process import RelayProcess
from tests.sockets import Listener, Peer, connect, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

off = asyncio.to_thread

CALL = (
    b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: relay\r\n"
    b"Content-Type: application/protobuf\r\nContent-Length: 3\r\n\r\nabc"
)

#: The relay, impatient: with workers that fail while there is a file `fail`, and wait for a processor all the
#: time while there is one `busy`, and a master whose wall clock is an hour ahead while there is one `jump`.
ODD = """
import os, sys, time
from pathlib import Path
from relay import master, processor, server, worker
from relay.settings import load
config = Path(sys.argv[1])
server.HUNG_SECONDS = 5
master.AWAY_SECONDS = 4
busy = config.parent / "busy"
master.Waits = lambda: processor.Waits(lambda _: time.monotonic() if busy.exists() else 0.0)
original = worker._prepare_metrics
def prepare():
    if (config.parent / "fail").exists():
        raise MemoryError("cannot allocate")
    original()
worker._prepare_metrics = prepare
me, real = os.getpid(), time.time
time.time = lambda: real() + 3600 * (os.getpid() == me and (config.parent / "jump").exists())
server.serve(lambda: load(config, {}))
"""


@asynccontextmanager
async def odd(directory: Path, upstream: int = 1, **settings: Any) -> AsyncIterator[RelayProcess]:
    relay = RelayProcess(directory, upstream, program=ODD, **settings)
    try:
        await off(relay.start)
        yield relay
    finally:
        await off(relay.end)


async def ask(port: int) -> Peer:
    peer = await connect(port)
    peer.send(CALL)
    return peer


async def close(peer: Peer) -> None:
    peer.writer.transport.abort()
    await asyncio.sleep(0.01)


async def until(relay: RelayProcess, condition: Any, timeout: float = 30.0) -> None:
    await off(relay.until, condition, timeout)


def test_the_pause_after_a_failed_start_grows_to_a_bound_and_has_no_last() -> None:
    assert [pause_after(failures) for failures in (1, 2, 6, 5000)] == [0.2, 0.4, 5.0, 5.0]


def pids(relay: RelayProcess) -> set[int]:
    return {worker.pid for worker in relay.workers()}


async def test_workers_outlive_a_host_that_stands_still_and_one_that_hangs_does_not(tmp_path: Path) -> None:
    async with odd(tmp_path) as relay:
        workers = pids(relay)
        processes = [relay.process, *relay.workers()]
        for process in processes:
            process.suspend()
        await asyncio.sleep(8.0)
        processes[0].resume()  # the master first, which finds workers that have said nothing for 8 s
        await asyncio.sleep(1.0)
        for process in processes[1:]:
            process.resume()
        await asyncio.sleep(2.5)
        assert pids(relay) == workers
        assert [line["event"] for line in relay.complaints()] == [
            "the host stood still; workers get a new period"
        ]
        processes[1].suspend()
        await until(relay, lambda: relay.count("worker serves") == 3)
        await until(relay, lambda: processes[1].pid not in pids(relay))


async def test_a_worker_that_gets_no_processor_is_not_killed_for_its_silence(tmp_path: Path) -> None:
    async with odd(tmp_path, workers=1) as relay:
        (worker,) = relay.workers()
        (tmp_path / "busy").touch()
        await asyncio.sleep(2)
        worker.suspend()
        await asyncio.sleep(9)
        assert pids(relay) == {worker.pid}
        (tmp_path / "busy").unlink()
        await until(relay, lambda: worker.pid not in pids(relay))


async def test_a_clock_that_is_set_in_a_drain_cuts_no_call(tmp_path: Path) -> None:
    async with Listener() as upstream, odd(tmp_path, upstream.port) as relay:
        node = await ask(relay.port)
        peer = await upstream.accept()
        await peer.message()
        relay.signal(signal.SIGTERM)
        await until(relay, lambda: relay.get("/readyz")[0] == 503)
        (tmp_path / "jump").touch()
        await asyncio.sleep(1.0)
        peer.send(response(b"late"))
        assert (await node.message()).body == b"late"
        await close(node)
        assert await off(relay.exit_code) == 0


async def test_a_worker_that_dies_while_a_balancer_is_given_time_is_replaced(tmp_path: Path) -> None:
    drain = {"delay": 60, "timeout": 5, "idle_grace": 0.1}
    async with odd(tmp_path, mode="maintenance", drain=drain) as relay:
        relay.signal(signal.SIGTERM)
        await until(relay, lambda: relay.get("/readyz")[0] == 503)
        for number, worker in enumerate(relay.workers(), start=3):
            worker.kill()
            await until(relay, lambda number=number: relay.count("worker serves") == number)
        await until(relay, lambda: len(relay.process.children()) == 2)  # none is left dead, either
        node = await ask(relay.port)
        assert (await node.message()).status == 503
        await close(node)
        relay.signal(signal.SIGTERM)
        assert await off(relay.exit_code) == 0


async def test_workers_that_cannot_start_end_the_relay_at_its_start_alone(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    relay = RelayProcess(tmp_path, 1, program=ODD)
    try:
        relay.start(ready=False)
        assert await off(relay.exit_code) == 3
    finally:
        relay.end()
    (tmp_path / "fail").unlink()
    async with odd(tmp_path, mode="maintenance") as relay:
        (tmp_path / "fail").touch()
        (one, other) = relay.workers()
        booted = relay.count("worker serves")
        one.kill()
        begun = time.monotonic()
        await until(relay, lambda: "cannot allocate\n" in relay.log.read_text())
        await asyncio.sleep(4.0)
        failed = relay.log.read_text().count("cannot allocate\n")
        assert other.pid in pids(relay)
        assert 1 <= failed <= 2 + 2 * (time.monotonic() - begun), "each after a longer pause"
        node = await ask(relay.port)
        assert (await node.message()).status == 503
        await close(node)
        (tmp_path / "fail").unlink()
        await until(relay, lambda: relay.count("worker serves") == booted + 1)


async def test_a_temporary_directory_that_is_gone_keeps_the_relay_from_nothing_but_starting_workers(
    tmp_path: Path,
) -> None:
    async with odd(tmp_path, mode="maintenance") as relay:
        shutil.rmtree(relay.temporary)
        relay.workers()[0].kill()
        await until(relay, lambda: relay.count("no worker can be started") == 2)
        node = await ask(relay.port)
        assert (await node.message()).status == 503
        await close(node)
        relay.temporary.mkdir()
        await until(relay, lambda: relay.count("worker serves") == 3)
        assert await off(relay.stop) == 0
        assert relay.leftovers() == []


async def test_a_page_of_metrics_is_there_again_when_somebody_has_removed_its_directory(
    tmp_path: Path,
) -> None:
    async with odd(tmp_path, mode="maintenance") as relay:
        (name,) = relay.leftovers()
        shutil.rmtree(relay.temporary / name)
        await until(relay, lambda: relay.count("the directory of metrics was removed") == 1)
        assert (await off(relay.get, "/metrics"))[0] == 200
        assert relay.count("worker serves") == 2, "for which no worker had to be started"
