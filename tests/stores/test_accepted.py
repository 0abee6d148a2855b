"""Pairs of key and node id are known to all processes, and only as they were written."""

from __future__ import annotations

import os

from relay.stores.accepted import AcceptedPairs, _digest


def test_a_pair_is_known_once_it_was_accepted_and_until_it_is_forgotten() -> None:
    pairs = AcceptedPairs(64)
    assert not pairs.accepted(b"key", 1)
    pairs.accept(b"key", 1)
    pairs.accept(b"key", 1)
    assert pairs.accepted(b"key", 1)
    assert not pairs.accepted(b"key", 2)
    assert not pairs.accepted(b"other", 1)
    assert not pairs.accepted(b"1:key", 0)
    pairs.forget(b"key", 1)
    assert not pairs.accepted(b"key", 1)


def test_all_processes_know_it() -> None:
    pairs = AcceptedPairs(64)
    pid = os.fork()
    if pid == 0:
        pairs.accept(b"key", 7)
        os._exit(0)
    os.waitpid(pid, 0)
    assert pairs.accepted(b"key", 7)


def test_a_record_that_holds_another_pair_is_none() -> None:
    """The place of a record is 8 bytes of a hash, which can be met on purpose."""
    pairs = AcceptedPairs(64)
    pairs._records.put(_digest(b"key", 1), _digest(b"attacker's", 666), 60.0)
    assert not pairs.accepted(b"key", 1)


def test_they_are_bounded() -> None:
    pairs = AcceptedPairs(16)
    for number in range(200):
        pairs.accept(b"key", number)
    assert 1 <= sum(pairs.accepted(b"key", number) for number in range(200)) <= 16
