"""Messages that outgrow what was granted them, seen from what their connections bring."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import structlog.testing

from relay.quota import GUESS, STEP, Quota, Share
from relay.refusal import Reason, Refusal
from relay.wires import grpc_arrivals
from relay.wires.grpc_arrivals import SLACK, UNASKED, Arrivals

if TYPE_CHECKING:
    from collections.abc import Collection

MIB = 1024 * 1024
SMALL = 64 * 1024


class Sockets:
    """What the kernel counts."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.fails = False

    def brought(self, peers: Collection[str]) -> dict[str, int]:
        if self.fails:
            raise OSError
        return {peer: self.counts[peer] for peer in peers if peer in self.counts}


class Message:
    """What is awaited, as `Incoming`."""

    made = 0.0

    def __init__(self, quota: Quota, peer: str = "a", *, limit: int = 1 << 30, share: int = GUESS) -> None:
        Message.made += 1
        self.started = Message.made
        self.peer, self.limit = peer, limit
        self.long = limit > SMALL
        self.share = Share(quota)
        if self.long and share:
            assert self.share.take_at_once(share)
        self.refusal: Refusal | None = None
        self.expected = 0

    @property
    def room(self) -> int:
        return max(self.share.size, SMALL) if self.long else self.limit

    @property
    def alone(self) -> bool:
        return self.share.outgrown

    def grow_at_once(self, more: int) -> bool:
        return self.share.grow_at_once(min(self.room + more, max(self.limit, self.room)))

    def expect(self, size: int) -> None:
        self.expected = size

    def refuse(self, refusal: Refusal) -> None:
        self.refusal = refusal


class Watched:
    """Arrivals, and what they look at."""

    def __init__(self) -> None:
        self.sockets = Sockets()
        self.waiting: list[Any] = []
        self.arrivals = Arrivals()
        self.arrivals._sockets = self.sockets  # type: ignore[assignment]

    async def bring(self, **counts: int) -> None:
        """Have connections bring so many bytes more, and have that looked at."""
        self.arrivals.watch(self.waiting)
        for peer, count in counts.items():
            self.sockets.counts[peer] = self.sockets.counts.get(peer, 0) + count
        assert self.arrivals._timer is not None
        self.arrivals._timer.cancel()
        self.arrivals._look()


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(grpc_arrivals, "_EVERY", 0.001)
    monkeypatch.setattr(grpc_arrivals, "_SHARE", 10.0)
    return Watched()


def reasons(*messages: Message) -> list[Reason | None]:
    return [each.refusal.reason if each.refusal is not None else None for each in messages]


async def test_a_small_message_cannot_be_long(watched: Watched) -> None:
    quota = Quota(1 << 30)
    one, other = Message(quota, "a", limit=4096), Message(quota, "b", limit=4096)
    watched.waiting += [one, other]
    await watched.bring(a=5 * MIB, b=5 * MIB)  # this was before anybody looked
    await watched.bring(a=SLACK, b=SLACK)
    assert reasons(one, other) == [None, None]
    await watched.bring(a=SLACK)
    assert reasons(one, other) == [Reason.TOO_LARGE, None]


async def test_a_message_that_outgrows_its_share_takes_more(watched: Watched) -> None:
    quota = Quota(1 << 30)
    one = Message(quota)
    watched.waiting.append(one)
    await watched.bring(a=0)
    await watched.bring(a=GUESS)
    assert one.share.size == GUESS
    await watched.bring(a=20 * MIB)
    assert 28 * MIB - SLACK <= one.share.size <= 28 * MIB + STEP
    assert reasons(one) == [None]


async def test_what_finds_no_room_is_put_off_and_expected_again(watched: Watched) -> None:
    quota = Quota(2 * GUESS)
    one, other = Message(quota, "a"), Message(quota, "b")
    watched.waiting += [one, other]
    await watched.bring(a=0, b=0)
    await watched.bring(a=30 * MIB)
    assert one.alone, "one may exceed the limit"
    await watched.bring(b=30 * MIB)
    await watched.bring(a=300 * MIB)
    assert reasons(one, other) == [None, Reason.OVERLOADED]
    assert 58 * MIB < other.expected <= 60 * MIB


async def test_of_several_on_one_connection_the_oldest_may_exceed_the_limit(watched: Watched) -> None:
    quota = Quota(3 * GUESS)
    three = [Message(quota) for _ in range(3)]
    watched.waiting += reversed(three)
    await watched.bring(a=0)
    await watched.bring(a=3 * GUESS)
    assert reasons(*three) == [None] * 3
    await watched.bring(a=5 * MIB)
    assert reasons(*three) == [None, Reason.OVERLOADED, Reason.OVERLOADED]


