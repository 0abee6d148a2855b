"""TLS contexts, and the manners of a server inside a handshake.

A SuperNode gives up for good on a transport error whose text names TLS (docs/flower-compatibility.md): a
clean close in the middle of a handshake is one, a reset is not. So every connection of a TLS listener is
born with SO_LINGER 0, by which the kernel ends it with a reset whoever closes it and why, a killed worker
included; the linger is taken off when its handshake is over.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: A handshake may wait for a busy worker, but not for ever for a client that went silent in it.
HANDSHAKE_SECONDS = 60.0

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_NORMAL_CLOSE = struct.pack("ii", 0, 0)
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# Forward secrecy and authenticated encryption only (RFC 9325); TLS 1.3 brings its own.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def server_context(certificate: Path, key: Path, minimum_version: str) -> ssl.SSLContext:
    """Return the context of a listener.

    Args:
        certificate: PEM chain, leaf first.
        key: its private key, PEM.
        minimum_version: "1.2" or "1.3".

    Raises:
        OSError: a file cannot be read, or they do not belong together (ssl.SSLError is one).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[minimum_version]
    context.set_ciphers(_CIPHERS)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return a context that checks an upstream against `ca_file`, or the system's authorities.

    Raises:
        OSError: `ca_file` cannot be read or holds no certificate (ssl.SSLError is one).
    """
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def reset_unfinished_handshakes(listening: socket.socket) -> None:
    """Have each connection that comes to `listening` end with a reset, until `handshake_done` is told."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def close_in_good_order(connection: socket.socket) -> None:
    """Undo `reset_unfinished_handshakes`: for a connection, or for a port that is no longer one for TLS."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NORMAL_CLOSE)


def handshake_done(transport: asyncio.BaseTransport) -> None:
    """Let this connection end in good order, once the end of its handshake has been sent.

    To be called within `connection_made`: the last message of TLS 1.2 is then sent in the next turn of the
    event loop. (Measured: a FIN before it, from a worker that was killed, is as fatal as any other.)
    """
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, _handshake_sent, transport)


def _handshake_sent(transport: asyncio.BaseTransport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):  # it may be closed already
            close_in_good_order(connection)
