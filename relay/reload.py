"""Have a running relay on this host read its settings again, and say what came of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    try:
        pid = int(settings.pid_file.read_text())
    except (OSError, ValueError) as error:
        raise ReloadError(f"no relay runs that wrote {settings.pid_file}: {error}") from error
    before = _state(settings)
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise ReloadError(f"process {pid} of {settings.pid_file}: {error.strerror}") from error
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        now = _state(settings)
        if now["reloads_refused"] > before["reloads_refused"]:
            raise ReloadError("the relay refused the settings and keeps the old ones; its log says why")
        if now["serving"] > before["serving"]:
            return f"generation {now['serving']} serves; the workers before it end when their calls have"
        time.sleep(0.1)
    raise ReloadError(f"no worker served the new settings within {PATIENCE:g} s; the relay's log says why")


def _state(settings: Settings) -> dict[str, Any]:
    address = settings.admin.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - compared
    connection = http.client.HTTPConnection(host, address.port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        state: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ReloadError(f"the admin port {address} does not answer: {error}") from error
    finally:
        connection.close()
    return state
