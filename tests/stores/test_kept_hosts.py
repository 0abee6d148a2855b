"""KeptOnHosts before a Redis that the test plays: who counts deliveries, and what a late answer leaves.

With a real server: tests/policies/test_redelivery_hosts.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from relay.stores import kept_hosts
from relay.stores.host import HostTable
from relay.stores.kept import PIECE, KeptAnswers, Outcome, digest
from relay.stores.kept_hosts import Change, Found, Granted, Keeping, KeptOnHosts, Verdict
from relay.stores.records import HostRecords
from relay.stores.redis_link import OutageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from relay.stores.kept import Claim

NODE = 2**64 - 7
ME = b"me      "
BODY = b"one message" * 20
MESSAGE = digest("m1")


class Redis:
    """Answers as the test says, and keeps what it was told.

    Attributes:
        verdict, found: the next answers; what is an exception is raised.
        gate: set it to have answers wait.
        feed: what other hosts have changed.
    """

    name = "played"

    def __init__(self) -> None:
        self.verdict: Verdict | Exception = Verdict("granted", 2, there=True)
        self.found: Found | Exception = Found(None, later=False, exhausted=0)
        self.gate: asyncio.Event | None = None
        self.told: list[tuple[object, ...]] = []
        self.feed: asyncio.Queue[list[Change] | OutageError] = asyncio.Queue()
        self.read_from: list[str] = []
        self.closed = False

    async def keep(self, keeping: Keeping) -> None:
        await self._waits()
        self.told.append(("keep", keeping.message, keeping.deliveries, keeping.busy))

    async def acquire(self, keeping: Keeping, claim: bytes, most: int) -> Verdict:
        self.told.append(("acquire", keeping.message, keeping.deliveries))
        await self._waits()
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    async def claim(self, node: int, holder: bytes, claim: bytes, most: int) -> Found:
        self.told.append(("claim", holder, most))
        await self._waits()
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    async def settle(self, node: int, claim: bytes, *, delivered: bool) -> None:
        self.told.append(("settle", delivered))

    async def end(self, node: int, holder: bytes | None, messages: Iterable[bytes] | None) -> int:
        self.told.append(("end", holder, None if messages is None else list(messages)))
        return 1

    async def available(self, node: int, online: float) -> None:
        self.told.append(("available", round(online)))

    async def changes(self, after: str) -> tuple[str, list[Change]]:
        self.read_from.append(after)
        changes = await self.feed.get()
        if isinstance(changes, OutageError):
            raise changes
        return str(int(after) + 1), changes

    async def close(self) -> None:
        self.closed = True

    async def _waits(self) -> None:
        if self.gate is not None:
            await self.gate.wait()


class Host:
    """A host with one worker, which listens."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.outcomes: Counter[Outcome] = Counter()
        self.here = KeptAnswers(HostRecords(256, PIECE), self._tell)
        self.table = HostTable(64)
        self.kept = KeptOnHosts(self.here, redis, self.table, self._tell)
        self.kept.start()

    def _tell(self, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1

    async def keep(self, *, delivered: bool = True) -> None:
        """Keep an answer whose first delivery is over, and of which Redis knows."""
        now = time.monotonic()
        token = self.kept.keep(NODE, BODY, message="m1", holder=ME, expires=now + 3600, online=now + 60)
        await until(lambda: bool(self.redis.told))
        self.kept.settle(NODE, token, delivered=delivered)
        await until(lambda: len(self.redis.told) == 2)
        assert self.redis.told == [("keep", MESSAGE, 1, True), ("settle", delivered)]
        self.redis.told.clear()
        self.outcomes.clear()

    async def claim(self, most: int = 3) -> Claim | None:
        return await self.kept.claim(NODE, ME, most)

    async def kept_elsewhere(self) -> None:
        self.redis.feed.put_nowait([Change(5, b"kept", NODE, MESSAGE)])
        await until(lambda: self.kept.has(NODE))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


@pytest.fixture
def redis() -> Redis:
    return Redis()


@pytest.fixture
async def host(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    monkeypatch.setattr(kept_hosts, "PATIENCE", 10.0)
    monkeypatch.setattr(kept_hosts, "OFF", 0.01)
    host = Host(redis)
    yield host
    if redis.gate is not None:
        redis.gate.set()
    await host.kept.close()


# -- what this host keeps -------------------------------------------------------------------------------


async def test_redis_says_which_delivery_it_is(host: Host, redis: Redis) -> None:
    await host.keep()
    redis.verdict = Verdict("granted", 3, there=True)
    claim = await host.claim()
    assert claim is not None
    assert (claim.body, claim.delivery) == (BODY, 3)
    assert redis.told == [("acquire", MESSAGE, 1)]
    assert await host.claim() is None, "one at a time"
    host.kept.settle(NODE, claim.token, delivered=True)
    await until(lambda: ("settle", True) in redis.told)
    assert await host.claim() is not None


async def test_what_redis_has_lost_it_is_told_again(host: Host, redis: Redis) -> None:
    await host.keep()
    redis.verdict = Verdict("granted", 2, there=False)
    assert await host.claim() is not None
    await until(lambda: len(redis.told) == 2)
    assert redis.told[1][:2] == ("keep", MESSAGE)


@pytest.mark.parametrize(("there", "outcomes"), [(True, {Outcome.EXHAUSTED: 1}), (False, {})])
async def test_what_is_used_up_is_dropped_and_counted_on_one_host(
    host: Host, redis: Redis, there: bool, outcomes: dict[Outcome, int]
) -> None:
    await host.keep()
    redis.verdict = Verdict("exhausted", 3, there=there)
    assert await host.claim() is None
    assert host.outcomes == outcomes
    assert not host.kept.has(NODE)


async def test_what_another_host_delivers_may_be_claimed_later(host: Host, redis: Redis) -> None:
    await host.keep()
    redis.verdict = Verdict("busy", 0, there=True)
    assert await host.claim() is None
    redis.verdict = Verdict("granted", 2, there=True)
    assert await host.claim() is not None


async def test_without_redis_the_host_counts_by_itself(host: Host, redis: Redis) -> None:
    await host.keep()
    redis.verdict = OutageError("down")
    for delivery in (2, 3):
        claim = await host.claim()
        assert claim is not None
        assert (claim.body, claim.delivery) == (BODY, delivery)
        host.kept.settle(NODE, claim.token, delivered=True)
    assert await host.claim() is None
    assert host.outcomes == {Outcome.EXHAUSTED: 1}
    assert [told[0] for told in redis.told] == ["acquire"], "after a failure it is left alone"


async def test_a_node_that_leaves_while_redis_is_asked_has_had_no_delivery(host: Host, redis: Redis) -> None:
    await host.keep()
    redis.gate = asyncio.Event()
    asking = asyncio.ensure_future(host.claim())
    await until(lambda: bool(redis.told))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    redis.gate.set()
    redis.gate = None
    await until(lambda: redis.told[1:] == [("settle", False)])
    claim = await host.claim()
    assert claim is not None, "it can be claimed at once"
    assert redis.told[-1] == ("acquire", MESSAGE, 1), "and counts as if nobody had"


async def test_a_grant_that_comes_too_late_counts_for_the_delivery_that_was_made_without_it(
    host: Host, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.keep()
    monkeypatch.setattr(kept_hosts, "PATIENCE", 0.01)
    redis.gate = asyncio.Event()
    claim = await host.claim()
    assert claim is not None
    assert claim.delivery == 2
    redis.gate.set()
    await until(lambda: redis.told[1:] == [("settle", True)])


@pytest.mark.parametrize("delivered", [True, False])
async def test_a_first_delivery_that_ends_before_redis_hears_of_it_is_told_with_it(
    host: Host, redis: Redis, delivered: bool
) -> None:
    now = time.monotonic()
    token = host.kept.keep(NODE, BODY, message="m1", holder=ME, expires=now + 60, online=now + 60)
    host.kept.settle(NODE, token, delivered=delivered)
    await until(lambda: bool(redis.told))
    assert redis.told == [("keep", MESSAGE, int(delivered), False)]


# -- what others keep -----------------------------------------------------------------------------------


async def test_a_node_for_which_nothing_is_kept_anywhere_asks_nobody(host: Host, redis: Redis) -> None:
    assert not host.kept.has(NODE)
    assert await host.claim() is None
    assert redis.told == []


async def test_what_another_host_keeps_is_delivered_and_ended_in_redis(host: Host, redis: Redis) -> None:
    await host.kept_elsewhere()
    redis.found = Found(Granted(MESSAGE, 2, BODY), later=True, exhausted=1)
    claim = await host.claim()
    assert claim is not None
    assert (claim.body, claim.delivery, claim.message) == (BODY, 2, MESSAGE)
    assert host.outcomes == {Outcome.EXHAUSTED: 1}, "of another message"
    host.kept.settle(NODE, claim.token, delivered=True)
    host.kept.take(NODE, claim.token, Outcome.CONFIRMED)
    await until(lambda: len(redis.told) == 3)
    assert redis.told == [("claim", ME, 3), ("settle", True), ("end", None, [MESSAGE])]
    assert host.outcomes == {Outcome.EXHAUSTED: 1, Outcome.CONFIRMED: 1}


async def test_a_note_of_what_is_gone_goes_too_and_one_that_came_meanwhile_stays(
    host: Host, redis: Redis
) -> None:
    await host.kept_elsewhere()
    redis.gate = asyncio.Event()
    asking = asyncio.ensure_future(host.claim())
    await until(lambda: bool(redis.told))
    redis.feed.put_nowait([Change(6, b"kept", NODE, MESSAGE)])
    await until(lambda: len(redis.read_from) == 3)
    redis.gate.set()
    assert await asking is None
    assert host.kept.has(NODE)
    assert await host.claim() is None
    assert not host.kept.has(NODE)


async def test_what_may_be_there_later_is_asked_for_again(host: Host, redis: Redis) -> None:
    await host.kept_elsewhere()
    redis.found = Found(None, later=True, exhausted=0)
    assert await host.claim() is None
    assert host.kept.has(NODE)


async def test_a_grant_of_what_another_keeps_that_comes_too_late_is_given_back(
    host: Host, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was delivered, and only Redis has it."""
    await host.kept_elsewhere()
    monkeypatch.setattr(kept_hosts, "PATIENCE", 0.01)
    redis.gate = asyncio.Event()
    redis.found = Found(Granted(MESSAGE, 2, BODY), later=True, exhausted=0)
    assert await host.claim() is None
    assert host.kept.has(NODE)
    redis.gate.set()
    await until(lambda: redis.told[1:] == [("settle", False)])


async def test_an_end_at_another_host_is_the_end_here(host: Host, redis: Redis) -> None:
    await host.keep()
    redis.feed.put_nowait([Change(6, b"ended", NODE, MESSAGE)])
    await until(lambda: not host.kept.has(NODE))
    assert host.outcomes == {}, "it was counted there"


async def test_after_an_outage_all_changes_are_read_again(host: Host, redis: Redis) -> None:
    await host.kept_elsewhere()
    redis.feed.put_nowait(OutageError("down"))
    redis.feed.put_nowait([Change(7, b"over", NODE, MESSAGE)])
    await until(lambda: not host.kept.has(NODE))
    assert redis.read_from[:3] == ["0", "1", "0"]


async def test_the_end_of_a_worker_tells_what_it_still_knows(host: Host, redis: Redis) -> None:
    now = time.monotonic()
    host.kept.keep(NODE, BODY, message="m1", holder=ME, expires=now + 60, online=now + 60)
    host.kept.available(NODE, now + 30)
    host.kept.drop(NODE, ME, None, Outcome.EXPIRED)
    redis.gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, redis.gate.set)
    await host.kept.close()
    assert redis.told == [("keep", MESSAGE, 1, True), ("available", 30), ("end", ME, None)]
    assert host.outcomes == {Outcome.KEPT: 1, Outcome.EXPIRED: 1}
    assert redis.closed
