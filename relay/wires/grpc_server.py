"""The gRPC server of one listener in one worker.

Each worker listens for itself (SO_REUSEPORT), and the kernel deals connections out.

Its end loses no call. The listening socket closes, and each connection is told to leave (GOAWAY) and closed
when the client has heard that and the calls on it are answered. The client opens another one without failing
a call. Every connection is told so when it is half a minute old as well, which deals nodes out anew among
the workers.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from typing import TYPE_CHECKING

import structlog

from relay import tls
from relay.refusal import Reason, Refusal
from relay.wires.grpc_health import CHECK, WATCH, Health
from relay.wires.http2_connection import Connection
from relay.wires.http_sockets import ACCEPTS, BACKLOG

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from relay.tls_files import ListenerTls
    from relay.wires.grpc_fleet import GrpcFront
    from relay.wires.http2_stream import Stream

log = structlog.get_logger("relay.wires.grpc")

#: Seconds after which a connection is told to leave, more or less a tenth: those that came together need not
#: come together again.
CONNECTION_SECONDS = 30.0
_JITTER = 0.1
#: Beyond this multiple of `limits.connections` a connection is reset before it has said anything.
_FAR = 2
#: Seconds between two looks at what is still connected, and for what was cut to end.
_LOOK = 0.05
_TO_SETTLE = 1.0


class GrpcServer:
    """Serves a front until it is drained. Must be made inside the running loop.

    Attributes:
        front: what answers.
        keepalive: seconds after which a connection without calls is told to leave.
        connections: those that are open.
        port: where it listens.
    """

    def __init__(
        self,
        front: GrpcFront,
        host: str,
        port: int,
        *,
        keepalive: float,
        age: float = CONNECTION_SECONDS,
        files: ListenerTls | None = None,
    ) -> None:
        """Prepare to listen.

        Args:
            front: what answers.
            host, port: where; port 0 for any.
            keepalive: seconds after which a connection without calls is told to leave.
            age: seconds after which any connection is; calls on it may take their time.
            files: what it has of TLS; None for a plain port.
        """
        self.front = front
        self.keepalive = keepalive
        self.connections: set[Connection] = set()
        self.port = port
        self._host = host
        self._age = age
        self._files = files
        self._health = Health(age)  # by then its client was told to leave
        self._listening: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    async def start(self) -> None:
        """Listen. Raises OSError."""
        # As gunicorn does for the other ports; asyncio by itself would keep IPv4 from `[::]`.
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listening = socket.socket(family, proto=socket.IPPROTO_TCP)
        secured = self._files is not None
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if secured:
                tls.reset_unfinished_handshakes(listening)
            listening.bind((self._host, self.port))
            self.port = listening.getsockname()[1]
            for each in (listening, *(listening.dup() for _ in range(ACCEPTS - 1))):
                self._listening.append(
                    await asyncio.get_running_loop().create_server(
                        lambda: Connection(self),
                        sock=each,
                        backlog=BACKLOG,
                        ssl=self._files.context if self._files is not None else None,
                        ssl_handshake_timeout=tls.HANDSHAKE_SECONDS if secured else None,
                    )
                )
        except BaseException:
            listening.close()
            raise

    def not_ready(self) -> None:
        """Have health checks say that this relay is about to stop; calls are served as before."""
        self._health.leave()

    def tick(self) -> None:
        """See to connections that take too long; to be called once a second."""
        now = time.monotonic()
        for connection in list(self.connections):
            connection.tick(now)
        files = self._files
        if files is not None and files.asks:
            for connection in self.connections:
                if connection.shown is not None and not files.holds(connection.shown, time.time()):
                    _refuse(connection, "it has expired, or was revoked")

    async def drain(self, timeout: float) -> None:
        """Accept no more; return when all connections have left, or were cut after `timeout` seconds.

        Calls whose node has left already are waited for as well.
        """
        self._draining = True
        self._health.close()
        for listening in self._listening:
            listening.close()
        # What was accepted in this very turn of the loop is a connection in the next.
        await asyncio.sleep(0)
        for connection in list(self.connections):
            connection.leave()
        end, looked = time.monotonic() + timeout, 0.0
        while self.connections or self.front.left:
            now = time.monotonic()
            if now >= end:
                await self._cut(timeout)
                break
            if now - looked >= 1.0:
                looked = now
                for connection in list(self.connections):
                    connection.tick(now)
            await asyncio.sleep(min(_LOOK, max(end - now, 0.0)))

    async def _cut(self, timeout: float) -> None:
        self.front.cutting = True
        if self.front.in_flight:
            log.warning("drain timed out; calls are cut", calls=self.front.in_flight, seconds=timeout)
        for connection in list(self.connections):
            connection.cut()
        for task in self.front.left:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_TO_SETTLE)

    # -- for connections ----------------------------------------------------------------------------

    def age(self) -> float:
        """Return the seconds that a connection shall live."""
        return self._age * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - nobody gains by guessing it

    def start_stream(self, stream: Stream) -> None:
        """Have a request answered."""
        path = stream.asked.path
        if path == CHECK:
            self._health.check(stream)
        elif path == WATCH:
            self._start(self._health.watch(stream))
        else:
            self._start(self.front.serve(stream))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def enter(self, connection: Connection) -> None:
        """Count a connection; its calls are refused if there are too many.

        Far too many are reset at once: they would cost what the limit is there to save.
        """
        self.connections.add(connection)
        front, limits, peer = self.front, self.front.limits, connection.peer
        if limits.connections and len(self.connections) > limits.connections:
            detail = f"{len(self.connections)} connections, limits.connections is {limits.connections}"
            connection.excess = Refusal(Reason.OVERLOADED, detail, by="wire", sent=False)
            if len(self.connections) > _FAR * limits.connections:
                connection.cut()
        if front.peers is not None and not front.trusts(peer):
            connection.excess = front.peers.enter(peer) or connection.excess
        if self._draining:
            asyncio.get_running_loop().call_soon(connection.leave)

    def leave(self, connection: Connection) -> None:
        """Count one less."""
        self.connections.discard(connection)
        peers = self.front.peers
        if peers is not None and not self.front.trusts(connection.peer):
            peers.leave(connection.peer)

    def admits(self, connection: Connection) -> bool:
        """Note the certificate that a client has shown; return whether it may still be used."""
        files = self._files
        if files is None or not files.asks:
            return True
        try:
            connection.shown = files.shown(connection.transport.get_extra_info("ssl_object"))
        except ValueError as error:
            log.info("client certificate refused", peer=connection.peer, problem=str(error))
            return False
        return True


def _refuse(connection: Connection, why: str) -> None:
    log.info("client certificate refused", peer=connection.peer, problem=why)
    connection.cut()
