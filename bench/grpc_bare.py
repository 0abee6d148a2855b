"""A gRPC relay that does nothing else: `python -m bench.grpc_bare PORT UPSTREAM`.

It passes the bytes and the metadata of each call on, by grpc.aio and as many channels as the relay opens.
What it costs is the library's share of the relay; what the relay costs beyond that is the relay's own.
"""

import itertools
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
from grpc import aio

from bench.grpc_load import OPTIONS as CHANNEL_OPTIONS
from bench.grpc_upstream import OPTIONS as SERVER_OPTIONS
from bench.grpc_upstream import Handlers
from relay.upstreams.channels import CHANNELS


async def serve(port: int, upstream: int) -> None:
    """Until it is ended."""
    channels = [aio.insecure_channel(f"127.0.0.1:{upstream}", CHANNEL_OPTIONS) for _ in range(CHANNELS)]

    def make(path: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        stubs = itertools.cycle([channel.unary_unary(path) for channel in channels])

        async def handle(request: bytes, context: Any) -> bytes:
            metadata = [pair for pair in context.invocation_metadata() if pair[0] != "user-agent"]
            answer: bytes = await next(stubs)(request, metadata=metadata, timeout=25.0)
            return answer

        return handle

    server = aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((Handlers(make),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
