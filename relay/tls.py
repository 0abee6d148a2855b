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
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

#: A handshake may wait for a busy worker, but not for ever for a client that went silent in it.
HANDSHAKE_SECONDS = 60.0

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_NORMAL_CLOSE = struct.pack("ii", 0, 0)
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# Forward secrecy and authenticated encryption only (RFC 9325); TLS 1.3 brings its own.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

#: What becomes of client certificates, by the word for it in the settings.
_ASKING = {"off": ssl.CERT_NONE, "wanted": ssl.CERT_OPTIONAL, "needed": ssl.CERT_REQUIRED}


def server_context(
    certificate: Path,
    key: Path,
    minimum_version: str,
    *,
    protocol: str = "http/1.1",
    client_ca: Path | None = None,
    client_certificates: str = "off",
) -> ssl.SSLContext:
    """Return the context of a listener.

    Args:
        certificate: PEM chain, leaf first.
        key: its private key, PEM.
        minimum_version: "1.2" or "1.3".
        protocol: what is spoken inside, by its name in ALPN: "http/1.1" or "h2".
        client_ca: PEM file of the authorities that clients' certificates are checked against.
        client_certificates: "off", "wanted" or "needed".

    Raises:
        OSError: a file cannot be read, or they do not belong together (ssl.SSLError is one).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[minimum_version]
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(certificate, key, password=_no_password)
    context.set_alpn_protocols([protocol])
    if client_ca is not None:
        context.load_verify_locations(cafile=client_ca)
        context.verify_mode = _ASKING[client_certificates]
        # What is named there is believed by itself: an office of a larger authority, without all of that.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        # A ticket would let a client in whose certificate was checked when it was given, not when it comes.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return context


def client_context(
    ca_file: Path | None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return a context that checks an upstream against `ca_file`, or the system's authorities.

    Args:
        ca_file: PEM file of authorities.
        certificate, key: PEM files of the relay's own certificate, for an upstream that asks for one.

    Raises:
        OSError: a file cannot be read, holds no certificate, or they do not belong together (ssl.SSLError
            is one).
    """
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if certificate is not None:
        context.load_cert_chain(certificate, key, password=_no_password)
    return context


def _no_password() -> str:
    """Stand in for OpenSSL's own question on the terminal, for which a worker would wait."""
    raise ssl.SSLError("the key is encrypted")


class Watcher(Protocol):
    """Who is told what becomes of the handshakes of a listener."""

    def done(self, version: str) -> None:
        """A handshake was done, in this version ("TLSv1.3")."""

    def refused(self, error: ssl.SSLError) -> None:
        """A handshake failed: what the client offered, or the certificate that it showed, will not do."""


class CurrentContext(ssl.SSLContext):
    """A context that gives every connection to the one in force, so that files change without a new port.

    asyncio and uvloop ask the context that they were given to wrap each connection (`wrap_bio`), http.client
    its socket (`wrap_socket`). A context is replaced as a whole: changed in place, it would keep a
    certificate of another key type, an authority that was taken out, and sessions begun under it.

    Attributes:
        current: the one in force; None before the first.
        server_name: name that the other end must prove to have, in place of the one that is connected to.
    """

    current: ssl.SSLContext
    server_name: str | None

    def __new__(cls, protocol: int) -> CurrentContext:  # noqa: PYI034 - as ssl.SSLContext has it
        """Make one for PROTOCOL_TLS_SERVER or PROTOCOL_TLS_CLIENT."""
        made: CurrentContext = super().__new__(cls, protocol)
        made.server_name = None
        return made

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Begin a session of the context in force."""
        name = self.server_name or server_hostname
        return self.current.wrap_bio(incoming, outgoing, server_side, name, session)

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Begin a session of the context in force."""
        if self.server_name is not None:
            options["server_hostname"] = self.server_name
        return self.current.wrap_socket(sock, *arguments, **options)


def watch_handshakes(context: ssl.SSLContext, watcher: Watcher) -> None:
    """Have `watcher` told of the handshakes of a server's context."""

    class Watched(ssl.SSLObject):
        is_done = False

        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                watcher.refused(error)
                raise
            if not self.is_done:
                self.is_done = True
                watcher.done(self.version() or "")

    context.sslobject_class = Watched


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
