"""A SuperLink that works on a few calls at a time, and nodes that ask more of it than it can do."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter, deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.relay_process import RelayProcess

PULL, HEARTBEAT = "pull-messages", "send-node-heartbeat"
#: What a message says that is there for a node, so that it cannot be taken for an answer made by the relay.
MESSAGE = b"\x0a\x02\x0a\x00"
ALIVE = b"\x08\x01"
#: When a node of flwr gives up a heartbeat, and any other call.
HEARTBEAT_PATIENCE, PATIENCE = 5.0, 30.0


class SlowSuperlink:
    """Answers each call after `seconds`, `at_a_time` calls at once, the others in the order of arrival.

    With `drag`, each call that waits makes those at work take that much longer, as a database does that too
    many threads pull at.

    Attributes:
        port: where it listens.
        done: calls by path's last segment that were answered.
        most: most calls that it ever had, at work and waiting.
        open: its connections.
        down: while set, it answers with 503.
    """

    def __init__(self, seconds: float, at_a_time: int, drag: float = 0.0) -> None:
        self.seconds, self.at_a_time, self.drag = seconds, at_a_time, drag
        self.port = 0
        self.done: Counter[str] = Counter()
        self.most = 0
        self.open: set[asyncio.Transport] = set()
        self.down = False
        #: Seconds that would have been spent on the calls that were answered, had none waited.
        self.useful = 0.0
        self._busy = 0
        self._waiting: deque[tuple[_Connection, str]] = deque()

    def take(self, connection: _Connection, name: str) -> None:
        self._waiting.append((connection, name))
        self.most = max(self.most, self._busy + len(self._waiting))
        self._next()

    def _next(self) -> None:
        while self._waiting and self._busy < self.at_a_time:
            self._busy += 1
            loop, call = asyncio.get_running_loop(), self._waiting.popleft()
            part = 1 / (1 + self.drag * len(self._waiting))
            loop.call_later(self.seconds / part, self._finish, *call, loop.time(), part)

    def _finish(self, connection: _Connection, name: str, started: float, part: float) -> None:
        self._busy -= 1
        # On a busy machine its seconds take longer; that is not the fault of those who ask it.
        self.useful += (asyncio.get_running_loop().time() - started) * part
        self.done[name] += 1
        connection.answer(ALIVE if name == HEARTBEAT else MESSAGE, b"503 Down" if self.down else b"200 OK")
        self._next()


class _Connection(asyncio.Protocol):
    def __init__(self, superlink: SlowSuperlink) -> None:
        self._superlink = superlink
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._superlink.open.add(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._superlink.open.discard(cast("asyncio.Transport", self._transport))
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (at := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:at].lower()
            size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            if len(self._data) < at + 4 + size:
                return
            self._data = self._data[at + 4 + size :]
            path = head.split(b" ", 2)[1].decode()
            self._superlink.take(self, path.rpartition("/")[2])

    def answer(self, body: bytes, status: bytes) -> None:
        if self._transport is not None:
            self._transport.write(
                b"HTTP/1.1 %b\r\ncontent-type: application/protobuf\r\ncontent-length: %d\r\n\r\n%b"
                % (status, len(body), body)
            )


@asynccontextmanager
async def slow_superlink(seconds: float, at_a_time: int, drag: float = 0.0) -> AsyncIterator[SlowSuperlink]:
    """Run one on a free loopback port."""
    superlink = SlowSuperlink(seconds, at_a_time, drag)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(superlink), "127.0.0.1", 0, backlog=1024
    )
    superlink.port = server.sockets[0].getsockname()[1]
    try:
        yield superlink
    finally:
        server.close()
        for transport in superlink.open:
            transport.abort()
        await asyncio.sleep(0)


@dataclass
class Tally:
    """What became of calls, by name.

    Attributes:
        messages: answers that came from the SuperLink.
        empty: pulls that were told "nothing now".
        statuses: answers that were not 200, by status.
        broken: calls that got no answer, by what happened.
        slowest: seconds of the slowest answer.
    """

    messages: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        return sum(c.total() for c in (self.messages, self.empty, self.statuses, self.broken))


class Caller:
    """One node's connection; opened anew when it was closed."""

    def __init__(self, port: int, node: int, tally: Tally) -> None:
        self._port = port
        self._body = b"\x0a\x09\x09" + struct.pack("<Q", node + 1)  # node { node_id }
        self.tally = tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, name: str, patience: float) -> None:
        """Make one call and note what became of it."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(patience):
                status, body = await self._ask(name)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.tally.broken[name, type(error).__name__] += 1
            await self.close()
            return
        seconds = loop.time() - started
        self.tally.slowest[name] = max(self.tally.slowest[name], seconds)  # type: ignore[assignment]
        if status != 200:
            self.tally.statuses[name, status] += 1
        elif body:
            self.tally.messages[name] += 1
        else:
            self.tally.empty[name] += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the connection, if it is not open."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams

    async def _ask(self, name: str) -> tuple[int, bytes]:
        reader, writer = await self.connect()
        writer.write(
            b"POST /v1/fleet/%b HTTP/1.1\r\nhost: relay\r\ncontent-type: application/protobuf\r\n"
            b"content-length: %d\r\n\r\n%b" % (name.encode(), len(self._body), self._body)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(size)
        if b"connection: close" in head:
            await self.close()
        return int(head.split(b" ", 2)[1]), body

    async def close(self) -> None:
        if self._streams is not None:
            writer = self._streams[1]
            self._streams = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def memory(relay: RelayProcess) -> int:
    """Return the resident bytes of the relay's workers."""
    return sum(worker.memory_info().rss for worker in relay.workers())


