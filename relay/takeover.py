"""A reload: workers with the new settings take over when all of them serve, or those of before go on.

Until then nobody is told to leave: the relay accepts throughout, and settings with which no worker can start
cost nothing but a line in the log.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from gunicorn.pidfile import Pidfile

from relay import listening

if TYPE_CHECKING:
    from pathlib import Path

    from relay.settings import Settings

log = structlog.get_logger("relay.takeover")

#: Workers that have not begun to serve by then are given up: one is up in a second, on a busy host in ten.
START_SECONDS = 30.0
#: So many workers that end before they serve show that none will.
TRIES = 3
#: A reload that is asked for while another one goes on waits for it, but no longer than this.
APART_SECONDS = 10.0
#: How long old workers may take to close their ports; more only if they hang.
LEAVE_SECONDS = 5.0


@dataclass(slots=True)
class State:
    """What can be gone back to.

    Attributes:
        settings: the ones that workers get.
        generation: their number.
        pid_file: the file that the master has written.
    """

    settings: Settings
    generation: int
    pid_file: Pidfile | None


@dataclass(slots=True)
class Takeover:
    """A reload that is under way.

    Attributes:
        before: to go back to.
        generation: the number of the new settings.
        pid_file: the file that was written for them.
        began: when, on the monotonic clock.
        deaths: how many workers have ended without having served.
        told: when the workers of before were told to leave; None while they go on.
    """

    before: State
    generation: int
    pid_file: Pidfile | None
    began: float = field(default_factory=time.monotonic)
    deaths: int = 0
    told: float | None = None

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def fault(self) -> str | None:
        """Return why it has failed, None if it has not."""
        if self.deaths >= TRIES:
            return f"{self.deaths} workers with the new settings ended before they served"
        if self.age > START_SECONDS:
            return f"no workers with the new settings served within {START_SECONDS:g} s"
        return None

    def drop_pid_file(self) -> None:
        """Remove the pid file that was written for it alone."""
        if self.pid_file is not None and self.pid_file is not self.before.pid_file:
            self.pid_file.unlink()


def problems(settings: Settings, sockets: listening.Sockets, *held: Settings) -> list[str]:
    """Return what is wrong with settings that a master shall take over which listens by those in `held`."""
    mine = {address for each in held for address in listening.grpc_addresses(each)}
    return [
        *listening.unbindable(sockets.missing(listening.addresses(settings))),
        *listening.unbindable(set(listening.grpc_addresses(settings)) - mine),
        *taken(settings.pid_file),
    ]


def written(pid_file: Path | None, so_far: Pidfile | None) -> Pidfile | None:
    """Write the pid file unless it is the one of `so_far`; return it. Raises OSError."""
    if pid_file is None:
        return None
    if so_far is not None and so_far.fname == str(pid_file):
        return so_far
    file = Pidfile(str(pid_file))
    try:
        file.create(os.getpid())
    except (OSError, RuntimeError) as error:
        raise OSError(f"{pid_file} cannot be written: {error}") from error
    file.pid = os.getpid()
    return file


def kept(pid_file: Pidfile | None) -> Pidfile | None:
    """Return the pid file, written again if it had another name and was removed by that."""
    if pid_file is not None:
        try:
            pid_file.create(os.getpid())
        except (OSError, RuntimeError) as error:
            log.warning("the pid file cannot be written", problem=str(error))
        pid_file.pid = os.getpid()
    return pid_file


def taken(pid_file: Path | None) -> list[str]:
    """Return what is wrong with a pid file that another process has written; gunicorn would end for it."""
    try:
        pid: Any = Pidfile(str(pid_file)).validate() if pid_file else None
    except (OSError, OverflowError) as error:
        return [f"{pid_file}: {error}"]
    return [] if pid in (None, os.getpid()) else [f"{pid_file} is the pid file of process {pid}"]
