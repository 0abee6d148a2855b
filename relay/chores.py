"""What a worker does again and again, such that no part of it keeps it from another."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

log = structlog.get_logger("relay.chores")

#: Seconds between two complaints of the same chore.
_COMPLAIN_SECONDS = 60.0


class Chores:
    """Chores of one owner, told apart by their names. Must be used inside one event loop."""

    def __init__(self) -> None:
        """Have done nothing yet."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self._complain_at: dict[str, float] = {}

    def do(self, name: str, chore: Callable[[], object]) -> None:
        """Do it. What it raises is logged, at times."""
        try:
            chore()
        except Exception:
            if self._complains(name):
                log.exception("a chore failed", chore=name)

    def start(self, name: str, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have it done beside all else, unless it still is. What it raises is logged, at times."""
        if name not in self._running:
            task = asyncio.get_running_loop().create_task(self._guard(name, chore))
            self._running[name] = task
            task.add_done_callback(partial(self._ended, name))

    def stop(self) -> None:
        """Go on with none of them."""
        for task in self._running.values():
            task.cancel()

    async def _guard(self, name: str, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await chore()
        except Exception:
            if self._complains(name):
                log.exception("a chore failed", chore=name)

    def _ended(self, name: str, _: asyncio.Task[None]) -> None:
        del self._running[name]

    def _complains(self, name: str) -> bool:
        now = time.monotonic()
        if now < self._complain_at.get(name, 0.0):
            return False
        self._complain_at[name] = now + _COMPLAIN_SECONDS
        return True
