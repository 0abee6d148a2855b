"""The directory in which the processes of one relay keep their counts: whose it is, and that it is there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "flwr-relay-metrics-"
_MEMORY = "/dev/shm"  # noqa: S108 - a directory of ours is made in it


class MetricsDirectory:
    """A directory that is locked for as long as a process of its relay lives.

    The lock is a BSD lock on the directory itself: processes inherit it, no other container's pids have to be
    known to see it, and systemd-tmpfiles leaves what is locked so alone.

    Attributes:
        path: where it is; it stays the same when the directory is made anew.
    """

    def __init__(self) -> None:
        """Make one, after those that nobody holds any more were removed. Raises OSError."""
        place = _place()
        _sweep(place)
        self._lock = -1
        while self._lock < 0:
            self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place))
            self._lock = _locked(self.path)  # -1 if another relay took it for one that is left over

    def ensure(self) -> bool:
        """Make the directory anew if somebody has removed it; return whether that was so. Raises OSError."""
        with suppress(OSError):
            if os.path.samestat(self.path.stat(), os.fstat(self._lock)):
                return False
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        lock = _locked(self.path)
        if lock < 0:
            raise BlockingIOError(0, "held by another process", str(self.path))
        os.close(self._lock)
        self._lock = lock
        return True

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _place() -> str:
    """Return where the directory belongs: where TMPDIR says, else in memory, which no cleaner looks after."""
    if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK | os.X_OK):
        return _MEMORY
    return tempfile.gettempdir()


def _sweep(place: str) -> None:
    """Remove the directories of relays that were killed and could not do it themselves."""
    for directory in Path(place).glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = _locked(directory)
            if lock >= 0:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)


def _locked(directory: Path) -> int:
    """Return a descriptor that locks a directory; -1 if it is locked, gone or somebody else's."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = directory.stat()
        if os.path.samestat(there, os.fstat(descriptor)) and there.st_uid == os.geteuid():
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return -1
