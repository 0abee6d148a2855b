"""A file of keys: replaced as a whole, never half read, and a broken one is named and not touched."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.credentials.keys import file as module
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.record import KeyRecord
from relay.credentials.keys.stores import Records, StoreError
from tests.credentials.keys.test_record import records as any_record

#: On a busy machine everything is slow.
IGNORED = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
A = KeyRecord("aaaaaaaa", "a", bytes(32), 1)
B = KeyRecord("bbbbbbbb", "b", bytes(32), 2, "north", (("site", "b"),))


def adding(*records: KeyRecord) -> Callable[[Records], None]:
    def change(present: Records) -> None:
        present.update((record.id, record) for record in records)

    return change


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def keys(path: Path) -> FileKeys:
    """A file with two keys, last changed long ago."""
    FileKeys(path).change(adding(A, B), init=True)
    long_ago(path)
    return FileKeys(path)


def long_ago(path: Path) -> None:
    os.utime(path, (1_700_000_000, 1_700_000_000))


def faults(keys: FileKeys) -> tuple[str, ...]:
    with pytest.raises(StoreError) as caught:
        keys.poll()
    return caught.value.problems


def test_what_was_written_is_read_once(keys: FileKeys) -> None:
    assert keys.poll() == {"aaaaaaaa": A, "bbbbbbbb": B}
    assert keys.poll() is None
    assert keys.poll() is None


def test_the_file_is_what_the_module_documents(keys: FileKeys, path: Path) -> None:
    head, *lines = path.read_text().splitlines()
    assert json.loads(head) == {"flwr_relay_keys": 1, "count": 2}
    assert [json.loads(line)["id"] for line in lines] == ["aaaaaaaa", "bbbbbbbb"]


@settings(suppress_health_check=IGNORED, deadline=None, max_examples=30)
@given(st.lists(any_record, unique_by=lambda record: record.id, max_size=5))
def test_any_records_are_read_as_they_were_written(path: Path, records: list[KeyRecord]) -> None:
    path.unlink(missing_ok=True)
    FileKeys(path).change(adding(*records), init=True)
    assert FileKeys(path).poll() == {record.id: record for record in records}


def test_a_change_is_seen_and_what_stayed_is_the_same_object(keys: FileKeys, path: Path) -> None:
    before = keys.poll()
    FileKeys(path).change(lambda records: records.update(aaaaaaaa=A._replace(revoked=5)))
    after = keys.poll()
    assert before is not None
    assert after is not None
    assert after["aaaaaaaa"].revoked == 5
    assert after["bbbbbbbb"] is before["bbbbbbbb"]


def test_a_file_changed_just_now_is_read_again_in_case_another_change_left_the_same_time(
    keys: FileKeys, path: Path
) -> None:
    FileKeys(path).change(lambda records: records.__delitem__("bbbbbbbb"))
    assert keys.poll() == {"aaaaaaaa": A}
    assert keys.poll() == {"aaaaaaaa": A}
    long_ago(path)
    assert keys.poll() == {"aaaaaaaa": A}
    assert keys.poll() is None


def test_a_link_that_is_turned_to_another_file_is_followed(
    tmp_path: Path, keys: FileKeys, path: Path
) -> None:
    """So Kubernetes replaces what it mounts."""
    other = tmp_path / "other"
    FileKeys(other).change(adding(A), init=True)
    long_ago(other)
    link = tmp_path / "link"
    link.symlink_to(path)
    linked = FileKeys(link)
    assert linked.poll() == {"aaaaaaaa": A, "bbbbbbbb": B}
    (tmp_path / "new").symlink_to(other)
    (tmp_path / "new").replace(link)
    assert linked.poll() == {"aaaaaaaa": A}


def test_a_link_stays_one_when_the_file_is_changed(tmp_path: Path, keys: FileKeys, path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    FileKeys(link).change(lambda records: records.clear())
    assert link.is_symlink()
    assert FileKeys(path).poll() == {}


def test_a_place_where_no_file_can_be_made_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    (tmp_path / "link").symlink_to(gone / "keys")
    for path, directory in ((gone / "keys", gone), (tmp_path / "link", gone)):
        with pytest.raises(StoreError) as caught:
            FileKeys(path).change(lambda records: records.clear(), init=True)
        [said] = caught.value.problems
        assert said.endswith(f": make the directory {directory}, or set keys.file to another path")
    with pytest.raises(StoreError) as caught:
        FileKeys(Path("/proc/keys")).change(lambda records: records.clear(), init=True)
    [said] = caught.value.problems
    assert said.endswith(": no file can be made in /proc: set keys.file to another path")
    assert "--init" not in said


# -- what is broken -----------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_an_outage_and_no_empty_table(path: Path) -> None:
    keys = FileKeys(path)
    [fault] = faults(keys)
    assert fault.startswith(f"{path} cannot be read: No such file or directory: restore it; if it never was")
    assert fault.endswith("make it with flwr-relay keys create --init")
    FileKeys(path).change(adding(A), init=True)
    assert keys.poll() == {"aaaaaaaa": A}


def test_a_file_that_is_not_there_is_made_only_if_that_is_meant(path: Path) -> None:
    """Whoever lost it would have the relays forget all other keys."""
    with pytest.raises(StoreError, match="does not exist: restore it"):
        FileKeys(path).change(adding(A))
    assert not path.exists()


def test_a_file_cut_off_anywhere_is_known_for_one(keys: FileKeys, path: Path) -> None:
    text = path.read_bytes()
    for length in range(len(text) - 1):  # without its last end of line it is whole
        path.write_bytes(text[:length])
        assert faults(FileKeys(path)), length
    path.write_bytes(text[:-1])
    assert FileKeys(path).poll() == {"aaaaaaaa": A, "bbbbbbbb": B}


def test_a_broken_file_is_complained_about_until_it_is_mended(keys: FileKeys, path: Path) -> None:
    text = path.read_bytes()
    keys.poll()
    path.write_bytes(text[:-20])
    long_ago(path)
    assert faults(keys) == faults(keys)
    path.write_bytes(text)
    assert keys.poll() == {"aaaaaaaa": A, "bbbbbbbb": B}


def test_every_broken_line_is_named_with_its_number(keys: FileKeys, path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([lines[0], "{}", "", lines[1], lines[1], lines[2].replace("north", "no rth"), "x"])
    )
    assert [fault.removeprefix(f"{path}:").partition(":")[0] for fault in faults(FileKeys(path))] == [
        "2",
        "5",
        "6",
        "7",
    ]
    assert "a line before it" in faults(FileKeys(path))[1]


def test_of_very_many_broken_lines_the_first_are_named(path: Path) -> None:
    path.write_text('{"flwr_relay_keys": 1, "count": 3}\n' + "x\n" * 1000)
    assert len(faults(FileKeys(path))) == module.MOST_FAULTS


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", ":1: must be"),
        ("[1]\n", ":1: must be"),
        ('{"count": 0}\n', ":1: must be"),
        ('{"flwr_relay_keys": true, "count": 0}\n', ":1: must be"),
        ('{"flwr_relay_keys": 1, "count": "0"}\n', ":1: must be"),
        ('{"flwr_relay_keys": 2, "count": 0}\n', "format '2': this release reads 1"),
        ('{"flwr_relay_keys": 1, "count": 2}\n', "says that 2 keys follow, and there are 0"),
        ('{"flwr_relay_keys": 1, "count": -1}\n', "says that -1 keys follow, and there are 0"),
        ("[" * 100_000, ":1: must be"),
    ],
)
def test_a_first_line_that_cannot_be_is_named(path: Path, text: str, fault: str) -> None:
    path.write_text(text)
    [told] = faults(FileKeys(path))
    assert fault in told


@settings(suppress_health_check=IGNORED, deadline=None, max_examples=60)
@given(st.data())
def test_garbage_raises_nothing_but_a_store_error(path: Path, data: st.DataObject) -> None:
    path.unlink(missing_ok=True)
    FileKeys(path).change(adding(A, B), init=True)
    text = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=10))
    path.write_bytes(text)
    problems: tuple[str, ...] = ()
    try:
        FileKeys(path).poll()
    except StoreError as error:
        problems = error.problems
    assert all(fault.startswith(str(path)) for fault in problems)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    assert "is no file of at most 256 MiB" in faults(FileKeys(Path("/dev/zero")))[0]
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert "is no file of at most" in faults(FileKeys(path))[0]


def test_what_cannot_be_read_is_not_held_open(
    tmp_path: Path, keys: FileKeys, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that looks once a second would run out of descriptors, and answer nobody."""
    directory = FileKeys(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        faults(directory)
        with pytest.raises(StoreError, match="is no file of at most"):
            directory.change(adding(A), init=True)
        path.write_bytes(b"broken")
        faults(keys)
        with monkeypatch.context() as patch:
            patch.setattr(module, "MOST_BYTES", 1)
            path.write_bytes(b"too long")
            faults(keys)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch, keys: FileKeys) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    assert "is no file of at most" in faults(keys)[0]


