"""The credentials of an encrypted gRPC listener."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from pathlib import Path


def server_credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    """Return the credentials of a listener; gRPC speaks TLS 1.2 and 1.3.

    Args:
        certificate: PEM chain, leaf first.
        key: its private key, PEM.

    Raises:
        OSError: a file cannot be read.
    """
    return grpc.ssl_server_credentials(((key.read_bytes(), certificate.read_bytes()),))
