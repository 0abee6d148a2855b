"""The bound holds whatever the order, and nothing that was taken is forgotten."""

from __future__ import annotations

import asyncio
import random

import pytest

from relay.quota import Quota, Share


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


async def share(quota: Quota, size: int) -> Share:
    made = Share(quota)
    await made.take(size)
    return made


async def test_settling_lets_others_in() -> None:
    quota = Quota(10)
    one = await share(quota, 8)
    other = await waiting(quota, 5)
    one.settle(2)
    await other
    assert (one.size, quota.held) == (2, 7)


async def test_settling_may_exceed_the_limit() -> None:
    quota = Quota(10)
    one, two = await share(quota, 4), await share(quota, 4)
    one.settle(30)
    two.settle(20)
    assert quota.held == 50, "so much is there"
    assert not (await waiting(quota, 1)).done()
    one.give()
    two.give()
    two.give()
    await asyncio.sleep(0)
    assert quota.held == 1


async def test_what_grows_within_the_limit_waits_for_nobody() -> None:
    quota = Quota(10)
    one = await share(quota, 2)
    assert one.grow_at_once(6)
    assert one.grow_at_once(3), "it is more already"
    assert (one.size, quota.held, one.outgrown) == (6, 6, False)


async def test_beyond_the_limit_one_alone_grows_to_its_end() -> None:
    quota = Quota(10)
    one, two = await share(quota, 4), await share(quota, 4)
    assert one.grow_at_once(40)
    assert one.outgrown
    assert not two.grow_at_once(7)
    assert two.size == 4
    growing = asyncio.create_task(two.grow(7))
    beginning = await waiting(quota, 1)
    assert one.grow_at_once(50)
    assert not growing.done()
    one.give()
    await growing
    await beginning
    assert quota.held == 8
    assert two.grow_at_once(60), "it is its turn"


async def test_those_that_grow_come_before_those_that_begin() -> None:
    quota = Quota(10)
    one, two, three = await share(quota, 4), await share(quota, 3), await share(quota, 3)
    one.grow_at_once(40)
    growing = asyncio.create_task(two.grow(12))
    await asyncio.sleep(0)
    three.give()
    beginning = await waiting(quota, 3)
    assert not beginning.done()
    one.give()
    await growing
    assert not beginning.done()
    two.give()
    await beginning


async def test_one_that_is_let_in_alone_is_the_one_that_may_exceed_the_limit() -> None:
    quota = Quota(10)
    one = await share(quota, 50)
    assert one.outgrown
    assert one.grow_at_once(60)
    one.give()
    assert quota.outgrown is None
    assert quota.held == 0


async def test_one_that_gives_up_growing_keeps_what_it_has() -> None:
    quota = Quota(10)
    one, two = await share(quota, 4), await share(quota, 4)
    one.grow_at_once(40)
    growing = asyncio.create_task(two.grow(7))
    await asyncio.sleep(0)
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    growing = asyncio.create_task(two.grow(7))
    await asyncio.sleep(0)
    one.give()  # its turn comes
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    assert (two.size, quota.held) == (4, 4)
    two.give()
    assert quota.held == 0


@pytest.mark.parametrize("begun", [0, 1])
async def test_one_that_gives_up_as_its_turn_to_outgrow_comes_leaves_that_to_others(begun: int) -> None:
    quota = Quota(10)
    one, two, three, last = await share(quota, 4), await share(quota, 4), Share(quota), Share(quota)
    assert one.grow_at_once(12)
    if begun:
        three.settle(begun)
    growing = asyncio.create_task(three.grow(20))
    await asyncio.sleep(0)
    two.give()
    one.give()  # its turn comes
    assert three.outgrown
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    assert quota.outgrown is None
    assert last.grow_at_once(11)
    last.give()
    three.give()
    assert (quota.held, quota.outgrown) == (0, None)


async def test_who_gives_its_share_back_never_keeps_the_right_to_outgrow() -> None:
    quota = Quota(10)
    one, two = await share(quota, 4), Share(quota)
    assert one.grow_at_once(12)
    one.settle(0)
    one.give()
    assert quota.outgrown is None
    assert two.grow_at_once(11)


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


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def ends_of(*tasks: asyncio.Task[None], choose: random.Random) -> set[type[BaseException] | None]:
    """Cancel half of the tasks as they run; return how they all ended."""
    for _ in tasks:
        await turns(choose.randrange(3))
        choose.choice(tasks[: 2 * len(tasks) // 3]).cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    return {type(end) if end is not None else None for end in ends}


async def test_nothing_is_lost_however_shares_come_grow_and_go() -> None:
    quota, longest = Quota(100), 140
    choose = random.Random(7)

    async def one() -> None:
        share = Share(quota)
        try:
            await share.take(choose.randrange(1, 30))
            for size in sorted(choose.randrange(1, longest) for _ in range(3)):
                await turns(choose.randrange(4))
                await share.grow(size)
                assert quota.held <= 100 + longest
        finally:
            share.give()

    tasks = [asyncio.create_task(one()) for _ in range(300)]
    assert await ends_of(*tasks, choose=choose) == {None, asyncio.CancelledError}
    assert (quota.held, quota.outgrown) == (0, None)


async def test_nothing_is_lost_however_takers_come_and_go() -> None:
    quota = Quota(100)
    choose = random.Random(7)

    async def one() -> None:
        size = choose.randrange(1, 140)
        await quota.take(size)
        try:
            await turns(choose.randrange(4))
            assert quota.held <= max(100, size)
        finally:
            quota.give(size)

    tasks = [asyncio.create_task(one()) for _ in range(300)]
    assert await ends_of(*tasks, choose=choose) == {None, asyncio.CancelledError}
    assert quota.held == 0
