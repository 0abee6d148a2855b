"""Each fault, as the TLS of the standard library meets it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, NamedTuple

import pytest

from drills.certificates import Authority
from drills.door import Broken, Door, Impostors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

#: Until a client has waited in vain, and until it must have been told.
PATIENCE, ENOUGH = 0.5, 10.0


class Doorway(NamedTuple):
    """A door before a TLS server that repeats what it is told."""

    door: Door
    context: ssl.SSLContext

    async def ask(self) -> bytes:
        """Shake hands and be told what was said."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.door.port, ssl=self.context)
        try:
            writer.write(b"hello")
            return await reader.readexactly(5)
        finally:
            writer.transport.abort()


@pytest.fixture
async def doorway(tmp_path: Path) -> AsyncIterator[Doorway]:
    authority = Authority(tmp_path / "ca.pem")
    made = authority.issue(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(100):
            writer.write(piece)
        writer.close()

    impostors = Impostors(tmp_path, authority)
    await impostors.listen()
    async with await asyncio.start_server(repeat, "127.0.0.1", 0, ssl=context) as server:
        door = Door(server.sockets[0].getsockname()[1], impostors)
        await door.set(Broken.NONE)
        yield Doorway(door, ssl.create_default_context(cafile=authority.file))
        await door.close()
        impostors.close()


#: The error of a client, and a part of its text.
EXPECTED: dict[Broken, tuple[type[BaseException], str]] = {
    Broken.REFUSED: (ConnectionRefusedError, ""),
    Broken.FIN: (ConnectionResetError, ""),  # as asyncio calls an end in a handshake
    Broken.RESET: (ConnectionResetError, ""),
    Broken.FIN_AFTER_HELLO: (ConnectionResetError, ""),
    Broken.RESET_AFTER_HELLO: (ConnectionResetError, ""),
    Broken.SILENCE: (TimeoutError, ""),
    Broken.GARBAGE: (ssl.SSLError, ""),
    Broken.HTTP: (ssl.SSLError, "WRONG_VERSION_NUMBER|wrong version number"),
    Broken.ALERT: (ssl.SSLError, "(?i)alert.internal.error"),
    Broken.FIN_IN_RECORD: (ConnectionResetError, ""),
    Broken.FIN_IN_FLIGHT: (ConnectionResetError, ""),
    Broken.RESET_IN_FLIGHT: (ConnectionResetError, ""),
    Broken.SILENCE_IN_FLIGHT: (TimeoutError, ""),
    Broken.FIN_AFTER_FLIGHT: (asyncio.IncompleteReadError, ""),
    Broken.RESET_AFTER_FLIGHT: (ConnectionResetError, ""),
    Broken.OTHER_AUTHORITY: (ssl.SSLCertVerificationError, "unable to get local issuer|signature failure"),
    Broken.EXPIRED: (ssl.SSLCertVerificationError, "expired"),
    Broken.OTHER_NAME: (ssl.SSLCertVerificationError, "not valid for '127.0.0.1'"),
}


@pytest.mark.parametrize("broken", EXPECTED, ids=lambda broken: broken.name.lower())
async def test_a_fault_comes_and_goes(doorway: Doorway, broken: Broken) -> None:
    assert await doorway.ask() == b"hello"
    await doorway.door.set(broken)
    error, text = EXPECTED[broken]
    with pytest.raises(error, match=text or None):
        async with asyncio.timeout(PATIENCE if error is TimeoutError else ENOUGH):
            await doorway.ask()
    assert doorway.door.met == 1
    await doorway.door.set(Broken.NONE)
    assert await doorway.ask() == b"hello"


def test_no_fault_is_forgotten() -> None:
    assert {Broken.NONE, *EXPECTED} == set(Broken)


async def test_a_fault_resets_what_is_connected(doorway: Doorway) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", doorway.door.port, ssl=doorway.context)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    await doorway.door.set(Broken.SILENCE)
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    writer.transport.abort()


@pytest.mark.parametrize(
    ("broken", "reset"), [(Broken.FIN_IN_FLIGHT, False), (Broken.RESET_IN_FLIGHT, True), (Broken.FIN, False)]
)
async def test_how_a_connection_ends(doorway: Doorway, broken: Broken, reset: bool) -> None:
    await doorway.door.set(broken)

    def end() -> bool:
        outgoing = ssl.MemoryBIO()
        session = doorway.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            session.do_handshake()
        with socket.create_connection(("127.0.0.1", doorway.door.port)) as client:
            try:
                client.sendall(outgoing.read())
                while client.recv(4096):
                    pass
            except ConnectionResetError:
                return True
        return False

    assert await asyncio.to_thread(end) is reset
