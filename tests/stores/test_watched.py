"""A list that changes is known soon after, and a broken or half-written one changes nothing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from relay.stores import watched
from relay.stores.lists import ListError
from relay.stores.watched import Watched

if TYPE_CHECKING:
    from pathlib import Path


def numbers(text: str) -> list[int]:
    try:
        return [int(line) for line in text.split()]
    except ValueError:
        raise ListError("line 1: must be a number") from None


def reads(outcome: str) -> float:
    return REGISTRY.get_sample_value("relay_list_reads_total", {"list": "test", "outcome": outcome}) or 0.0


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "SETTLE", 0.01)


async def until(known: Watched[list[int] | None], value: list[int] | None) -> None:
    """Tick, as a worker does, until the list is this."""
    end = time.monotonic() + 10
    while known.value != value:
        assert time.monotonic() < end, f"it stays {known.value}"
        known.tick()
        await asyncio.sleep(0.01)


async def ticks(known: Watched[list[int] | None]) -> None:
    for _ in range(10):
        known.tick()
        await asyncio.sleep(0.01)


def watch(path: Path, absent: list[int] | None = None) -> Watched[list[int] | None]:
    return Watched(path, numbers, name="test", absent=absent)


async def test_a_change_is_known(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    known = watch(path)
    assert known.value == [1]
    path.write_text("1\n2\n")
    await until(known, [1, 2])
    other = tmp_path / "other"
    other.write_text("3\n4\n")
    other.replace(path)
    await until(known, [3, 4])


async def test_what_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    before = reads("taken")
    known = watch(path)
    await ticks(known)
    assert reads("taken") == before + 1


async def test_a_broken_list_changes_nothing_until_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    known, before = watch(path), reads("refused")
    path.write_text("x\n")
    await ticks(known)
    assert known.value == [1]
    assert reads("refused") == before + 1, "told once, not each second"
    path.write_text("5\n")
    await until(known, [5])


@pytest.mark.parametrize("absent", [None, []])
async def test_a_list_that_was_broken_from_the_beginning_is_not_an_empty_one(
    tmp_path: Path, absent: list[int] | None
) -> None:
    path = tmp_path / "list"
    path.write_text("x\n")
    known = watch(path, absent)
    assert known.value is None
    await ticks(known)
    assert known.value is None
    path.write_text("5\n")
    await until(known, [5])


@pytest.mark.parametrize("absent", [None, []])
async def test_a_list_that_is_taken_away_stays_as_it_was(tmp_path: Path, absent: list[int] | None) -> None:
    """A configuration management that replaces a file in two steps must let nobody in or out."""
    path = tmp_path / "list"
    path.write_text("1\n")
    known = watch(path, absent)
    path.unlink()
    await ticks(known)
    assert known.value == [1]
    path.write_text("2\n")
    await until(known, [2])
    path.unlink()
    await ticks(known)
    assert known.value == [2]


@pytest.mark.parametrize("absent", [None, []])
async def test_a_list_that_is_made_later_is_known_then(tmp_path: Path, absent: list[int] | None) -> None:
    path = tmp_path / "list"
    before = reads("refused")
    known = watch(path, absent)
    assert known.value == absent
    assert reads("refused") - before == (absent is None), "no list of nobody is as good as an empty one"
    path.write_text("7\n")
    await until(known, [7])
    path.unlink()
    await ticks(known)
    assert known.value == [7]


async def test_a_list_that_is_being_written_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "SETTLE", 0.2)
    path = tmp_path / "list"
    path.write_text("1\n2\n")
    known = watch(path)
    with path.open("w") as file:  # a list without anybody, for a moment
        for value in (1, 2, 3):
            known.tick()
            await asyncio.sleep(0.1)
            file.write(f"{value}\n")
            file.flush()
            assert known.value == [1, 2]
    await until(known, [1, 2, 3])


async def test_a_directory_or_an_unreadable_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("1\n")
    known = watch(path)
    path.unlink()
    path.mkdir()
    await ticks(known)
    assert known.value == [1]
