"""The message of a gRPC call: not received before it is asked for, nor waited for without an end.

On the wire a unary call is a stream of one message, and is served here as one. The chain asks for the message
when it first looks at it, which is behind `auth`; until then flow control holds the sender up, and all that
there is of the message are the bytes that gRPC takes unasked. What may be long takes its share of the quota
before it is received.

gRPC does not say how much of a message has come. So whether one comes as fast as it must is seen from what
its connection has brought, which the kernel counts, shared among all messages that are waited for on it. And
so is whether it keeps to its share (`grpc_arrivals`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

from grpc import aio

from relay.call import Payload, View
from relay.limits import Limits, Pace
from relay.quota import GUESS
from relay.refusal import Reason, Refusal
from relay.wires import grpc_sockets
from relay.wires.grpc_arrivals import Arrivals

if TYPE_CHECKING:
    from relay.call import Body
    from relay.wires.grpc_rpc import Rpc

#: A message that may not be longer than this comes with the head of its call, or next to it.
SMALL = 64 * 1024
#: Seconds in which gRPC tells that a node has left; that there is no message it tells before.
_TO_HEAR = 0.1
#: Addresses whose next message is known to be long, and seconds for which that is believed: nodes try again
#: sooner, and a push session lives for 180.
_MOST_EXPECTED = 1024
_EXPECTED_SECONDS = 180.0


class Message(Payload):
    """A body of which there is all or nothing: whoever looks at a part of it has it received."""

    __slots__ = ()

    def __init__(self, body: Body) -> None:
        """Hold what `body` will bring in one piece."""
        super().__init__(body=body)

    async def peek(self, size: int) -> bytes:
        """Return the first `size` bytes. Raises what `Body.read` raises."""
        self._look(View.PEEK)
        await self._receive()
        return self._data[:size]

    async def read(self, limit: int) -> bytes:
        """Return the whole message. See `Payload.read`."""
        self._look(View.BYTES)
        await self._receive()
        return await super().read(limit)

    async def __anext__(self) -> bytes:
        await self._receive()
        return await super().__anext__()

    async def _receive(self) -> None:
        if self._body is not None:
            self._data = await self._pull(self._body)
            self._body = None
            self.size = len(self._data)


class Incoming:
    """A message that is still to be received; see `relay.call.Body`.

    Attributes:
        peer: who sends it, in gRPC's words.
        limit: most bytes that it may have.
        started: `time.monotonic()` when it was asked for.
        waits: whether it waits for its share of the quota first.
    """

    __slots__ = (
        "_before",
        "_context",
        "_fault",
        "_looked",
        "_messages",
        "_pace",
        "_rpc",
        "_task",
        "limit",
        "peer",
        "started",
        "waits",
    )

    def __init__(
        self,
        messages: Messages,
        rpc: Rpc,
        context: aio.ServicerContext[bytes, bytes],
        peer: str,
        limit: int,
    ) -> None:
        """Receive from `context`.

        Args:
            messages: what is waited for beside it.
            rpc: whose it is.
            context: where it comes from.
            peer: who sends it.
            limit: most bytes that it may have.
        """
        self._messages = messages
        self._rpc = rpc
        self._context = context
        self.peer = peer
        self.waits = False
        self.limit = limit
        self.started = 0.0
        self._task: asyncio.Task[object] | None = None
        self._fault: Refusal | None = None
        self._pace: Pace | None = None
        self._before: int | None = None
        self._looked = 0.0

    async def read(self) -> bytes:
        """Return the message, whole.

        Raises:
            Refusal: MALFORMED if there is none, or if it comes too slowly; TOO_LARGE; OVERLOADED if it got no
                share of the quota.
        """
        started = self.started = time.monotonic()
        messages = self._messages
        if self.waits:
            with messages.arrivals.unasked(self.peer):
                await self._rpc.take(messages.expected.take(self.peer.rpartition(":")[0]))
        task = self._task = asyncio.current_task()
        messages.waiting.add(self)
        messages.arrivals.watch(messages.waiting)
        size = 0
        try:
            message: bytes = await self._context.read()
            size = len(message) if message is not aio.EOF else 0
            if message is aio.EOF:
                await asyncio.sleep(_TO_HEAR)
        except asyncio.CancelledError:
            if self._fault is None or task is None or task.uncancel() > 0:
                raise
            raise self._fault from None
        finally:
            messages.waiting.discard(self)
            messages.arrivals.came(self.peer, size)
            self._task = None
        if message is aio.EOF:
            raise Refusal(Reason.MALFORMED, "no message, or one that gRPC refused", by="wire", sent=False)
        self._rpc.received(size, time.monotonic() - started)
        if size > self.limit:
            detail = f"{size} bytes, at most {self.limit}"
            raise Refusal(Reason.TOO_LARGE, detail, by="wire", sent=False)
        return message

    def close(self) -> None:
        """Nothing to give up: gRPC lets go of what was not received when the call ends."""

    def is_due(self, now: float, idle_timeout: float) -> bool:
        """Return whether it is time for another look."""
        return self._pace is None or now - self._looked >= idle_timeout

    def look(self, now: float, brought: int | None, crowd: int) -> None:
        """Give the message up if it comes too slowly.

        Args:
            now: `time.monotonic()`.
            brought: bytes that its connection has brought so far; None if that is not known.
            crowd: how many messages are waited for on that.
        """
        limits, idle_timeout = self._messages.limits, self._messages.idle_timeout
        if self._pace is None:
            self._pace = Pace(limits.min_rate, limits.rate_window)
        elif self.limit <= SMALL or brought is None or self._before is None or brought <= self._before:
            self._give_up(f"no whole message within {idle_timeout:g} s, or nothing more of it")
        elif not self._pace.holds(now - self._looked, (brought - self._before) // crowd):
            self._give_up("the message comes slower than limits.min_rate")
        self._before, self._looked = brought, now

    def _give_up(self, why: str) -> None:
        self.refuse(Refusal(Reason.MALFORMED, why, by="wire", sent=False))

    def hurry(self, seconds: float) -> None:
        """Give the message up if it is small, and was asked for so many seconds ago: the worker ends."""
        if not self.long and time.monotonic() - self.started > seconds:
            self._give_up(f"no message within {seconds:g} s")

    def refuse(self, refusal: Refusal) -> None:
        """Wait for it no longer; its reader gets this."""
        if self._task is not None and self._fault is None:
            self._fault = refusal
            self._task.cancel()

    # -- its share of the quota ---------------------------------------------------------------------

    @property
    def long(self) -> bool:
        """Whether it may be longer than what comes with the head of a call."""
        return self.limit > SMALL

    @property
    def room(self) -> int:
        """Bytes that it may have without asking for more."""
        return max(self._rpc.share.size, SMALL) if self.long else self.limit

    @property
    def alone(self) -> bool:
        """Whether it has outgrown all that may be held."""
        return self._rpc.share.outgrown

    def grow_at_once(self, more: int) -> bool:
        """Take so many bytes more for it, if that may be at this moment; return whether."""
        return self._rpc.share.grow_at_once(min(self.room + more, max(self.limit, self.room)))

    def expect(self, size: int) -> None:
        """Have the next message from this address take so much before it is received."""
        self._messages.expected.put(self.peer.rpartition(":")[0], min(size, self.limit))


class Expected:
    """What the next messages from some addresses take of the quota."""

    def __init__(self) -> None:
        """Expect nothing of anybody."""
        self._sizes: dict[str, tuple[float, int]] = {}

    def put(self, address: str, size: int) -> None:
        """Expect so many bytes from there for a while. Who was put off longest ago makes room."""
        sizes, now = self._sizes, time.monotonic()
        sizes.pop(address, None)
        while sizes:
            oldest, (since, _) = next(iter(sizes.items()))
            if len(sizes) < _MOST_EXPECTED and now - since < _EXPECTED_SECONDS:
                break
            del sizes[oldest]
        sizes[address] = now, size

    def take(self, address: str) -> int:
        """Return what is expected from there, once; what most messages need if nothing is."""
        since, size = self._sizes.pop(address, (-math.inf, GUESS))
        return size if time.monotonic() - since < _EXPECTED_SECONDS else GUESS


class Messages:
    """The messages that are waited for on one listener.

    Attributes:
        limits: what they must keep to.
        idle_timeout: seconds in which something of each must come.
        waiting: them.
        arrivals: what comes of them.
        expected: what a message took that was put off, by the address that it came from: it comes again.
    """

    def __init__(self, limits: Limits, idle_timeout: float) -> None:
        """Have each keep to `limits`, and bring something in `idle_timeout` seconds."""
        self.limits = limits
        self.idle_timeout = idle_timeout
        self.waiting: set[Incoming] = set()
        self.arrivals = Arrivals()
        self.expected = Expected()

    async def tick(self) -> None:
        """Give up those that come too slowly; to be called once a second."""
        now = time.monotonic()
        due = [each for each in self.waiting if each.is_due(now, self.idle_timeout)]
        if not due:
            return
        # Every open file is looked at, which may take long where there are many.
        brought = await asyncio.to_thread(grpc_sockets.brought, {each.peer for each in due})
        crowd = Counter(each.peer for each in self.waiting)
        for each in due:
            if each in self.waiting:
                each.look(now, brought.get(each.peer), crowd[each.peer])
