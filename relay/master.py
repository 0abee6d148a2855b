"""gunicorn's master as a relay needs it: it replaces workers, reloads by takeover, stops in good order."""

from __future__ import annotations

import os
import queue
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from relay import listening, takeover
from relay.processor import Waits
from relay.settings import SettingsError
from relay.takeover import State, Takeover
from relay.worker import HELD_SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay.metrics_directory import MetricsDirectory
    from relay.pid_file import PidFile
    from relay.settings import Settings
    from relay.shared import Shared

log = structlog.get_logger("relay.master")

#: A master that did not look for so long was away itself, and so were its workers: the host stood still.
AWAY_SECONDS = 5.0
#: Longest pause before a worker is started in place of one that could not start.
_PAUSE = 5.0
_TURN = 0.05
_NO_SUCH_CODE = -1


def pause_after(failures: int) -> float:
    """Return the seconds before the next worker is started after so many that could not start."""
    # The power of a night full of failures is too large for a float.
    return min(_PAUSE, 0.1 * 2.0 ** min(failures, 10))


class Application(Protocol):
    """What the master asks of the application.

    Attributes:
        settings: the ones that workers get.
        generation: their number.
        shared: memory that master and workers share.
        metrics: where the processes count, None if each does so for itself.
        graceful_seconds: the patience with a worker that drains.
    """

    settings: Settings
    generation: int
    callable: object
    shared: Shared
    metrics: MetricsDirectory | None

    @property
    def graceful_seconds(self) -> int: ...

    def read(self) -> Settings:
        """Read the settings. Raises SettingsError."""
        ...

    def reload(self) -> None:
        """Translate `settings` into gunicorn's."""
        ...


