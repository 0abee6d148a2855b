"""The stub SuperLink that speaks gRPC, a process of its own: `python -m bench.grpc_upstream SCENARIO`.

Towards the runner it is as `bench.upstream`. It is grpc.aio, as Flower's own server is grpcio, so it costs
about as much as the proxies that it stands behind.
"""

import asyncio
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final

import grpc
import uvloop
from grpc import aio

from bench import messages
from bench.scenarios import SCENARIOS, Scenario
from bench.upstream import Expected, Stats, expectations

OPTIONS: Final = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 1000),
]


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Serves each path by the function of bytes that `make` returns for it; None: there is no such method."""

    def __init__(self, make: Callable[[str], Callable[[bytes, Any], Awaitable[bytes]] | None]) -> None:
        """Ask `make` once for each path."""
        self._make = make
        self._made: dict[str, grpc.RpcMethodHandler | None] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Called by grpc.aio for each call."""
        path = details.method
        if path not in self._made:
            handle = self._make(path)
            self._made[path] = None if handle is None else grpc.unary_unary_rpc_method_handler(handle)
        return self._made[path]


class GrpcUpstream:
    """Answers the calls of one scenario, and counts them."""

    def __init__(self, scenario: Scenario) -> None:
        """Nothing is served yet."""
        self._expected = {messages.GRPC[path]: found for path, found in expectations(scenario).items()}
        self._object_id = messages.object_id_of(messages.content_of(scenario.payload))
        self._keys: set[bytes] = set()
        self.stats = Stats()

    def make(self, path: str) -> Callable[[bytes, Any], Awaitable[bytes]] | None:
        """What answers calls of `path`."""
        expected = self._expected.get(path)
        if expected is None:
            return None

        async def handle(request: bytes, context: Any) -> bytes:
            wrong = self.judge(expected, request, context.invocation_metadata())
            if wrong:
                self.stats.refused += 1
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"stub SuperLink: {wrong}")
            self.stats.calls += 1
            return expected.answer

        return handle

    def judge(self, expected: Expected, request: bytes, metadata: Any) -> str | None:
        """What is wrong with a call, if anything. The first content of each node is hashed."""
        key = next((value for name, value in metadata if name == messages.PUBLIC_KEY), None)
        if not key:
            return "lost metadata: no public key"
        if len(request) != expected.size:
            return f"message of {len(request)} bytes, expected {expected.size}"
        if expected.content_at is not None and key not in self._keys:
            self._keys.add(key)
            if hashlib.sha256(memoryview(request)[expected.content_at :]).hexdigest() != self._object_id:
                return "the content was changed on its way"
            self.stats.hashed += 1
        return None


async def serve(scenario: Scenario) -> None:
    """Until the standard input ends."""
    upstream = GrpcUpstream(scenario)
    server = aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Handlers(upstream.make),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ended = asyncio.Event()

    def asked() -> None:
        if sys.stdin.readline():
            print(json.dumps(asdict(upstream.stats)), flush=True)
        else:
            ended.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), asked)
    print(json.dumps({"port": port}), flush=True)
    await ended.wait()
    loop.remove_reader(sys.stdin.fileno())
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve(SCENARIOS[sys.argv[1]]))
