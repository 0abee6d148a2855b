"""The bound holds whatever the order, and nothing that was taken is forgotten."""

from __future__ import annotations

import asyncio
import random

import pytest

from relay.quota import Quota


async def waiting(quota: Quota, size: int) -> asyncio.Task[None]:
    task = asyncio.create_task(quota.take(size))
    await asyncio.sleep(0)
    return task


async def test_what_fits_is_held_at_once() -> None:
    quota = Quota(10)
    await quota.take(4)
    await quota.take(6)
    assert quota.held == 10


async def test_what_does_not_fit_waits_for_its_turn() -> None:
    quota = Quota(10)
    await quota.take(8)
    first, second = await waiting(quota, 6), await waiting(quota, 1)
    assert not first.done()
    assert not second.done(), "it overtook the one that had come first"
    quota.give(8)
    await asyncio.gather(first, second)
    assert quota.held == 7


async def test_a_message_longer_than_the_limit_is_let_in_alone() -> None:
    quota = Quota(10)
    await quota.take(1)
    long = await waiting(quota, 50)
    assert not long.done()
    quota.give(1)
    await long
    other = await waiting(quota, 1)
    assert not other.done()
    quota.give(50)
    await other
    assert quota.held == 1


async def test_settling_lets_others_in() -> None:
    quota = Quota(10)
    await quota.take(8)
    other = await waiting(quota, 5)
    assert quota.settle(8, 2) == 2
    await other
    assert quota.held == 7


async def test_settling_may_exceed_the_limit() -> None:
    quota = Quota(10)
    await quota.take(8)
    quota.settle(8, 30)
    assert quota.held == 30
    assert not (await waiting(quota, 1)).done()


async def test_one_that_gives_up_waiting_lets_the_next_one_in() -> None:
    quota = Quota(10)
    await quota.take(8)
    large, small = await waiting(quota, 6), await waiting(quota, 2)
    large.cancel()
    with pytest.raises(asyncio.CancelledError):
        await large
    await small
    assert quota.held == 10


async def test_one_that_is_cancelled_as_its_turn_comes_gives_it_back() -> None:
    quota = Quota(10)
    await quota.take(8)
    other = await waiting(quota, 6)
    quota.give(8)
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    assert quota.held == 0


async def test_nothing_is_lost_however_takers_come_and_go() -> None:
    quota = Quota(100)
    choose = random.Random(7)

    async def one() -> None:
        size = choose.randrange(1, 140)
        async with asyncio.timeout(choose.random() * 0.02):
            await quota.take(size)
            try:
                await asyncio.sleep(choose.random() * 0.002)
                assert quota.held <= max(100, size)
            finally:
                quota.give(size)

    ends = await asyncio.gather(*(one() for _ in range(300)), return_exceptions=True)
    assert {type(end) for end in ends} <= {type(None), TimeoutError}
    assert None in ends
    assert quota.held == 0