class Master(Arbiter):  # type: ignore[misc]
    """The process that starts workers and looks after them."""

    app: Application
    LISTENERS: list[Any]
    WORKERS: dict[int, Any]
    pidfile: PidFile | None

    def __init__(self, app: Application) -> None:
        """Prepare to run `app`."""
        self._leaving: set[int] = set()
        self._sockets = listening.Sockets()
        self._takeover: Takeover | None = None
        self._asked = False
        self._metrics_fault = ""
        self._failures = 0
        self._start_at = 0.0
        self._looked = time.monotonic()
        self._spared_until = 0.0
        self._waits = Waits()
        super().__init__(app)

    def start(self) -> None:
        """Listen."""
        super().start()
        self.pidfile = takeover.written(self.app.settings)
        names = [str(address) for address in listening.addresses(self.app.settings)]
        self._sockets.hold(dict(zip(names, self.LISTENERS, strict=True)))
        self._sockets.choose_endings(self.app.settings)

    # -- workers -----------------------------------------------------------------------------------

    @property
    def WORKER_BOOT_ERROR(self) -> int:  # noqa: N802 - gunicorn's
        """The exit code of a worker for which the relay ends: none as soon as one has served."""
        return _NO_SUCH_CODE if self.app.shared.served else 3

    @property
    def APP_LOAD_ERROR(self) -> int:  # noqa: N802 - gunicorn's
        """Likewise."""
        return _NO_SUCH_CODE if self.app.shared.served else 4

    def manage_workers(self) -> None:
        """Go on with a reload, and keep as many workers of the newest settings as were asked for.

        One that was told to leave takes no calls, and counts not. gunicorn counts it: a new worker that dies
        would be missed for as long as an old one drains.
        """
        self._leaving &= self.WORKERS.keys()
        self._keep_metrics_directory()
        self._go_on()
        staying = sorted(self._of(self.app.generation), key=lambda pid: self.WORKERS[pid].age)
        for pid in staying[: max(0, len(staying) - self.num_workers)]:
            self.kill_worker(pid, signal.SIGTERM)
        for _ in range(self.num_workers - len(staying)):
            if time.monotonic() >= self._start_at:
                self.spawn_worker()
                time.sleep(_TURN)  # no faster, should they die as soon as they have begun

    def _keep_metrics_directory(self) -> None:
        try:
            if self.app.metrics is not None and self.app.metrics.ensure():
                # Workers that are there go on counting in what is gone; those of a reload count in this.
                log.warning("the directory of metrics was removed", directory=str(self.app.metrics.path))
            self._metrics_fault = ""
        except OSError as error:
            if str(error) != self._metrics_fault:
                self._metrics_fault = str(error)
                log.warning("no directory for metrics", problem=str(error))

    def spawn_worker(self) -> int:
        """Fork a worker that misses no signal of its start; return 0 if that cannot be done for now."""
        self.app.shared.starts(self.worker_age + 1)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        self._keep_metrics_directory()
        try:
            pid: int = super().spawn_worker()
        except OSError as error:
            log.error("no worker can be started", problem=str(error))  # noqa: TRY400 - it is of the host
            self._pause()
            return 0
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        self.WORKERS[pid].generation = self.app.generation
        return pid

    def kill_worker(self, pid: int, sig: int) -> None:
        """Send a signal to a worker, and remember who was told to leave."""
        if sig == signal.SIGTERM:
            self._leaving.add(pid)
        super().kill_worker(pid, sig)

    def murder_workers(self) -> None:
        """Kill workers that tell nothing of themselves, unless the whole host stood still, or is too busy."""
        now = time.monotonic()
        if now - self._looked > AWAY_SECONDS:
            log.warning("the host stood still; workers get a new period", seconds=round(now - self._looked))
            self._spared_until = now + self.timeout
        self._looked = now
        self._waits.forgive(self.WORKERS)
        if now >= self._spared_until:
            super().murder_workers()

    def ended(self, worker: Any) -> None:
        """Take note of a worker that has ended."""
        told = worker.pid in self._leaving
        if told or self.app.shared.has_begun(worker.age):
            return
        self._pause()
        if self._takeover is not None and worker.generation == self._takeover.generation:
            self._takeover.deaths += 1

    def _pause(self) -> None:
        """Wait longer with each worker that cannot start."""
        self._failures += 1
        self._start_at = time.monotonic() + pause_after(self._failures)

    def _of(self, generation: int) -> set[int]:
        """Return the workers of these settings that were not told to leave."""
        return {
            pid
            for pid, worker in self.WORKERS.items()
            if worker.generation == generation and pid not in self._leaving
        }

    def _dismiss(self, pids: Iterable[int]) -> None:
        """Have workers drain; end those that have not begun to accept, of which no node knows."""
        for pid in pids:
            worker = self.WORKERS[pid]
            if self.app.shared.may_accept(worker.age):
                self.kill_worker(pid, signal.SIGTERM)
                continue
            self._leaving.add(pid)
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                # gunicorn would take it for one that was short of memory.
                del self.WORKERS[pid]
                worker.tmp.close()
                self.cfg.child_exit(self, worker)

    # -- reload ------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Have workers with new settings take over, as soon as a reload that is under way has ended."""
        self._asked = True

    def drop_other_sockets(self) -> None:
        """Close the sockets that only workers of before listen on; for a worker that was just forked."""
        self._sockets.close(but=listening.addresses(self.app.settings))

    def wait_for_signals(self, timeout: float = 1.0) -> list[int]:
        """Return the signals that have come, each SIGHUP but the last left out; wait not long in a reload."""
        busy = self._takeover is not None or time.monotonic() < self._start_at
        signals: list[int] = super().wait_for_signals(_TURN if busy else timeout)
        return [
            number
            for at, number in enumerate(signals)
            if number != signal.SIGHUP or signal.SIGHUP not in signals[at + 1 :]
        ]

    def _go_on(self) -> None:
        if self._takeover is not None:
            self._watch(self._takeover)
        waits = self._takeover is not None and self._takeover.age < takeover.APART_SECONDS
        if self._asked and not waits and not self.app.shared.stopping:
            self._asked = False
            self._begin()

    def _begin(self) -> None:
        """Read the settings and make them those of new workers, or say why not."""
        shared = self.app.shared
        shared.begin()
        before = self._takeover
        try:
            faults = self._take()
        except (Exception, SystemExit) as error:  # the relay must outlive whatever is wrong with a reload
            log.exception("reload failed")
            faults = [str(error)]
            if self._takeover is not None and self._takeover is not before:
                self._give_up(self._takeover, str(error))
        for fault in faults:
            log.error("reload refused; the old settings stay", problem=fault)
        if faults:
            shared.reloaded(accepted=False)
            if self._takeover is None:
                shared.end(self.app.generation)

    def _take(self) -> list[str]:
        """Make new settings those of new workers; return what is wrong with them, and then change nothing."""
        app, pending = self.app, self._takeover
        now = State(app.settings, app.generation, self.pidfile)
        before = now if pending is None or pending.told is not None else pending.before
        try:
            settings = app.read()
        except SettingsError as error:
            return [str(problem) for problem in error.problems]
        if faults := takeover.problems(settings, self._sockets, now.settings, before.settings):
            return faults
        try:
            self._sockets.open(listening.addresses(settings), self.cfg, self.log)
            pid_file = takeover.written(settings, before.pid_file)
        except OSError as error:
            held = (*listening.addresses(now.settings), *listening.addresses(before.settings))
            self._sockets.close(but=held)
            return [str(error)]
        if pending is not None:
            if pending.told is not None:
                self._finish(pending)
            else:
                log.warning("a newer reload has come before workers served", generation=pending.generation)
                pending.give_way_to(pid_file)
                self._dismiss(self._of(pending.generation))
        app.shared.reloaded(accepted=True, workers=settings.workers)
        self._takeover = Takeover(before, app.shared.generation, pid_file)
        self._use(settings, app.shared.generation)
        self._sockets.choose_endings(before.settings, settings)
        return []

    def _use(self, settings: Settings, generation: int) -> None:
        """Give these settings to the workers that are started from here on."""
        app = self.app
        app.settings, app.generation, app.callable = settings, generation, None
        app.reload()
        self.setup(app)  # gunicorn's: numbers of workers, names, its log
        self.LISTENERS = self._sockets.of(listening.addresses(settings))
        self._failures, self._start_at = 0, 0.0

    def _watch(self, pending: Takeover) -> None:
        """Take the next step of a reload if it is time to."""
        if pending.told is not None:
            left = all(
                self.app.shared.has_left(worker.age)
                for worker in self.WORKERS.values()
                if worker.generation != pending.generation
            )
            if left or time.monotonic() - pending.told > takeover.LEAVE_SECONDS:
                self._finish(pending)
            return
        mine = self._of(pending.generation)
        if sum(self.app.shared.has_begun(self.WORKERS[pid].age) for pid in mine) >= self.num_workers:
            pending.told = time.monotonic()
            self._sockets.choose_endings(self.app.settings)
            self._sockets.close(but=listening.addresses(self.app.settings))
            pending.keep_pid_file()
            self.pidfile = pending.pid_file
            self._dismiss(self.WORKERS.keys() - self._leaving - mine)
        elif (fault := pending.fault()) is not None:
            self._give_up(pending, fault)

    def _finish(self, pending: Takeover) -> None:
        self._takeover = None
        self.app.shared.end(pending.generation)

    def _give_up(self, pending: Takeover, fault: str) -> None:
        log.error("reload given up; the workers of before go on", problem=fault)
        self._takeover = None
        failed = self._of(pending.generation)
        pending.drop_pid_file()
        self._use(pending.before.settings, pending.before.generation)
        self._sockets.choose_endings(self.app.settings)
        self._sockets.close(but=listening.addresses(self.app.settings))
        self._dismiss(failed)
        self.app.shared.reloaded(accepted=False)
        self.app.shared.end(pending.before.generation)

    # -- stop --------------------------------------------------------------------------------------

    def handle_int(self) -> None:
        """Ctrl-C drains, too; a second one does not wait."""
        self.handle_term()

    def stop(self, graceful: bool = True) -> None:
        """Report not ready, go on for `drain.delay`, then stop the workers."""
        self.app.shared.stop()
        if graceful and self.app.shared.served:
            self._wait_for_balancers(self.app.settings.drain.delay)
        if self._takeover is not None:
            self._takeover.drop_pid_file()
        # While one starts that nobody hears of, its copies of the sockets would take connections.
        self._dismiss([pid for pid, each in self.WORKERS.items() if not self.app.shared.may_accept(each.age)])
        self._sockets.close()
        self.LISTENERS = []
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        self._wait_for_workers(self.app.graceful_seconds)
        self.kill_workers(signal.SIGKILL)
        self._reap()

    def _wait_for_balancers(self, seconds: float) -> None:
        """Go on for so long, or until told to hurry; that a worker has ended is no reason to."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(queue.Empty):
                number = self.SIG_QUEUE.get(timeout=0.1)
                if number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
                    self.SIG_QUEUE.put(number)
                    return
            self._reap()
            self.murder_workers()
            self.manage_workers()

    def _wait_for_workers(self, seconds: float) -> None:
        """Wait for all workers to end, for so long by a clock that nobody sets, or until told to hurry."""
        turn = time.monotonic()
        end = turn + seconds
        while self.WORKERS and turn < end:
            with suppress(queue.Empty):
                if self.SIG_QUEUE.get(timeout=0.1) in (signal.SIGINT, signal.SIGQUIT):
                    log.info("quick shutdown requested")
                    self.kill_workers(signal.SIGQUIT)
                    end = min(end, time.monotonic() + 2.0)
            self._reap()
            away = time.monotonic() - turn
            if away > AWAY_SECONDS:
                end += away
            turn += away

    def _reap(self) -> None:
        with suppress(HaltServer):
            self.reap_workers()