async def test_a_message_beyond_its_own_limit_is_refused_before_it_is_here(watched: Watched) -> None:
    quota = Quota(1 << 30)
    one = Message(quota, limit=20 * MIB)
    watched.waiting.append(one)
    await watched.bring(a=0)
    await watched.bring(a=20 * MIB)
    await watched.bring(a=0)
    assert reasons(one) == [None]
    await watched.bring(a=3 * MIB)
    assert reasons(one) == [Reason.TOO_LARGE]


async def test_messages_that_are_here_leave_room_for_the_next_ones(watched: Watched) -> None:
    quota = Quota(GUESS)
    slow = Message(quota)
    quota.outgrown = Share(quota)
    watched.waiting.append(slow)
    await watched.bring(a=0)
    for _ in range(10):
        watched.arrivals.came("a", 5 * MIB)
        await watched.bring(a=5 * MIB)
    assert reasons(slow) == [None]
    await watched.bring(a=GUESS + 2 * SLACK)
    assert reasons(slow) == [Reason.OVERLOADED]


async def test_framing_and_encryption_do_not_count(watched: Watched) -> None:
    quota = Quota(GUESS)
    one = Message(quota, share=0)
    assert one.share.take_at_once(GUESS)
    watched.waiting.append(one)
    quota.outgrown = Share(quota)
    await watched.bring(a=0)
    await watched.bring(a=GUESS + GUESS // 128)
    assert reasons(one) == [None]


async def test_heads_of_other_calls_are_no_growth(watched: Watched) -> None:
    one = Message(Quota(1 << 30))
    watched.waiting.append(one)
    await watched.bring(a=0)
    for _ in range(20):
        for _ in range(2000):
            watched.arrivals.head("a", 600)
        await watched.bring(a=2000 * 650)
    assert one.share.size == GUESS
    assert reasons(one) == [None]


async def test_heads_that_came_as_less_do_not_hide_a_message_for_ever(watched: Watched) -> None:
    one = Message(Quota(1 << 30), limit=20 * MIB)
    watched.waiting.append(one)
    await watched.bring(a=0)
    for _ in range(50_000):
        watched.arrivals.head("a", 8000)
    await watched.bring(a=MIB)
    await watched.bring(a=30 * MIB)
    await watched.bring()
    assert reasons(one) != [None]


async def test_a_small_message_that_is_not_alone_is_put_off_and_not_lost(watched: Watched) -> None:
    quota = Quota(1 << 30)
    messages = [Message(quota, peer, limit=4096) for peer in ("a", "a", "b", "c")]
    watched.waiting += messages
    await watched.bring(a=0, b=0, c=0)
    watched.arrivals.head("b", 300)
    with watched.arrivals.unasked("c"):
        await watched.bring(a=2 * SLACK, b=2 * SLACK, c=2 * SLACK)
    assert reasons(*messages) == [Reason.OVERLOADED] * 4
    assert [each.expected for each in messages] == [0] * 4


async def test_what_comes_beside_a_message_does_not_make_it_too_large(watched: Watched) -> None:
    quota = Quota(1 << 30)
    one, two = Message(quota, limit=9 * MIB), Message(quota, limit=4096)
    watched.waiting += [one, two]
    await watched.bring(a=0)
    await watched.bring(a=12 * MIB)
    await watched.bring()
    assert reasons(one, two) == [Reason.OVERLOADED] * 2


async def test_what_gives_no_share_yet_has_room_for_what_grpc_takes_of_it(watched: Watched) -> None:
    one = Message(Quota(1 << 30), limit=4096)
    watched.waiting.append(one)
    await watched.bring(a=0)
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(watched.arrivals.unasked("a"))
        await watched.bring(a=8 * UNASKED + SLACK // 2)
        assert reasons(one) == [None]
    assert not watched.arrivals._unasked
    await watched.bring()
    assert reasons(one) != [None]


async def test_a_look_that_fails_is_told_of_once_and_followed_by_others(watched: Watched) -> None:
    one = Message(Quota(1 << 30), limit=20 * MIB)
    watched.waiting.append(one)
    await watched.bring(a=0)
    watched.sockets.fails = True
    with structlog.testing.capture_logs() as logs:
        await watched.bring(a=30 * MIB)
    watched.sockets.fails = False
    await watched.bring()
    await watched.bring()
    assert reasons(one) == [Reason.TOO_LARGE]
    assert [line["event"] for line in logs] == ["no look at what comes over gRPC"]


async def test_nobody_is_looked_at_when_nothing_is_awaited(watched: Watched) -> None:
    quota = Quota(1 << 30)
    one = Message(quota)
    watched.waiting.append(one)
    await watched.bring(a=MIB)
    watched.waiting.clear()
    async with asyncio.timeout(10):
        while watched.arrivals._timer is not None:
            await asyncio.sleep(0.001)
    assert not watched.arrivals._known
