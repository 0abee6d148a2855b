"""A real relay that speaks gRPC: what its workers, its reloads and its end mean to calls."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
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
    relay.settings["drain"] = {"delay": 3, "timeout": 4, "idle_grace": 0.5}
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
