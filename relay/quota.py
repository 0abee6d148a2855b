"""How many bytes of messages a worker holds at a time, where it cannot pass them on piece by piece.

Messages are whole towards a gRPC SuperLink and in the containers of Flower's gRPC adapter. Whoever is about
to receive one that may be long first takes a share of the quota, and waits for it in the order of arrival.
One whose length is not known takes what most need, and grows as more comes. Beyond the limit only one may
grow at a time, so that one comes to its end: what is held is bounded by the limit and the longest message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

#: Taken for an object whose length is not known yet: Flower cuts arrays into pieces of 5 MiB.
GUESS = 8 * 1024 * 1024
#: What a message that outgrows its share takes at a time.
STEP = 8 * 1024 * 1024


class Quota:
    """A bound on bytes; one per worker. Must be used inside one event loop.

    Attributes:
        limit: the bound.
        held: bytes that are taken. More than `limit` when a single message is longer, or has outgrown it.
        outgrown: what that message holds.
    """

    def __init__(self, limit: int) -> None:
        """Allow `limit` bytes."""
        self.limit = limit
        self.held = 0
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()
        self._growing: deque[tuple[asyncio.Future[None], Share, int]] = deque()
        self.outgrown: Share | None = None

    def take_at_once(self, size: int) -> bool:
        """Hold `size` more bytes if nobody has to wait for that; return whether."""
        if self._queue or self._growing or not self._fits(size):
            return False
        self.held += size
        return True

    async def take(self, size: int) -> None:
        """Wait until `size` more bytes may be held, and hold them; more than the limit is let in alone."""
        if self.take_at_once(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((turn, size))
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give(size)  # it was given in the same moment
            else:
                with suppress(ValueError):  # `_wake` has passed it over already
                    self._queue.remove((turn, size))
                self._wake()
            raise

    def give(self, size: int) -> None:
        """Hold `size` bytes less."""
        self.held -= size
        self._wake()

    # -- what grows, for `Share` --------------------------------------------------------------------

    def grow_at_once(self, share: Share, more: int) -> bool:
        """Hold `more` bytes for a share if they fit, or if no other exceeds the limit; return whether."""
        if self.held + more > self.limit:
            if self.outgrown not in (None, share):
                return False
            self.outgrown = share
        self.held += more
        return True

    async def grow(self, share: Share, more: int) -> None:
        """Wait until `more` bytes may be held for a share, before any that have not begun, and hold them."""
        if self.grow_at_once(share, more):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waits = (turn, share, more)
        self._growing.append(waits)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.held -= more
                if self.outgrown is share and (not share.size or self.held <= self.limit):
                    self.outgrown = None
            else:
                with suppress(ValueError):
                    self._growing.remove(waits)
            self._wake()
            raise

    def end(self, share: Share) -> None:
        """Hold nothing for a share any more."""
        if self.outgrown is share:
            self.outgrown = None
        self.give(share.size)

    def _fits(self, size: int) -> bool:
        return not self.held or self.held + size <= self.limit

    def _wake(self) -> None:
        while self._growing:
            turn, share, more = self._growing[0]
            if not turn.cancelled():
                if not self.grow_at_once(share, more):
                    return  # those that have not begun must not take what it waits for
                turn.set_result(None)
            self._growing.popleft()
        while self._queue and self._fits(self._queue[0][1]):
            turn, size = self._queue.popleft()
            if turn.cancelled():
                continue
            self.held += size
            turn.set_result(None)


class Share:
    """What one message holds of a quota.

    Attributes:
        size: bytes; 0 before it is taken, and when it was given back.
    """

    __slots__ = ("_quota", "size")

    def __init__(self, quota: Quota) -> None:
        """Hold nothing of `quota` yet."""
        self._quota = quota
        self.size = 0

    @property
    def outgrown(self) -> bool:
        """Whether this is the one that may exceed the limit."""
        return self._quota.outgrown is self

    def take_at_once(self, size: int) -> bool:
        """Take it if nobody has to wait for that; return whether."""
        if self._quota.take_at_once(size):
            self._hold(size)
            return True
        return False

    async def take(self, size: int) -> None:
        """Wait for it, and take it."""
        await self._quota.take(size)
        self._hold(size)

    def _hold(self, size: int) -> None:
        self.size = size
        if size > self._quota.limit:
            self._quota.outgrown = self  # it is here alone

    def grow_at_once(self, size: int) -> bool:
        """Make it `size` bytes, if it is less and that may be at this moment; return whether it is enough."""
        more = size - self.size
        if more > 0:
            if not self._quota.grow_at_once(self, more):
                return False
            self.size = size
        return True

    async def grow(self, size: int) -> None:
        """Make it `size` bytes, if it is less, and wait for that."""
        more = size - self.size
        if more > 0:
            await self._quota.grow(self, more)
            self.size = size

    def settle(self, size: int) -> None:
        """Make it `size` bytes, without waiting: so much is there."""
        more, self.size = size - self.size, size
        if more <= 0 or not self._quota.grow_at_once(self, more):
            self._quota.give(-more)

    def give(self) -> None:
        """Give it back; harmless when repeated."""
        if self.size or self.outgrown:
            self._quota.end(self)
            self.size = 0
