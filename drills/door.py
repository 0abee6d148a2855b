"""A proxy before the relay's TLS port that breaks handshakes on request, each in its own way."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import socket
import ssl
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from cryptography import x509

from drills.certificates import Authority
from relay.demo.processes import LOOPBACK, reserve_port

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PIECE: Final = 64 * 1024
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_LINGER: Final = 2.0  # seconds
_DAY: Final = dt.timedelta(days=1)


class Broken(enum.Enum):
    """What becomes of each TLS handshake. The value is for people."""

    NONE = "passed on"
    REFUSED = "the port is closed"
    FIN = "closed (FIN) before a byte"
    RESET = "reset (RST) before a byte"
    FIN_AFTER_HELLO = "closed (FIN) after the client's hello"
    RESET_AFTER_HELLO = "reset (RST) after the client's hello"
    SILENCE = "never answered"
    GARBAGE = "answered with bytes that are no TLS"
    HTTP = "answered with an HTTP response in plain"
    ALERT = "answered with a TLS alert, `internal error`"
    FIN_IN_RECORD = "closed (FIN) after 3 bytes of the server's answer"
    FIN_IN_FLIGHT = "closed (FIN) after 300 bytes of the server's answer"
    RESET_IN_FLIGHT = "reset (RST) after 300 bytes of the server's answer"
    SILENCE_IN_FLIGHT = "silent after 300 bytes of the server's answer"
    FIN_AFTER_FLIGHT = "closed (FIN) when the client has sent its last part of the handshake"
    RESET_AFTER_FLIGHT = "reset (RST) when the client has sent its last part of the handshake"
    OTHER_AUTHORITY = "a certificate of another authority"
    EXPIRED = "a certificate that has expired"
    OTHER_NAME = "a certificate for another host"


#: After how many bytes of the server's answer the rest is withheld.
_CUT_AFTER: Final[Mapping[Broken, int]] = {
    Broken.FIN_IN_RECORD: 3,
    Broken.FIN_IN_FLIGHT: 300,
    Broken.RESET_IN_FLIGHT: 300,
    Broken.SILENCE_IN_FLIGHT: 300,
}
_SAID: Final[Mapping[Broken, bytes]] = {
    Broken.GARBAGE: bytes(range(128, 192)),
    Broken.HTTP: (
        b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/html\r\ncontent-length: 20\r\n"
        b"connection: close\r\n\r\n<h1>Bad Request</h1>"
    ),
    Broken.ALERT: bytes((21, 3, 3, 0, 2, 2, 80)),
}
_SILENT: Final = frozenset({Broken.SILENCE, Broken.SILENCE_IN_FLIGHT})
_RESET: Final = frozenset(
    {Broken.RESET, Broken.RESET_AFTER_HELLO, Broken.RESET_IN_FLIGHT, Broken.RESET_AFTER_FLIGHT}
)
_FLIGHT: Final = frozenset({Broken.FIN_AFTER_FLIGHT, Broken.RESET_AFTER_FLIGHT})


class Impostors:
    """TLS servers with certificates that a node must not believe; they close what has come to them."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        """Make the certificates below `directory`; `authority` is the one that nodes trust."""
        other = [x509.DNSName("elsewhere.example")]
        for name in (folders := ("stranger", "expired", "elsewhere")):
            (directory / name).mkdir()
        stranger, expired, elsewhere = (directory / name for name in folders)
        self._certificates = {
            Broken.OTHER_AUTHORITY: Authority(stranger / "ca.pem").issue(stranger),
            Broken.EXPIRED: authority.issue(expired, ended=_DAY),
            Broken.OTHER_NAME: authority.issue(elsewhere, other),
        }
        self._servers: list[asyncio.Server] = []
        self.ports: dict[Broken, int] = {}

    async def listen(self) -> None:
        """Begin."""
        for broken, made in self._certificates.items():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(made.certificate, made.key)
            context.set_alpn_protocols(["h2", "http/1.1"])
            server = await asyncio.start_server(_hang_up, LOOPBACK, 0, ssl=context)
            self.ports[broken] = server.sockets[0].getsockname()[1]
            self._servers.append(server)

    def close(self) -> None:
        """End."""
        for server in self._servers:
            server.close()


async def _hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


class Door:
    """One port before the relay's. Everything but the constructor belongs into one event loop.

    Attributes:
        port: where it listens, on the loopback address.
        met: connections that met what was set last.
    """

    def __init__(self, target: int, impostors: Impostors) -> None:
        """Reserve the port; `target` is the relay's."""
        self.met = 0
        self._target = target
        self._impostors = impostors
        self._broken = Broken.NONE
        self._holder = reserve_port()
        self.port: int = self._holder.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def set(self, broken: Broken) -> None:
        """Let this become of each handshake; a fault resets what is connected, so that nodes meet it."""
        self._broken, self.met = broken, 0
        if broken is not Broken.NONE:  # the end of a fault resets nothing: who was silent, stays so
            for writer in list(self._writers):
                _reset(writer)
        if broken is Broken.REFUSED:
            if self._server is not None:
                self._server.close()
            self._server = None
            self.met = 1  # nobody sees who is refused
        elif self._server is None:
            self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port)

    async def close(self) -> None:
        """End, and reset all connections."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            _reset(writer)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LINGER)
        self._holder.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        broken = self._broken
        self.met += 1
        try:
            await self._become(broken, reader, writer)
            if broken in _RESET:
                _reset(writer)
            elif broken is not Broken.NONE:
                writer.write_eof()
                await asyncio.wait_for(reader.read(), _LINGER)  # a close before the rest has come would reset
        except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
            _reset(writer)  # one side has left, so the other is left as well
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _become(
        self, broken: Broken, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if broken in {Broken.FIN, Broken.RESET}:
            return
        if broken in {Broken.FIN_AFTER_HELLO, Broken.RESET_AFTER_HELLO, Broken.SILENCE, *_SAID}:
            await reader.read(_PIECE)
            if broken in _SAID:
                writer.write(_SAID[broken])
                await writer.drain()
            if broken in _SILENT:
                await reader.read()  # until the client has had enough
            return
        port = self._impostors.ports.get(broken, self._target)
        beyond, to = await asyncio.open_connection(LOOPBACK, port)
        self._writers.add(to)
        try:
            if broken in _CUT_AFTER:
                await self._cut(reader, writer, beyond, to, _CUT_AFTER[broken])
                if broken in _SILENT:
                    await reader.read()
            elif broken in _FLIGHT:
                to.write(await reader.read(_PIECE))
                writer.write(await beyond.read(_PIECE))
                await reader.read(_PIECE)  # what it holds is never passed on
            else:
                await _join(reader, to, beyond, writer)
        finally:
            self._writers.discard(to)
            _reset(to)

    async def _cut(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        beyond: asyncio.StreamReader,
        to: asyncio.StreamWriter,
        size: int,
    ) -> None:
        to.write(await reader.read(_PIECE))
        writer.write(await beyond.readexactly(size))
        await writer.drain()


async def _join(
    reader: asyncio.StreamReader,
    to: asyncio.StreamWriter,
    beyond: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    ways = [asyncio.create_task(_pour(reader, to)), asyncio.create_task(_pour(beyond, writer))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, and not with a FIN."""
    if writer.transport.is_closing():
        return
    with suppress(OSError):
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
