"""One worker process: listeners on uvloop, and how they come to their end.

A stop loses no call: the worker stops accepting, says `Connection: close` with each answer it still gives,
lets connections leave by themselves, and only then closes the ones on which nothing happened since.
(aiohttp's own worker closes idle connections at once: measured, that loses 0.3 to 1.9 % of the calls
under load at each reload.) gRPC's clients are told to leave, and do so at once (`wires/http2_leaving`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from typing import TYPE_CHECKING

import structlog
import uvloop
from aiohttp import web
from gunicorn.workers.base import Worker

from relay import tls, tls_files
from relay.chores import Chores
from relay.wires.grpc_server import GrpcServer
from relay.wires.http import Front
from relay.wires.http_server import NodeServer
from relay.wires.http_sockets import ACCEPTS, BACKLOG

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from relay.app import Relay
    from relay.settings import Settings
    from relay.shared import Shared
    from relay.tls_files import ListenerTls

log = structlog.get_logger("relay.worker")

#: A call leaves no cycles behind, so the collector may look seldom (the default is 700, 10, 10).
GC_THRESHOLDS = (20_000, 20, 20)
_TURN = 0.05
#: Seconds that a worker with old settings goes on with gRPC ports until those with newer ones listen there.
#: They need well under a second; on a host that swaps they may need longer.
_HEIR_SECONDS = 30.0
#: Held back from the fork until the event loop runs: the master's handlers do nothing in a worker, and
#: uvloop forgets what came before it ran. A worker that missed its stop would be waited for, then killed.
HELD_SIGNALS = (signal.SIGTERM, signal.SIGQUIT)


class RelayWorker(Worker):  # type: ignore[misc]
    """A gunicorn worker that serves the relay on uvloop. `wsgi` is the Settings."""

    def init_process(self) -> None:
        """Make the event loop of this process, then enter gunicorn's start-up, which ends in `run`."""
        self.shared: Shared = self.app.shared
        self.generation: int = self.app.generation
        self.loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.stop = asyncio.Event()
        super().init_process()

    def init_signals(self) -> None:
        """TERM drains, QUIT ends at once; INT is the terminal's and the master's business."""
        for name in self.SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.loop.add_signal_handler(signal.SIGTERM, self.stop.set)
        self.loop.add_signal_handler(signal.SIGQUIT, os._exit, 0)
        self.loop.add_signal_handler(signal.SIGUSR1, self.log.reopen_files)
        signal.siginterrupt(signal.SIGTERM, False)

    def run(self) -> None:
        """Serve until told to stop; then drain."""
        # Until the sockets are served, an exception is a failed start: gunicorn then stops instead of
        # starting workers for ever.
        self.booted = False
        try:
            self.loop.run_until_complete(self._serve())
        finally:
            self.loop.close()
        sys.exit(0)

    async def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        _prepare_metrics()
        # For a gRPC SuperLink: grpcio's own lines are no JSON, and what it complains of becomes a Refusal.
        os.environ["GRPC_VERBOSITY"] = "NONE"  # flwr may have set another one
        from relay import admin, app  # noqa: PLC0415 - after the fork, and after the metrics are prepared

        settings: Settings = self.wsgi
        if not await self._files_are_sound(settings) or self.stop.is_set():
            return
        self.shared.listens(self.age)
        relay = app.build(
            settings, self.shared.table, self.shared.kept, self.shared.nodes, self.shared.upstreams
        )
        await relay.prepare()
        *node_sockets, admin_socket = self.sockets
        runner = web.AppRunner(admin.application(relay, self.shared), access_log=None, handle_signals=False)
        await runner.setup()
        admin_site = web.SockSite(runner, admin_socket.sock)
        await admin_site.start()
        servers: list[NodeServer] = []
        listening: list[asyncio.AbstractServer] = []
        grpc_servers: list[GrpcServer] = []
        sockets = iter(node_sockets)
        for front, listener, files in zip(relay.fronts, settings.listeners, relay.tls.listeners, strict=True):
            if isinstance(front, Front):
                servers.append(NodeServer(front, listener.keepalive))
                listening += await self._listen(servers[-1], next(sockets).sock, files)
            else:
                address = listener.address
                grpc_servers.append(
                    GrpcServer(front, address.host, address.port, keepalive=listener.keepalive, files=files)
                )
                await grpc_servers[-1].start()
        # What was made so far lives as long as the worker: never look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.booted = True
        self.shared.serves(self.generation, self.age)
        log.info("worker serves", pid=os.getpid(), mode=settings.mode)
        beating = self.loop.create_task(self._beat(relay, servers, grpc_servers))
        await self.stop.wait()
        for server in listening:
            server.close()
        if not grpc_servers:
            self.shared.leaves(self.age)
        await asyncio.gather(
            drain(servers, settings.drain.timeout, settings.drain.idle_grace),
            self._drain_grpc(grpc_servers, settings.drain.timeout),
        )
        beating.cancel()
        Chores().do("tick", relay.tick)
        await relay.close()
        await admin_site.stop()
        # A health check that was accepted meanwhile is still answered.
        await asyncio.sleep(2 * _TURN)
        await runner.cleanup()

    async def _listen(
        self, server: NodeServer, socket: socket.socket, files: ListenerTls | None
    ) -> list[asyncio.AbstractServer]:
        server.tls = files
        context = files.context if files is not None else None
        return [
            await self.loop.create_server(
                server,
                sock=each,
                backlog=BACKLOG,
                ssl=context,
                ssl_handshake_timeout=tls.HANDSHAKE_SECONDS if context else None,
            )
            for each in (socket, *(socket.dup() for _ in range(ACCEPTS - 1)))
        ]

    async def _files_are_sound(self, settings: Settings) -> bool:
        """Wait until all files that secrets are in can be used; return whether, False if told to stop first.

        They could when the master read the settings. A worker that is started while they are being renewed
        must wait for that: gunicorn would end the relay for a worker that cannot start.
        """
        said = None
        sections = [listener.tls for listener in settings.listeners if listener.tls is not None]
        upstream = settings.upstream if settings.upstream.url.tls else None
        pepper = settings.keys.pepper_file
        while (
            fault := tls_files.fault(sections, upstream) or _unreadable(pepper)
        ) is not None and not self.stop.is_set():
            if fault != said:
                log.error("files refused; waiting for others", problem=fault)
                said = fault
            self.notify()
            await asyncio.sleep(1.0)
        return fault is None

    async def _drain_grpc(self, servers: Sequence[GrpcServer], timeout: float) -> None:
        """Let the gRPC ports come to their end, once others listen on them.

        Nobody else holds their sockets: until a worker with new settings listens, a port that is closed here
        refuses who comes.
        """
        if not servers:
            return
        end = self.loop.time() + _HEIR_SECONDS
        while self._has_heirs():
            if self.loop.time() > end:
                log.warning("workers with new settings are late; gRPC ports close", pid=os.getpid())
                break
            await asyncio.sleep(_TURN)
        for server in servers:
            if self.shared.stopping:
                server.not_ready()
        self.loop.call_later(_TURN, self.shared.leaves, self.age)  # the ports close first of all
        await asyncio.gather(*(server.drain(timeout) for server in servers))

    def _has_heirs(self) -> bool:
        """Return whether workers with newer settings are about to serve."""
        shared, generation = self.shared, self.generation
        return not shared.stopping and shared.generation > generation and not shared.succeeded(generation)

    async def _beat(
        self, relay: Relay, servers: Sequence[NodeServer] = (), grpc_servers: Sequence[GrpcServer] = ()
    ) -> None:
        """Once a second tell the master that this worker is alive, until it has drained; stop without one."""
        chores = Chores()
        while True:
            # A worker that does not tell is shot: this comes first, and waits for nothing.
            chores.do("notify", self.notify)
            chores.do("tick", relay.tick)
            for server in servers:
                chores.do("certificates", server.check_certificates)
            for each in grpc_servers:
                chores.do("grpc", each.tick)
                if self.shared.stopping:
                    chores.do("health", each.not_ready)
            if self.ppid != os.getppid() and not self.stop.is_set():
                log.warning("the master is gone; stopping", pid=os.getpid())
                self.stop.set()
            await asyncio.sleep(1.0)


