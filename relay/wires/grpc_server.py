"""The gRPC server of one listener in one worker.

Each worker listens for itself (SO_REUSEPORT), and the kernel deals connections out: gRPC takes no socket from
the master.

Its end loses no call. The listening socket closes, and the server
goes on until all its connections have left: every connection is told to leave (GOAWAY) when it is half a
minute old, ended or not, and its client opens another one without failing a call. That also deals nodes out
anew among the workers. The server is shut down only then, because a shut-down fails calls (`grpc_sockets`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog
from grpc import aio

from relay.wires import grpc_paths, grpc_sockets, grpc_tasks
from relay.wires.grpc_fleet import MOST_BYTES
from relay.wires.grpc_health import Health

if TYPE_CHECKING:
    import grpc

    from relay.wires.grpc_fleet import GrpcFront

log = structlog.get_logger("relay.wires.grpc")

#: As Flower's own server has it (flwr 1.39 `supercore/grpc.py`): some clouds cut connections that were idle
#: for 4 minutes.
_PING_MS = 210_000
_STREAMS = 1000
#: Bytes of a message that a client may send before anybody asks for it; 1000 such calls of one connection
#: come to 17 MB together (measured). More of it for each round trip is let in only when it is received.
_UNASKED = 256 * 1024
#: Bit 0 of gRPC's set of algorithms: no compression.
_PLAIN = 1
#: Seconds after which a connection is told to leave, more or less a tenth (gRPC's own jitter).
CONNECTION_SECONDS = 30.0
_JITTER = 1.1
#: Seconds for a connection to say its first word, and for a call to bring a small message.
_SILENT = 2.0
#: The first bytes of HTTP/2; over TLS there are more.
_PREFACE = 24
#: Seconds between two looks at what is still connected. They cost some microseconds for each open file.
_LOOK = 0.2
#: Seconds for gRPC to notice that connections were cut.
_TO_SETTLE = 1.0


def options(
    max_body: int, max_head: int, keepalive: float, age: float = CONNECTION_SECONDS
) -> list[tuple[str, int]]:
    """Return the options of a server.

    Args:
        max_body: longest message that is welcome, in bytes.
        max_head: longest metadata that are, in bytes.
        keepalive: seconds after which a connection without calls is told to close.
        age: seconds after which any connection is; calls on it may take their time.
    """
    return [
        ("grpc.so_reuseport", 1),
        # gRPC refuses what is longer by itself, with RESOURCE_EXHAUSTED. Up to twice the limit the answer is
        # ours; beyond it a node, which is pushing an object then, drops that and lives on.
        ("grpc.max_receive_message_length", min(2 * max_body, MOST_BYTES)),
        ("grpc.max_send_message_length", MOST_BYTES),
        # Likewise. By itself gRPC fails calls by chance between two bounds.
        ("grpc.max_metadata_size", 2 * max_head),
        ("grpc.absolute_max_metadata_size", 2 * max_head),
        ("grpc.max_concurrent_streams", _STREAMS),
        # By itself gRPC lets in as much unasked as the line can carry: 170 MB of 100 calls (measured). This
        # costs little: one connection over a line of 100 ms takes 10 MB a second, over a shorter one more.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _UNASKED),
        # No node compresses, and a MB of zeros would become a GB here.
        ("grpc.compression_enabled_algorithms_bitset", _PLAIN),
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
        self._leave_by = age * _JITTER + _TO_SETTLE
        grpc_tasks.install(asyncio.get_running_loop())
        grpc_paths.install()
        self._health = Health(age * _JITTER)  # by then its client was told to leave
        self._server = aio.server(options=options(max_body, front.messages.limits.head_size, keepalive, age))
        # The front comes last: it counts what is asked for and none of ours.
        self._server.add_generic_rpc_handlers((self._health, front))
        if credentials is None:
            self.port: int = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self._place = grpc_sockets.Place.of(address, self.port)

    async def start(self) -> None:
        """Listen."""
        await self._server.start()

    def not_ready(self) -> None:
        """Have health checks say that this relay is about to stop; calls are served as before."""
        self._health.leave()

    async def tick(self) -> None:
        """Give up messages that come too slowly; to be called once a second."""
        await self.front.messages.tick()

    async def drain(self, timeout: float) -> None:
        """Accept no more; return when all connections have left, or were cut after `timeout` seconds.

        Calls whose node has left already are waited for as well. Connections are not, if nobody calls on
        them: those that have said nothing are cut soon, and all when they should have left.
        """
        self._health.close()
        grpc_sockets.close_listening(self._place)
        loop = asyncio.get_running_loop()
        began = loop.time()
        end, silent, idle = began + timeout, began + _SILENT, began + self._leave_by
        while grpc_sockets.count_connections(self._place) or self.front.left:
            now = loop.time()
            if now >= end or (now >= idle and not self._calls()):
                self._cut(timeout)
                break
            if now >= silent:
                silent = end
                grpc_sockets.cut_connections(self._place, _PREFACE)
            await asyncio.sleep(min(_LOOK, max(end - now, 0.0)))
        await self._server.stop(_TO_SETTLE)

    def _calls(self) -> bool:
        """Return whether a call is under way, and refuse those whose message should long be here."""
        waiting = self.front.messages.waiting
        for each in waiting:
            each.hurry(_SILENT)
        return bool(self.front.in_flight or self.front.left or waiting)

    def _cut(self, timeout: float) -> None:
        self.front.cutting = True
        if self.front.in_flight:
            log.warning("drain timed out; calls are cut", calls=self.front.in_flight, seconds=timeout)
        for task in list(self.front.left):
            task.cancel()
        grpc_sockets.cut_connections(self._place)
