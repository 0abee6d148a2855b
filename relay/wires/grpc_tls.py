"""The credentials of an encrypted gRPC listener."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import structlog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

log = structlog.get_logger("relay.wires.grpc")


class _Files:
    """Certificates and keys as they are on disk; gRPC asks at each handshake, in threads of its own."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Read them. Raises OSError."""
        self._pairs = pairs
        self._seen = self._state()
        self.configuration = self._read()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what is on disk if that is not what was returned last; None if it is, or cannot be used."""
        try:
            state = self._state()
            if state == self._seen:
                return None
            configuration = self._read()
        except OSError as error:
            log.warning("a certificate cannot be read; the old one stays", error=str(error))
            return None
        self._seen = state
        log.info("certificates changed", files=[str(certificate) for certificate, _ in self._pairs])
        return configuration

    def _state(self) -> list[tuple[int, int, int, int]]:
        stats = [path.stat() for pair in self._pairs for path in pair]
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for stat in stats]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(key.read_bytes(), certificate.read_bytes()) for certificate, key in self._pairs]
        )


def server_credentials(pairs: Sequence[tuple[Path, Path]]) -> grpc.ServerCredentials:
    """Return the credentials of a listener; gRPC speaks TLS 1.2 and 1.3. Files that change are taken up.

    Args:
        pairs: PEM files of a certificate, leaf first, and its key. A client that asks for a name gets the one
            that is made for it, or the first.

    Raises:
        OSError: a file cannot be read.
    """
    files = _Files(pairs)
    return grpc.dynamic_ssl_server_credentials(files.configuration, files.changed)
