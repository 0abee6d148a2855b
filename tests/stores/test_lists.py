"""Lists are edited without a loss, whoever edits at the same time, and keep what people wrote into them."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.stores import lists
from relay.stores.lists import ListError, edit, parse, read, with_line, without_lines


def number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("must be a number")
    return int(text)


def test_lines_with_entries_are_numbered_as_they_stand() -> None:
    assert list(parse("# first\n\n 1 \n2\n   # no\n3", number)) == [(3, 1), (4, 2), (6, 3)]
    with pytest.raises(ListError, match="line 2: must be a number"):
        list(parse("1\nx\n", number))


def test_what_is_no_file_is_neither_waited_for_nor_held_open(tmp_path: Path) -> None:
    """A worker looks once a second."""
    os.mkfifo(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ListError, match="is no file"):
            read(path)
    # Fewer, if what other tests have left is collected meanwhile.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_line_is_added_and_taken_away_and_the_others_stay() -> None:
    assert with_line("", "a") == "a\n"
    assert with_line("# c\na", "b") == "# c\na\nb\n"
    assert with_line("a\n", "b") == "a\nb\n"
    assert without_lines("# c\na\nb\n\nd", {2, 4}) == "# c\nb\nd"


#: All that some tool takes for the end of a line, but for the line feed.
SEPARATORS = ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@given(
    lines=st.lists(st.text(st.sampled_from(["1", "#", " ", *SEPARATORS]), max_size=6), max_size=6),
    ended=st.booleans(),
    data=st.data(),
)
def test_lines_are_taken_away_by_the_numbers_that_they_are_read_with(
    lines: list[str], ended: bool, data: st.DataObject
) -> None:
    text = "\n".join(lines) + ("\n" if ended else "")
    entries = list(parse(text, str))
    gone = data.draw(st.sets(st.sampled_from([number for number, _ in entries]))) if entries else set()
    left = without_lines(text, gone)
    assert [entry for _, entry in parse(left, str)] == [
        entry for number, entry in entries if number not in gone
    ]
    longer = with_line(text, "17")
    assert [entry for _, entry in parse(longer, str)] == [*(entry for _, entry in entries), "17"]
    assert without_lines(longer, {longer.count("\n")}).removesuffix("\n") == text.removesuffix("\n")


@pytest.mark.parametrize("separator", ["\n", *SEPARATORS, "\x00", "\x1b", "\udcff"])
def test_no_line_is_written_that_somebody_could_take_for_two(separator: str) -> None:
    with pytest.raises(ListError, match="cannot hold control characters"):
        with_line("a\n", f"b{separator}c")


def test_a_program_that_takes_no_lock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list"
    replace = type(path).replace

    def overtaken(source: Path, target: Path) -> Path:
        replaced = replace(source, target)
        target.write_text("7\n")
        return replaced

    monkeypatch.setattr(type(path), "replace", overtaken)
    with pytest.raises(ListError, match="another program changes it"):
        edit(path, lambda text: with_line(text, "1"))
    assert path.read_text() == "7\n"


def test_a_list_that_is_not_there_is_made(tmp_path: Path) -> None:
    path = tmp_path / "list"
    before = os.umask(0)
    try:
        edit(path, lambda text: with_line(text, "1"))
    finally:
        os.umask(before)
    assert path.read_text() == "1\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_first_list_belongs_to_the_owner_of_its_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 54321)
    edit(tmp_path / "list", lambda text: with_line(text, "1"))
    status = (tmp_path / "list").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 54321, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_another_group_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    path.chmod(0o660)
    os.chown(path, -1, 54321)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    edit(path, lambda text: with_line(text, "2"))
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(tmp_path: Path, there: bool) -> None:
    path, target = tmp_path / "list", tmp_path / "elsewhere" / "real"
    target.parent.mkdir()
    path.symlink_to(target)
    if there:
        target.write_text("1\n")
    edit(path, lambda text: with_line(text, "2"))
    assert path.is_symlink()
    assert target.read_text() == ("1\n2\n" if there else "2\n")
    assert [*target.parent.iterdir()] == [target]


def test_mode_and_owner_stay_and_the_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    path.chmod(0o640)
    before = path.stat()
    with path.open() as reader:
        edit(path, lambda text: with_line(text, "2"))
        assert reader.read() == "1\n", "who reads meanwhile sees the old list"
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_a_change_that_raises_or_changes_nothing_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    before = path.stat()

    def refuse(_: str) -> str:
        raise LookupError

    with pytest.raises(LookupError):
        edit(path, refuse)
    edit(path, lambda text: text)
    assert path.stat().st_ino == before.st_ino
    assert [*tmp_path.iterdir()] == [path]


def test_edits_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list"

    def add(first: int) -> None:
        for value in range(first, first + 10):
            edit(path, lambda text, line=str(value): with_line(text, line))  # type: ignore[misc]

    threads = [threading.Thread(target=add, args=(start,)) for start in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(value for _, value in parse(path.read_text(), number)) == list(range(40))


def test_what_is_no_text_or_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"1\n\xff\n")
    with pytest.raises(ListError, match="byte 2 is not UTF-8"):
        read(path)
    monkeypatch.setattr(lists, "MOST_BYTES", 1 << 20)
    path.write_bytes(b"1" * ((1 << 20) + 1))
    with pytest.raises(ListError, match="is longer than 1 MiB"):
        read(path)


def test_a_list_that_cannot_be_written_whole_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        edit(path, lambda text: with_line(text, "2"))
    assert path.read_text() == "1\n"
    assert [*tmp_path.iterdir()] == [path]
