"""Have a running relay on this host read its settings again, and say what came of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from relay.pid_file import admin_of

if TYPE_CHECKING:
    from pathlib import Path

    from relay.settings import HostPort, Settings

#: A worker is up in well under a second; a host that swaps may take longer. The relay gives up first.
PATIENCE = 45.0


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
    addresses = _admin_ports(settings, settings.pid_file)
    before = _idle(addresses)
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise ReloadError(f"process {pid} of {settings.pid_file}: {error.strerror}") from error
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            now = _state(addresses)
        except ReloadError:
            # A worker that ends may take a connection with it.
            if not _lives(pid):
                raise ReloadError(f"the relay (process {pid}) ended; its log says why") from None
        else:
            # All that was read since `before` was read from what was there then.
            if now["serving"] > before["generation"]:
                return f"generation {now['serving']} serves; the workers before it end when their calls have"
            if now["reloads_refused"] > before["reloads_refused"] and not now["reloading"]:
                raise ReloadError(_refusal(before, now))
        time.sleep(0.1)
    raise ReloadError(f"no worker served the new settings within {PATIENCE:g} s; the relay's log says why")


def _refusal(before: dict[str, int], now: dict[str, int]) -> str:
    if now["generation"] > before["generation"]:
        return "the relay could start no workers with the settings and keeps the old ones; its log says why"
    return "the relay refused the settings and keeps the old ones; its log says why"


def _admin_ports(settings: Settings, pid_file: Path) -> list[HostPort]:
    """Return where the relay may be asked: where it said it listens, then where it is to."""
    said = admin_of(pid_file)
    wanted = settings.admin.address
    return [wanted] if said in (None, wanted) else [said, wanted]


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


def _idle(addresses: list[HostPort]) -> dict[str, int]:
    """Return the state when no other reload is under way, which could be mistaken for this one."""
    try:
        now = _state(addresses)
    except ReloadError:
        # As above: a worker that ends because of another reload may have taken the connection with it.
        time.sleep(0.1)
        now = _state(addresses)
    end = time.monotonic() + PATIENCE
    while now["reloading"] and time.monotonic() < end:
        time.sleep(0.1)
        with suppress(ReloadError):
            now = _state(addresses)
    return now


def _state(addresses: list[HostPort]) -> dict[str, int]:
    """Return what the relay says at the first of these addresses that answers. Raises ReloadError."""
    *others, last = addresses
    for address in others:
        with suppress(ReloadError):
            return _ask(address)
    return _ask(last)


def _ask(address: HostPort) -> dict[str, int]:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - compared
    connection = http.client.HTTPConnection(host, address.port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        said = json.loads(connection.getresponse().read())
        numbers = {name: int(said[name]) for name in ("generation", "serving", "reloads_refused")}
        return numbers | {"reloading": int(said.get("reloading", 0))}
    except (OSError, ValueError, TypeError, LookupError, http.client.HTTPException) as error:
        raise ReloadError(f"the admin port {address} does not answer as a relay's: {error!r}") from error
    finally:
        connection.close()
