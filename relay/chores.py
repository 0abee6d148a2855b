"""What a worker does again and again, such that no part of it keeps it from another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger("relay.chores")

#: Seconds between two complaints of the same chore.
_COMPLAIN_SECONDS = 60.0


class Chores:
    """Chores of one owner, told apart by their names."""

    def __init__(self) -> None:
        """Have done nothing yet."""
        self._complain_at: dict[str, float] = {}

    def do(self, name: str, chore: Callable[[], object]) -> None:
        """Do it. What it raises is logged, at times."""
        try:
            chore()
        except Exception:
            if self._complains(name):
                log.exception("a chore failed", chore=name)

    def _complains(self, name: str) -> bool:
        now = time.monotonic()
        if now < self._complain_at.get(name, 0.0):
            return False
        self._complain_at[name] = now + _COMPLAIN_SECONDS
        return True
