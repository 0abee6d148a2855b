"""A message of a GiB over gRPC, through a real worker that lives on, and answers others meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
import pytest

from relay.fleet import Method
from tests.grpc_ends import GrpcNode
from tests.relay_process import RelayProcess
from tests.test_big_bodies import peak

if TYPE_CHECKING:
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
