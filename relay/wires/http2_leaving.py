"""How an HTTP/2 connection ends without the loss of a call.

The client is told to leave (GOAWAY), and pinged: when its answer is here it has heard that, and every call
that it began before is here too. It is told then which call was the last one, and when that is answered the
connection is closed; most clients do so first. Only when the client has taken all that was written, though,
which it says by the answer to another ping: a closed socket answers whatever else comes on it with a reset,
which takes the rest of an answer with it, also out of the client's own buffers (Envoy's, for one).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from relay.wires import http2
from relay.wires.http2 import Code
from relay.wires.http_sockets import reset, untaken

if TYPE_CHECKING:
    from relay.wires.http2_connection import Connection

#: Seconds for a client to have heard that it is to leave, and to be gone once the connection is closed.
TO_HEAR = 1.0
_TO_GO = 2.0
#: Seconds between two looks at what the client has taken.
_LOOK = 0.1
PING = b"leaving\0"
LAST = b"the end\0"


class Leaving:
    """The end of one connection; it is handed in, because they would hold each other.

    Attributes:
        refused_from: number of the first call that is not answered any more; None while all are.
        closed: `time.monotonic()` when it was closed, None before.
    """

    __slots__ = ("_began", "_left", "_moved", "_since", "_taken", "_timer", "closed", "refused_from")

    def __init__(self) -> None:
        """Let it live."""
        self._began: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._left = 0
        self._taken = False
        self._since = self._moved = 0.0
        self.refused_from: int | None = None
        self.closed: float | None = None

    def begin(self, connection: Connection) -> None:
        """Tell the client to leave: calls that are under way, or on their way, are still answered."""
        if self._began is None and self.closed is None:
            self._began = time.monotonic()
            told = http2.goaway(http2.LAST_STREAM, Code.NO_ERROR) + http2.frame(http2.PING, 0, 0, PING)
            connection.write(told)

    def heard(self, connection: Connection) -> None:
        """Tell the client which call was the last: it has heard that it is to leave."""
        if self._began is not None and self.refused_from is None:
            highest = connection.highest
            self.refused_from = highest + 1
            connection.write(http2.goaway(highest, Code.NO_ERROR))
            self.settle(connection)

    def settle(self, connection: Connection) -> None:
        """Close if no call is left, and when what was written has been taken."""
        if self.refused_from is None or connection.streams or self._timer or self.closed is not None:
            return
        self._since = time.monotonic()
        connection.write(http2.frame(http2.PING, 0, 0, LAST))
        self._look(connection)

    def taken(self) -> None:
        """Take note that the client has read everything, up to the ping behind the last answer."""
        self._taken = True

    def _look(self, connection: Connection) -> None:
        self._timer = None
        if self.closed is not None:
            return
        left = untaken(connection.transport)
        if self._taken and not left and time.monotonic() - self._since >= _LOOK:
            self.close(connection)
        else:
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look, connection)

    def close(self, connection: Connection) -> None:
        """Close, once what was written has gone out."""
        if self.closed is None:
            self.closed = self._since = time.monotonic()
            connection.transport.close()

    def cut(self, connection: Connection) -> None:
        """End it with a reset."""
        self.closed = self.closed or time.monotonic()
        reset(connection.transport)

    def ended(self) -> None:
        """Take note that the connection is gone."""
        self.closed = self.closed or time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tick(self, connection: Connection, now: float, idle_timeout: float) -> bool:
        """See to an end that takes too long; return whether it has begun. To be called once a second."""
        if self._began is not None and self.refused_from is None and now - self._began > TO_HEAR:
            self._taken = True  # it answers no pings
            self.heard(connection)
        if self.closed is not None or self._timer is not None:
            left = untaken(connection.transport)
            if left != self._left:
                self._left, self._moved = left, now
            waits = left or not (self._taken or self.closed)
            if now - max(self._moved, self._since) > (idle_timeout if waits else _TO_GO):
                self.cut(connection)
        return self._began is not None or self.closed is not None
