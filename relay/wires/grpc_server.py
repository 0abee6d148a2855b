"""The gRPC server of one listener in one worker.

Each worker listens for itself (SO_REUSEPORT), and the kernel deals connections out: gRPC takes no socket from
the master. Its end loses no call: health checks say that it is not serving, the listening socket closes,
clients are told to take their next calls elsewhere (GOAWAY), and calls that are under way go on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from relay.fleet import GRPC_SERVICE
from relay.wires.grpc_fleet import MOST_BYTES

if TYPE_CHECKING:
    from relay.wires.grpc_fleet import GrpcFront

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
#: What a health check may ask for: the server as a whole, or the service.
_ASKED_FOR = ("", GRPC_SERVICE.strip("/"))

#: As Flower's own server has it (flwr 1.39 `supercore/grpc.py`): some clouds cut connections that were idle
#: for 4 minutes.
_PING_MS = 210_000
_STREAMS = 1000


def options(max_body: int, keepalive: float) -> list[tuple[str, int]]:
    """Return the options of a server.

    Args:
        max_body: longest message that is welcome, in bytes.
        keepalive: seconds after which a connection without calls is told to close.
    """
    return [
        ("grpc.so_reuseport", 1),
        # gRPC refuses what is longer by itself, with RESOURCE_EXHAUSTED. Up to twice the limit the answer is
        # ours; beyond it a node, which is pushing an object then, drops that and lives on.
        ("grpc.max_receive_message_length", min(2 * max_body, MOST_BYTES)),
        ("grpc.max_send_message_length", MOST_BYTES),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_connection_idle_ms", int(keepalive * 1000)),
        ("grpc.keepalive_time_ms", _PING_MS),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class GrpcServer:
    """Serves a front until it is drained. Must be made inside the running loop."""

    def __init__(
        self,
        front: GrpcFront,
        address: str,
        *,
        max_body: int,
        keepalive: float,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """Prepare to listen.

        Args:
            front: what answers.
            address: `host:port`.
            max_body, keepalive: see `options`.
            credentials: None for a port that is not encrypted.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        self.front = front
        self._ready = True
        self._health = health.aio.HealthServicer()
        self._server = aio.server(options=options(max_body, keepalive))
        self._server.add_generic_rpc_handlers((front,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if credentials is None:
            self.port: int = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Listen."""
        await self._tell(_SERVING)
        await self._server.start()

    async def not_ready(self) -> None:
        """Have health checks say that this relay is about to stop; calls are served as before."""
        if self._ready:
            self._ready = False
            await self._tell(_NOT_SERVING)

    async def drain(self, timeout: float) -> None:
        """Accept no more; return when all calls have ended, or were cut after `timeout` seconds."""
        await self.not_ready()
        loop = asyncio.get_running_loop()
        cut = loop.call_later(max(timeout - 0.1, 0.0), self._cutting)
        try:
            await self._server.stop(timeout)
        finally:
            cut.cancel()

    def _cutting(self) -> None:
        self.front.cutting = True

    async def _tell(self, status: int) -> None:
        for service in _ASKED_FOR:
            await self._health.set(service, status)
