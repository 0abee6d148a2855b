"""Chores that fail or last, and the others beside them."""

from __future__ import annotations

import asyncio

import structlog.testing

from relay.chores import Chores


def fail() -> None:
    raise OSError(24, "no more files")


async def fail_later() -> None:
    await asyncio.sleep(0)
    fail()


async def test_one_that_fails_is_told_of_once_and_done_again() -> None:
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


async def test_one_that_fails_beside_is_told_of_once_and_started_again() -> None:
    chores = Chores()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            chores.start("one", fail_later)
            while chores._running:
                await asyncio.sleep(0)
    assert [line["chore"] for line in logs] == ["one"]


async def test_one_that_lasts_is_not_started_again_before_it_ends() -> None:
    chores, started, gate = Chores(), 0, asyncio.Event()

    async def last() -> None:
        nonlocal started
        started += 1
        await gate.wait()

    for _ in range(3):
        chores.start("one", last)
        await asyncio.sleep(0)
    assert started == 1
    gate.set()
    while chores._running:
        await asyncio.sleep(0)
    chores.start("one", last)
    await asyncio.sleep(0)
    assert started == 2


async def test_none_goes_on_after_the_end() -> None:
    chores = Chores()
    chores.start("one", asyncio.Event().wait)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    chores.stop()
    async with asyncio.timeout(5):
        while chores._running:
            await asyncio.sleep(0)
