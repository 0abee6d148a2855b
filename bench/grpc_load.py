"""The load generator of gRPC nodes: `python -m bench.grpc_load SCENARIO PORT WARM SECONDS FIRST_NODE_ID`.

Towards the runner it is as `bench.load`. Each node is a grpc.aio channel of its own, which is one connection:
grpcio is what SuperNodes are made of, so its frames and windows are those that a proxy meets.
"""

import asyncio
import itertools
import json
import sys
import time
from dataclasses import asdict
from typing import Any, Final

import uvloop
from grpc import aio

from bench import messages
from bench.load import NO_PROGRESS, WARM_CALLS, LoadError, LoadResult, Plan
from bench.scenarios import SCENARIOS, Scenario
from bench.stats import percentile
from bench.wire import KEPT

#: Of Flower's client, and: one connection for each channel.
OPTIONS: Final = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
_HEARTBEAT_SECONDS: Final = 5.0  # Flower gives no other call a deadline


class Node:
    """One node: its message, its channel."""

    def __init__(self, plan: Plan, scenario: Scenario, *, node_id: int, port: int) -> None:
        """Render the message; the channel connects with its first call."""
        self._plan = plan
        self._message = b"".join(plan.message(node_id))
        self._metadata = messages.metadata(node_id)
        self._timeout = _HEARTBEAT_SECONDS if scenario.path == messages.HEARTBEAT else None
        self._first = True
        self.channel = aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS)
        self._stub: Any = self.channel.unary_unary(messages.GRPC[scenario.path])
        self.hashed = 0

    async def call(self) -> None:
        """Make the call and check its answer.

        Raises:
            LoadError: it failed, or the answer is not the one the stub gave.
        """
        try:
            answer: bytes = await self._stub(self._message, metadata=self._metadata, timeout=self._timeout)
        except aio.AioRpcError as error:
            raise LoadError(f"{error.code().name}: {error.details()}") from error
        self.check(answer)

    def check(self, answer: bytes) -> None:
        """Compare size and beginning; the first object also with its hash.

        Raises:
            LoadError: it is another one.
        """
        expected = self._plan.answer
        if len(answer) != len(expected) or answer[:KEPT] != expected[:KEPT]:
            raise LoadError(
                f"answer with {len(answer)} bytes, expected {len(expected)}; it begins with {answer[:100]!r}"
            )
        if self._first and self._plan.content_at is not None:
            if messages.object_id_of(answer[self._plan.content_at :]) != self._plan.object_id:
                raise LoadError("the content of an answer was changed on its way")
            self.hashed += 1
        self._first = False


class GrpcLoad:
    """All nodes of one run."""

    def __init__(self, scenario: Scenario, *, port: int, first_node_id: int) -> None:
        """Make the nodes. Must be made inside the running loop."""
        plan = Plan(scenario)
        self._scenario = scenario
        self._nodes = [
            Node(plan, scenario, node_id=first_node_id + index, port=port)
            for index in range(scenario.connections)
        ]

    async def warm(self, seconds: float) -> None:
        """Make calls for `seconds` and at least a few per connection; nothing is in flight afterwards."""
        await self._run(seconds, at_least=WARM_CALLS)

    async def measure(self, seconds: float) -> LoadResult:
        """Make calls for `seconds`, wait for the last answers, and count."""
        cpu, began = time.process_time(), time.perf_counter()
        latencies = await self._run(seconds, at_least=0)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        latencies.sort()
        return LoadResult(
            calls=len(latencies),
            seconds=took,
            cpu=cpu,
            p50=percentile(latencies, 0.50),
            p99=percentile(latencies, 0.99),
            hashed=sum(node.hashed for node in self._nodes),
            reconnects=0,  # grpcio opens another connection without a word
        )

    async def close(self) -> None:
        """Close all connections."""
        for node in self._nodes:
            await node.channel.close()

    async def _run(self, seconds: float, *, at_least: int) -> list[float]:
        latencies: list[float] = []
        end = time.perf_counter() + seconds
        share = self._scenario.max_calls // len(self._nodes)

        async def repeat(node: Node) -> None:
            for calls in itertools.count():
                began = time.perf_counter()
                if calls >= share or (began >= end and calls >= at_least):
                    return
                await node.call()
                latencies.append(time.perf_counter() - began)

        try:
            async with asyncio.timeout(seconds + NO_PROGRESS), asyncio.TaskGroup() as group:
                for node in self._nodes:
                    group.create_task(repeat(node))
        except TimeoutError:
            raise LoadError(f"calls were not answered within {NO_PROGRESS:.0f} s") from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return latencies


async def main(scenario: str, port: str, warm: str, seconds: str, first_node_id: str) -> int:
    """Warm up, wait for the word, measure, report."""
    load = GrpcLoad(SCENARIOS[scenario], port=int(port), first_node_id=int(first_node_id))
    try:
        await load.warm(float(warm))
        print("ready", flush=True)
        if not await asyncio.to_thread(sys.stdin.readline):
            return 1
        print(json.dumps(asdict(await load.measure(float(seconds)))), flush=True)
    except LoadError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    finally:
        await load.close()
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main(*sys.argv[1:])))
