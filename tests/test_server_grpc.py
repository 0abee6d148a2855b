"""A real relay that speaks gRPC: what its workers, its reloads and its end mean to calls."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from relay.fleet import Method
from tests.certificates import make_pair
from tests.grpc_ends import GrpcNode, GrpcSuperLink
from tests.relay_process import RelayProcess, free_port
from tests.sockets import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpc import aio

    from tests.grpc_ends import Answered, Asked

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

off = asyncio.to_thread

REQUEST = b"\x0a\x02\x08\x07"


@pytest.fixture
async def superlink() -> AsyncIterator[GrpcSuperLink]:
    async with GrpcSuperLink() as superlink:
        yield superlink


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def started(relay: RelayProcess) -> RelayProcess:
    """Start it, without keeping the loop from answering it."""
    relay.start(ready=False)
    await until(lambda: relay.count("worker serves") >= relay.settings["workers"])
    return relay


class Load:
    """Nodes that ask without a pause.

    Attributes:
        answers: what they got.
    """

    def __init__(self, port: int, nodes: int = 4) -> None:
        self.answers: list[Answered] = []
        self._port = port
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._node()) for _ in range(nodes)]

    async def _node(self) -> None:
        async with GrpcNode(self._port) as node:
            while not self._stop.is_set():
                self.answers.append(await node.ask(Method.PULL_MESSAGES, REQUEST))

    async def end(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    @property
    def codes(self) -> set[str]:
        return {answer.code for answer in self.answers}


@pytest.fixture
async def relay(tmp_path: Path, superlink: GrpcSuperLink) -> AsyncIterator[RelayProcess]:
    relay = RelayProcess(tmp_path, superlink.port, wire="grpc")
    relay.settings["drain"] = {"timeout": 4, "idle_grace": 0.5}
    try:
        yield relay
    finally:
        await off(relay.end)


async def test_a_stop_under_load_loses_no_call(relay: RelayProcess, superlink: GrpcSuperLink) -> None:
    await started(relay)
    load = Load(relay.port)
    await until(lambda: len(load.answers) > 100)
    relay.signal(signal.SIGTERM)
    code = await off(relay.exit_code, 60.0)
    await load.end()
    assert code == 0
    # A call that came too late was told to come back, and one that was carried out got its answer.
    assert load.codes == {"OK", "UNAVAILABLE"}
    assert len(superlink.asked) == sum(answer.code == "OK" for answer in load.answers)
    assert relay.complaints() == []
    assert relay.leftovers() == []


async def test_reloads_under_load_lose_no_call(relay: RelayProcess, superlink: GrpcSuperLink) -> None:
    await started(relay)
    load = Load(relay.port)
    for serving in (4, 6):
        relay.signal(signal.SIGHUP)
        await until(lambda n=serving: relay.count("worker serves") >= n)  # type: ignore[misc]
        await until(lambda: len(relay.workers()) == 2)
    await load.end()
    lost = [answer for answer in load.answers if answer.code != "OK"]
    assert {answer.code for answer in lost} <= {"UNAVAILABLE"}, "a connection that was not accepted any more"
    assert len(lost) <= 4
    assert len(superlink.asked) == len(load.answers) - len(lost)
    assert relay.complaints() == []


class Knocker(threading.Thread):
    """Opens one connection after the other, and notes which were not accepted.

    A thread, so that it knocks while the test waits.

    Attributes:
        knocks: how often it did.
        refused: seconds, on its own clock, at which nobody listened.
    """

    def __init__(self, port: int) -> None:
        super().__init__(name="knocker")
        self.knocks = 0
        self.refused: list[float] = []
        self._port = port
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            self.knocks += 1
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
            except ConnectionRefusedError:
                self.refused.append(time.monotonic())
            time.sleep(0.002)

    def end(self) -> None:
        self._end.set()
        self.join()


async def test_a_port_is_listened_on_throughout_reloads(relay: RelayProcess) -> None:
    """Nodes that connect in that moment, and connections that were told to leave, find somebody."""
    relay.settings["drain"] = {"timeout": 30, "idle_grace": 0.5}
    await started(relay)
    knocker = Knocker(relay.port)
    knocker.start()
    try:
        for serving in (4, 6, 8):
            relay.signal(signal.SIGHUP)
            await until(lambda n=serving: relay.count("worker serves") >= n)  # type: ignore[misc]
            await asyncio.sleep(0.5)
    finally:
        await off(knocker.end)
    assert knocker.knocks > 100
    assert knocker.refused == []
    assert relay.complaints() == []


async def test_a_relay_that_stops_waits_for_no_other_workers(relay: RelayProcess) -> None:
    relay.settings["drain"] = {"timeout": 60, "idle_grace": 0.5}
    await started(relay)
    relay.signal(signal.SIGHUP)
    await until(lambda: relay.count("worker serves") >= 4)
    relay.signal(signal.SIGTERM)
    assert await off(relay.exit_code, 8.0) == 0


@pytest.mark.parametrize("wires", [["grpc"], ["grpc_adapter"]])
async def test_a_stranger_cannot_hold_what_messages_need(
    relay: RelayProcess, tmp_path: Path, wires: list[str]
) -> None:
    """Not by calls that send nothing, and not by calls that send much; he is told at once that he is one."""
    keys = tmp_path / "keys.jsonl"
    listener = {"address": f"127.0.0.1:{relay.port}", "wires": wires, "auth": {"accept": ["api_key"]}}
    relay.settings |= {"listeners": [listener], "keys": {"file": str(keys)}, "workers": 1}
    relay.settings["limits"] = {"max_held": "1 MiB"}
    relay.settings["log"] = {"format": "json", "level": "debug"}
    relay.write()
    create = [sys.executable, "-m", "relay", "keys", "create", "site", "--init", "-c", str(relay.config)]
    await off(partial(subprocess.run, create, check=True, capture_output=True))
    await started(relay)
    path = Method.PUSH_OBJECT.grpc if wires == ["grpc"] else "/flwr.proto.GrpcAdapter/SendReceive"
    async with GrpcNode(relay.port) as node:
        silent = [node.channel.stream_unary(path)(timeout=20) for _ in range(20)]
        wanted = "UNAUTHENTICATED" if wires == ["grpc"] else "UNAVAILABLE"
        assert {(await call.code()).name for call in silent} == {wanted}
        before = relay.workers()[0].memory_info().rss
        answers = await asyncio.gather(*(node.ask(path, b"x" * (64 << 20)) for _ in range(4)))
        assert {answer.code for answer in answers} == {wanted}
        assert relay.workers()[0].memory_info().rss - before < 30 << 20


async def test_a_long_call_is_left_to_its_old_worker(relay: RelayProcess, superlink: GrpcSuperLink) -> None:
    go = asyncio.Event()

    async def answer(asked: Asked, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        if asked.method is Method.PUSH_OBJECT:
            await go.wait()
        return b""

    superlink.answer = answer
    await started(relay)
    async with GrpcNode(relay.port) as node:
        pushing = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x" * 1000))
        await until(lambda: bool(superlink.asked))
        relay.signal(signal.SIGHUP)
        await until(lambda: relay.count("worker serves") >= 4)
        async with GrpcNode(relay.port) as other:
            assert (await other.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
        assert not pushing.done()
        go.set()
        assert (await pushing).code == "OK"


async def test_a_killed_worker_is_replaced(relay: RelayProcess) -> None:
    await started(relay)
    for worker in await off(relay.workers):
        worker.kill()
    await until(lambda: relay.count("worker serves") >= 4)
    async with GrpcNode(relay.port) as node:
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"


async def test_health_checks_hear_of_a_stop_before_it_comes(relay: RelayProcess) -> None:
    relay.settings["drain"] = {"delay": 25, "timeout": 4, "idle_grace": 0.5}
    await started(relay)
    async with GrpcNode(relay.port) as node:
        stub = health_pb2_grpc.HealthStub(node.channel)

        async def health() -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            status: int = answer.status
            return status

        assert await health() == health_pb2.HealthCheckResponse.SERVING
        relay.signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            while await health() == health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.05)
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
    relay.signal(signal.SIGTERM)  # ends the delay
    assert await off(relay.exit_code, 30.0) == 0


async def test_both_kinds_of_ports_lead_to_one_superlink(
    relay: RelayProcess, superlink: GrpcSuperLink
) -> None:
    http = free_port()
    relay.settings["listeners"] = [
        {"address": f"127.0.0.1:{relay.port}", "wires": ["grpc"]},
        {"address": f"127.0.0.1:{http}", "wires": ["http_v1"]},
    ]
    await started(relay)
    async with GrpcNode(relay.port) as node:
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
    peer = await connect(http)

    head = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: relay\r\nContent-Type: application/protobuf\r\n"
    peer.send(head + b"flwr-signature: AP8=\r\nContent-Length: 4\r\n\r\n" + REQUEST)
    message = await peer.message()
    assert (message.status, message.body) == (200, b"")
    assert message.one(b"content-type") == b"application/protobuf"
    assert [asked.data for asked in superlink.asked] == [REQUEST, REQUEST]
    assert dict(superlink.asked[1].metadata)["flwr-signature-bin"] == b"\x00\xff"
    peer.writer.transport.abort()
    await asyncio.sleep(0.01)


async def test_a_port_is_encrypted(relay: RelayProcess, tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    others, other_key = make_pair(tmp_path, "other", host="relay.example")
    tls = {
        "certificate": str(certificate),
        "key": str(key),
        "certificates": [{"certificate": str(others), "key": str(other_key)}],
    }
    relay.settings["listeners"] = [{"address": f"127.0.0.1:{relay.port}", "tls": tls}]
    await started(relay)
    roots = certificate.read_bytes()
    async with GrpcNode(relay.port, roots=roots, host="localhost") as node:
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
    async with GrpcNode(relay.port, roots=others.read_bytes(), name="relay.example") as node:
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"
    async with GrpcNode(relay.port) as plain:
        assert (await plain.ask(Method.PULL_MESSAGES, REQUEST, timeout=2.0)).code != "OK"
    certificate.write_text("no certificate")
    async with GrpcNode(relay.port, roots=roots, host="localhost") as node:
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK", "with the one of before"
    assert not [line for line in relay.lines() if "text" in line], "what gRPC says of it itself is no JSON"


async def test_a_port_that_is_taken_is_a_clear_error(relay: RelayProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", relay.port))
        taken.listen()
        relay.start(ready=False)
        assert await off(relay.exit_code, 30.0) == 1
    assert f"127.0.0.1:{relay.port} cannot be listened on: Address already in use" in relay.log.read_text()


async def test_the_port_of_another_relay_is_not_shared(relay: RelayProcess, tmp_path: Path) -> None:
    await started(relay)
    directory = tmp_path / "other"
    directory.mkdir()
    other = RelayProcess(directory, 1, wire="grpc")
    other.settings["listeners"] = relay.settings["listeners"]
    try:
        other.start(ready=False)
        assert await off(other.exit_code, 30.0) == 1
    finally:
        await off(other.end)


async def test_a_port_does_not_change_from_one_kind_to_the_other(relay: RelayProcess) -> None:
    await started(relay)
    relay.settings["listeners"] = [{"address": f"127.0.0.1:{relay.port}", "wires": ["http_v1"]}]
    relay.write()
    relay.signal(signal.SIGHUP)
    await until(lambda: relay.count("reload refused; the old settings stay") == 1)
    async with GrpcNode(relay.port) as node:
        assert (await node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"


async def test_a_master_knows_nothing_of_grpc() -> None:
    """It would not survive the fork."""
    code = "import sys, relay.server, relay.app; print(any(name.startswith('grpc') for name in sys.modules))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert (await process.communicate())[0].strip() == b"False"
