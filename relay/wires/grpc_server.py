"""The gRPC server of one listener in one worker.

Each worker listens for itself (SO_REUSEPORT), and the kernel deals connections out: gRPC takes no socket from
the master.

Its end loses no call. Health checks say that it is not serving, the listening socket closes, and the server
goes on until all its connections have left: every connection is told to leave (GOAWAY) when it is half a
minute old, ended or not, and its client opens another one without failing a call. That also deals nodes out
anew among the workers. The server is shut down only then, because a shut-down fails calls (`grpc_sockets`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from relay.fleet import GRPC_SERVICE
from relay.wires import grpc_sockets
from relay.wires.grpc_fleet import MOST_BYTES

if TYPE_CHECKING:
    from relay.wires.grpc_fleet import GrpcFront

log = structlog.get_logger("relay.wires.grpc")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
#: What a health check may ask for: the server as a whole, or the service.
_ASKED_FOR = ("", GRPC_SERVICE.strip("/"))

#: As Flower's own server has it (flwr 1.39 `supercore/grpc.py`): some clouds cut connections that were idle
#: for 4 minutes.
_PING_MS = 210_000
_STREAMS = 1000
#: Seconds after which a connection is told to leave, more or less a tenth (gRPC's own jitter).
CONNECTION_SECONDS = 30.0
#: Seconds between two looks at what is still connected. They cost some microseconds for each open file.
_LOOK = 0.2
#: Seconds for gRPC to notice that connections were cut.
_TO_SETTLE = 1.0


def options(max_body: int, keepalive: float, age: float = CONNECTION_SECONDS) -> list[tuple[str, int]]:
    """Return the options of a server.

    Args:
        max_body: longest message that is welcome, in bytes.
        keepalive: seconds after which a connection without calls is told to close.
        age: seconds after which any connection is; calls on it may take their time.
    """
    return [
        ("grpc.so_reuseport", 1),
        # gRPC refuses what is longer by itself, with RESOURCE_EXHAUSTED. Up to twice the limit the answer is
        # ours; beyond it a node, which is pushing an object then, drops that and lives on.
        ("grpc.max_receive_message_length", min(2 * max_body, MOST_BYTES)),
        ("grpc.max_send_message_length", MOST_BYTES),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_connection_idle_ms", int(keepalive * 1000)),
        ("grpc.max_connection_age_ms", int(age * 1000)),
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
        age: float = CONNECTION_SECONDS,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """Prepare to listen.

        Args:
            front: what answers.
            address: `host:port`.
            max_body, keepalive, age: see `options`.
            credentials: None for a port that is not encrypted.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        self.front = front
        self._ready = True
        self._health = health.aio.HealthServicer()
        self._server = aio.server(options=options(max_body, keepalive, age))
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
        """Accept no more; return when all connections have left, or were cut after `timeout` seconds."""
        await self.not_ready()
        grpc_sockets.close_listening(self.port)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while grpc_sockets.count_connections(self.port):
            if loop.time() >= end:
                self._cut(timeout)
                break
            await asyncio.sleep(min(_LOOK, max(end - loop.time(), 0.0)))
        await self._server.stop(_TO_SETTLE)

    def _cut(self, timeout: float) -> None:
        self.front.cutting = True
        if self.front.in_flight:
            log.warning("drain timed out; calls are cut", calls=self.front.in_flight, seconds=timeout)
        grpc_sockets.cut_connections(self.port)

    async def _tell(self, status: int) -> None:
        for service in _ASKED_FOR:
            await self._health.set(service, status)
