"""A file whose content is known: it is read again when it changes, and a broken one changes nothing.

The file is looked at once a second and read in a thread when it has changed and then stayed as it is for
SETTLE seconds, so that one that is still being written is not taken for whole: a change is known within two.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import structlog
from prometheus_client import Counter

from relay.stores.lists import ListError, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger("relay.stores.watched")

T = TypeVar("T")

READS = Counter(
    "relay_list_reads",
    "Times that a worker read a list that had changed, by whether it could be used",
    ["list", "outcome"],
)

#: Seconds for which a file must not have changed before it is read.
SETTLE = 0.3


class _Stamp(NamedTuple):
    """What is different after a change: time, size and number of the file."""

    modified: int
    changed: int
    size: int
    inode: int


class Watched(Generic[T]):
    """The content of one file.

    Attributes:
        value: the content as it was last read whole and right, or `absent`; None if the file was there from
            the beginning, and could never be used.
    """

    def __init__(self, path: Path, parse: Callable[[str], T], *, name: str, absent: T) -> None:
        """Read the file for the first time.

        Args:
            path: of the file.
            parse: makes the content of the text; raises ListError if it cannot be used.
            name: of the list in logs and metrics.
            absent: the content as long as no file could be read; None if that is a problem. A file that is
                removed later changes nothing.
        """
        self._path = path
        self._parse = parse
        self._name = name
        self._absent = absent
        self._read = False
        self.value: T | None = None
        self._busy = False
        self._known = self._stamp()
        self._take(*self._load())

    def tick(self) -> None:
        """Look whether the file has changed; to be called in the event loop, about once a second."""
        if self._busy or self._stamp() == self._known:
            return
        self._busy = True
        asyncio.get_running_loop().call_later(SETTLE, self._settled, self._stamp())

    def _settled(self, stamp: _Stamp | None) -> None:
        if self._stamp() != stamp:
            self._busy = False  # it is being written; the next tick looks again
            return
        self._known = stamp
        reading = asyncio.get_running_loop().run_in_executor(None, self._load)
        reading.add_done_callback(self._loaded)

    def _loaded(self, reading: asyncio.Future[tuple[T | None, str]]) -> None:
        self._busy = False
        if not reading.cancelled():
            self._take(*reading.result())

    def _load(self) -> tuple[T | None, str]:
        """Return the content, or None and what is wrong."""
        try:
            return self._parse(read(self._path)), ""
        except FileNotFoundError:  # no list yet, or one that was taken away
            return self._absent, "is not there" if self._absent is None or self._read else ""
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"
        except ListError as error:
            return None, str(error)

    def _take(self, value: T | None, problem: str) -> None:
        told = partial(READS.labels, self._name)
        if problem or value is None:
            told("refused").inc()
            log.error("list cannot be used; what was known of it stays", list=self._name, problem=problem)
            return
        told("taken").inc()
        self.value = value
        self._read = self._read or self._known is not None

    def _stamp(self) -> _Stamp | None:
        try:
            status = os.stat(self._path)  # noqa: PTH116 - Path.stat costs twice as much, each second
        except OSError:
            return None
        return _Stamp(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
