"""Have a running relay on this host read its settings again, and say what came of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from relay.settings import Settings

#: A worker is up in well under a second; a host that swaps may take longer.
PATIENCE = 30.0


class ReloadError(Exception):
    """The relay could not be told, or did not take the settings over; the text says which and why."""


def reload(settings: Settings) -> str:
    """Send SIGHUP to the master whose `pid_file` is set, and wait until its workers serve the new settings.

    Args:
        settings: the ones to be taken over, already read and found right.

    Returns:
        What happened, for people.

    Raises:
        ReloadError: there is no such relay, it refused the settings, or it did not answer in time.
    """
    if settings.pid_file is None:
        raise ReloadError(
            "pid_file is not set: set it, and restart the relay once so that it writes the file"
        )
    pid = _master(settings.pid_file)
    before = _first_state(settings)
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise ReloadError(f"process {pid} of {settings.pid_file}: {error.strerror}") from error
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            now = _state(settings)
        except ReloadError:
            # A worker that ends may take a connection with it.
            if not _lives(pid):
                raise ReloadError(f"the relay (process {pid}) ended; its log says why") from None
        else:
            if now["reloads_refused"] > before["reloads_refused"]:
                raise ReloadError("the relay refused the settings and keeps the old ones; its log says why")
            # Not merely newer than what serves: a reload before this one may still be under way.
            if now["serving"] > before["generation"]:
                return f"generation {now['serving']} serves; the workers before it end when their calls have"
        time.sleep(0.1)
    raise ReloadError(f"no worker served the new settings within {PATIENCE:g} s; the relay's log says why")


def _master(pid_file: Path) -> int:
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError) as error:
        raise ReloadError(f"no relay runs that wrote {pid_file}: {error}") from error
    if not 0 < pid < 1 << 31:
        # 0 and below are whole groups of processes.
        raise ReloadError(f"no relay runs that wrote {pid_file}: {pid} is no process")
    return pid


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _first_state(settings: Settings) -> dict[str, int]:
    try:
        return _state(settings)
    except ReloadError:
        # As below: a worker that ends because of another reload may have taken the connection with it.
        time.sleep(0.1)
        return _state(settings)


def _state(settings: Settings) -> dict[str, int]:
    address = settings.admin.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - compared
    connection = http.client.HTTPConnection(host, address.port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        said = json.loads(connection.getresponse().read())
        return {name: int(said[name]) for name in ("generation", "serving", "reloads_refused")}
    except (OSError, ValueError, TypeError, LookupError, http.client.HTTPException) as error:
        raise ReloadError(f"the admin port {address} does not answer as a relay's: {error!r}") from error
    finally:
        connection.close()
