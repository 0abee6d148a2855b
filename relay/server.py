"""The processes of a relay: gunicorn's configuration from our settings, and where they count."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import aiohttp.http_parser
import structlog
from gunicorn.app.base import BaseApplication

from relay import listening, logs, open_files, pid_file, settings_unused, takeover
from relay.master import Master
from relay.metrics_directory import MetricsDirectory
from relay.shared import Shared
from relay.wires.http_sockets import BACKLOG
from relay.worker import RelayWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    from gunicorn.workers.base import Worker

    from relay.settings import Settings

log = structlog.get_logger("relay.server")

#: A worker that tells nothing of itself for so long is killed: sooner than nodes give a handshake with it up
#: (30 s), which is for good. The next worker does the ones that were not begun, a reset ends the others.
HUNG_SECONDS = 20

_LEVELS = ("debug", "info", "warning", "error")


class UnsafeParserError(RuntimeError):
    """aiohttp runs without its C parser."""


class RelayApplication(BaseApplication):  # type: ignore[misc]
    """What gunicorn runs: it reads its configuration from our settings.

    Attributes:
        settings: the ones that workers are started with.
        generation: their number.
        shared: memory that master and workers share.
        metrics: where the processes count; None if each does so for itself.
    """

    def __init__(self, read: Callable[[], Settings], metrics: MetricsDirectory | None = None) -> None:
        """Read the settings by `read` now and at each reload. Raises SettingsError."""
        self._read = read
        self.generation = 0
        self.metrics = metrics
        self.settings = read()
        self.shared = Shared(self.settings.redelivery.memory, self.settings.inventory.nodes)
        super().__init__()

    @property
    def graceful_seconds(self) -> int:
        """The master's patience with a worker that drains, which keeps the drain's time by itself."""
        return int(self.settings.drain.timeout) + 10

    def load_config(self) -> None:
        """Translate the settings into gunicorn's."""
        settings = self.settings
        logs.configure(settings.log)
        chosen = {
            "bind": [str(address) for address in listening.addresses(settings)],
            "workers": settings.workers,
            "worker_class": RelayWorker,
            "backlog": BACKLOG,
            "graceful_timeout": self.graceful_seconds,
            "timeout": HUNG_SECONDS,
            "errorlog": None,  # its lines go through ours
            # at debug it writes its whole configuration
            "loglevel": max(settings.log.level, "info", key=_LEVELS.index),
            "pidfile": str(settings.pid_file) if settings.pid_file else None,
            "proc_name": "flwr-relay",
            "control_socket_disable": True,
            "post_fork": _on_fork,
            "child_exit": _on_child_exit,
        }
        for key, value in chosen.items():
            self.cfg.set(key, value)

    def load(self) -> Settings:
        """Return what the workers serve."""
        return self.settings

    def read(self) -> Settings:
        """Read the settings again. Raises SettingsError."""
        return self._read()

    def run(self) -> None:
        """Serve until told to stop."""
        problems = pid_file.taken(self.settings.pid_file)
        # Workers open the ports of gRPC by themselves, and would share them with another relay's.
        problems += listening.unbindable(listening.grpc_addresses(self.settings))
        if not problems:
            try:
                takeover.written(self.settings)
            except OSError as error:
                problems = [str(error)]
        for problem in problems:
            log.error("not started", problem=problem)
        if problems:
            sys.exit(1)
        for line in settings_unused.idle(self.settings):
            log.warning("a setting has no effect", setting=line)
        open_files.raise_limit(self.settings)
        Master(self).run()


def serve(read: Callable[[], Settings]) -> None:
    """Serve until told to stop; returns or exits when all workers have ended.

    Args:
        read: returns the settings; called at start and at each reload (SIGHUP).

    Raises:
        SettingsError: the settings are wrong.
        UnsafeParserError: aiohttp runs without its C parser.
    """
    if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
        raise UnsafeParserError(
            "aiohttp runs without its C extensions; its Python parser is slow and has known request-smuggling"
            " bugs: install a wheel of aiohttp for this platform"
        )
    application = RelayApplication(read)
    try:
        application.metrics = metrics = MetricsDirectory()
    except OSError as error:
        log.error("not started", problem=f"no directory for metrics: {error}")  # noqa: TRY400
        sys.exit(1)
    # prometheus_client decides at its first import where numbers live, so it is imported after this.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics.path)
    master = os.getpid()
    try:
        application.run()
    finally:
        if os.getpid() == master:
            metrics.remove()


def _on_child_exit(master: Master, worker: Worker) -> None:
    """Take note of a worker that has ended, and keep what it counted."""
    master.ended(worker)
    if master.app.metrics is None:
        return
    from relay.exposition import bury  # noqa: PLC0415 - see `serve`

    bury(worker.pid)


def _on_fork(master: Master, _: Worker) -> None:
    """Close what the workers of before alone listen on: nobody would accept there."""
    master.drop_other_sockets()
