"""A reload is a takeover: who accepts goes on until all workers with the new settings serve."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest

from relay import takeover
from relay.listening import Sockets
from relay.settings import Settings
from tests.relay_process import RelayProcess, free_port
from tests.sockets import CutError, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

off = asyncio.to_thread

#: The relay with workers that wait while there is a file `slow`, and fail while there is one `fail`.
HINDERED = """
import os, sys, time
from pathlib import Path
from relay import server, takeover, worker
from relay.settings import load
config = Path(sys.argv[1])
original = worker._prepare_metrics
def hindered():
    while (config.parent / "slow").exists():
        time.sleep(0.05)
    if (config.parent / "fail").exists():
        raise MemoryError("cannot allocate")
    original()
worker._prepare_metrics = hindered
takeover.START_SECONDS = float(os.environ.get("START", "30"))
server.serve(lambda: load(config, {}))
"""


@asynccontextmanager
async def hindered(directory: Path, **settings: Any) -> AsyncIterator[RelayProcess]:
    chosen: dict[str, Any] = {"mode": "maintenance", "pid_file": str(directory / "relay.pid"), **settings}
    relay = RelayProcess(directory, 1, program=HINDERED, **chosen)
    try:
        await off(relay.start)
        yield relay
    finally:
        await off(relay.end)


class Nodes:
    """Nodes that ask on a connection of their own each time, as REST nodes do.

    Attributes:
        slowest: how long an answer took, in seconds.
        answered: how many there were.
        lost: what went wrong.
    """

    def __init__(self, port: int, nodes: int = 4) -> None:
        self.slowest = 0.0
        self.answered = 0
        self.lost: list[str] = []
        self._port = port
        self._stopped = False
        self._tasks = [asyncio.create_task(self._node()) for _ in range(nodes)]

    async def _node(self) -> None:
        while not self._stopped:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(10):
                    await self._ask()
            except (CutError, OSError) as error:
                self.lost.append(repr(error))
            else:
                self.answered += 1
                self.slowest = max(self.slowest, time.monotonic() - begun)
            await asyncio.sleep(0.02)

    async def _ask(self) -> None:
        peer = await connect(self._port)
        try:
            peer.send(
                b"POST /v1/fleet/push-messages HTTP/1.1\r\nHost: relay\r\n"
                b"Content-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
            )
            await peer.message()
        finally:
            peer.writer.transport.abort()
            await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)


def state(relay: RelayProcess) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(relay.get("/readyz")[1])
    return said


async def until(relay: RelayProcess, condition: Any, timeout: float = 30.0) -> None:
    await off(relay.until, condition, timeout)


async def test_nobody_waits_for_workers_that_start_slowly(tmp_path: Path) -> None:
    async with hindered(tmp_path) as relay, Nodes(relay.port) as nodes:
        old = {worker.pid for worker in relay.workers()}
        (tmp_path / "slow").touch()
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: len(relay.workers()) == 4)
        answered = nodes.answered
        await asyncio.sleep(2.0)
        assert nodes.answered > answered + 20
        assert old <= {worker.pid for worker in relay.workers()}
        said = await off(state, relay)
        assert (said["generation"], said["serving"], said["reloading"]) == (1, 0, True)
        (tmp_path / "slow").unlink()
        await until(relay, lambda: state(relay)["serving"] == 1)
        await until(relay, lambda: old.isdisjoint({worker.pid for worker in relay.workers()}))
        assert "reloading" not in await off(state, relay)
        await nodes.end()
        assert nodes.lost == []
        assert relay.complaints() == []


async def test_settings_with_which_no_worker_can_start_are_given_up(tmp_path: Path) -> None:
    second = free_port()
    async with hindered(tmp_path) as relay, Nodes(relay.port) as nodes:
        old = {worker.pid for worker in relay.workers()}
        before = list(relay.settings["listeners"])
        (tmp_path / "fail").touch()
        relay.settings["listeners"] = [{"address": f"127.0.0.1:{second}"}]
        relay.settings["pid_file"] = str(tmp_path / "other.pid")
        relay.write()
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: state(relay)["reloads_refused"] == 1)
        said = await off(state, relay)
        assert (said["generation"], said["serving"], said["reloads_refused"]) == (1, 0, 1)
        assert "reloading" not in said
        assert relay.count("reload given up; the workers of before go on") == 1
        assert {worker.pid for worker in relay.workers()} == old
        assert sorted(path.name for path in tmp_path.glob("*.pid")) == ["relay.pid"]
        with pytest.raises(ConnectionRefusedError):
            await connect(second)
        (tmp_path / "fail").unlink()
        # One that dies is replaced by one with the settings of before.
        relay.workers()[0].kill()
        await until(relay, lambda: relay.count("worker serves") == 3)
        await nodes.end()
        assert len([problem for problem in nodes.lost if "Reset" not in problem]) <= 4
        relay.settings["listeners"] = before
        relay.write()
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: state(relay)["serving"] == 2)
        assert not (tmp_path / "relay.pid").exists()
        assert int((tmp_path / "other.pid").read_text()) == relay.process.pid


async def test_workers_that_do_not_come_up_in_time_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("START", "1.5")
    async with hindered(tmp_path) as relay:
        old = {worker.pid for worker in relay.workers()}
        (tmp_path / "slow").touch()
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: state(relay)["reloads_refused"] == 1)
        await until(relay, lambda: {worker.pid for worker in relay.workers()} == old)
        (line,) = relay.complaints()
        assert line["problem"] == "no workers with the new settings served within 1.5 s"


async def test_reloads_that_come_close_together_are_two_at_most_and_end_with_the_newest(
    tmp_path: Path,
) -> None:
    async with hindered(tmp_path, workers=1) as relay, Nodes(relay.port) as nodes:
        (tmp_path / "slow").touch()
        for number in range(8):
            relay.settings["workers"] = 2 if number == 7 else 1
            relay.write()
            relay.signal(signal.SIGHUP)
            await asyncio.sleep(0.05)
        (tmp_path / "slow").unlink()
        await until(relay, lambda: state(relay)["serving"] > 0 and "reloading" not in state(relay))
        await until(relay, lambda: len(relay.workers()) == 2)
        assert (await off(state, relay))["serving"] <= 2
        await nodes.end()
        assert nodes.lost == []


async def test_a_reload_that_hangs_gives_way_to_a_newer_one(tmp_path: Path) -> None:
    async with hindered(tmp_path) as relay:
        (tmp_path / "slow").touch()
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: len(relay.workers()) == 4)
        hanging = {worker.pid for worker in relay.workers()}
        await asyncio.sleep(takeover.APART_SECONDS)
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: state(relay)["generation"] == 2)
        assert len({worker.pid for worker in relay.workers()} & hanging) == 2
        (tmp_path / "slow").unlink()
        await until(relay, lambda: state(relay)["serving"] == 2)
        await until(relay, lambda: hanging.isdisjoint({worker.pid for worker in relay.workers()}))


async def test_a_stop_in_a_reload_waits_for_no_worker_that_starts(tmp_path: Path) -> None:
    async with hindered(tmp_path) as relay, Nodes(relay.port) as nodes:
        (tmp_path / "slow").touch()
        relay.settings["pid_file"] = str(tmp_path / "other.pid")
        relay.write()
        relay.signal(signal.SIGHUP)
        await until(relay, lambda: len(relay.workers()) == 4)
        begun = time.monotonic()
        relay.signal(signal.SIGTERM)
        assert await off(relay.exit_code) == 0
        assert time.monotonic() - begun < 10
        await nodes.end()
        # Whoever waits to be accepted in that moment is reset, and the next is refused.
        assert len([problem for problem in nodes.lost if "Refused" not in problem]) <= 8
        assert not [problem for problem in nodes.lost if "Timeout" in problem]
        assert list(tmp_path.glob("*.pid")) == []
        assert relay.complaints() == []


# -- the parts -----------------------------------------------------------------------------------------


def with_pid_file(path: Path, admin: int = 1) -> Settings:
    return Settings.model_validate({"pid_file": path, "admin": {"address": f"127.0.0.1:{admin}"}})


def test_a_pid_file_is_written_once_and_stays_if_it_stays(tmp_path: Path) -> None:
    path = tmp_path / "relay.pid"
    file = takeover.written(with_pid_file(path))
    assert path.read_text() == f"{os.getpid()}\n"
    path.write_text("other\n")
    again = takeover.written(with_pid_file(path), file)
    assert again is not None
    assert again.fname == str(path)
    assert path.read_text() == "other\n"
    assert takeover.written(Settings(), file) is None


def test_a_pid_file_under_another_name_of_its_own_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    old = takeover.written(with_pid_file(tmp_path / "relay.pid"))
    new = takeover.written(with_pid_file(tmp_path / "run" / ".." / "relay.pid", 2), old)
    takeover.Takeover(takeover.State(Settings(), 0, old), 1, new).keep_pid_file()
    assert (tmp_path / "relay.pid").read_text() == f"{os.getpid()}\n"
    assert (tmp_path / "relay.pid.admin").read_text() == "127.0.0.1:2\n"


def test_where_the_admin_port_is_is_told_when_it_has_moved(tmp_path: Path) -> None:
    path = tmp_path / "relay.pid"
    old = takeover.written(with_pid_file(path, 1))
    new = takeover.written(with_pid_file(path, 2), old)
    assert (tmp_path / "relay.pid.admin").read_text() == "127.0.0.1:1\n"
    takeover.Takeover(takeover.State(Settings(), 0, old), 1, new).keep_pid_file()
    assert (tmp_path / "relay.pid.admin").read_text() == "127.0.0.1:2\n"


def test_a_reload_that_was_given_up_takes_back_the_pid_file_that_it_wrote_and_no_other(
    tmp_path: Path,
) -> None:
    mine = takeover.written(with_pid_file(tmp_path / "relay.pid"))
    for wanted in ("relay.pid", "other.pid"):
        file = takeover.written(with_pid_file(tmp_path / wanted), mine)
        takeover.Takeover(takeover.State(Settings(), 0, mine), 1, file).drop_pid_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["relay.pid", "relay.pid.admin"]


def test_a_reload_leaves_the_pid_file_to_a_newer_one_that_has_it_too(tmp_path: Path) -> None:
    before = takeover.State(Settings(), 0, takeover.written(with_pid_file(tmp_path / "relay.pid")))
    pending = takeover.Takeover(before, 1, takeover.written(with_pid_file(tmp_path / "other.pid")))
    pending.give_way_to(takeover.written(with_pid_file(tmp_path / "other.pid"), before.pid_file))
    assert (tmp_path / "other.pid").exists()
    pending.give_way_to(before.pid_file)
    assert not (tmp_path / "other.pid").exists()


def test_addresses_that_are_held_already_are_no_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        chosen = {"listeners": [{"address": address}], "admin": {"address": f"127.0.0.1:{free_port()}"}}
        settings = Settings.model_validate(chosen)
        sockets = Sockets()
        assert takeover.problems(settings, sockets) == [
            f"{address} cannot be listened on: Address already in use"
        ]
        sockets.hold({address: taken})
        assert takeover.problems(settings, sockets) == []
