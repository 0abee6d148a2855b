"""One stream of an HTTP/2 connection: a request that comes, and the answer to it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from relay.refusal import NodeGone
from relay.wires import http2
from relay.wires.http_sockets import untaken

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.limits import Pace
    from relay.wires.http2_connection import Connection
    from relay.wires.http2_request import Head

#: Bytes of a request that may come before anybody asks for it, and how far it may be ahead of who reads it.
UNASKED = 16 * 1024
AHEAD = 1024 * 1024
#: Most bytes of an answer that are written at a time, and of one frame.
_BURST = 256 * 1024
_MOST_FRAME = 64 * 1024
#: Pieces of a request that are shorter together are one.
_SMALL = 2048


class Stream:
    """See RFC 9113, section 5.

    Attributes:
        number: its id.
        connection: which it is on.
        asked: the head of its request.
        ended: whether the request is here to its end.
        gone: whether the node has given it up, or is gone itself.
        on_gone: called once when that happens before the answer is out.
    """

    __slots__ = (
        "_length",
        "_most",
        "_moved",
        "_pieces",
        "_reader",
        "_room",
        "_used",
        "_window",
        "asked",
        "connection",
        "ended",
        "gone",
        "number",
        "on_gone",
    )

    def __init__(
        self,
        connection: Connection,
        number: int,
        head: Head,
        *,
        room: int,
        ended: bool,
    ) -> None:
        """Begin with a head.

        Args:
            connection: which it is on.
            number: its id.
            head: what is asked.
            room: bytes of an answer that the node takes unasked.
            ended: whether there is no body.
        """
        self.connection = connection
        self.number = number
        self.asked = head
        self.ended = ended
        self.gone = False
        self.on_gone: Callable[[], object] | None = None
        self._pieces: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._most = UNASKED
        self._window = UNASKED if connection.told else http2.FIRST_WINDOW
        self._used = 0
        self._room = room
        self._length = head.length
        self._moved: asyncio.Future[None] | None = None

    # -- the request --------------------------------------------------------------------------------

    def expects(self, size: int) -> bool:
        """Count the payload of a frame that comes; return whether there was room for it."""
        self._window -= size
        return self._window >= 0 or not size

    def told(self) -> None:
        """Take note that the node knows only from here on how little it may send unasked."""
        self._window -= http2.FIRST_WINDOW - UNASKED

    def feed(self, piece: bytes) -> None:
        """Take what came of the body."""
        pieces = self._pieces
        if pieces and len(piece) + len(pieces[-1]) <= _SMALL:
            # As objects of their own they would take many times their size.
            pieces[-1] = bytes(pieces[-1]) + piece
        else:
            pieces.append(piece)
        if self._length is not None:
            self._length -= len(piece)
        if self._reader is not None:
            self._wake_reader()

    def finish(self) -> bool:
        """Take the end of the body; return whether it is as long as the head said."""
        self.ended = True
        if self._reader is not None:
            self._wake_reader()
        return not self._length

    def at_hand(self) -> bytes:
        """Return what has come and was not read, and leave it."""
        if len(self._pieces) > 1 or (self._pieces and type(self._pieces[0]) is not bytes):
            whole = b"".join(self._pieces)
            self._pieces.clear()
            self._pieces.append(whole)
        return self._pieces[0] if self._pieces else b""

    async def read(self) -> bytes:
        """Return the next piece of the body; b"" at its end. Raises NodeGone."""
        while not self._pieces:
            if self.ended:
                return b""
            if self.gone:
                raise NodeGone
            if self._most == UNASKED:
                self._most = AHEAD
                self._window += AHEAD - UNASKED
                self.connection.write(http2.window_update(self.number, AHEAD - UNASKED))
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        piece = self._pieces.popleft()
        if not self.ended:
            self.used(len(piece))
        return piece

    def used(self, size: int) -> None:
        """Let as much more come."""
        self._used += size
        if self._used * 2 >= self._most:
            self._window += self._used
            self.connection.write(http2.window_update(self.number, self._used))
            self._used = 0

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -- the answer ---------------------------------------------------------------------------------

    def answer(self, head: bytes, body: bytes, trailers: bytes) -> bool:
        """Write a short answer whole, if the node takes it now; return whether.

        Args:
            head, trailers: header blocks.
            body: of at most one frame.
        """
        size, connection = len(body), self.connection
        if size > min(self._room, connection.room, http2.FIRST_FRAME):
            return False
        if connection.wants.smaller_table:
            head = connection.resize(head)
        self._room -= size
        connection.room -= size
        number = self.number
        parts = (
            http2.head(len(head), http2.HEADERS, http2.END_HEADERS, number),
            head,
            http2.head(size, http2.DATA, 0, number),
            body,
            http2.head(len(trailers), http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, number),
            trailers,
        )
        connection.write(b"".join(parts))
        connection.close_stream(self)
        return True

    def head(self, block: bytes, *, last: bool = False) -> None:
        """Write a header block: the head of the answer, or its trailers, which end it."""
        flags = http2.END_HEADERS | (http2.END_STREAM if last else 0)
        if self.connection.wants.smaller_table:
            block = self.connection.resize(block)
        self.connection.write(http2.frame(http2.HEADERS, flags, self.number, block))
        if last:
            self.connection.close_stream(self)

    def tell(self, body: bytes) -> bool:
        """Write a short part of the answer's body; a node that takes not even that loses the call.

        Return whether it goes on.
        """
        if self.gone:
            return False
        if len(body) > min(self._room, self.connection.room):
            self.reset(http2.Code.REFUSED_STREAM)
            return False
        self._room -= len(body)
        self.connection.room -= len(body)
        self.connection.write(http2.frame(http2.DATA, 0, self.number, body))
        return True

    async def send(self, *pieces: bytes, pace: Pace, idle_timeout: float) -> None:
        """Write a part of the answer's body, as fast as the node takes it.

        Args:
            pieces: what follows each other.
            pace: how fast the node must take it.
            idle_timeout: seconds within which it must take something.

        Raises:
            NodeGone: it has left, or takes next to nothing.
        """
        connection, sent = self.connection, 0
        try:
            for piece in pieces:
                view, at = memoryview(piece), 0
                while at < len(view):
                    size = min(len(view) - at, self._room, connection.room, _BURST)
                    if size <= 0 or connection.full:
                        await self._moves(
                            connection.turns.waiting if self._room > 0 else None, sent, pace, idle_timeout
                        )
                        sent = 0
                        continue
                    if self.gone:
                        raise NodeGone
                    self._room -= size
                    connection.room -= size
                    self._write(view[at : at + size])
                    at += size
                    sent += size
        finally:
            connection.next_turn()

    def _write(self, data: memoryview) -> None:
        most = min(self.connection.wants.frame, _MOST_FRAME)
        parts: list[bytes | memoryview] = []
        for at in range(0, len(data), most):
            part = data[at : at + most]
            parts += (http2.head(len(part), http2.DATA, 0, self.number), part)
        self.connection.write_all(parts)

    async def caught_up(self, pace: Pace, idle_timeout: float) -> None:
        """Wait until the node has taken enough of earlier answers. Raises NodeGone."""
        connection = self.connection
        try:
            while connection.full:
                await self._moves(connection.turns.asking, 0, pace, idle_timeout)
        finally:
            connection.next_turn()

    async def _moves(
        self, queue: dict[Stream, None] | None, sent: int, pace: Pace, idle_timeout: float
    ) -> None:
        """Wait until the node takes more; a slow one may, one that takes next to nothing is gone.

        Args:
            queue: of those that wait for the same; None if this is for the stream alone.
            sent: bytes since the last wait.
            pace, idle_timeout: see `send`.
        """
        if self.gone:
            raise NodeGone
        connection = self.connection
        if queue is not None:
            queue[self] = None
        connection.next_turn()
        left, turns, began = untaken(connection.transport), connection.turns.given, time.monotonic()
        self._moved = asyncio.get_running_loop().create_future()
        try:
            while True:
                # Not wait_for, which would end the future.
                done, _ = await asyncio.wait((self._moved,), timeout=idle_timeout)
                if done:
                    break
                before, left = left, untaken(connection.transport)
                if queue is not None and turns != connection.turns.given:
                    turns = connection.turns.given  # the node takes answers to others before it in the queue
                elif left >= before or not pace.holds(idle_timeout, before - left):
                    raise NodeGone
        finally:
            self._moved = None
            if queue is not None:
                queue.pop(self, None)
        if self.gone or (sent and not pace.holds(time.monotonic() - began, sent)):
            raise NodeGone

    def widen(self, more: int) -> bool:
        """Take note that the node takes so many more bytes, or fewer; return whether that may be."""
        self._room += more
        if self._room > 0 and self not in self.connection.turns.waiting:
            self.wake()
        return self._room <= http2.MOST_WINDOW

    def wake(self) -> None:
        """Have who waits to write look again."""
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    def lose(self) -> None:
        """Take note that the node has given this up, or is gone."""
        self.gone = True
        self._wake_reader()
        self.wake()
        if self.on_gone is not None:
            self.on_gone()

    def reset(self, code: http2.Code) -> None:
        """End it without an answer."""
        self.on_gone = None  # who ends it knows
        if not self.gone:
            self.connection.reset_stream(self, code)
