"""A proxy before the SuperLink or before the relay that does harm on request, in a thread of its own.

It knows as much of HTTP/1.1 as nodes, relay and SuperLink use between each other: requests and responses with
a Content-Length, one after the other. An opaque one knows nothing, and can only close its port, or reset what
is connected.
"""

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from drills.faults import (
    ANSWERS,
    AT_A_TIME,
    LONG,
    SLOW_SECONDS,
    Fault,
    UnknownFramingError,
    body_size,
    cut_at,
)
from relay.demo.processes import LOOPBACK, reserve_port
from relay.fleet import Method

_PIECE: Final = 256 * 1024
_MAX_HEAD: Final = 64 * 1024
_COMMAND_SECONDS: Final = 10.0
_SEED: Final = 2026
_PULL: Final = f"/{Method.PULL_MESSAGES.path}"
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)

T = TypeVar("T")
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class FaultProxy:
    """`with FaultProxy() as proxy: proxy.target = port; proxy.set(Fault.HANG)`.

    Attributes:
        port: where it listens, on the loopback address.
        target: the port that it passes calls on to.
        slots: of those that a slow SuperLink works on.
        hits: how many calls, or for REFUSED open connections, met each fault.
        abandoned: calls by path that the relay left before it had the whole answer. The SuperLink may have
            carried them out; it writes no line about an answer that nobody takes.
        on_message: called, in the proxy's thread, when an answer with a message comes by for the first time.
        broken: what went wrong in the proxy itself, which no drill wants.
    """

    def __init__(self, *, opaque: bool = False) -> None:
        """Reserve the port; entering the `with` block starts to listen. `opaque`: it passes on any bytes."""
        self.target = 0
        self._opaque = opaque
        self.hits: Counter[Fault] = Counter()
        self.abandoned: Counter[str] = Counter()
        self.broken: list[BaseException] = []
        self._resources = ExitStack()
        self.port: int = self._resources.enter_context(reserve_port()).getsockname()[1]
        self._fault, self._share = Fault.NONE, 1.0
        self._random = random.Random(_SEED)  # about the same calls in each run
        self._answers = {fault: cycle(answers) for fault, answers in ANSWERS.items()}
        self._resets = cycle((True, False))
        self._wanted: _Wanted | None = None
        self.on_message: Callable[[], None] | None = None
        self._armed = False
        self._messages: set[bytes] = set()
        self.slots = asyncio.Semaphore(AT_A_TIME)
        self._carriers: set[_Carrier] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._set(Fault.NONE, 1.0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_COMMAND_SECONDS)
        self._loop.close()
        self._resources.close()

    def set(self, fault: Fault, share: float = 1.0) -> None:
        """Let `share` of the calls from now on meet the fault. NONE ends it, but for the calls that hang."""
        self._do(self._set(fault, share))

    def cut_next(self) -> None:
        """Of an opaque one: reset all connections in place of passing on what comes next from the target."""
        self._do(self._arm())

    def capture(self, path: bytes, least: int, timeout: float) -> bytes:
        """Return the next whole request whose path ends with `path` and whose answer has `least` bytes.

        It is passed on, too. Raises TimeoutError when none comes within `timeout` seconds.
        """
        return self._do(self._capture(path, least, timeout), timeout + _COMMAND_SECONDS)

    def _do(self, what: Coroutine[Any, Any, T], timeout: float = _COMMAND_SECONDS) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout)

    # -- in the thread ------------------------------------------------------------------------------

    async def _set(self, fault: Fault, share: float) -> None:
        self._fault, self._share = fault, share
        if fault is not Fault.REFUSED and self._server is None:
            self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port, limit=_MAX_HEAD)
        elif fault is Fault.REFUSED and self._server is not None:
            self._server.close()
            self._server = None
            self.hits[fault] += len(self._carriers)
            self._abort_all()

    async def _arm(self) -> None:
        self._armed = True

    def cuts(self) -> bool:
        """Return whether what has come from the target is to be lost; if so, all connections are."""
        cuts, self._armed = self._armed, False
        if cuts:
            self.hits[Fault.CUT_MESSAGE] += 1
            self._abort_all()
        return cuts

    async def _capture(self, path: bytes, least: int, timeout: float) -> bytes:
        self._wanted = wanted = _Wanted(path + b" ", least, self._loop.create_future())
        try:
            async with asyncio.timeout(timeout):
                return await wanted.request
        finally:
            self._wanted = None

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._abort_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _abort_all(self) -> None:
        for carrier in self._carriers:
            carrier.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carrier = _Carrier(self, reader, writer)
        self._carriers.add(carrier)
        try:
            while await (carrier.any() if self._opaque else carrier.one()):
                pass
            await carrier.finish()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one side has left; the other is told by a reset
        except Exception as error:  # noqa: BLE001 - whoever looks at the drill must see it
            self.broken.append(error)
        finally:
            self._carriers.discard(carrier)
            carrier.abort()

    def draw(self) -> Fault:
        """Return what the next call meets."""
        if self._fault is Fault.NONE or self._random.random() >= self._share:
            return Fault.NONE
        return self._fault

    def answer(self, fault: Fault) -> bytes:
        """Return the next answer of a fault."""
        return next(self._answers[fault])

    def is_new_message(self, path: str, body: bytes) -> bool:
        """Return whether this is the first answer to a pull with this message."""
        first = bool(body) and path.endswith(_PULL) and body not in self._messages
        if first:
            self._messages.add(body)
        return first

    def resets(self) -> bool:
        """Return whether the next cut ends with a reset; else in good order."""
        return next(self._resets)

    def wanted(self, head: bytes) -> "_Wanted | None":
        """Return what to do with a copy of this request."""
        wanted = self._wanted
        return wanted if wanted and wanted.path in head[: head.index(b"\r\n")] else None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request that somebody waits for."""

    path: bytes
    least: int
    request: asyncio.Future[bytes]

    def offer(self, request: bytes, size: int) -> None:
        """Give it a request whose answer has `size` bytes."""
        if size >= self.least and not self.request.done():
            self.request.set_result(request)


class _Carrier:
    """One connection of the relay, and the one to the SuperLink that belongs to it."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._upstream: _Streams | None = None
        self._aborted = False

    def abort(self) -> None:
        """Reset both connections."""
        self._aborted = True
        for writer in (self._writer, *([self._upstream[1]] if self._upstream else [])):
            if not writer.transport.is_closing():
                # Without this, closing says FIN when nothing is left unread.
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                writer.transport.abort()

    async def finish(self) -> None:
        """Close the relay's connection in good order."""
        self._writer.close()
        await self._writer.wait_closed()

    async def any(self) -> bool:
        """Pass on all bytes, both ways, until one side ends; return False, for the connection is over."""
        reader, writer = self._upstream = await asyncio.open_connection(LOOPBACK, self._proxy.target)
        ways = [
            asyncio.create_task(_pour(self._reader, writer)),
            asyncio.create_task(_pour(reader, self._writer, unless=self._proxy.cuts)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        return False

    async def one(self) -> bool:
        """Let the next call meet what it meets; return whether the connection goes on."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        size = body_size(head, request=True)
        fault = self._proxy.draw()
        if fault is Fault.SLOW:
            self._proxy.hits[fault] += 1
            async with self._proxy.slots:
                await asyncio.sleep(SLOW_SECONDS)
        if fault in {Fault.NONE, Fault.SLOW, Fault.CUT, Fault.CUT_LONG, Fault.CUT_MESSAGE}:
            return await self._pass_on(head, size, fault)
        self._proxy.hits[fault] += 1
        await self._reader.readexactly(size)
        if fault in ANSWERS:
            self._writer.write(self._proxy.answer(fault))
            await self._writer.drain()
        elif fault is Fault.HANG:
            await self._reader.read()  # until the relay gives up
        return fault in {Fault.STATUS_500, Fault.STATUS_503, Fault.STATUS_429}

    async def _pass_on(self, head: bytes, size: int, fault: Fault) -> bool:
        if self._upstream is None:
            self._upstream = await asyncio.open_connection(LOOPBACK, self._proxy.target, limit=_MAX_HEAD)
        reader, writer = self._upstream
        wanted = self._proxy.wanted(head)
        if wanted is not None:
            head += await self._reader.readexactly(size)
            size = 0
        writer.write(head)
        await _pump(self._reader, writer, size)
        path = head.split(b" ", 2)[1].decode("ascii", "replace")
        answer = await self._unless_left(path, reader.readuntil(b"\r\n\r\n"))
        size = body_size(answer, request=False)
        if wanted is not None:
            wanted.offer(head, size)
        if fault is Fault.CUT or (fault is Fault.CUT_LONG and size > LONG):
            self._proxy.hits[fault] += 1
            await self._cut(reader, answer, cut_at(answer, size))
            return False
        if (fault is Fault.CUT_MESSAGE or self._proxy.on_message) and size < LONG:
            body = await reader.readexactly(size)
            if self._proxy.is_new_message(path, body):
                if fault is Fault.CUT_MESSAGE:
                    self._proxy.hits[fault] += 1
                    raise ConnectionResetError
                if self._proxy.on_message:
                    self._proxy.on_message()
            answer, size = answer + body, 0
        self._writer.write(answer)
        try:
            await _pump(reader, self._writer, size)
        except ConnectionError:
            if self._writer.is_closing():
                self._left(path)
            raise
        return True

    def _left(self, path: str) -> None:
        if not self._aborted:  # it was the relay, then, and not a fault
            self._proxy.abandoned[path] += 1

    async def _unless_left(self, path: str, head: Coroutine[Any, Any, bytes]) -> bytes:
        """Return the head of the answer; raise ConnectionError when the relay leaves before it is there."""
        answering = asyncio.create_task(head)
        leaving = asyncio.create_task(self._reader.read(1))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if leaving.exception() is None and leaving.result():
                raise UnknownFramingError("the relay sent a call before the last one was answered")
            self._left(path)
            raise ConnectionResetError
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _cut(self, reader: asyncio.StreamReader, head: bytes, end: int) -> None:
        self._writer.write(head[:end])
        await _pump(reader, self._writer, max(0, end - len(head)))
        if self._proxy.resets():
            raise ConnectionResetError


async def _pour(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unless: Callable[[], bool] = lambda: False
) -> None:
    while (piece := await reader.read(_PIECE)) and not unless():
        writer.write(piece)
        await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
    while size > 0:
        piece = await reader.read(min(size, _PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        writer.write(piece)
        await writer.drain()
        size -= len(piece)
    await writer.drain()
