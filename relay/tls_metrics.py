"""The TLS of one worker: its handshakes and the files behind it, counted, and a warning before they end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter, Gauge

from relay.certificates import show_time

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from relay.stores.host import HostTable
    from relay.tls_files import End, ListenerTls, TlsFiles, UpstreamTls

log = structlog.get_logger("relay.tls")

HANDSHAKES = Counter(
    "relay_tls_handshakes",
    "TLS handshakes of clients: done, in this version, or refused because of what the client can or showed",
    ["outcome", "version"],
)
RELOADS = Counter(
    "relay_tls_reloads",
    "Changes of TLS files that a worker noticed: taken, or refused because they cannot be used",
    ["outcome"],
)
EXPIRY = Gauge(
    "relay_tls_certificate_expiry_seconds",
    "When a file of a listener or of the upstream ends, in seconds since 1970",
    ["listener", "file"],
    multiprocess_mode="livemostrecent",
)

#: How long before the end of something it is warned of, once a day.
WARNING_SECONDS = 14 * 86_400.0
_DAY = 86_400.0

# OpenSSL's words for a handshake that failed for the certificate of a client, or for want of one.
_CLIENT_FAULTS = {"PEER_DID_NOT_RETURN_A_CERTIFICATE", "CERTIFICATE_VERIFY_FAILED"}


class Handshakes:
    """Counts the handshakes of listeners; a `relay.tls.Watcher`."""

    def __init__(self) -> None:
        """Bind the labels."""
        self._done = {version: HANDSHAKES.labels("done", version) for version in ("TLSv1.2", "TLSv1.3")}
        self._refused = HANDSHAKES.labels("refused", "")

    def done(self, version: str) -> None:
        """Count one that was done."""
        self._done[version].inc()

    def refused(self, error: ssl.SSLError) -> None:
        """Count one that failed; say why, if it was for the certificate of a client."""
        self._refused.inc()
        if error.reason in _CLIENT_FAULTS:
            why = getattr(error, "verify_message", "") or "no certificate was shown"
            log.info("TLS handshake refused", problem=why)


class Tls:
    """What a worker has of TLS.

    Attributes:
        listeners: one per listener of the settings, None for a plain one.
        upstream: for the SuperLink, None for a plain one.
    """

    def __init__(
        self,
        listeners: Sequence[ListenerTls | None] = (),
        upstream: UpstreamTls | None = None,
        table: HostTable | None = None,
    ) -> None:
        """Watch these; `table` remembers for all workers what was warned of today."""
        self.listeners = tuple(listeners)
        self.upstream = upstream
        self._table = table
        self._files: list[TlsFiles] = [files for files in (*listeners, upstream) if files is not None]
        self._warned = 0.0
        for files in self._files:
            self._show(files)

    def tick(self) -> None:
        """Take changed files up, and warn of what ends; to be called once a second."""
        for files in self._files:
            outcome = files.tick()
            if outcome is not None:
                RELOADS.labels(outcome).inc()
            if outcome == "taken":
                self._show(files)
        now = time.time()
        if now >= self._warned + 60.0 or now < self._warned:
            self._warned = now
            for files in self._files:
                for end in files.ends:
                    self._warn(files.name, end, now)

    def _show(self, files: TlsFiles) -> None:
        for end in files.ends:
            EXPIRY.labels(files.name, end.file).set(end.at)

    def _warn(self, name: str, end: End, now: float) -> None:
        """Write one line a day, whichever worker comes to it first."""
        if now < end.at - WARNING_SECONDS:
            return
        key = f"tls end {name} {end.file} {end.at}".encode()
        today = int(now // _DAY)
        if self._table is not None:
            if self._table.get(key) == today:
                return
            self._table.put(key, today)
        what = "a TLS file has ended" if now >= end.at else "a TLS file ends soon"
        log.warning(what, where=name, file=end.file, ends=show_time(end.at))


#: What a relay has that serves and calls without TLS.
NO_TLS = Tls()
