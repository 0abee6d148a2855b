"""The pid file of a master, and beside it the address of its admin port, for `flwr-relay reload`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from gunicorn.pidfile import Pidfile

from relay.settings import HostPort


class PidFile(Pidfile):  # type: ignore[misc]
    """A file with the pid of this process; `<name>.admin` says where its admin port is."""

    def __init__(self, path: Path, admin: HostPort) -> None:
        """Prepare to write it."""
        super().__init__(str(path))
        self.admin = admin

    def write(self) -> None:
        """Write both files, unless they are there. Raises OSError."""
        try:
            self.create(os.getpid())
            beside = _beside(Path(self.fname))
            if _read(beside) != str(self.admin):
                beside.write_text(f"{self.admin}\n")
        except (OSError, RuntimeError) as error:
            raise OSError(f"{self.fname} cannot be written: {error}") from error
        finally:
            self.pid = os.getpid()  # also if it was there already

    def unlink(self) -> None:
        """Remove both files if they are of this process."""
        with suppress(OSError, ValueError):
            if int(Path(self.fname).read_text()) == self.pid:
                _beside(Path(self.fname)).unlink()
        super().unlink()


def admin_of(pid_file: Path) -> HostPort | None:
    """Return where the admin port of the relay is that wrote this pid file; None if it does not say."""
    try:
        return HostPort.parse(_read(_beside(pid_file)))
    except ValueError:
        return None


def taken(pid_file: Path | None) -> list[str]:
    """Return what is wrong with a pid file that another process has written; gunicorn would end for it."""
    try:
        pid = Pidfile(str(pid_file)).validate() if pid_file else None
    except (OSError, OverflowError) as error:
        return [f"{pid_file}: {error}"]
    return [] if pid in (None, os.getpid()) else [f"{pid_file} is the pid file of process {pid}"]


def _beside(pid_file: Path) -> Path:
    return pid_file.with_name(f"{pid_file.name}.admin")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
