"""A timer that is set and cleared with every call and hardly ever runs out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Timer:
    """Calls `expired` once `seconds` have passed since it was set, unless it was cleared.

    The event loop's own timer is left where it is as long as it comes early enough: when it fires, it looks
    whether the time is up and else waits for the rest. A timer of the loop per call costs ten times as much.
    """

    __slots__ = ("_deadline", "_expired", "_fires", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        """Prepare a timer that is not set."""
        self._loop = loop
        self._expired = expired
        self._deadline = math.inf
        self._fires = math.inf
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Run out after so many seconds from now; what was set before is forgotten."""
        self._deadline = self._loop.time() + seconds
        if self._deadline < self._fires:
            self._schedule()

    def clear(self) -> None:
        """Do not run out."""
        self._deadline = math.inf

    def close(self) -> None:
        """Clear it for good, and let go of the loop."""
        self._deadline = self._fires = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _schedule(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._fires = self._deadline
        self._handle = self._loop.call_at(self._fires, self._fire)

    def _fire(self) -> None:
        self._handle = None
        self._fires = math.inf
        if self._deadline == math.inf:
            return
        if self._loop.time() < self._deadline:
            self._schedule()
            return
        self._deadline = math.inf
        self._expired()
