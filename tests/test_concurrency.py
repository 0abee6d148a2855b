"""The adaptive limit finds what a SuperLink can do, and the turnstile keeps order."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.concurrency import AdaptiveLimit, FixedLimit, FullError, Turnstile

# -- the limit: workers against a simulated SuperLink ---------------------------------------------------


class Simulation:
    """Workers that always have a call to send, and a SuperLink that does `at_a_time` of them in `seconds`."""

    def __init__(self, limits: list[AdaptiveLimit], clock: list[float]) -> None:
        self.limits = limits
        self.clock = clock
        self.in_flight = [0] * len(limits)
        self.seconds, self.at_a_time = 0.008, 1
        self.away = 0.0
        self.done = 0
        self._busy: list[tuple[float, int, int, float]] = []
        self._line: deque[tuple[int, float]] = deque()
        self._numbers = count()

    def run(self, seconds: float, *, most: int = 10**6) -> float:
        """Let time pass with at most `most` calls of each worker at a time; return calls per second."""
        end, self.done = self.clock[0] + seconds, 0
        started = self.clock[0]
        while self.clock[0] < end:
            for worker, limit in enumerate(self.limits):
                while self.in_flight[worker] < min(limit.value, most):
                    self.in_flight[worker] += 1
                    self._line.append((worker, self.clock[0]))
            while self._line and len(self._busy) < self.at_a_time:
                worker, sent = self._line.popleft()
                at = self.clock[0] + self.seconds
                heapq.heappush(self._busy, (at, next(self._numbers), worker, sent))
            at, _, worker, sent = heapq.heappop(self._busy)
            self.clock[0] = at
            taken = at + self.away - sent
            self.limits[worker].answered("pull", taken, self.in_flight[worker])
            self.in_flight[worker] -= 1
            self.done += 1
        return self.done / (self.clock[0] - started)


def simulation(workers: int, *, first: int = 16, most: int = 64) -> Simulation:
    clock = [100.0]
    limits = [AdaptiveLimit(first=first, least=4, most=most) for _ in range(workers)]
    return Simulation(limits, clock)


def learn(run: Simulation) -> None:
    """Have it see answers that did not wait."""
    run.run(1.0, most=1)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_superlink_is_kept_busy_with_a_short_queue(workers: int) -> None:
    run = simulation(workers)
    learn(run)
    rate = run.run(20.0)
    assert rate > 0.99 / 0.008
    assert all(4 <= limit.value <= 12 for limit in run.limits)


def test_a_superlink_that_does_several_at_a_time_gets_as_many() -> None:
    run = simulation(2, first=4)
    run.seconds, run.at_a_time = 0.1, 8
    learn(run)
    run.run(5.0)
    assert run.run(20.0) > 0.95 * 80
    assert sum(limit.value for limit in run.limits) >= 8


def test_a_superlink_that_becomes_slower_for_good_is_still_kept_busy() -> None:
    run = simulation(2)
    learn(run)
    run.seconds = 0.08
    assert run.run(60.0) > 0.95 / 0.08
    assert all(limit.value <= 12 for limit in run.limits)


def test_what_it_takes_is_learned_anew_from_answers_that_nobody_stood_in_the_way_of() -> None:
    run = simulation(1, first=4)
    run.at_a_time = 16
    run.seconds = 0.02
    learn(run)
    run.seconds = 0.2
    run.run(30.0, most=1)
    run.run(30.0)
    assert run.limits[0].value >= 16


def test_a_long_overload_does_not_move_the_limit() -> None:
    """Although there is no answer in it that did not wait."""
    run = simulation(4)
    learn(run)
    for _ in range(10):
        run.run(20.0)
        assert all(limit.value <= 14 for limit in run.limits)


def test_answers_that_are_quicker_than_any_superlinks_limit_nothing() -> None:
    run = simulation(1)
    run.seconds = 0.0001
    learn(run)
    run.run(2.0)
    assert run.limits[0].value == 64


def test_an_outage_leaves_the_limit_where_it_was_and_slow_answers_after_it_lower_it_for_seconds_only() -> (
    None
):
    run = simulation(1)
    run.seconds, run.at_a_time = 0.1, 16
    learn(run)
    run.run(10.0)
    before = run.limits[0].value
    assert before >= 16
    run.away = 25.0
    run.run(0.5)
    run.away = 0.0
    assert run.limits[0].value >= 4
    run.run(3.0)
    assert run.limits[0].value >= before - 2


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    run = simulation(1, first=8)
    run.run(10.0, most=2)
    assert run.limits[0].value == 8


def test_each_kind_of_call_is_compared_with_its_own() -> None:
    limit = AdaptiveLimit(first=8, least=4, most=32)
    for _ in range(200):
        limit.answered("pull", 0.008, 32)
        limit.answered("object", 0.4, 32)
    assert limit.value == 32


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.floats(0, 1e6, allow_nan=False),
            st.integers(0, 1000),
        ),
        max_size=300,
    )
)
def test_the_limit_stays_within_its_bounds_whatever_it_is_told(
    answers: list[tuple[str, float, int]],
) -> None:
    limit = AdaptiveLimit(first=16, least=4, most=32)
    for answer in answers:
        limit.answered(*answer)
        assert 4 <= limit.value <= 32


def test_a_fixed_limit_learns_nothing() -> None:
    limit = FixedLimit(7)
    limit.answered("pull", 100.0, 7)
    assert limit.value == 7


# -- the turnstile --------------------------------------------------------------------------------------


def slots(most: int, *, length: int = 100, timeout: float = 5.0) -> Turnstile:
    return Turnstile(lambda inside, _, size: inside + size <= most, classes=3, length=length, timeout=timeout)


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_who_finds_room_enters_at_once() -> None:
    turnstile = slots(2)
    await turnstile.enter(2)
    assert turnstile.enter_at_once(2)
    assert not turnstile.enter_at_once(0)
    assert (turnstile.inside, turnstile.waiting) == (2, 0)


async def test_those_that_wait_come_in_by_class_and_then_in_order() -> None:
    turnstile, order = slots(1), []

    async def come(rank: int, name: str) -> None:
        await turnstile.enter(rank)
        order.append(name)

    await turnstile.enter(2)
    tasks = [
        asyncio.ensure_future(come(*who)) for who in [(2, "c1"), (1, "b1"), (2, "c2"), (0, "a"), (1, "b2")]
    ]
    await settle()
    for _ in tasks:
        turnstile.leave()
        await settle()
    assert order == ["a", "b1", "b2", "c1", "c2"]


async def test_nobody_overtakes_an_equal_one_and_a_better_one_may() -> None:
    turnstile = slots(2)
    await turnstile.enter(1, 2)
    waiting = asyncio.ensure_future(turnstile.enter(1, 2))
    await settle()
    turnstile.leave(1)
    assert not turnstile.enter_at_once(1)
    assert not turnstile.enter_at_once(2)
    assert turnstile.enter_at_once(0)
    turnstile.leave(2)
    await waiting


async def test_a_wait_ends_with_its_time_or_with_the_patience_of_who_waits() -> None:
    turnstile = slots(1, timeout=0.02)
    await turnstile.enter(0)
    loop = asyncio.get_running_loop()
    for patience in (10.0, 0.01, -1.0):
        started = loop.time()
        with pytest.raises(TimeoutError):
            await turnstile.enter(0, patience=patience)
        assert loop.time() - started < 8.0
    assert (turnstile.inside, turnstile.waiting) == (1, 0)


async def test_a_full_queue_loses_the_last_of_the_lowest_class() -> None:
    turnstile = slots(1, length=3)
    await turnstile.enter(2)
    low = [asyncio.ensure_future(turnstile.enter(2)) for _ in range(2)]
    middle = asyncio.ensure_future(turnstile.enter(1))
    await settle()
    with pytest.raises(FullError, match="3 wait"):
        await turnstile.enter(2)
    best = asyncio.ensure_future(turnstile.enter(0))
    await settle()
    with pytest.raises(FullError, match="more important"):
        await low[1]
    assert not low[0].done()
    assert not middle.done()
    for task in (best, middle, low[0]):
        turnstile.leave()
        await task


async def test_one_class_alone_does_not_push_itself_out() -> None:
    turnstile = slots(1, length=1)
    await turnstile.enter(0)
    first = asyncio.ensure_future(turnstile.enter(0))
    await settle()
    with pytest.raises(FullError):
        await turnstile.enter(0)
    turnstile.leave()
    await first


async def test_who_leaves_the_queue_lets_the_smaller_ones_behind_him_in() -> None:
    turnstile = slots(10)
    await turnstile.enter(0, 5)
    large = asyncio.ensure_future(turnstile.enter(0, 8))
    small = asyncio.ensure_future(turnstile.enter(0, 3))
    await settle()
    assert not small.done()
    large.cancel()
    await settle()
    assert small.done()
    assert turnstile.inside == 8


async def test_a_place_that_is_given_to_one_who_leaves_in_that_moment_goes_to_the_next() -> None:
    turnstile = slots(1)
    await turnstile.enter(0)
    first, second = (asyncio.ensure_future(turnstile.enter(0)) for _ in range(2))
    await settle()
    turnstile.leave()
    first.cancel()
    await settle()
    assert second.done()
    assert (turnstile.inside, turnstile.waiting) == (1, 0)


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(0, 2), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(_STEPS)
def test_what_is_inside_is_what_came_and_did_not_leave_and_nobody_waits_without_reason(
    steps: list[tuple[str, int, int]],
) -> None:
    asyncio.run(_walk(steps))


async def _walk(steps: list[tuple[str, int, int]]) -> None:
    most, length = 6, 5
    turnstile = slots(most, length=length)
    tasks: list[tuple[int, int, asyncio.Task[None]]] = []
    inside: list[int] = []
    for what, number, size in steps:
        if what == "come":
            tasks.append((number, size, asyncio.create_task(turnstile.enter(number, size))))
        elif what == "leave" and inside:
            turnstile.leave(inside.pop(number % len(inside)))
        elif what == "cancel" and tasks:
            tasks[number % len(tasks)][2].cancel()
        await settle()
        still = []
        for rank, wanted, task in tasks:
            if not task.done():
                still.append((rank, wanted, task))
            elif not task.cancelled() and task.exception() is None:
                inside.append(wanted)
            elif not task.cancelled():
                assert isinstance(task.exception(), FullError)
        tasks = still
        assert turnstile.inside == sum(inside) <= most
        assert turnstile.waiting == len(tasks) <= length
        if tasks:
            first = min(range(len(tasks)), key=lambda at: (tasks[at][0], at))
            assert turnstile.inside + tasks[first][1] > most
    for _, _, task in tasks:
        task.cancel()
    await settle()
    assert turnstile.waiting == 0
