"""Clients of a TLS port that see how a connection ends: FIN, RST, and what a SuperNode makes of it."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any

import httpcore
import httpx
from flwr.supercore.retry.http_retry import make_simple_http_retry_invoker

from tests.sockets import Peer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Longest wait for anything; a busy machine may need a while.
PATIENCE = 20.0

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
#: Bytes that no TLS record begins with, and an alert (fatal, bad_certificate) as a client sends one.
GARBAGE = bytes(range(200, 256)) * 4
ALERT = b"\x15\x03\x03\x00\x02\x02\x2a"


def trusting(certificate: Path, version: str | None = None) -> ssl.SSLContext:
    """Return the context of a client that trusts one certificate, and speaks one version if it is told to."""
    context = ssl.create_default_context(cafile=str(certificate))
    if version is not None:
        context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


async def connect_tls(port: int, context: ssl.SSLContext) -> Peer:
    """Open an encrypted connection to a loopback port."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost"
    )
    return Peer(reader, writer)


class RawClient:
    """A client that does its part of a handshake when the test says so, on a socket that blocks.

    Attributes:
        socket: the connection.
        tls: its end of the session.
        answer: the first piece of what the server sent in the handshake.
    """

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        """Connect, and send nothing."""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        self.answer = b""

    def close(self) -> None:
        self.socket.close()

    def begin(self) -> bytes:
        """Return the ClientHello."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return self._out.read()
        raise AssertionError

    def say_half(self) -> None:
        """Send half of the ClientHello."""
        hello = self.begin()
        self.socket.sendall(hello[: len(hello) // 2])

    def say_hello(self) -> None:
        """Send the ClientHello, and wait until the server answers; what it says is not looked at."""
        self.socket.sendall(self.begin())
        self.answer = self.socket.recv(65536)
        assert self.answer

    def finish(self) -> None:
        """Do the whole handshake. Raises EOFError or ConnectionResetError if the server ends it."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.socket.sendall(self._out.read())
                piece = self.socket.recv(65536)
                if not piece:
                    raise EOFError from None
                self._in.write(piece)
            else:
                self.socket.sendall(self._out.read())
                return

    def send(self, data: bytes) -> None:
        self.tls.write(data)
        self.socket.sendall(self._out.read())

    def read(self) -> bytes:
        """Return the next decrypted piece; b"" when the server has closed the session in good order.

        Raises: ssl.SSLEOFError: the server closed the connection alone.
        """
        while True:
            try:
                return self.tls.read(65536)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                piece = self.socket.recv(65536)
                if piece:
                    self._in.write(piece)
                else:
                    self._in.write_eof()

    def reject(self) -> bytes:
        """Take the server's answer for one that cannot be trusted; return what the client says to that."""
        self._in.write(self.answer)
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._in.write(self.socket.recv(65536))
            except ssl.SSLCertVerificationError:
                return self._out.read()

    def ending(self) -> tuple[bytes, str]:
        """Read to the end; return what came, and whether the end was `closed` (FIN) or `reset` (RST)."""
        return ending(self.socket)


def ending(sock: socket.socket) -> tuple[bytes, str]:
    """Read to the end; return what came, and whether the end was `closed` (FIN) or `reset` (RST)."""
    pieces = []
    try:
        while piece := sock.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        return b"".join(pieces), "reset"
    return b"".join(pieces), "closed"


def is_reset_on_close(sock: socket.socket) -> bool:
    """Return whether closing a socket resets its connection (SO_LINGER with no time)."""
    chosen, seconds = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
    return bool(chosen) and seconds == 0


# -- the HTTP client of SuperNodes ------------------------------------------------------------------------


class _HeldStream(httpcore.NetworkStream):
    """A connection that begins its handshake when the test allows it."""

    def __init__(self, stream: httpcore.NetworkStream, before: Callable[[], object]) -> None:
        self._stream, self._before = stream, before

    def start_tls(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        self._before()
        return self._stream.start_tls(*arguments, **options)

    def close(self) -> None:
        self._stream.close()


class _Held(httpcore.SyncBackend):
    def __init__(self, before: Callable[[], object]) -> None:
        self._before = before

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        return _HeldStream(super().connect_tcp(*arguments, **options), self._before)


def supernode(
    context: ssl.SSLContext, *, before_handshake: Callable[[], object] | None = None
) -> httpx.Client:
    """Return the HTTP client of a SuperNode.

    Args:
        context: whom it trusts.
        before_handshake: called when its connection is open and its handshake has not begun.
    """
    transport = httpx.HTTPTransport(verify=context)
    if before_handshake is not None:
        pool: Any = transport._pool
        pool._network_backend = _Held(before_handshake)
    return httpx.Client(transport=transport, timeout=PATIENCE)


_invoker = make_simple_http_retry_invoker()


def is_survived(error: Exception) -> bool:
    """Return what Flower's own code decides about an error: try again, or give up for good."""
    return isinstance(error, _invoker.recoverable_exceptions) and not _invoker.should_giveup(error)
