"""A file of counts that is reserved before it is written, and counts that find no room stay in their process.

prometheus_client writes to files that are mapped and have holes. On a file system that is full, such a write
ends the process (SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.mmap_dict import MmapedDict

log = structlog.get_logger("relay.metrics_file")

_FIRST = 1 << 16
#: Between attempts to reserve room for what is counted without a file.
RETRY_SECONDS = 10.0
_TWO_DOUBLES = struct.Struct("dd").pack
#: The head of such a file: how many bytes of it are used, in native order.
_EMPTY = struct.pack("i4x", 8)


class ReservedDict(MmapedDict):
    """prometheus_client's file of doubles, on blocks of the disk that are its own."""

    #: Whether this process has said that there is no room.
    _said = False

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        """Open or make the file; without room for it nothing is written, and nothing is raised."""
        self._fname = filename
        self._f: Any = None
        self._m: Any = None
        self._capacity = self._used = 0
        self._positions: dict[str, int] = {}
        self._alone: dict[str, tuple[float, float]] = {}
        self._retry_at = 0.0
        self._attempt()

    def read_value(self, key: str) -> tuple[float, float]:
        """Return the number of `key` and its time, (0, 0) if there is none yet."""
        if key not in self._positions and not self._moved(key):
            return self._alone.setdefault(key, (0.0, 0.0))
        value: tuple[float, float] = super().read_value(key)  # type: ignore[no-untyped-call]
        return value

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Set the number of `key`, in this process alone if there is no room for it."""
        at = self._positions.get(key)
        if at is None:
            if not self._moved(key):
                self._alone[key] = value, timestamp
                return
            at = self._positions[key]
        self._m[at : at + 16] = _TWO_DOUBLES(value, timestamp)

    def counts_alone(self) -> bool:
        """Whether there are numbers for which there was no room."""
        return bool(self._alone)

    def close(self) -> None:
        """Close the file."""
        if self._f is not None:
            super().close()  # type: ignore[no-untyped-call]

    def _moved(self, key: str) -> bool:
        """Return whether there is room for `key`; what it counts so far then stands in the file."""
        if time.monotonic() < self._retry_at or (self._f is None and not self._attempt()):
            return False
        try:
            self._reserve(self._used + len(key.encode()) + 32)
        except OSError as error:
            self._fail(error)
            return False
        self._init_value(key)  # type: ignore[no-untyped-call]
        if (so_far := self._alone.pop(key, None)) is not None:
            self.write_value(key, *so_far)
        return True

    def _attempt(self) -> bool:
        """Open or make the file; return whether that could be done."""
        try:
            _prepare(self._fname)
            alone = self._alone, self._retry_at
            super().__init__(self._fname)  # type: ignore[no-untyped-call]
            self._alone, self._retry_at = alone
        except OSError as error:
            self._f = None
            self._fail(error)
            return False
        return True

    def _reserve(self, size: int) -> None:
        if size <= self._capacity:
            return
        capacity = self._capacity
        while capacity < size:
            capacity *= 2
        os.posix_fallocate(self._f.fileno(), 0, capacity)
        self._m = mmap.mmap(self._f.fileno(), capacity)
        self._capacity = capacity

    def _fail(self, error: OSError) -> None:
        if not ReservedDict._said:
            ReservedDict._said = True
            log.warning(
                "metrics are not seen by the other workers: make room for them",
                file=self._fname,
                problem=error.strerror,
            )
        self._retry_at = time.monotonic() + RETRY_SECONDS


def _prepare(name: str) -> None:
    """Reserve a file of counts, an empty one if there is none. Raises OSError."""
    path = Path(name)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    # A scrape sees all of the file or nothing.
    made = path if size else path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(made, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size or _FIRST)
        if not size:
            os.pwrite(descriptor, _EMPTY, 0)
            made.replace(path)
    except OSError:
        if not size:
            with suppress(OSError):
                made.unlink()
        raise
    finally:
        os.close(descriptor)
