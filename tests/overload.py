"""A SuperLink that works on a few calls at a time, and nodes that ask more of it than it can do.

`python -m tests.overload [SECONDS]` keeps four times too many calls up for as long (60 s), and says what came
of it.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import tempfile
from collections import Counter, deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tests.relay_process import RelayProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PULL, HEARTBEAT = "pull-messages", "send-node-heartbeat"
#: What a message says that is there for a node, so that it cannot be taken for an answer made by the relay.
MESSAGE = b"\x0a\x02\x0a\x00"
ALIVE = b"\x08\x01"
#: When a node of flwr gives up a heartbeat, and any other call.
HEARTBEAT_PATIENCE, PATIENCE = 5.0, 30.0


class SlowSuperlink:
    """Answers each call after `seconds`, `at_a_time` calls at once, the others in the order of arrival.

    Attributes:
        port: where it listens.
        done: calls by path's last segment that were answered.
        most: most calls that it ever had, at work and waiting.
        open: its connections.
        down: while set, it answers with 503.
    """

    def __init__(self, seconds: float, at_a_time: int) -> None:
        self.seconds, self.at_a_time = seconds, at_a_time
        self.port = 0
        self.done: Counter[str] = Counter()
        self.most = 0
        self.open: set[asyncio.Transport] = set()
        self.down = False
        self._busy = 0
        self._worked = self._noted = 0.0
        self._waiting: deque[tuple[_Connection, str]] = deque()

    @property
    def worked(self) -> float:
        """Seconds of work that it has done so far; `at_a_time` a second are the most."""
        now = asyncio.get_running_loop().time()
        self._worked += self._busy * (now - self._noted)
        self._noted = now
        return self._worked

    def take(self, connection: _Connection, name: str) -> None:
        self._waiting.append((connection, name))
        self.most = max(self.most, self._busy + len(self._waiting))
        self._next()

    def _next(self) -> None:
        while self._waiting and self._busy < self.at_a_time:
            _ = self.worked
            self._busy += 1
            asyncio.get_running_loop().call_later(self.seconds, self._finish, *self._waiting.popleft())

    def _finish(self, connection: _Connection, name: str) -> None:
        _ = self.worked
        self._busy -= 1
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
async def slow_superlink(seconds: float, at_a_time: int) -> AsyncIterator[SlowSuperlink]:
    """Run one on a free loopback port."""
    superlink = SlowSuperlink(seconds, at_a_time)
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
        self._tally = tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, name: str, patience: float) -> None:
        """Make one call and note what became of it."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(patience):
                status, body = await self._ask(name)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self._tally.broken[name, type(error).__name__] += 1
            await self.close()
            return
        seconds = loop.time() - started
        self._tally.slowest[name] = max(self._tally.slowest[name], seconds)  # type: ignore[assignment]
        if status != 200:
            self._tally.statuses[name, status] += 1
        elif body:
            self._tally.messages[name] += 1
        else:
            self._tally.empty[name] += 1

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
        goodput: calls a second that the SuperLink did, but for the first two seconds.
        share: of what it could have done in that time. On a busy machine its own 100 ms take longer.
    """

    offered: int
    heartbeats: int
    tally: Tally
    memory: list[int]
    goodput: float
    share: float


async def overload(
    relay: RelayProcess, superlink: SlowSuperlink, *, seconds: float, times: float
) -> Overload:
    """Make so many times the calls that the SuperLink can do, an eighth of them heartbeats."""
    loop, tally = asyncio.get_running_loop(), Tally()
    rate = round(times * superlink.at_a_time / superlink.seconds)
    nodes = [Caller(relay.port, number, tally) for number in range(rate * 4)]
    sizes: list[int] = []
    counts: list[int] = []
    worked: list[float] = []
    at: list[float] = []
    asking: set[asyncio.Task[None]] = set()
    offered = round(rate * seconds)
    started = loop.time()
    for number in range(offered):
        await asyncio.sleep(started + number / rate - loop.time())
        if number % rate == 0:
            sizes.append(memory(relay))
            counts.append(superlink.done.total())
            worked.append(superlink.worked)
            at.append(loop.time())
        what = (HEARTBEAT, HEARTBEAT_PATIENCE) if number % 8 == 0 else (PULL, PATIENCE)
        task = loop.create_task(nodes[number % len(nodes)].ask(*what))
        asking.add(task)
        task.add_done_callback(asking.discard)
    seconds_worked, ended = superlink.worked - worked[2], loop.time()
    goodput = (superlink.done.total() - counts[2]) / (ended - at[2])
    share = seconds_worked / (ended - at[2]) / superlink.at_a_time
    await asyncio.gather(*asking)
    for node in nodes:
        await node.close()
    return Overload(offered, (offered + 7) // 8, tally, sizes, goodput, share)


async def _main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with slow_superlink(0.1, 8) as superlink:
            with RelayProcess(Path(directory), superlink.port, workers=2) as relay:
                found = await overload(relay, superlink, seconds=seconds, times=4)
                limit = relay.metric("relay_concurrency_limit")
    print(f"{found.offered} calls in {seconds:g} s, {found.heartbeats} of them heartbeats: {found.tally}")
    print(
        f"goodput {found.goodput:.1f} of {superlink.at_a_time / superlink.seconds:.1f} calls a second;",
        end="",
    )
    print(f" the SuperLink was at work for {found.share:.1%} of what it could have been")
    print(f"memory of the workers, MB: {[size >> 20 for size in found.memory]}")
    print(f"most calls at the SuperLink: {superlink.most}; limit at the end: {limit:g}")


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0))
