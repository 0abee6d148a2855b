"""A message of a GiB over gRPC, through a real worker that lives on, and answers others meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import pytest

from relay.fleet import Method
from tests.grpc_ends import Asked, GrpcNode, GrpcSuperLink
from tests.relay_process import RelayProcess, free_port
from tests.test_big_bodies import REQUEST as POST
from tests.test_big_bodies import BigSuperlink, Wire, blocks, digest_of, peak

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("relay-processes")]

off = asyncio.to_thread

GIB = 1 << 30
#: A relay, a SuperLink and a node hold it, each of them several times for a moment.
NEEDED = 14 * GIB
REQUEST = b"\x0a\x02\x08\x07"

#: Takes what is pushed and gives as much, and says its port.
SUPERLINK = """
import asyncio, sys
from relay.fleet import Method
from tests.grpc_ends import GrpcSuperLink
size = int(sys.argv[1])

async def main():
    async with GrpcSuperLink() as superlink:
        async def answer(asked, _):
            superlink.asked.clear()
            if asked.method is Method.PULL_OBJECT:
                return bytes(size)
            return len(asked.data).to_bytes(8) if asked.method is Method.PUSH_OBJECT else b"\\x08\\x01"
        superlink.answer = answer
        print(superlink.port, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

#: Asks once, and says what came of it: the status, and how long the answer was or what it says.
NODE = """
import asyncio, sys
from relay.fleet import Method
from tests.grpc_ends import GrpcNode
port, method, size = int(sys.argv[1]), Method[sys.argv[2]], int(sys.argv[3])

async def main():
    async with GrpcNode(port) as node:
        answer = await node.ask(method, bytes(size), timeout=170)
        data = answer.data
        print(answer.code, int.from_bytes(data) if len(data) == 8 else len(data), flush=True)

asyncio.run(main())
"""


def started(stack: ExitStack, program: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, args)]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    return process


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


async def heartbeats(port: int, until: asyncio.Event) -> list[str]:
    codes = []
    async with GrpcNode(port) as node:
        while not until.is_set():
            codes.append((await node.ask(Method.SEND_NODE_HEARTBEAT, REQUEST, timeout=30)).code)
            await asyncio.sleep(0.1)
    return codes


@pytest.mark.parametrize(("method", "size"), [(Method.PUSH_OBJECT, GIB), (Method.PULL_OBJECT, 4)])
async def test_a_message_of_a_gib_passes_and_its_worker_lives(
    tmp_path: Path, method: Method, size: int
) -> None:
    if (free := psutil.virtual_memory().available) < NEEDED:
        pytest.skip(f"{free >> 20} MiB of memory are free, and it needs {NEEDED >> 20}")
    with ExitStack() as stack:
        superlink = started(stack, SUPERLINK, GIB)
        (port,) = await off(said, superlink)
        relay = RelayProcess(tmp_path, int(port), workers=1, wire="grpc")
        relay.settings["listeners"][0]["wires"] = ["grpc"]
        stack.callback(relay.end)
        await off(relay.start)
        (worker,) = relay.workers()
        over = asyncio.Event()
        others = asyncio.create_task(heartbeats(relay.port, over))
        node = started(stack, NODE, relay.port, method.name, size)
        assert await off(said, node) == ["OK", str(GIB)]
        over.set()
        codes = Counter(await others)
        print(f"{codes}, peak {(await off(peak, relay)) >> 20} MiB")
        assert codes.keys() <= {"OK", "UNAVAILABLE"}, "a heartbeat survives no other status"
        assert codes["OK"] > codes["UNAVAILABLE"]
        assert await off(peak, relay) < 6 * GIB
        assert [each.pid for each in relay.workers()] == [worker.pid]
        assert relay.complaints() == []


# -- many at a time -------------------------------------------------------------------------------------

MIB = 1 << 20
LONG, HELD = 64 * MIB, 64 * MIB
#: What a worker may have for so much that it holds: each byte twice, on its way to the SuperLink.
MOST = 2 * (HELD + LONG) + 150 * MIB


