"""Lines come out in order, and nobody waits for them: neither a worker nor the master."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from relay import log_writer
from relay.log_writer import Writer, WriterHandler, handler_for
from tests.relay_process import RelayProcess
from tests.sockets import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

off = asyncio.to_thread


class Pipe:
    """A pipe that is read when the test wants to."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.room: int = fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ)

    def lines(self, number: int) -> list[str]:
        """Wait for so many lines."""
        data = b""
        while data.count(b"\n") < number:
            data += os.read(self.reader, 1 << 20)
        return data.decode().splitlines()

    def rest(self) -> list[str]:
        """Wait for the end; return the lines until then."""
        with os.fdopen(os.dup(self.reader), "rb") as file:
            return file.read().decode().splitlines()

    def close(self) -> None:
        for end in (self.reader, self.writer):
            with contextlib.suppress(OSError):
                os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def gap(lines: int) -> str:
    return f"lost {lines}"


def test_lines_come_out_in_order(pipe: Pipe) -> None:
    writer = Writer(pipe.writer, gap)
    expected = [f"{number} {'x' * (number % 700)}" for number in range(2000)]
    reading: list[str] = []
    thread = threading.Thread(target=lambda: reading.extend(pipe.lines(2000)))
    thread.start()
    for line in expected:
        writer.put(line)
    assert writer.flush()
    thread.join(10)
    assert reading == expected
    assert writer.dropped == 0


def test_nobody_waits_for_a_reader_that_is_stuck_and_what_was_lost_is_told_in_its_place(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "MOST_BYTES", 400_000)
    writer = Writer(pipe.writer, gap)
    begun = time.monotonic()
    for number in range(20_000):
        writer.put(f"{number:05} {'x' * 100}")
    assert time.monotonic() - begun < 5
    lost = writer.dropped
    assert 10_000 < lost < 20_000
    assert not writer.flush(0.1)
    reading: list[str] = []
    thread = threading.Thread(target=lambda: reading.extend(pipe.rest()))
    thread.start()
    assert writer.flush()
    writer.put("after")
    assert writer.flush()
    os.close(pipe.writer)
    thread.join(10)
    told = [line for line in reading if line.startswith("lost ")]
    numbers = [int(line[:5]) for line in reading if line not in (*told, "after")]
    assert reading[-1] == "after"
    assert sum(int(line.split()[1]) for line in told) == lost == writer.dropped
    assert numbers == sorted(set(numbers))
    assert len(numbers) + lost == 20_000
    assert reading[-2] in told or numbers[-1] == 19_999


def test_a_line_is_never_mixed_with_those_of_other_processes(pipe: Pipe) -> None:
    """What is at most PIPE_BUF long is written at once; so the lines of a batch are no more than that."""
    writer = Writer(pipe.writer, gap)
    children = []
    for name in "ab":
        child = os.fork()
        if child == 0:
            for _ in range(3000):
                writer.put(name * 300)
            writer.flush(20)
            os._exit(0)
        children.append(child)
    lines = pipe.lines(6000)
    for child in children:
        os.waitpid(child, 0)
    assert set(lines) == {"a" * 300, "b" * 300}


def test_a_fork_writes_its_own_lines_and_leaves_those_that_wait_to_its_parent(pipe: Pipe) -> None:
    stream = os.fdopen(os.dup(pipe.writer), "w")
    handler = handler_for(stream)
    for number in range(200):
        handler.emit(logging.makeLogRecord({"msg": f"parent {number} {'x' * 1000}"}))
    child = os.fork()
    if child == 0:
        handler.emit(logging.makeLogRecord({"msg": "child"}))
        handler.flush()
        os._exit(0)
    lines = pipe.lines(201)
    os.waitpid(child, 0)
    assert lines.count("child") == 1
    lines.remove("child")
    assert [line.split()[1] for line in lines] == [str(number) for number in range(200)]
    stream.close()


def test_a_reader_that_is_gone_costs_lines_and_nothing_else(pipe: Pipe) -> None:
    writer = Writer(pipe.writer, gap)
    os.close(pipe.reader)
    for _ in range(3):
        writer.put("x")
    begun = time.monotonic()
    writer.flush(20.0)
    assert time.monotonic() - begun < 15.0
    assert writer.dropped == 3


def test_a_pipe_that_another_process_has_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    writer = Writer(pipe.writer, gap)
    for number in range(200):
        writer.put(f"{number} {'x' * 1000}")
    time.sleep(0.1)
    assert [line.split()[0] for line in pipe.lines(200)] == [str(number) for number in range(200)]
    assert writer.flush()
    assert writer.dropped == 0


def test_a_stream_that_is_no_file_is_written_at_once() -> None:
    stream = io.StringIO()
    handler = handler_for(stream)
    handler.emit(logging.makeLogRecord({"msg": "hello"}))
    assert stream.getvalue() == "hello\n"


def test_a_gap_has_the_form_of_the_log(pipe: Pipe) -> None:
    writer = Writer(pipe.writer, gap)
    handler = WriterHandler(writer)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    assert writer.gap(7) == "WARNING relay.logs lines of the log were lost because nobody took them: 7"


#: Says so in the log, then does not catch an exception.
CRASH = """
import structlog
from relay import logs
from relay.settings import Log
logs.configure(Log(format="json"))
for number in range(100):
    structlog.get_logger("a").info("line", number=number)
raise RuntimeError("crashed")
"""


def test_the_last_lines_of_a_process_and_its_crash_come_out() -> None:
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    said = [json.loads(line)["number"] for line in lines if line.startswith("{")]
    assert said == list(range(100))
    assert "RuntimeError: crashed" in lines
    assert done.returncode == 1


async def answered(port: int, calls: int) -> int:
    """Ask so many calls of a relay in maintenance; return how many were answered."""
    peer = await connect(port)
    try:
        for call in range(calls):
            peer.send(
                b"POST /v1/fleet/push-messages HTTP/1.1\r\nHost: relay\r\n"
                b"Content-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
            )
            async with asyncio.timeout(5):
                assert (await peer.message()).status == 503, call
    finally:
        peer.writer.transport.abort()
        await asyncio.sleep(0.01)
    return calls


@pytest.mark.timeout(60)
@pytest.mark.xdist_group("relay-processes")
async def test_a_relay_whose_log_nobody_reads_serves_reloads_replaces_workers_and_stops(
    tmp_path: Path, pipe: Pipe
) -> None:
    relay = RelayProcess(tmp_path, 1, workers=1, mode="maintenance")
    relay.write()
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("RELAY_", "PROM"))}
    environ["TMPDIR"] = str(relay.temporary)
    command = [sys.executable, "-m", "relay", "serve", "-c", str(relay.config)]
    process = psutil.Popen(command, stdout=pipe.writer, stderr=pipe.writer, env=environ)

    async def state(serving: int) -> None:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    if json.loads((await off(relay.get, "/readyz"))[1])["serving"] == serving:
                        return
                await asyncio.sleep(0.05)

    try:
        await state(0)
        for generation in (1, 2):
            assert await answered(relay.port, 400) * 200 > pipe.room
            process.send_signal(signal.SIGHUP)
            await state(generation)
        (worker,) = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE][-1:]
        worker.kill()
        await asyncio.sleep(0.5)
        assert await answered(relay.port, 100)
        process.send_signal(signal.SIGTERM)
        assert await off(process.wait, 20) == 0
    finally:
        for each in [*process.children(recursive=True), process] if process.is_running() else []:
            each.kill()
        process.wait(5)
