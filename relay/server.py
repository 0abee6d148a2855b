"""The processes of a relay: gunicorn's master, fed from our settings, and how it reloads and stops."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp.http_parser
import structlog
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.pidfile import Pidfile
from gunicorn.sock import create_sockets

from relay import logs, tls
from relay.settings import Settings, SettingsError
from relay.shared import Shared
from relay.worker import BACKLOG, HELD_SIGNALS, RelayWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gunicorn.workers.base import Worker

    from relay.settings import HostPort, Listener

log = structlog.get_logger("relay.server")

#: A worker that tells nothing of itself for so long is killed: sooner than nodes give a handshake with it up
#: (30 s), which is for good. The next worker does the ones that were not begun, a reset ends the others.
HUNG_SECONDS = 20

_METRICS = "flwr-relay-metrics-"
_LEVELS = ("debug", "info", "warning", "error")


class UnsafeParserError(RuntimeError):
    """aiohttp runs without its C parser."""


class _Master(Arbiter):  # type: ignore[misc]
    """gunicorn's master with a reload that refuses bad settings, and a stop that is seen by health checks."""

    LISTENERS: list[Any]
    pidfile: Pidfile | None

    def __init__(self, app: RelayApplication) -> None:
        """Prepare to run `app`."""
        self._leaving: set[int] = set()
        super().__init__(app)

    def start(self) -> None:
        """Listen."""
        super().start()
        self._choose_endings()

    def reload(self) -> None:
        """Start workers with the new settings and have the old ones drain, or keep the old settings."""
        accepted = self.app.refresh()
        self.app.shared.reloaded(accepted=accepted, workers=self.app.settings.workers)
        if not accepted:
            return
        self._listen()
        # gunicorn would remove the pid file and write it anew; the next `flwr-relay reload` might miss it.
        written, wanted = self.pidfile, self.app.settings.pid_file
        stays = written is not None and written.fname == str(wanted)
        if stays:
            self.pidfile = None
        super().reload()
        if stays:
            self.pidfile = written
        # `_on_reload` had made this 0; from here on it is the patience of a stop again.
        self.cfg.set("graceful_timeout", self.app.graceful_seconds)

    def stop(self, graceful: bool = True) -> None:
        """Report not ready, go on for `drain.delay`, then stop the workers."""
        self.app.shared.stop()
        if graceful:
            self._wait_for_balancers(self.app.settings.drain.delay)
        super().stop(graceful)

    def spawn_worker(self) -> int:
        """Fork a worker that misses no signal of its start."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            pid: int = super().spawn_worker()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        return pid

    def kill_worker(self, pid: int, sig: int) -> None:
        """Send a signal to a worker, and remember who was told to leave."""
        if sig == signal.SIGTERM:
            self._leaving.add(pid)
        super().kill_worker(pid, sig)

    def manage_workers(self) -> None:
        """Keep as many workers as were asked for; one that was told to leave takes no calls, and counts not.

        gunicorn counts it: a new worker that dies would be missed for as long as an old one drains.
        """
        self._leaving &= self.WORKERS.keys()
        staying = sorted(self.WORKERS.keys() - self._leaving, key=lambda pid: self.WORKERS[pid].age)
        for pid in staying[: max(0, len(staying) - self.num_workers)]:
            self.kill_worker(pid, signal.SIGTERM)
        for _ in range(self.num_workers - len(staying)):
            self.spawn_worker()
            time.sleep(0.05)  # no faster, should they die as soon as they have begun

    def handle_int(self) -> None:
        """Ctrl-C drains, too; a second one does not wait (gunicorn's `stop`)."""
        self.handle_term()

    def _listen(self) -> None:
        """Listen on the addresses of the new settings, with the sockets of before where they stay.

        gunicorn would bind all of them anew, and end: the workers of before still hold the old ones.
        """
        sockets = dict(zip(self.cfg.bind, self.LISTENERS, strict=True))
        wanted = [str(address) for address in _addresses(self.app.settings)]
        self.cfg.set("bind", [address for address in wanted if address not in sockets])
        sockets |= zip(self.cfg.bind, create_sockets(self.cfg, self.log), strict=True)
        self.cfg.set("bind", wanted)
        self.LISTENERS = [sockets.pop(address) for address in wanted]
        for left in sockets.values():
            left.close()
        self._choose_endings()

    def _choose_endings(self) -> None:
        """Choose how connections end, before the first worker accepts one: they inherit it as they arrive."""
        for listening, listener in zip(self.LISTENERS, _http(self.app.settings), strict=False):
            if listener.tls is not None:
                tls.reset_unfinished_handshakes(listening.sock)
            else:
                tls.close_in_good_order(listening.sock)

    def _wait_for_balancers(self, seconds: float) -> None:
        """Go on for so long, or until told to hurry; that a worker has ended is no reason to."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(queue.Empty):
                number = self.SIG_QUEUE.get(timeout=0.1)
                if number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
                    self.SIG_QUEUE.put(number)
                    return
            self.murder_workers()


class RelayApplication(BaseApplication):  # type: ignore[misc]
    """What gunicorn runs: it reads its configuration from our settings.

    Attributes:
        settings: the ones in force.
        shared: memory that master and workers share.
    """

    def __init__(self, read: Callable[[], Settings]) -> None:
        """Read the settings by `read` now and at each reload. Raises SettingsError."""
        self._read = read
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
            "bind": [str(address) for address in _addresses(settings)],
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
            "child_exit": _bury,
            "on_reload": _on_reload,
        }
        for key, value in chosen.items():
            self.cfg.set(key, value)

    def load(self) -> Settings:
        """Return what the workers serve."""
        return self.settings

    def refresh(self) -> bool:
        """Read the settings again; keep the old ones, and say why, if the new ones cannot be served."""
        try:
            settings = self._read()
        except SettingsError as error:
            problems = [str(problem) for problem in error.problems]
        else:
            problems = list(_unbindable(set(_addresses(settings)) - set(_addresses(self.settings))))
            problems += _unbindable(set(_grpc_addresses(settings)) - set(_grpc_addresses(self.settings)))
            problems += _taken(settings.pid_file)
        if problems:
            for problem in problems:
                log.error("reload refused; the old settings stay", problem=problem)
            return False
        self.settings = settings
        self.callable = None
        return True

    def run(self) -> None:
        """Serve until told to stop."""
        # Workers open the ports of gRPC by themselves, and would share them with another relay's.
        for problem in (*_taken(self.settings.pid_file), *_unbindable(set(_grpc_addresses(self.settings)))):
            log.error("not started", problem=problem)
            sys.exit(1)
        _Master(self).run()


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
    _sweep_metrics()
    directory = tempfile.mkdtemp(prefix=f"{_METRICS}{os.getpid()}-")
    # prometheus_client decides at its first import where numbers live, so it is imported after this.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    master = os.getpid()
    try:
        application.run()
    finally:
        if os.getpid() == master:
            shutil.rmtree(directory, ignore_errors=True)


def _sweep_metrics() -> None:
    """Remove the directories of relays that were killed and could not do it themselves."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_METRICS}*"):
        owner = directory.name.removeprefix(_METRICS).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            shutil.rmtree(directory, ignore_errors=True)


