"""Calls in great number through a relay, each of them accounted for: sent, seen by the upstream, answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Longest that a call may take before it counts as lost.
PATIENCE = 15.0


class Superlink(asyncio.Protocol):
    """One connection of an upstream that notes the id in each call and gives it back.

    Attributes:
        seen: how often each id was asked, over all connections.
        open: the connections that have not ended.
        delay: seconds before each answer.
    """

    seen: Counter[bytes]
    open: set[asyncio.BaseTransport]
    delay: float

    def __init__(self) -> None:
        self._held = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.open.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.discard(cast("asyncio.Transport", self._transport))

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (at := self._held.find(b"\r\n\r\n")) >= 0:
            head = self._held[:at].lower()
            size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            if len(self._held) < at + 4 + size:
                return
            body = self._held[at + 4 : at + 4 + size]
            self._held = self._held[at + 4 + size :]
            self.seen[body] += 1
            if self.delay:
                asyncio.get_running_loop().call_later(self.delay, self._answer, body)
            else:
                self._answer(body)

    def _answer(self, body: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )


@asynccontextmanager
async def superlink(delay: float = 0.0) -> AsyncIterator[tuple[int, Counter[bytes]]]:
    """Run an upstream; give its port, and the ids that it has seen."""

    class One(Superlink):
        pass

    One.seen, One.open, One.delay = Counter(), set(), delay
    server = await asyncio.get_running_loop().create_server(One, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], One.seen
    finally:
        server.close()
        for transport in One.open:
            transport.close()
        await asyncio.sleep(0)


class Tally:
    """What became of the calls of some nodes.

    Attributes:
        answered: calls that got their own answer.
        lost: what happened to the ones that did not, by its description.
        refused: connections that could not be opened.
        reset: connections that were opened, but ended before any call on them was answered: they stood in
            the queue of a socket that nobody accepts from any more.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.lost: Counter[str] = Counter()
        self.refused = 0
        self.reset: list[bytes] = []
        self.connections = 0

    @property
    def calls(self) -> int:
        return self.answered + self.lost.total()


class Node:
    """Asks one call after the other on one connection, and opens a new one when it is told to."""

    def __init__(self, port: int, name: str, tally: Tally) -> None:
        self._port = port
        self._name = name
        self._tally = tally
        self._number = 0
        self.stopped = False

    async def run(self, pause: float = 0.0) -> None:
        """Ask until stopped, or until the relay takes no connection any more."""
        while not self.stopped:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except ConnectionError:
                self._tally.refused += 1
                return
            self._tally.connections += 1
            try:
                await self._talk(reader, writer, pause)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause: float) -> None:
        first = True
        while not self.stopped:
            self._number += 1
            body = b"%b/%08d" % (self._name.encode(), self._number)
            try:
                async with asyncio.timeout(PATIENCE):
                    writer.write(
                        b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: relay\r\n"
                        b"Content-Type: application/protobuf\r\nContent-Length: %d\r\n\r\n%b"
                        % (len(body), body)
                    )
                    head = await reader.readuntil(b"\r\n\r\n")
                    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    answer = await reader.readexactly(size)
            except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
                if first and not isinstance(error, TimeoutError):
                    self._tally.reset.append(body)
                else:
                    self._tally.lost[repr(error)] += 1
                return
            if not head.startswith(b"HTTP/1.1 200 ") or answer != body:
                self._tally.lost[f"{head[:12]!r} {answer[:40]!r}"] += 1
                return
            self._tally.answered += 1
            first = False
            if b"connection: close" in head.lower():
                return
            if pause:
                await asyncio.sleep(pause)
