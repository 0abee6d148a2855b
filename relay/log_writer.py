"""Lines of the log on their way out: a thread writes them, so that nobody waits for who reads them.

A pipe that nobody empties holds 64 KiB; whoever writes to it then stands still. Here lines are kept
meanwhile, up to a number of bytes. Further ones are dropped and counted; in their place a line says how many.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

#: Most bytes that wait to be written.
MOST_BYTES = 4 << 20
#: How long the end of a process waits for its last lines.
FLUSH_SECONDS = 2.0
#: What a line costs beside its text.
_EACH = 100
_TURN = 0.005


class Writer:
    """Writes lines to a file descriptor in the order in which they come."""

    def __init__(self, descriptor: int, gap: Callable[[int], str]) -> None:
        """Prepare.

        Args:
            descriptor: where lines go.
            gap: makes the line that says how many are missing.
        """
        self.gap = gap
        self._descriptor = descriptor
        self.begin()

    def begin(self) -> None:
        """Begin anew, in a process that was just forked: what waits is written by the one before."""
        self._lines: SimpleQueue[bytes] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # One thread counts what was put (under the lock of the handler), the other what is done.
        self._put = self._put_bytes = self._refused = 0
        self._done = self._done_bytes = self._failed = 0
        self._told = 0
        self._telling = threading.Lock()
        self._broken = False

    @property
    def dropped(self) -> int:
        """How many lines found no room, or could not be written."""
        return self._refused + self._failed

    def put(self, line: str) -> None:
        """Take a line, without its end; never waits."""
        data = line.encode(errors="backslashreplace") + b"\n"
        if self._put_bytes - self._done_bytes + len(data) > MOST_BYTES:
            self._refused += 1
            return
        if self.dropped > self._told and not self._broken:
            self._take(self._missing())
        self._take(data)
        if self._thread is None:
            self._start()

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until all lines are written, for so long at most; return whether they are."""
        end = time.monotonic() + seconds
        while self._done < self._put or (self.dropped > self._told and not self._broken):
            if self._thread is None or time.monotonic() > end:
                return False
            if self._done == self._put:
                self._take(self._missing())
            time.sleep(_TURN)
        return True

    def _take(self, data: bytes) -> None:
        if data:
            self._put_bytes += len(data) + _EACH
            self._put += 1
            self._lines.put(data)

    def _missing(self) -> bytes:
        """Return the line that says how many lines are missing here; nothing if that was said."""
        with self._telling:
            lost = self.dropped - self._told
            self._told += lost
        return self.gap(lost).encode() + b"\n" if lost else b""

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        # Signals are for the main thread, which would hear of one that came here when it wakes next.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self) -> None:
        following = b""
        while True:
            lines = [following or self._lines.get()]
            following = b""
            size = len(lines[0])
            # What fits into a pipe at once is not mixed with the lines of other processes.
            while not following:
                try:
                    line = self._lines.get_nowait()
                except Empty:
                    break
                if size + len(line) > select.PIPE_BUF:
                    following = line
                else:
                    lines.append(line)
                    size += len(line)
            self._broken = not self._write(b"".join(lines))
            if self._broken:
                self._failed += len(lines)
            self._done_bytes += size + len(lines) * _EACH
            self._done += len(lines)
            if not following and self._lines.empty() and self.dropped > self._told and not self._broken:
                self._write(self._missing())

    def _write(self, data: bytes) -> bool:
        """Write all of it, however long that takes; return whether it could be done."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # who shares the pipe has set it so
                select.select([], [self._descriptor], [], 1.0)
            except OSError:
                return False
        return True


class WriterHandler(logging.Handler):
    """Hands lines to a Writer."""

    def __init__(self, writer: Writer) -> None:
        """Hand them to `writer`, which says in the form of this handler how many were lost."""
        super().__init__()
        self._writer = writer
        writer.gap = self._gap

    def emit(self, record: logging.LogRecord) -> None:
        """Format here, where what is logged does not change meanwhile."""
        try:
            self._writer.put(self.format(record))
        except Exception:  # noqa: BLE001 - as the library does it
            self.handleError(record)

    def flush(self) -> None:
        """Wait for the lines, for a bounded time; called at the end of the process."""
        self._writer.flush()

    def _gap(self, lines: int) -> str:
        text = "lines of the log were lost because nobody took them"
        record = logging.LogRecord("relay.logs", logging.WARNING, "", 0, f"{text}: {lines}", None, None)
        return self.format(record)


_writers: dict[int, Writer] = {}


def handler_for(stream: TextIO) -> logging.Handler:
    """Return what writes to `stream`: by a thread if it is a file of the system, else at once."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return logging.StreamHandler(stream)
    writer = _writers.get(descriptor)
    if writer is None:
        writer = _writers[descriptor] = Writer(descriptor, str)
    return WriterHandler(writer)


def dropped() -> int:
    """Return how many lines this process has lost."""
    return sum(writer.dropped for writer in _writers.values())


def _in_a_child() -> None:
    for writer in _writers.values():
        writer.begin()


os.register_at_fork(after_in_child=_in_a_child)