def _addresses(settings: Settings) -> Iterator[HostPort]:
    """Yield what the master listens on, the admin port last: workers find their sockets by this order."""
    for listener in _http(settings):
        yield listener.address
    yield settings.admin.address


def _grpc_addresses(settings: Settings) -> Iterator[HostPort]:
    """Yield what each worker listens on by itself: gRPC takes no socket from the master."""
    for listener in settings.listeners:
        if listener.speaks_grpc:
            yield listener.address


def _http(settings: Settings) -> list[Listener]:
    return [listener for listener in settings.listeners if not listener.speaks_grpc]


def _unbindable(addresses: set[HostPort]) -> Iterator[str]:
    """Yield what is wrong with addresses that cannot be listened on; gunicorn would end for it."""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, address.port))
            except OSError as error:
                yield f"{address} cannot be listened on: {error.strerror}"


def _taken(pid_file: Path | None) -> Iterator[str]:
    """Yield what is wrong with a pid file that another process has written; gunicorn would end for it."""
    try:
        pid = Pidfile(str(pid_file)).validate() if pid_file else None
    except (OSError, OverflowError) as error:
        yield f"{pid_file}: {error}"
    else:
        if pid not in (None, os.getpid()):
            yield f"{pid_file} is the pid file of process {pid}"


def _on_reload(master: Arbiter) -> None:
    """Have the master not wait for the old workers: it would hear no signal and replace no worker."""
    master.cfg.set("graceful_timeout", 0)


def _bury(_: Arbiter, worker: Worker) -> None:
    """Keep what a worker counted that has ended."""
    from relay.exposition import bury  # noqa: PLC0415 - see `serve`

    bury(worker.pid)
