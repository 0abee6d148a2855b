"""Counts have room on the disk before they are written; those that find none stay in their process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import structlog
from prometheus_client.mmap_dict import MmapedDict

from relay import metrics_file
from relay.metrics_file import ReservedDict

if TYPE_CHECKING:
    from pathlib import Path


class Disk:
    """A file system that has so much room left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def reserve(self, descriptor: int, offset: int, length: int) -> None:
        needed = offset + length - os.fstat(descriptor).st_size
        if needed > self.room:
            raise OSError(28, "No space left on device")
        self.room -= max(needed, 0)
        os.truncate(descriptor, max(os.fstat(descriptor).st_size, offset + length))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(0)
    monkeypatch.setattr(os, "posix_fallocate", disk.reserve)
    return disk


def read(path: Path) -> dict[str, float]:
    """Return what a scrape finds."""
    found = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    return {key: value for key, value, _, _ in found}


def test_it_is_the_file_that_the_library_reads(tmp_path: Path) -> None:
    file = ReservedDict(str(tmp_path / "counter_1.db"))
    assert read(tmp_path / "counter_1.db") == {}
    assert file.read_value("a") == (0.0, 0.0)
    file.write_value("a", 3.0, 1.0)
    file.write_value("b", 4.0, 0.0)
    assert file.read_value("a") == (3.0, 1.0)
    assert read(tmp_path / "counter_1.db") == {"a": 3.0, "b": 4.0}
    file.close()
    again = ReservedDict(str(tmp_path / "counter_1.db"))
    assert again.read_value("b") == (4.0, 0.0)
    assert not again.counts_alone()
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["counter_1.db"]


def test_all_of_it_is_reserved_also_when_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "counter_1.db"
    file = ReservedDict(str(path))
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 0
    keys = [f"{number:0100}" for number in range(3000)]
    for number, key in enumerate(keys):
        file.read_value(key)
        file.write_value(key, number, 0.0)
    assert path.stat().st_blocks * 512 >= path.stat().st_size >= 300_000
    assert read(path) == {key: number for number, key in enumerate(keys)}
    file.close()


def test_without_room_for_the_file_a_process_counts_in_itself_and_says_so_once(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReservedDict, "_said", False)
    with structlog.testing.capture_logs() as logs:
        ReservedDict(str(tmp_path / "histogram_1.db")).write_value("a", 1.0, 0.0)
        file = ReservedDict(str(tmp_path / "counter_1.db"))
        for count in (1.0, 2.0):
            file.write_value("a", count, 0.0)
            assert file.read_value("a") == (count, 0.0)
        assert file.counts_alone()
        file.close()
    assert [(line["log_level"], line["problem"]) for line in logs] == [("warning", "No space left on device")]
    assert list(tmp_path.iterdir()) == [], "what is empty would spoil a scrape"
    assert disk.room == 0


def test_what_does_not_fit_any_more_is_counted_alone_until_there_is_room(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.room = 1 << 16
    path = tmp_path / "counter_1.db"
    file = ReservedDict(str(path))
    long = "k" * 40_000
    for key in ("a", long, long + "2"):
        file.read_value(key)
        file.write_value(key, 7.0, 0.0)
    assert read(path) == {"a": 7.0, long: 7.0}
    assert file.read_value(long + "2") == (7.0, 0.0)
    file.write_value("a", 8.0, 0.0)
    assert read(path)["a"] == 8.0
    disk.room = 1 << 20
    file.write_value(long + "2", 8.0, 0.0)
    assert file.counts_alone(), "it is not tried with every number"
    monkeypatch.setattr(metrics_file, "RETRY_SECONDS", 0.0)
    file._retry_at = 0.1
    file.write_value(long + "2", 9.0, 0.0)
    assert not file.counts_alone()
    assert read(path) == {"a": 8.0, long: 7.0, long + "2": 9.0}
    file.close()


def test_a_file_that_was_begun_by_a_process_that_was_killed_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").touch()
    file = ReservedDict(str(tmp_path / "counter_1.db"))
    file.write_value("a", 1.0, 0.0)
    assert read(tmp_path / "counter_1.db") == {"a": 1.0}
    file.close()


#: A worker that counts where files must not be longer than `sys.argv[1]` bytes.
WORKER = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from relay import exposition
exposition.count_as(1)
from relay.policies.metrics import STRAYS, stray
for _ in range(3):
    stray("404")
print(STRAYS.labels("404")._value.get())
"""


@pytest.mark.parametrize("room", [0, resource.RLIM_INFINITY])
def test_a_worker_counts_whatever_room_there_is(tmp_path: Path, room: int) -> None:
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(room)], capture_output=True, text=True, env=environ, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["3.0"]), done.stderr
    assert (tmp_path / "counter_1.db").exists() == (room != 0)
