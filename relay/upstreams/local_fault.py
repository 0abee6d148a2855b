"""Why a connection could not be opened that says nothing about the SuperLink: the fault is this host's.

A worker without a free file or port, a host without memory, a name server that does not answer: the SuperLink
may be well, and other workers may reach it. So it counts as a failure neither for the circuit breaker, which
would shut all workers of the host out, nor for the health of an address.
"""

from __future__ import annotations

import errno
import socket
import time

import structlog
from prometheus_client import Counter

from relay.refusal import Reason, Refusal

log = structlog.get_logger("relay.upstreams.local_fault")

FAULTS = Counter(
    "relay_upstream_local_faults",
    "Connections to the SuperLink that could not be opened by no fault of that: `no_files`, `no_ports`,"
    " `no_memory`, `no_name` (it could not be resolved)",
    ["cause"],
)

NO_NAME = "no_name"
_CAUSES = {
    errno.EMFILE: "no_files",
    errno.ENFILE: "no_files",
    errno.EADDRNOTAVAIL: "no_ports",
    errno.ENOBUFS: "no_memory",
    errno.ENOMEM: "no_memory",
}
_KNOWN = frozenset({NO_NAME, *_CAUSES.values()})

#: Seconds between two lines in the log about faults on the way to one address.
_QUIET = 10.0


def local_fault(error: BaseException) -> str | None:
    """Return which fault of this host it is, as the metric names it; None if it is none."""
    if isinstance(error, socket.gaierror):
        return NO_NAME
    return _CAUSES.get(error.errno or 0) if isinstance(error, OSError) else None


def is_local(refusal: Refusal) -> bool:
    """Return whether a refusal was made by `LocalFaults`."""
    return refusal.reason is Reason.UPSTREAM_DOWN and refusal.cause in _KNOWN


class LocalFaults:
    """Counts and logs the faults on the way to one address, in one worker."""

    def __init__(self, address: str) -> None:
        """Prepare for `address`, `host:port`."""
        self._address = address
        self._quiet_until = 0.0

    def refusal(self, cause: str, detail: str) -> Refusal:
        """Note a fault; return what its call is refused with."""
        FAULTS.labels(cause).inc()
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET
            log.error(
                "no connection to the SuperLink by a fault of this host",
                address=self._address,
                cause=cause,
                error=detail,
            )
        return Refusal(Reason.UPSTREAM_DOWN, detail, by=self._address, sent=False, cause=cause)