@dataclass(frozen=True)
class Overload:
    """What came of an overload.

    Attributes:
        offered: calls that were made.
        heartbeats: how many of them were heartbeats.
        tally: what became of them.
        memory: of the relay's workers, each second.
        share: what the SuperLink did, but for the first two seconds, of what it could have done without a
            crowd.
        afterwards: what became of a call of some of the nodes when it was over.
    """

    offered: int
    heartbeats: int
    tally: Tally
    memory: list[int]
    share: float
    afterwards: Tally


def _again(nodes: deque[Caller], node: Caller, _: asyncio.Task[None]) -> None:
    nodes.append(node)


async def overload(
    relay: RelayProcess, superlink: SlowSuperlink, *, seconds: float, times: float
) -> Overload:
    """Make so many times the calls that the SuperLink can do, an eighth of them heartbeats."""
    loop, tally = asyncio.get_running_loop(), Tally()
    rate = round(times * superlink.at_a_time / superlink.seconds)
    nodes = deque(Caller(relay.port, number, tally) for number in range(rate * 4))
    sizes: list[int] = []
    useful: list[float] = []
    at: list[float] = []
    asking: set[asyncio.Task[None]] = set()
    offered = round(rate * seconds)
    started = loop.time()
    for number in range(offered):
        await asyncio.sleep(started + number / rate - loop.time())
        if number % rate == 0:
            sizes.append(memory(relay))
            useful.append(superlink.useful)
            at.append(loop.time())
        what = (HEARTBEAT, HEARTBEAT_PATIENCE) if number % 8 == 0 else (PULL, PATIENCE)
        # A node makes one call at a time.
        node = nodes.popleft() if nodes else Caller(relay.port, number, tally)
        task = loop.create_task(node.ask(*what))
        asking.add(task)
        task.add_done_callback(asking.discard)
        task.add_done_callback(partial(_again, nodes, node))
    seconds_useful, ended = superlink.useful - useful[2], loop.time()
    share = seconds_useful / (ended - at[2]) / superlink.at_a_time
    await asyncio.gather(*asking)
    afterwards = Tally()
    for number, node in enumerate(islice(nodes, superlink.at_a_time * 8)):
        node.tally = afterwards
        await asyncio.sleep(2 * superlink.seconds / superlink.at_a_time)
        await node.ask(HEARTBEAT, HEARTBEAT_PATIENCE) if number % 2 else await node.ask(PULL, PATIENCE)
    for node in nodes:
        await node.close()
    return Overload(offered, (offered + 7) // 8, tally, sizes, share, afterwards)
