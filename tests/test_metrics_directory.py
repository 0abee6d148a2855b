"""Where the processes of a relay count: one directory each relay, that is nobody else's to remove."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from relay import metrics_directory
from relay.metrics_directory import PREFIX, MetricsDirectory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_directory_of_a_living_relay_is_left_alone_whatever_its_pid(place: Path) -> None:
    one = MetricsDirectory()
    # As another container sees it: its pid is nobody's here.
    foreign = one.path.rename(place / f"{PREFIX}4194303-x")
    other = MetricsDirectory()
    assert foreign.is_dir()
    assert other.path.is_dir()
    other.remove()
    assert [path.name for path in place.iterdir()] == [foreign.name]


def test_the_directories_of_relays_that_were_killed_are_removed(place: Path) -> None:
    code = "import os, relay.metrics_directory as m; m.MetricsDirectory(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (dead,) = place.iterdir()
    (dead / "counter_1.db").touch()
    kept = place / "something-else"
    kept.mkdir()
    mine = MetricsDirectory()
    assert sorted(place.iterdir()) == sorted([kept, mine.path])
    mine.remove()


def test_a_worker_that_outlives_its_master_holds_the_directory(place: Path) -> None:
    directory = MetricsDirectory()
    done = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(done[1])
        os.read(done[0], 1)
        os._exit(0)
    os.close(directory._lock)
    other = MetricsDirectory()
    assert directory.path.is_dir()
    os.close(done[1])
    os.waitpid(worker, 0)
    last = MetricsDirectory()
    assert not directory.path.exists()
    assert other.path.exists()
    for each in (other, last):
        each.remove()


def test_a_directory_that_a_cleaner_has_removed_is_made_anew_at_the_same_place(place: Path) -> None:
    directory = MetricsDirectory()
    assert not directory.ensure()
    shutil.rmtree(directory.path)
    assert directory.ensure()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert not directory.ensure()
    other = MetricsDirectory()
    assert directory.path.is_dir(), "it is locked as before"
    for each in (directory, other):
        each.remove()
    assert list(place.iterdir()) == []


def test_a_directory_that_cannot_be_made_anew_is_an_os_error(place: Path) -> None:
    directory = MetricsDirectory()
    shutil.rmtree(place)
    with pytest.raises(OSError, match="No such file"):
        directory.ensure()
    place.mkdir()
    assert directory.ensure()
    directory.remove()


def test_memory_is_the_place_unless_tmpdir_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_directory, "_MEMORY", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    directory = MetricsDirectory()
    assert directory.path.parent == tmp_path
    directory.remove()
