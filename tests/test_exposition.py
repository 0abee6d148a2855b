"""Counts outlive the worker that counted, in two files however many workers there were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from relay.exposition import DIRECTORY, bury, exposition

#: What a worker does that counts `sys.argv[1]` strays and one call, and says its pid.
WORKER = """
import os, sys
from relay.policies.metrics import IN_FLIGHT, SECONDS, STRAYS
STRAYS.labels("404").inc(int(sys.argv[1]))
SECONDS.labels("GetRun", "http_v1").observe(0.2)
IN_FLIGHT.labels("http_v1").set(1)
print(os.getpid())
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    return tmp_path


def worker(count: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(count)],
        check=True,
        capture_output=True,
        env=os.environ,
        timeout=60,
    )
    return int(done.stdout)


def sample(name: str) -> float:
    families = text_string_to_metric_families(exposition().decode())
    return sum(s.value for family in families for s in family.samples if s.name == name)


def test_what_ended_workers_counted_is_added_up_in_two_files(directory: Path) -> None:
    pids = [worker(count) for count in (1, 2, 4)]
    before = sample("relay_strays_total"), sample("relay_call_duration_seconds_count")
    assert before == (7.0, 3.0)
    for pid in pids:
        bury(pid)
    assert (sample("relay_strays_total"), sample("relay_call_duration_seconds_count")) == before
    assert sorted(path.name for path in directory.glob("*.db")) == ["counter_ended.db", "histogram_ended.db"]


def test_a_worker_that_counted_nothing_leaves_nothing(directory: Path) -> None:
    bury(1)
    assert list(directory.glob("*.db")) == []


def test_the_gauges_of_an_ended_worker_are_dropped(directory: Path) -> None:
    pids = [worker(1), worker(1)]
    values = [sample("relay_calls_in_flight")]
    for pid in pids:
        bury(pid)
        values.append(sample("relay_calls_in_flight"))
    assert values == [2, 1, 0]


def test_the_living_are_not_touched(directory: Path) -> None:
    ended, living = worker(1), worker(2)
    bury(ended)
    assert (directory / f"counter_{living}.db").exists()
    assert sample("relay_strays_total") == 3


def test_what_cannot_be_added_up_for_want_of_room_stays_where_it_is(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = worker(1), worker(2)
    bury(first)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with structlog.testing.capture_logs() as logs:
        bury(second)
    assert {line["event"] for line in logs} >= {"counts of an ended worker are not added up"}
    assert sample("relay_strays_total") == 3
    assert not list(directory.glob("*.new"))


def test_what_cannot_be_read_of_a_worker_is_removed(directory: Path) -> None:
    ended = worker(1)
    for content in (b"", b"\xff" * 8, (1 << 16).to_bytes(4, "little") + b"\x07" * 65532):
        (directory / f"counter_{ended}.db").write_bytes(content)
        bury(ended)
        assert not (directory / f"counter_{ended}.db").exists()
    assert sample("relay_strays_total") == 0


def test_nothing_is_raised_when_the_directory_is_gone(directory: Path) -> None:
    ended = worker(1)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    bury(ended)
