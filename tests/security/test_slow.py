"""Slow nodes in great number: real slowhttptest against a real relay, while ordinary calls go on.

What it holds is bounded by time, so nothing of it is left soon after, whether the attack has ended or not.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from relay.wireformat import encode_bytes
from tests.relay_process import RelayProcess
from tests.security.corpus import PULL, call, length, push
from tests.security.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

CONNECTIONS = 300
SECONDS = 8
#: How long an ordinary call may take on a busy machine; without an attack it takes milliseconds.
PATIENCE = 3.0
#: After which nothing of a slow node may be left.
HEAD, WINDOW, IDLE = 2.0, 2.0, 2.0
BOUND = 12.0
PULL_CALL = call(length(PULL), body=PULL, start=b"POST /v1/fleet/pull-messages HTTP/1.1")


@pytest.fixture(scope="module")
def slowhttptest() -> str:
    found = shutil.which("slowhttptest")
    if found is None:
        why = "no slowhttptest on the PATH (Debian: apt-get install slowhttptest)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


@contextmanager
def running(folder: Path, **limits: object) -> Iterator[tuple[RelayProcess, Recorder]]:
    """Run a relay with short patience."""
    with Recorder() as upstream:
        relay = RelayProcess(
            folder,
            upstream.port,
            workers=2,
            limits={"head_timeout": HEAD, "rate_window": WINDOW, "min_rate": 1024, **limits},
        )
        relay.settings["upstream"] |= {"idle_timeout": IDLE, "max_connections": 16}
        with relay:
            yield relay, upstream


def held(relay: RelayProcess) -> int:
    """Return how many connections the relay has to nodes, or is closing."""
    return sum(
        entry.laddr.port == relay.port and entry.status not in (psutil.CONN_LISTEN, psutil.CONN_TIME_WAIT)
        for worker in relay.workers()
        for entry in worker.net_connections("tcp4")
    )


def ask(port: int, data: bytes) -> float:
    """Make one ordinary call on a connection of its own; return the seconds that it took."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as node:
        node.settimeout(PATIENCE)
        node.sendall(data)
        answer = node.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
    return time.monotonic() - started