def _unreadable(path: Path | None) -> str | None:
    """Return why a file cannot be read, None if it can or there is none."""
    try:
        if path is not None:
            path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


async def drain(servers: list[NodeServer], timeout: float, idle_grace: float) -> None:
    """Let the connections of `servers`, which accept no more, come to their end.

    Args:
        servers: whose connections.
        timeout: seconds after which the calls that are still in flight are cut.
        idle_grace: seconds after which a connection is closed on which no call has come since.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    listened = 0.0
    for server in servers:
        server.front.draining = True
    # What was accepted in this very turn of the loop is a connection in the next.
    await asyncio.sleep(_TURN)
    while any(server.connections for server in servers):
        if loop.time() - started > timeout:
            calls = sum(len(server.front.busy) for server in servers)
            log.warning("drain timed out; calls are cut", calls=calls, seconds=timeout)
            break
        if listened > idle_grace:
            for server in servers:
                server.close_idle()
        await asyncio.sleep(_TURN)
        # Not the clock's time: a worker that got no processor has not listened to its nodes.
        listened += _TURN
    for server in servers:
        await server.shutdown(0.1)


def _prepare_metrics() -> None:
    """Say whose the counts are.

    To be called after the fork and before the first metric is made.
    """
    from relay import exposition  # noqa: PLC0415 - see `relay.server.serve`

    exposition.count_as(os.getpid())
