"""HostRecords, alone and with processes that are killed, stopped, or write at the same time."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stores.records import WAYS, BusyError, HostRecords, Kept

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 60.0


@pytest.fixture
def records() -> HostRecords:
    return HostRecords(64, 32)


def test_what_was_put_is_got_until_it_is_deleted(records: HostRecords) -> None:
    assert records.get(b"a") is None
    records.put(b"a", b"one", SECONDS)
    records.put(b"b", b"", SECONDS)
    records.put(b"a", b"two", SECONDS)
    assert records.get(b"a") == b"two"
    assert records.get(b"b") == b""
    assert sorted(records.values()) == [b"", b"two"]
    records.delete(b"a")
    records.delete(b"never there")
    assert records.get(b"a") is None
    assert list(records.values()) == [b""]


def test_a_record_ends_by_itself(records: HostRecords) -> None:
    records.put(b"a", b"short", 1.0)
    records.put(b"b", b"long", SECONDS)
    assert records.get(b"a") == b"short"
    time.sleep(1.05)
    assert records.get(b"a") is None
    assert list(records.values()) == [b"long"]
    assert records.update(b"a", lambda old: Kept(b"new" if old is None else old, SECONDS)) == b"new"


def test_a_change_sees_the_value_and_may_take_it_away(records: HostRecords) -> None:
    seen: list[bytes | None] = []

    def change(old: bytes | None) -> Kept | None:
        seen.append(old)
        return Kept(b"x", SECONDS) if old is None else None

    assert records.update(b"a", change) == b"x"
    assert records.update(b"a", change) is None
    assert seen == [None, b"x"]
    assert records.get(b"a") is None


def test_a_change_that_raises_changes_nothing_and_leaves_no_lock(records: HostRecords) -> None:
    records.put(b"a", b"old", SECONDS)

    def broken(_: bytes | None) -> Kept | None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        records.update(b"a", broken)
    with pytest.raises(ValueError, match="33 bytes do not fit into a record of 32"):
        records.put(b"a", bytes(33), SECONDS)
    assert records.get(b"a") == b"old"
    records.put(b"a", bytes(32), SECONDS)
    assert records.get(b"a") == bytes(32)


def test_a_full_bucket_loses_what_would_have_gone_first() -> None:
    records = HostRecords(WAYS, 8)
    for number in range(WAYS):
        records.put(b"%d" % number, b"%d" % number, SECONDS + (number - 3) % WAYS)
    records.put(b"new", b"new", SECONDS)
    assert records.get(b"3") is None
    assert len(list(records.values())) == WAYS
    records.put(b"5", b"again", SECONDS)
    assert records.get(b"5") == b"again"
    assert len(list(records.values())) == WAYS


def test_garbage_in_the_memory_reads_as_nothing_and_is_overwritten() -> None:
    records = HostRecords(WAYS, 8)
    records.put(b"a", b"value", SECONDS)
    whole = records._memory[:]
    for at in range(len(records._memory)):
        records._memory[:] = whole
        records._memory[at] ^= 0xFF
        assert records.get(b"a") in (b"value", None)
    records._memory[:] = b"\xa5" * len(records._memory)
    assert records.get(b"a") is None
    assert list(records.values()) == []
    records.put(b"a", b"anew", SECONDS)
    assert records.get(b"a") == b"anew"


def test_all_processes_see_a_record_and_no_step_is_lost(
    records: HostRecords, forked: Callable[[Callable[[], object]], int]
) -> None:
    def count() -> None:
        for _ in range(500):
            while True:
                try:
                    records.update(
                        b"n", lambda old: Kept((int.from_bytes(old or b"") + 1).to_bytes(4), SECONDS)
                    )
                    break
                except BusyError:
                    continue  # a loaded machine may take its processor from who holds the lock
            records.get(b"n")

    pids = [forked(count) for _ in range(4)]
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert int.from_bytes(records.get(b"n") or b"") == 2000


def test_a_process_that_is_killed_within_a_change_leaves_no_lock(
    records: HostRecords, forked: Callable[[Callable[[], object]], int]
) -> None:
    records.put(b"a", b"old", SECONDS)
    read, write = os.pipe()

    def hang(_: bytes | None) -> Kept | None:
        os.write(write, b"x")
        signal.pause()
        return None

    pid = forked(partial(records.update, b"a", hang))
    os.read(read, 1)
    with pytest.raises(BusyError):
        records.put(b"a", b"new", SECONDS)
    assert records.get(b"a") == b"old"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    records.put(b"a", b"new", SECONDS)
    assert records.get(b"a") == b"new"


def test_a_record_whose_writer_was_stopped_in_the_middle_is_absent(
    records: HostRecords, forked: Callable[[Callable[[], object]], int]
) -> None:
    """A reader that raised would fail the call of a node that has nothing to do with it."""
    records.put(b"a", b"old", SECONDS)
    at = records._memory.find(b"old")
    read, write = os.pipe()

    def half_written(_: bytes | None) -> Kept | None:
        records._memory[at : at + 1] = b"n"
        os.write(write, b"x")
        signal.pause()
        return None

    forked(partial(records.update, b"a", half_written))
    os.read(read, 1)
    begun = time.monotonic()
    assert records.get(b"a") is None
    assert time.monotonic() - begun < 10, "it does not wait for ever"


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.none() | st.binary(max_size=32))))
@settings(max_examples=200)
def test_it_is_a_map(steps: list[tuple[bytes, bytes | None]]) -> None:
    records, model = HostRecords(64, 32), dict[bytes, bytes]()
    for key, value in steps:
        if value is None:
            records.delete(key)
            model.pop(key, None)
        else:
            records.put(key, value, SECONDS)
            model[key] = value
        assert {key: records.get(key) for key in (b"a", b"b", b"c")} == {
            key: model.get(key) for key in (b"a", b"b", b"c")
        }
    assert sorted(records.values()) == sorted(model.values())


def test_no_step_of_a_thread_is_lost(records: HostRecords) -> None:
    """A record lock keeps no other thread of the process out."""

    def add(value: bytes | None) -> Kept:
        time.sleep(0)  # let another thread in
        return Kept(bytes([value[0] + 1 if value else 1]), 60)

    def count() -> None:
        for _ in range(50):
            records.update(b"a", add)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records.get(b"a") == bytes([200])
