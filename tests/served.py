"""A node-facing server as a worker makes it, on uvloop in a thread of its own, in front of a handler.

Clients of the test can so be of any kind, also ones that block, such as the httpx that SuperNodes use.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar, cast

import psutil
import uvloop

from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.limits import Limits, bodies
from relay.settings import Listener
from relay.tls import reset_unfinished_handshakes
from relay.tls_files import ListenerTls
from relay.wires.forwarded import Forwarding
from relay.wires.http import Front, Route
from relay.wires.http_request import Receiver
from relay.wires.http_server import NodeServer
from relay.wires.http_v1 import HTTP_V1
from relay.wires.rest_v0 import REST_V0
from relay.worker import RelayWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

    from relay.call import Call
    from relay.pipeline import Handler

    T = TypeVar("T")

#: Longest wait for anything; a busy machine may need a while.
PATIENCE = 20.0
SPECS = {Wire.HTTP_V1: HTTP_V1, Wire.REST_V0: REST_V0}


def path_of(method: Method, wire: Wire = Wire.HTTP_V1) -> str:
    return SPECS[wire].prefix + method.path


def request(method: Method, body: bytes = b"", *, wire: Wire = Wire.HTTP_V1, more: bytes = b"") -> bytes:
    """Return the bytes of a call of a node."""
    return (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
        b"%bContent-Length: %d\r\n\r\n" % (path_of(method, wire).encode(), more, len(body))
    ) + body


async def echo(call: Call) -> Reply:
    """Answer with the body that was sent."""
    return Reply(Payload(await call.payload.read(1 << 30)), Source.LOCAL)


class Served:
    """The server; to be used as a context.

    Attributes:
        ports: where it listens.
        servers: one for each of them.
        handler: who answers its calls; may be changed at any time.
        loop: where it runs.
        tls: its files, if it is encrypted; nobody calls their `tick`.
    """

    def __init__(
        self,
        handler: Handler = echo,
        *,
        pair: tuple[Path, Path] | None = None,
        keepalive: float = 75.0,
        idle_timeout: float = PATIENCE,
        minimum_version: str = "1.2",
        listeners: int = 1,
        **tls_settings: object,
    ) -> None:
        """Serve `handler`, encrypted by the certificate and key of `pair` if there is one.

        `tls_settings` are further ones of `listeners[].tls`.
        """
        self._listeners = listeners
        self.handler = handler
        tls = None
        if pair is not None:
            tls = {"certificate": pair[0], "key": pair[1], "minimum_version": minimum_version, **tls_settings}
        section = Listener.model_validate({"address": "127.0.0.1:0", "tls": tls}).tls
        self.tls = ListenerTls("test", section) if section is not None else None
        self._keepalive, self._idle_timeout = keepalive, idle_timeout
        self._thread = threading.Thread(target=self._run, name="served")
        self._stop: asyncio.Event
        self._ready = threading.Event()
        self.loop: asyncio.AbstractEventLoop
        self.servers: list[NodeServer] = []
        self.ports: list[int] = []
        self._listening: list[asyncio.AbstractServer] = []

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.soon(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the server's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def soon(self, work: Callable[[], object]) -> None:
        """Call `work` in the server's loop, and do not wait."""
        self.loop.call_soon_threadsafe(work)

    @property
    def port(self) -> int:
        """Where it listens; the first port of several."""
        return self.ports[0]

    @property
    def front(self) -> Front:
        return self.servers[0].front

    def connections(self) -> int:
        """Return how many connections are open whose handshake, if there is one, is done."""
        return sum(len(server.connections) for server in self.servers)

    async def stop_listening(self) -> None:
        """Accept nothing more."""
        for listening in self._listening:
            listening.close()

    def open_sockets(self) -> int:
        """Return how many connections are open at this end, whether their handshake is done or not."""
        mine = psutil.Process().net_connections("tcp4")
        return sum(entry.laddr.port in self.ports and entry.status != psutil.CONN_LISTEN for entry in mine)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        routes = {
            path_of(method, wire): Route(SPECS[wire], method, self._handle)
            for wire in SPECS
            for method in Method
        }
        for _ in range(self._listeners):
            receiver = Receiver(Forwarding([]), Limits(bodies(1 << 30, {})), self._idle_timeout)
            front = Front(routes, receiver, idle_timeout=self._idle_timeout, on_stray=lambda _: None)
            server = NodeServer(front, self._keepalive)
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            if self.tls is not None:
                reset_unfinished_handshakes(sock)  # as the master does
            worker = cast("RelayWorker", SimpleNamespace(loop=self.loop))
            self._listening += await RelayWorker._listen(worker, server, sock, self.tls)
            self.servers.append(server)
            self.ports.append(sock.getsockname()[1])
        self._ready.set()
        await self._stop.wait()
        await self.stop_listening()
        for server in self.servers:
            await server.shutdown(0.01)
        # uvloop warns of what is left in a handshake; its client has closed it, or is about to.
        end = self.loop.time() + PATIENCE
        while self.open_sockets() and self.loop.time() < end:
            await asyncio.sleep(0.01)

    async def _handle(self, call: Call) -> Reply:
        return await self.handler(call)
