"""How long workers have waited for a processor: that is no sign that they hang.

On a host with too much to do, what takes a second may take twenty: grpcio, by which a gRPC SuperLink is
asked, copies a message of a GiB in one go. A worker that was not let to work is not killed for it; one that
works or sleeps without a word is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Seconds of silence that are nothing to speak of.
_SHORT = 2.0


def waited(pid: int) -> float:
    """Return the seconds that the first thread of a process was ready to run and did not; 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0  # it has ended, or this kernel does not count


class Waits:
    """Adds what workers waited to the time at which they last told of themselves."""

    def __init__(self, waited: Callable[[int], float] = waited) -> None:
        """Ask `waited` how long a process has waited."""
        self._waited = waited
        self._before: dict[int, float] = {}

    def forgive(self, workers: Mapping[int, Any]) -> None:
        """Look at gunicorn's workers, by their process ids; to be called each second."""
        before, self._before = self._before, {}
        for pid, worker in workers.items():
            self._before[pid] = total = self._waited(pid)
            more = total - before.get(pid, total)
            try:
                told, now = worker.tmp.last_update(), time.monotonic()
                if more > 0 and now - told > _SHORT:
                    told = min(told + more, now)
                    os.utime(worker.tmp.fileno(), (told, told))
            except (OSError, ValueError):
                continue  # it has just ended