class Asking(threading.Thread):
    """Makes ordinary calls all the time.

    Attributes:
        took: seconds of each.
        failed: what went wrong.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._stop_asking = threading.Event()
        self.took: list[float] = []
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._stop_asking.wait(0.05):
            try:
                self.took.append(ask(self._port, PULL_CALL))
                self.took.append(ask(self._port, call(length())))
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))

    def stop(self) -> None:
        self._stop_asking.set()
        self.join(2 * PATIENCE)
        assert self.failed == []
        assert len(self.took) > 20
        assert max(self.took) < PATIENCE


def wait_for_few(relay: RelayProcess, most: int) -> None:
    end = time.monotonic() + BOUND
    while held(relay) > most:
        assert time.monotonic() < end, f"{held(relay)} connections are still held"
        time.sleep(0.1)


# Slow reading is done by hand below: slowhttptest's way of it needs answers that fill its window.
ATTACKS = {
    "head": "-H -u /v1/fleet/pull-messages -t POST",
    "body": "-B -u /v1/fleet/push-object -f application/protobuf -s 1000",
    "long body": "-B -u /v1/fleet/push-object -f application/protobuf -s 100000",
}


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_slowhttptest_holds_nothing_for_long_and_nobody_up(
    slowhttptest: str, tmp_path: Path, kind: str
) -> None:
    mode, _, path, *more = ATTACKS[kind].split()
    with running(tmp_path) as (relay, upstream):
        command = [slowhttptest, mode, "-u", f"http://127.0.0.1:{relay.port}{path}", *more]
        command += ["-c", str(CONNECTIONS), "-r", str(CONNECTIONS), "-i", "1", "-x", "4", "-l", str(SECONDS)]
        asking = Asking(relay.port)
        attack = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            asking.start()
            peak, end = 0, time.monotonic() + SECONDS
            while attack.poll() is None and time.monotonic() < end:
                peak = max(peak, held(relay))
                time.sleep(0.05)
            # Most attacks are over by now since the relay has ended all of their connections.
            asking.stop()
        finally:
            attack.kill()
            attack.wait()
        assert peak > CONNECTIONS // 3  # the attack was one
        wait_for_few(relay, 2)
        assert upstream.wrong == []
        assert {seen.method for seen in upstream.seen} == {"pull-messages", "push-object"}
        ask(relay.port, PULL_CALL)
        relay.until(lambda: relay.metric("relay_calls_in_flight") == 0)


# -- the same by hand, where it says more ---------------------------------------------------------------


@contextmanager
def many(port: int, data: bytes, *, receive_buffer: int | None = None) -> Iterator[list[socket.socket]]:
    """Open connections that all send `data`."""
    with ExitStack() as stack:
        nodes = []
        for _ in range(64):
            node = stack.enter_context(socket.socket())
            if receive_buffer is not None:
                node.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            node.connect(("127.0.0.1", port))
            node.sendall(data)
            nodes.append(node)
        yield nodes


def trickle(nodes: list[socket.socket], stop: threading.Event, piece: bytes) -> None:
    """Send a piece on each connection, or read one byte if there is none to send, again and again."""
    while not stop.wait(0.2):
        for node in nodes:
            with suppress(OSError):
                node.settimeout(0.001)
                if piece:
                    node.sendall(piece)
                else:
                    node.recv(1)


@pytest.mark.parametrize("kind", ["body", "chunks", "reading"])
def test_slow_nodes_whose_calls_are_sound_give_their_connections_to_the_superlink_back(
    tmp_path: Path, kind: str
) -> None:
    """16 connections to the SuperLink a worker, and 64 nodes that want to keep one each."""
    begun = push(b"x" * 900_000)[:2000]
    data, piece = {
        "body": (call(b"Content-Length: 900129", body=begun), b"x"),
        "chunks": (
            call(b"Transfer-Encoding: chunked", body=b"%x\r\n%b\r\n" % (len(begun), begun)),
            b"1\r\nx\r\n",
        ),
        "reading": (call(length(PULL), body=PULL, start=b"POST /v1/fleet/pull-messages HTTP/1.1"), b""),
    }[kind]
    with running(tmp_path) as (relay, upstream):
        if kind == "reading":
            answer = encode_bytes(1, bytes(9 << 20))  # more than is awaited whole
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\nContent-Length: %d\r\n\r\n"
            upstream.answers["pull-messages"] = head % len(answer) + answer
        stop = threading.Event()
        small = 4096 if kind == "reading" else None
        with many(relay.port, data, receive_buffer=small) as nodes:
            trickling = threading.Thread(target=trickle, args=(nodes, stop, piece), daemon=True)
            trickling.start()
            relay.until(lambda: relay.metric("relay_calls_in_flight") > 20)
            relay.until(lambda: relay.metric("relay_calls_in_flight") == 0, timeout=4 * BOUND)
            # They are all still there, and still send or read.
            for _ in range(10):
                ask(relay.port, call(length()))
            stop.set()
            trickling.join()
        wait_for_few(relay, 0)
        assert upstream.wrong == []


def test_a_slow_node_that_keeps_to_the_rate_is_served(tmp_path: Path) -> None:
    """16 KiB/s is a poor line, and no attack."""
    body = push(os.urandom(80_000))
    with running(tmp_path) as (relay, upstream), socket.create_connection(("127.0.0.1", relay.port)) as node:
        data = call(length(body), body=body)
        for at in range(0, len(data), 1600):
            node.sendall(data[at : at + 1600])
            time.sleep(0.1)
        node.settimeout(PATIENCE)
        assert node.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        assert upstream.seen[-1].body == body


def test_more_connections_than_allowed_take_nothing_from_those_that_are_served(tmp_path: Path) -> None:
    with running(tmp_path, connections=20) as (relay, _), ExitStack() as stack:
        first = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
        first.sendall(call(length()))
        assert first.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
        relay.until(lambda: held(relay) <= 2 * 2 * 20)
        first.sendall(call(length()))
        assert first.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        relay.until(lambda: held(relay) <= 2 * 20)  # those beyond the limit that say nothing are closed
