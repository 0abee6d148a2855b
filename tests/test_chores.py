"""Chores that fail, and the others beside them."""

from __future__ import annotations

import structlog.testing

from relay.chores import Chores


def fail() -> None:
    raise OSError(24, "no more files")


def test_one_that_fails_is_told_of_once_and_done_again() -> None:
    chores, done = Chores(), 0

    def also_fail() -> None:
        nonlocal done
        done += 1
        fail()

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            chores.do("one", also_fail)
        chores.do("two", fail)
    assert done == 3
    assert [(line["event"], line["chore"]) for line in logs] == [
        ("a chore failed", "one"),
        ("a chore failed", "two"),
    ]
