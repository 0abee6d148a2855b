"""Listeners and processes: gunicorn's master, a worker class on uvloop, reload and drain.

A stop, of one worker or of the whole relay, loses no call: the worker stops accepting, says
`Connection: close` with each answer it still gives, lets connections leave by themselves, and only then
closes the ones on which nothing has happened for IDLE_GRACE seconds. (aiohttp's own worker closes idle
connections at once: measured, it loses 0.3 to 1.9 % of the calls under load at each reload.)
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

import aiohttp.http_parser
import structlog
import uvloop
from aiohttp import web
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker

from relay import logs
from relay.settings import Settings, SettingsError
from relay.wires.http_server import NodeServer

if TYPE_CHECKING:
    from collections.abc import Callable


log = structlog.get_logger("relay.server")

BACKLOG = 2048
_LEVELS = ("debug", "info", "warning", "error")
#: Nodes poll every 3 s: in this time nearly each one has had an answer that told it to reconnect.
IDLE_GRACE = 5.0
#: A call leaves no cycles behind, so the collector may look seldom (the default is 700, 10, 10).
GC_THRESHOLDS = (20_000, 20, 20)


class Stopping:
    """One byte that master and workers share: whether the whole relay was told to stop."""

    def __init__(self) -> None:
        """Map the byte; to be called before the first fork."""
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        """Say so. Cannot be taken back."""
        self._byte[0] = 1

    def __call__(self) -> bool:
        """Return whether it was said."""
        return self._byte[0] == 1


class RelayWorker(Worker):  # type: ignore[misc]
    """A gunicorn worker that serves the relay on uvloop. `wsgi` is the Settings."""

    def init_process(self) -> None:
        """Make the event loop of this process, then enter gunicorn's start-up, which ends in `run`."""
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
        _prepare_metrics()
        from relay import admin, app  # noqa: PLC0415 - after the fork, and after the metrics are prepared

        settings: Settings = self.wsgi
        relay = app.build(settings)
        *node_sockets, admin_socket = self.sockets
        runner = web.AppRunner(
            admin.application(relay, self.app.stopping), access_log=None, handle_signals=False
        )
        await runner.setup()
        await web.SockSite(runner, admin_socket.sock).start()
        servers = [
            NodeServer(front, listener.keepalive)
            for front, listener in zip(relay.fronts, settings.listeners, strict=True)
        ]
        listening = [
            await self.loop.create_server(server, sock=socket.sock, backlog=BACKLOG)
            for server, socket in zip(servers, node_sockets, strict=True)
        ]
        # What was made so far lives as long as the worker: never look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.booted = True
        log.info("worker serves", pid=os.getpid())
        await self._until_stopped()
        for server in listening:
            server.close()
        await drain(servers, settings.drain.timeout)
        await relay.pool.close()
        await runner.cleanup()

    async def _until_stopped(self) -> None:
        """Tell the master once a second that this worker is alive; return when it was told to stop."""
        while not self.stop.is_set():
            self.notify()
            if self.ppid != os.getppid():
                log.warning("the master is gone; stopping", pid=os.getpid())
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.stop.wait()


async def drain(servers: list[NodeServer], timeout: float) -> None:
    """Let the connections of `servers`, which accept no more, come to their end.

    Args:
        servers: whose connections.
        timeout: seconds after which the calls that are still in flight are cut.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    for server in servers:
        server.front.draining = True
    while any(server.connections for server in servers):
        passed = loop.time() - started
        if passed > timeout:
            calls = sum(len(server.front.busy) for server in servers)
            log.warning("drain timed out; calls are cut", calls=calls, seconds=timeout)
            break
        if passed > IDLE_GRACE:
            for server in servers:
                for connection in server.connections:
                    if connection not in server.front.busy:
                        connection.force_close()
        await asyncio.sleep(0.05)
    for server in servers:
        await server.shutdown(0.1)


class _Master(Arbiter):  # type: ignore[misc]
    """gunicorn's master with a reload that refuses bad settings, and a stop that is seen by health checks."""

    def reload(self) -> None:
        if self.app.refresh():
            super().reload()

    def stop(self, graceful: bool = True) -> None:
        self.app.stopping.set()
        super().stop(graceful)

    def handle_int(self) -> None:
        self.handle_term()  # Ctrl-C drains, too; a second one does not wait (gunicorn's `stop`)


class RelayApplication(BaseApplication):  # type: ignore[misc]
    """What gunicorn runs: it reads its configuration from our settings."""

    def __init__(self, read: Callable[[], Settings]) -> None:
        """Read the settings by `read` now and at each reload. Raises SettingsError."""
        self._read = read
        self.settings = read()
        self.stopping = Stopping()
        super().__init__()

    def load_config(self) -> None:
        """Translate the settings into gunicorn's."""
        settings = self.settings
        logs.configure(settings.log)
        addresses = [str(listener.address) for listener in settings.listeners]
        chosen = {
            "bind": [*addresses, str(settings.admin.address)],
            "workers": settings.workers,
            "worker_class": RelayWorker,
            "backlog": BACKLOG,
            # The worker keeps the drain's time itself; this is the master's patience with it.
            "graceful_timeout": int(settings.drain.timeout) + 10,
            "timeout": 60,
            "errorlog": None,  # its lines go through ours
            # at debug it writes its whole configuration
            "loglevel": max(settings.log.level, "info", key=_LEVELS.index),
            "proc_name": "flwr-relay",
            "control_socket_disable": True,
            "child_exit": _forget_gauges,
        }
        for key, value in chosen.items():
            self.cfg.set(key, value)

    def load(self) -> Settings:
        """Return what the workers serve."""
        return self.settings

    def refresh(self) -> bool:
        """Read the settings again; keep the old ones, and say why, if the new ones are wrong."""
        try:
            self.settings = self._read()
        except SettingsError as error:
            for problem in error.problems:
                log.error("reload refused; the old settings stay", problem=str(problem))  # noqa: TRY400 - no trace
            return False
        self.callable = None
        return True

    def run(self) -> None:
        """Serve until told to stop."""
        _Master(self).run()


def _prepare_metrics() -> None:
    """Tell prometheus_client once who this worker is; by itself it asks for its pid at each count.

    To be called after the fork and before the first metric is made.
    """
    from prometheus_client import values  # noqa: PLC0415 - see `serve`

    pid = os.getpid()
    values.ValueClass = values.MultiProcessValue(lambda: pid)  # type: ignore[no-untyped-call]


def _forget_gauges(_: Arbiter, worker: Worker) -> None:
    """Drop the in-flight gauge of a worker that has ended; its counters stay."""
    from prometheus_client import multiprocess  # noqa: PLC0415 - see `serve`

    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def serve(read: Callable[[], Settings]) -> None:
    """Serve until told to stop; returns or exits when all workers have ended.

    Args:
        read: returns the settings; called at start and at each reload (SIGHUP).

    Raises:
        SettingsError: the settings are wrong.
        RuntimeError: aiohttp runs without its C parser.
    """
    if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
        raise RuntimeError(
            "aiohttp runs without its C extensions; its Python parser is slow and has known request-smuggling"
            " bugs: install a wheel of aiohttp for this platform"
        )
    application = RelayApplication(read)
    directory = tempfile.mkdtemp(prefix="flwr-relay-metrics-")
    # prometheus_client decides at its first import where numbers live, so it is imported after this.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    master = os.getpid()
    try:
        application.run()
    finally:
        if os.getpid() == master:
            shutil.rmtree(directory, ignore_errors=True)
