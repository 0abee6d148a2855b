"""How many calls at a time the SuperLink is given, and in which order the others wait.

The limit is adaptive, found from how long answers take. The idea is TCP Vegas' (Brakmo and Peterson, 1995;
Netflix's concurrency-limits has it for calls): an answer that takes longer than the fastest of late has
waited in a queue at the SuperLink. Of `limit` calls in flight, `limit * (1 - fastest / taken)` stand in that
queue. The limit grows while fewer than FEW do, and shrinks while more than MANY do. A SuperLink works on one
call at a time, so more of them only wait longer; but a few must wait, or it would idle between an answer and
the next call.

No worker has to know of the others: each keeps its own few calls in the queue, so together they keep it
short. Methods take different times, so each has its own fastest. Failures change nothing: they say that the
SuperLink is out, not how many calls it can take; so the limit stands after an outage where it stood before.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

#: Calls of a worker that should stand in the SuperLink's queue.
FEW = 3.0
MANY = 6.0
#: Answers of a method before its fastest means something.
_LEARNED = 8
#: Seconds that are no wait worth speaking of: no SuperLink does anything faster.
_QUICK = 0.01
#: By how much an answer that nobody stood in the way of may raise the fastest: a SuperLink may become slower
#: for good. Other answers do not, because in a long overload all of them are slow.
_FORGOTTEN = 1.02


class _Fastest:
    """The fastest answer of a method of late, in seconds, and how many there were."""

    __slots__ = ("seconds", "seen")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.seen = 0


class FixedLimit:
    """A limit that stays where it was set.

    Attributes:
        value: calls that may be in flight.
    """

    def __init__(self, value: int) -> None:
        self.value = value

    def answered(self, what: Hashable, seconds: float, in_flight: int) -> None:
        """Learn nothing."""


class AdaptiveLimit:
    """A limit that follows the SuperLink.

    Attributes:
        value: calls that may be in flight.
    """

    def __init__(self, *, first: int, least: int, most: int) -> None:
        """Begin with `first`, and stay between `least` and `most`."""
        self._least, self._most = least, most
        self._limit = float(min(max(first, least), most))
        self.value = int(self._limit)
        self._fastest: dict[Hashable, _Fastest] = {}
        self._ratios = 0.0
        self._count = 0
        self._peak = 0

    def answered(self, what: Hashable, seconds: float, in_flight: int) -> None:
        """Learn from one answer.

        Args:
            what: kind of call; answers are compared with others of the same.
            seconds: from the call's being sent to its answer.
            in_flight: calls that were in flight, this one included.
        """
        fastest = self._fastest.get(what)
        if fastest is None:
            fastest = self._fastest[what] = _Fastest(seconds)
        if seconds < fastest.seconds:
            fastest.seconds = seconds
        elif in_flight == 1:
            fastest.seconds = min(fastest.seconds * _FORGOTTEN, seconds)
        fastest.seen += 1
        if fastest.seen <= _LEARNED:
            return
        self._ratios += 1.0 if seconds <= _QUICK else max(fastest.seconds, _QUICK) / seconds
        self._count += 1
        self._peak = max(self._peak, in_flight)
        if self._count >= self._limit:
            self._adapt()

    def _adapt(self) -> None:
        """Move the limit, once for as many answers as it lets through at a time."""
        queued = self._limit * (1.0 - self._ratios / self._count)
        used = self._peak >= self.value
        if queued > 2 * MANY:
            self._limit *= 0.75
        elif queued > MANY:
            self._limit -= 1.0
        elif queued < FEW and used:
            self._limit += max(1.0, self._limit / 4) if queued < FEW / 2 else 1.0
        self._limit = min(max(self._limit, float(self._least)), float(self._most))
        self.value = int(self._limit)
        self._ratios, self._count, self._peak = 0.0, 0, 0


class FullError(Exception):
    """There is no room in the queue, or none any more: somebody more important came."""


class Turnstile:
    """Lets in as much as may be inside at a time; the rest waits, in classes, in a short queue.

    Attributes:
        inside: how much is in.
        waiting: how many wait.
    """

    def __init__(
        self, may_enter: Callable[[int, int, int], bool], *, classes: int, length: int, timeout: float
    ) -> None:
        """Prepare it; nobody is in.

        Args:
            may_enter: from what is inside, a class and a size to whether so much more of this class may be.
                What a class may do, every better one may.
            classes: how many there are; 0 is the best.
            length: most that may wait.
            timeout: seconds for which one waits at most.
        """
        self._may_enter = may_enter
        self._length = length
        self._timeout = timeout
        self._lines: list[OrderedDict[asyncio.Future[None], int]] = [OrderedDict() for _ in range(classes)]
        self.inside = 0
        self.waiting = 0

    def enter_at_once(self, rank: int, size: int = 1) -> bool:
        """Enter if there is room and nobody of this class or a better one waits; return whether it was so."""
        if self.waiting and any(self._lines[: rank + 1]):
            return False
        if not self._may_enter(self.inside, rank, size):
            return False
        self.inside += size
        return True

    async def enter(self, rank: int, size: int = 1, *, patience: float = math.inf) -> None:
        """Wait for `patience` seconds, by default and at most as long as one waits here, and enter.

        Raises:
            FullError: the queue is full.
            TimeoutError: the time is up.
        """
        if self.enter_at_once(rank, size):
            return
        if self.waiting >= self._length:
            self._make_room(rank)
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._lines[rank][turn] = size
        self.waiting += 1
        timer = loop.call_later(max(min(patience, self._timeout), 0.0), self._give_up, rank, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(size)  # it was let in in that very moment
            else:
                self._forget(rank, turn)
            raise
        finally:
            timer.cancel()

    def force(self, size: int) -> None:
        """Enter, whether there is room or not."""
        self.inside += size

    def leave(self, size: int = 1) -> None:
        """Make room for others."""
        self.inside -= size
        if self.waiting:
            self._let_in()

    def _let_in(self) -> None:
        """Let in whoever is next for as long as there is room, strictly in order."""
        for rank, line in enumerate(self._lines):
            while line:
                turn, size = next(iter(line.items()))
                gone = turn.done()  # cancelled in this turn of the loop
                if not gone and not self._may_enter(self.inside, rank, size):
                    return
                del line[turn]
                self.waiting -= 1
                if not gone:
                    self.inside += size
                    turn.set_result(None)

    def _forget(self, rank: int, turn: asyncio.Future[None]) -> None:
        """Take somebody out who waits no more, and may have stood in the way of smaller ones."""
        if self._lines[rank].pop(turn, None) is not None:
            self.waiting -= 1
            self._let_in()

    def _give_up(self, rank: int, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            turn.set_exception(TimeoutError())
            self._forget(rank, turn)

    def _make_room(self, rank: int) -> None:
        """Send away the last of the lowest class that is below this one."""
        for line in reversed(self._lines[rank + 1 :]):
            for turn in reversed(line):
                if not turn.done():
                    del line[turn]
                    self.waiting -= 1
                    turn.set_exception(FullError("somebody more important came"))
                    return
        raise FullError(f"{self._length} wait already")
