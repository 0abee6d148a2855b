"""The credentials of an encrypted gRPC listener.

gRPC asks for certificates at each handshake, and takes whatever it is given: of what it then cannot use it
says nothing here, and goes on with the old ones for good. So files are given to it only if they are sound and
belong together, by the rules of `relay.tls_files`; until then each handshake looks again.
"""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING

import grpc
import structlog

from relay import certificates
from relay.tls import server_context

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryptography import x509

log = structlog.get_logger("relay.wires.grpc")

#: PEM of a key and of its certificate with the chain, as gRPC takes them.
_Content = list[tuple[bytes, bytes]]


class _Files:
    """Certificates and keys as they are on disk; gRPC asks at each handshake, in threads of its own."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Read them. Raises OSError or ValueError if they cannot be used."""
        self._pairs = pairs
        self._told = ""
        self._leaves: list[x509.Certificate] = []
        self._seen = self._state()
        self._leaves = self._sound()
        self._content = self._read()
        self.configuration = grpc.ssl_server_certificate_configuration(self._content)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what is on disk if that is not what was returned last; None if it is, or cannot be used."""
        try:
            state = self._state()
            if state == self._seen:
                return None
            content = self._read()
            if content != self._content:
                leaves = self._sound()
                if self._state() != state:
                    return None  # they are being written, and the next handshake looks again
                self._leaves = leaves
        except (OSError, ValueError) as error:
            self._warn(str(error) or type(error).__name__)
            return None
        self._told, self._seen = "", state
        if content == self._content:
            return None  # touched, or put back
        self._content = content
        log.info("certificates changed", files=[str(certificate) for certificate, _ in self._pairs])
        return grpc.ssl_server_certificate_configuration(content)

    def _state(self) -> list[tuple[int, int, int, int]]:
        stats = [path.stat() for pair in self._pairs for path in pair]
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for stat in stats]

    def _read(self) -> _Content:
        return [(key.read_bytes(), certificate.read_bytes()) for certificate, key in self._pairs]

    def _sound(self) -> list[x509.Certificate]:
        """Return the certificates without chains. Raises OSError or ValueError if one cannot be used."""
        leaves, now = [], time.time()
        for index, (certificate, key) in enumerate(self._pairs):
            try:
                server_context(certificate, key, "1.2")
            except ssl.SSLError as error:
                raise ValueError(f"{certificate} with {key}: {error}") from None
            leaf = certificates.load(certificate)[0]
            fault = certificates.time_fault(leaf, now)
            if fault is not None and self._is_valid(index, now):
                raise ValueError(f"{certificate} {fault}")
            leaves.append(leaf)
        return leaves

    def _is_valid(self, index: int, now: float) -> bool:
        """Return whether the certificate in force is; at the beginning there is none."""
        return bool(self._leaves) and certificates.time_fault(self._leaves[index], now) is None

    def _warn(self, problem: str) -> None:
        if problem != self._told:  # else each handshake would say it
            self._told = problem
            log.warning("certificates cannot be used; the old ones stay", problem=problem)


def server_credentials(pairs: Sequence[tuple[Path, Path]]) -> grpc.ServerCredentials:
    """Return the credentials of a listener; gRPC speaks TLS 1.2 and 1.3. Files that change are taken up.

    Args:
        pairs: PEM files of a certificate, leaf first, and its key. A client that asks for a name gets the one
            that is made for it, or the first.

    Raises:
        OSError: a file cannot be read.
        ValueError: it cannot be used.
    """
    files = _Files(pairs)
    return grpc.dynamic_ssl_server_credentials(files.configuration, files.changed)