class BothWires(RelayProcess):
    """A relay that listens for gRPC at `grpc_port`, and for HTTP at `port`."""

    def __init__(self, directory: Path, upstream: int) -> None:
        super().__init__(directory, upstream, workers=1, wire="grpc", limits={"max_held": HELD})
        self.settings["limits"]["check_calls"] = False
        self.settings["listeners"][0]["wires"] = ["http_v1"]
        self.grpc_port = free_port()
        listener = {"address": f"127.0.0.1:{self.grpc_port}", "wires": ["grpc", "grpc_adapter"]}
        self.settings["listeners"].append(listener)


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[BothWires]:
    """A relay for both wires that holds 64 MiB; its SuperLink takes a second for what is pushed."""

    async def slow(asked: Asked, _: object) -> bytes:
        superlink.asked.clear()
        if asked.method is Method.PUSH_OBJECT:
            await asyncio.sleep(1.0)
            assert len(asked.data) == LONG
        return b"\x08\x01"

    async with GrpcSuperLink() as superlink:
        superlink.answer = slow
        relay = BothWires(tmp_path, superlink.port)
        try:
            await off(relay.start)
            yield relay
        finally:
            await off(relay.end)


async def test_pushes_at_a_time_are_held_to_the_bound_and_all_arrive(relay: BothWires) -> None:
    async def push(node: GrpcNode) -> None:
        async with node:
            while (answer := await node.ask(Method.PUSH_OBJECT, data, timeout=170)).code != "OK":
                assert answer.code == "UNAVAILABLE"
                await asyncio.sleep(0.5)

    data = bytes(LONG)
    await asyncio.gather(*(push(GrpcNode(relay.grpc_port)) for _ in range(12)))
    print(f"peak {(most := await off(peak, relay)) >> 20} of {MOST >> 20} MiB")
    assert most < MOST
    assert relay.complaints() == []


async def test_long_small_calls_are_not_held(relay: BothWires) -> None:
    data = bytes(100 * MIB)
    nodes = [GrpcNode(relay.grpc_port) for _ in range(8)]
    answers = await asyncio.gather(
        *(node.ask(Method.SEND_NODE_HEARTBEAT, data, timeout=100) for node in nodes)
    )
    await asyncio.gather(*(node.channel.close() for node in nodes))
    print(f"peak {(most := await off(peak, relay)) >> 20} MiB")
    assert {answer.code for answer in answers} == {"UNAVAILABLE"}
    assert most < 150 * MIB


def upload(port: int) -> None:
    """Push in chunks, over HTTP, until it is taken."""
    while True:
        wire = Wire(socket.create_connection(("127.0.0.1", port)))
        with contextlib.closing(wire), contextlib.suppress(OSError):
            wire.send(POST % b"push-object", LONG, chunked=True)
            head = wire.head()
            if head.startswith(b"http/1.1 200 "):
                return
            assert head.startswith(b"http/1.1 503 ")
        time.sleep(0.5)


async def test_uploads_of_unknown_length_are_held_to_the_bound_and_all_arrive(relay: BothWires) -> None:
    await asyncio.gather(*(off(upload, relay.port) for _ in range(8)))
    print(f"peak {(most := await off(peak, relay)) >> 20} of {MOST >> 20} MiB")
    assert most < MOST
    assert relay.complaints() == []


# -- towards a SuperLink that takes and gives pieces ----------------------------------------------------


@pytest.mark.parametrize("method", [Method.PUSH_OBJECT, Method.PULL_OBJECT], ids=["up", "down"])
async def test_what_an_http_superlink_takes_and_gives_is_never_held(tmp_path: Path, method: Method) -> None:
    superlink = BigSuperlink(LONG, chunked=False)
    relay = RelayProcess(tmp_path, superlink.port, workers=1, limits={"max_held": MIB, "check_calls": False})
    relay.settings["listeners"][0]["wires"] = ["grpc"]
    up = method is Method.PUSH_OBJECT
    data = b"".join(blocks(LONG))
    nodes = [GrpcNode(relay.port) for _ in range(8)]
    try:
        await off(relay.start)
        answers = await asyncio.gather(
            *(node.ask(method, data if up else REQUEST, timeout=100) for node in nodes)
        )
        assert {answer.details for answer in answers} == {""}
        assert {(answer.code, answer.data == (b"" if up else data)) for answer in answers} == {("OK", True)}
        assert superlink.pushed == ([(LONG, digest_of(LONG))] * 8 if up else [])
        print(f"peak {(most := await off(peak, relay)) >> 20} MiB")
        assert most < 120 * MIB
        assert relay.complaints() == []
    finally:
        await asyncio.gather(*(node.channel.close() for node in nodes))
        await off(relay.end)
        superlink.close()
