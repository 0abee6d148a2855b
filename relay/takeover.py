"""A reload: workers with the new settings take over when all of them serve, or those of before go on.

Until then nobody is told to leave: the relay accepts throughout, and settings with which no worker can start
cost nothing but a line in the log.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from relay import listening
from relay.pid_file import PidFile, taken

if TYPE_CHECKING:
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
    pid_file: PidFile | None


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
    pid_file: PidFile | None
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
        if self.pid_file is not None and not _same(self.pid_file, self.before.pid_file):
            self.pid_file.unlink()

    def give_way_to(self, pid_file: PidFile | None) -> None:
        """Remove its pid file, unless a newer reload has that one, too."""
        if self.pid_file is not None and not _same(self.pid_file, pid_file):
            self.drop_pid_file()

    def keep_pid_file(self) -> None:
        """Make its pid file that of the relay, and remove the one of before."""
        before = self.before.pid_file
        if before is not None and not _same(before, self.pid_file):
            before.unlink()
        if self.pid_file is not None:
            try:
                # The admin port may have moved, or the file of before was this one by another name.
                self.pid_file.write()
            except OSError as error:
                log.warning("the pid file may be out of date", problem=str(error))


def problems(settings: Settings, sockets: listening.Sockets, *held: Settings) -> list[str]:
    """Return what is wrong with settings that a master shall take over which listens by those in `held`."""
    mine = {address for each in held for address in listening.grpc_addresses(each)}
    return [
        *listening.unbindable(sockets.missing(listening.addresses(settings))),
        *listening.unbindable(set(listening.grpc_addresses(settings)) - mine),
        *taken(settings.pid_file),
    ]


def written(settings: Settings, so_far: PidFile | None = None) -> PidFile | None:
    """Return the pid file of these settings, written if it is not the one of `so_far`. Raises OSError."""
    if settings.pid_file is None:
        return None
    file = PidFile(settings.pid_file, settings.admin.address)
    if _same(file, so_far):
        file.pid = os.getpid()
    else:
        file.write()
    return file


def _same(one: PidFile, other: PidFile | None) -> bool:
    return other is not None and one.fname == other.fname
