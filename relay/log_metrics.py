"""What became of lines of the log that nobody took."""

from __future__ import annotations

from prometheus_client import Counter

from relay import log_writer

DROPPED = Counter(
    "relay_log_lines_dropped", "Lines of the log that a worker has lost because nobody took them in time"
)


class LogMetrics:
    """Counts what a process has lost since it was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self._counted = log_writer.dropped()

    def sample(self) -> None:
        """Count what was lost since; to be called once a second."""
        lost = log_writer.dropped()
        if lost > self._counted:
            DROPPED.inc(lost - self._counted)
            self._counted = lost
