"""A body of unknown length is read on only when there is room for more of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.call import Payload
from relay.growing import Growing
from relay.quota import GUESS, STEP, Quota, Share
from tests.test_payload import FakeBody

if TYPE_CHECKING:
    from collections.abc import Awaitable

PIECE = STEP // 2


async def at_most_a_moment(waits: Awaitable[None]) -> None:
    async with asyncio.timeout(0.01):
        await waits


def growing(quota: Quota, pieces: int) -> tuple[Growing, Share]:
    share = Share(quota)
    body = FakeBody([bytes(PIECE)] * pieces)
    return Growing(Payload(body=body), share, at_most_a_moment), share


async def test_it_takes_room_before_it_reads_on() -> None:
    quota = Quota(4 * STEP)
    body, share = growing(quota, 4)
    sizes = []
    while await body.read():
        sizes.append((quota.held, share.size))
    assert all(held == size >= PIECE * at for at, (held, size) in enumerate(sizes, 1))
    assert quota.held <= PIECE * 4 + STEP
    share.give()
    assert quota.held == 0


async def test_it_waits_while_another_one_exceeds_the_bound() -> None:
    quota = Quota(STEP)
    first, mine = growing(quota, 4)
    other, its = growing(quota, 4)
    while await first.read():
        pass
    assert quota.held > quota.limit
    with pytest.raises(TimeoutError):
        await other.read()
    assert quota.outgrown is mine
    mine.give()
    assert await other.read()
    its.give()
    assert quota.held == 0


async def test_what_is_here_already_grows_by_nothing() -> None:
    quota = Quota(4 * STEP)
    body, share = growing(quota, 1)
    assert share.grow_at_once(GUESS)
    assert len(await body.read()) == PIECE
    assert quota.held == GUESS