# -- changes ------------------------------------------------------------------------------------------


def test_a_broken_file_is_not_replaced(keys: FileKeys, path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(StoreError):
        keys.change(adding(A))
    assert path.read_bytes() == b"precious"


def test_a_change_that_fails_leaves_the_file_and_nothing_beside_it(keys: FileKeys, path: Path) -> None:
    before = path.read_bytes()

    def failing(records: Records) -> None:
        records.clear()
        raise LookupError

    with pytest.raises(LookupError):
        keys.change(failing)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["keys.jsonl", "keys.jsonl.lock"]
    keys.change(adding(A))  # the lock was given back


def test_a_full_disk_leaves_the_file_and_nothing_beside_it(
    monkeypatch: pytest.MonkeyPatch, keys: FileKeys, path: Path
) -> None:
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        keys.change(adding(A._replace(revoked=1)))
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["keys.jsonl", "keys.jsonl.lock"]


def test_the_file_is_made_for_its_owner_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        FileKeys(path).change(adding(A), init=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize(("mode", "then"), [(0o640, 0o640), (0o644, 0o640), (0o400, 0o600), (0o660, 0o660)])
def test_a_group_that_may_read_the_file_may_go_on_doing_so(
    keys: FileKeys, path: Path, mode: int, then: int
) -> None:
    path.chmod(mode)
    keys.change(adding(A))
    assert stat.S_IMODE(path.stat().st_mode) == then


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_the_file_stays_with_its_owner_when_root_changes_it(keys: FileKeys, path: Path) -> None:
    os.chown(path, 12345, 54321)
    keys.change(adding(A))
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


def test_a_lock_that_is_held_for_long_is_reported(
    monkeypatch: pytest.MonkeyPatch, keys: FileKeys, path: Path
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    with keys._locked(), pytest.raises(StoreError, match=r"keys\.jsonl\.lock is held by another command"):
        FileKeys(path).change(adding(A), init=True)


CREATE = """
import sys
from pathlib import Path
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.record import KeyRecord
for number in range(20):
    record = KeyRecord(f"{sys.argv[2]}{number:07}", "n", bytes(32), 1)
    FileKeys(Path(sys.argv[1])).change(lambda records: records.update({record.id: record}))
"""


def test_processes_that_change_it_at_once_lose_nothing_and_nobody_reads_a_half(path: Path) -> None:
    FileKeys(path).change(adding(A), init=True)
    writers = [subprocess.Popen([sys.executable, "-c", CREATE, path, name]) for name in "xyz"]
    reader = FileKeys(path)
    sizes: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            records = reader.poll()  # raises StoreError on half a file, and the last check then fails
            sizes.append(len(records or ()))
            stop.wait(0.002)

    thread = threading.Thread(target=read)
    thread.start()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    stop.set()
    thread.join()
    final = FileKeys(path).poll()
    assert final is not None
    assert set(final) == {"aaaaaaaa"} | {f"{name}{number:07}" for name in "xyz" for number in range(20)}
    assert len(sizes) > 10


def test_a_writer_that_is_killed_holds_no_lock(keys: FileKeys, path: Path) -> None:
    hold = "import sys, time; from relay.credentials.keys.file import *; "
    hold += "FileKeys(Path(sys.argv[1])).change(lambda _: (print(flush=True), time.sleep(60)))"
    with subprocess.Popen([sys.executable, "-c", hold, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.kill()
        writer.wait()
    keys.change(adding(A._replace(revoked=3)))
    assert (FileKeys(path).poll() or {})["aaaaaaaa"].revoked == 3
