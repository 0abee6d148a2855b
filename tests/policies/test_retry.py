"""What is repeated, how often, how soon, and what it may cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY

from relay.call import Call, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.policies.retry import Budget, Retry, may_repeat
from relay.refusal import Reason, Refusal

MakeCall = Callable[..., Call]

REPEATABLE = {
    Method.SEND_NODE_HEARTBEAT,
    Method.PUSH_MESSAGES,
    Method.GET_RUN,
    Method.GET_FAB,
    Method.PULL_OBJECT,
    Method.CONFIRM_MESSAGE_RECEIVED,
}
PASSING = [Reason.UPSTREAM_DOWN, Reason.UPSTREAM_BAD_ANSWER, Reason.OVERLOADED, Reason.BREAKER_OPEN]
#: For these a pull waits only where it is held anyway.
NOT_FOR_PULLS = [Reason.OVERLOADED, Reason.BREAKER_OPEN]


class Arriving:
    """A body that is still on its way."""

    async def read(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


def streamed(passed: int = 0) -> Payload:
    payload = Payload(body=Arriving(), size=100)
    payload.passed = passed
    return payload


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.value)
def test_a_call_that_may_have_arrived_is_repeated_only_if_the_method_allows_it(
    make_call: MakeCall, method: Method, reason: Reason
) -> None:
    expected = method in REPEATABLE and reason in PASSING
    assert may_repeat(make_call(method, b"x"), Refusal(reason)) is expected


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.value)
def test_a_call_that_never_left_is_repeated_whatever_the_method(
    make_call: MakeCall, method: Method, reason: Reason
) -> None:
    told_at_once = method is Method.PULL_MESSAGES and reason in NOT_FOR_PULLS
    expected = reason in PASSING and not told_at_once
    assert may_repeat(make_call(method, b"x"), Refusal(reason, sent=False)) is expected


def test_a_legacy_pull_is_held_while_the_breaker_is_open_and_not_when_there_is_too_much_to_do(
    make_call: MakeCall,
) -> None:
    call = make_call(Method.PULL_MESSAGES, b"x", wire=Wire.REST_V0)
    assert may_repeat(call, Refusal(Reason.BREAKER_OPEN, sent=False))
    assert not may_repeat(call, Refusal(Reason.OVERLOADED, sent=False))


def test_a_body_that_was_streamed_away_cannot_be_sent_again(make_call: MakeCall) -> None:
    refusal = Refusal(Reason.UPSTREAM_DOWN, sent=False)
    assert may_repeat(make_call(Method.PUSH_OBJECT, streamed()), refusal)
    assert not may_repeat(make_call(Method.PUSH_OBJECT, streamed(passed=10)), refusal)
    assert not may_repeat(make_call(Method.PUSH_MESSAGES, streamed()), Refusal(Reason.UPSTREAM_DOWN))


@pytest.mark.parametrize(("status", "expected"), [(500, True), (501, True), (404, False), (400, False)])
def test_a_failure_of_the_superlink_itself_is_repeated_and_its_no_is_not(
    make_call: MakeCall, status: int, expected: bool
) -> None:
    refusal = Refusal(Reason.UPSTREAM_REJECTED, status=status)
    assert may_repeat(make_call(Method.PULL_OBJECT, b"x"), refusal) is expected
    assert not may_repeat(make_call(Method.PUSH_OBJECT, b"x"), refusal)


# -- the loop ---------------------------------------------------------------------------------------


class Upstream:
    """Fails as scripted, then answers."""

    def __init__(self, *failures: Refusal) -> None:
        self.failures = list(failures)
        self.calls = 0

    async def __call__(self, call: Call) -> Reply:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return Reply(Payload(b"ok"), Source.UPSTREAM)


def retry(base: float = 0.001, cap: float = 0.01, floor: float = 1000, share: float = 0.0) -> Retry:
    return Retry(enabled=True, base=base, cap=cap, budget=Budget(share, floor))


async def test_a_call_is_repeated_until_it_is_answered(make_call: MakeCall) -> None:
    upstream = Upstream(*[Refusal(Reason.UPSTREAM_DOWN)] * 5)
    reply = await retry().handle(make_call(Method.GET_RUN, b"x"), upstream)
    assert (reply.payload.data, upstream.calls) == (b"ok", 6)


async def test_the_last_refusal_comes_out_before_the_node_would_give_up(make_call: MakeCall) -> None:
    upstream = Upstream(*[Refusal(Reason.UPSTREAM_DOWN, str(n)) for n in range(10_000)])
    call = make_call(Method.GET_RUN, b"x", deadline=time.monotonic() + 0.5)
    with pytest.raises(Refusal) as caught:
        await retry().handle(call, upstream)
    assert caught.value.detail == str(upstream.calls - 1)
    assert upstream.calls > 3
    assert time.monotonic() < call.deadline + 5, "all of them would take more than 10 s"


async def test_a_pull_that_may_have_arrived_is_sent_once(make_call: MakeCall) -> None:
    upstream = Upstream(Refusal(Reason.UPSTREAM_DOWN))
    with pytest.raises(Refusal):
        await retry().handle(make_call(Method.PULL_MESSAGES, b"x"), upstream)
    assert upstream.calls == 1


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_repeats_are_counted_by_method_and_reason(make_call: MakeCall) -> None:
    labels = {"method": "GetFab", "reason": "overloaded"}
    before = counted("relay_retries_total", **labels)
    await retry().handle(make_call(Method.GET_FAB, b"x"), Upstream(*[Refusal(Reason.OVERLOADED)] * 3))
    assert counted("relay_retries_total", **labels) == before + 3


async def test_an_empty_budget_ends_the_repeats_and_is_counted(make_call: MakeCall) -> None:
    before = counted("relay_retries_denied_total", method="GetRun")
    policy = retry(floor=0.5)
    upstream = Upstream(*[Refusal(Reason.UPSTREAM_DOWN)] * 100)
    with pytest.raises(Refusal):
        await policy.handle(make_call(Method.GET_RUN, b"x"), upstream)
    assert upstream.calls == 6  # ten seconds of 0.5 a second were saved up
    assert counted("relay_retries_denied_total", method="GetRun") == before + 1


async def test_cancelling_the_call_ends_the_waiting(make_call: MakeCall) -> None:
    upstream = Upstream(*[Refusal(Reason.UPSTREAM_DOWN)] * 100)
    task = asyncio.create_task(retry(base=30, cap=30).handle(make_call(Method.GET_RUN, b"x"), upstream))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_waits_are_jittered_and_grow_up_to_the_cap(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0.0
        ranges.append(high)
        return 0.0

    monkeypatch.setattr("relay.policies.retry.random.uniform", uniform)
    await retry(base=0.1, cap=0.5).handle(
        make_call(Method.GET_RUN, b"x"), Upstream(*[Refusal(Reason.UPSTREAM_DOWN)] * 4)
    )
    assert ranges == [0.1, 0.2, 0.4, 0.5]


def test_switched_off_it_is_in_no_chain() -> None:
    policy = Retry(enabled=False, base=0.1, cap=1, budget=Budget(0.2, 10))
    assert not any(policy.applies(method) for method in Method)


# -- the budget -------------------------------------------------------------------------------------


async def test_an_address_that_fails_uses_nothing_up_of_the_others(make_call: MakeCall) -> None:
    budgets = {name: Budget(0.0, 0.2) for name in ("a:1", "b:1")}  # two repeats each
    policy = Retry(enabled=True, base=0.001, cap=0.001, budget=Budget(0.0, 0.1), budgets=budgets)

    async def repeats(by: str) -> int:
        upstream = Upstream(*[Refusal(Reason.UPSTREAM_DOWN, by=by)] * 9)
        with pytest.raises(Refusal):
            await policy.handle(make_call(Method.GET_RUN, b"x"), upstream)
        return upstream.calls - 1

    assert [await repeats(by) for by in ("a:1", "a:1", "b:1", "shed", "other")] == [2, 0, 2, 1, 0]


async def test_each_call_adds_to_what_each_address_may_repeat(make_call: MakeCall) -> None:
    budgets = {"a:1": Budget(0.5, 1e-9)}
    policy = Retry(enabled=True, base=0.001, cap=0.001, budget=Budget(0.0, 1e-9), budgets=budgets)
    assert budgets["a:1"].withdraw()
    for _ in range(2):
        await policy.handle(make_call(Method.GET_RUN, b"x"), Upstream())
    assert [budgets["a:1"].withdraw(), budgets["a:1"].withdraw()] == [True, False]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_repeats_are_a_share_of_the_calls_and_a_floor_per_second() -> None:
    clock = Clock()
    budget = Budget(share=0.2, floor=1.0, now=clock)
    assert [budget.withdraw() for _ in range(12)] == [True] * 10 + [False] * 2
    for _ in range(5):
        budget.deposit()
    assert [budget.withdraw(), budget.withdraw()] == [True, False]
    clock.now += 2.0
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def test_no_more_than_ten_seconds_are_saved_up() -> None:
    clock = Clock()
    budget = Budget(share=1.0, floor=1.0, now=clock)
    for _ in range(1000):
        budget.deposit()
    clock.now += 3600
    assert sum(budget.withdraw() for _ in range(100)) == 10
