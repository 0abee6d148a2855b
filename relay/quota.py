"""How many bytes of messages a worker holds at a time, where it cannot pass them on piece by piece.

gRPC hands a message over whole. Whoever is about to receive one that may be long first takes a share of the
quota, and waits for it in the order of arrival; what the message really has is settled when it is there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

#: Taken for an object whose length is not known yet: Flower cuts arrays into pieces of 5 MiB.
GUESS = 8 * 1024 * 1024


class Quota:
    """A bound on bytes; one per worker. Must be used inside one event loop.

    Attributes:
        limit: the bound.
        held: bytes that are taken. More than `limit` when a single message is longer, or longer than guessed.
    """

    def __init__(self, limit: int) -> None:
        """Allow `limit` bytes."""
        self.limit = limit
        self.held = 0
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()

    def take_at_once(self, size: int) -> bool:
        """Hold `size` more bytes if nobody has to wait for that; return whether."""
        if self._queue or not self._fits(size):
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

    def settle(self, taken: int, size: int) -> int:
        """Hold `size` bytes in place of the `taken` ones, without waiting; return `size`."""
        self.held += size - taken
        self._wake()
        return size

    def give(self, size: int) -> None:
        """Hold `size` bytes less."""
        self.held -= size
        self._wake()

    def _fits(self, size: int) -> bool:
        return not self.held or self.held + size <= self.limit

    def _wake(self) -> None:
        while self._queue and self._fits(self._queue[0][1]):
            turn, size = self._queue.popleft()
            if turn.cancelled():
                continue
            self.held += size
            turn.set_result(None)
