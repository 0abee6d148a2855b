"""The table that the workers of a host share: what is found, what may be lost, and that it never lies."""

from __future__ import annotations

import os
import signal

from hypothesis import given
from hypothesis import strategies as st

from relay.stores.host import PROBES, HostTable


def test_what_was_put_is_found_and_can_be_changed() -> None:
    table = HostTable(64)
    assert table.get(b"a") is None
    table.put(b"a", 1)
    table.put(b"b", 2**64 - 1)
    table.put(b"a", 3)
    assert (table.get(b"a"), table.get(b"b"), table.get(b"c")) == (3, 2**64 - 1, None)


@given(st.dictionaries(st.binary(max_size=8), st.integers(0, 2**64 - 1), max_size=200))
def test_a_full_table_forgets_but_never_gives_a_wrong_number(entries: dict[bytes, int]) -> None:
    table = HostTable(32)
    for key, value in entries.items():
        table.put(key, value)
    for key, value in entries.items():
        assert table.get(key) in (value, None)


def test_the_latest_entry_is_kept_when_its_neighbourhood_is_full() -> None:
    table = HostTable(PROBES)
    for number in range(1000):
        table.put(b"%d" % number, number)
        assert table.get(b"%d" % number) == number


def test_what_another_process_put_is_found_and_its_death_leaves_no_lock() -> None:
    table = HostTable(64)
    child = os.fork()
    if child == 0:
        number = 0
        while True:
            table.put(b"node", number)
            table.put(b"ready", 1)
            number += 1
    try:
        while table.get(b"ready") is None:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    table.put(b"node", 42)
    assert table.get(b"node") == 42


def test_a_record_written_in_part_reads_as_absent() -> None:
    table = HostTable(8)
    table.put(b"node", 7)
    for at in range(0, 8 * 24, 24):
        if table._memory[at : at + 8] != bytes(8):
            table._memory[at + 8] ^= 1
    assert table.get(b"node") is None
