"""Lines that were lost are counted once."""

from __future__ import annotations

import pytest

from relay import log_writer
from relay.log_metrics import DROPPED, LogMetrics


def test_what_was_lost_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = [3]
    monkeypatch.setattr(log_writer, "dropped", lambda: lost[-1])
    metrics = LogMetrics()
    before = DROPPED._value.get()
    metrics.sample()
    assert DROPPED._value.get() == before, "what was lost before the fork is the master's"
    for lines in (5, 5, 9):
        lost.append(lines)
        metrics.sample()
    assert DROPPED._value.get() == before + 6
