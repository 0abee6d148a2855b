"""When an address is left out, for how long, and that the last one never is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from relay.refusal import Reason, Refusal
from relay.stores.upstreams import UpstreamTable
from relay.upstreams.health import Health

if TYPE_CHECKING:
    from collections.abc import Callable

FAILS = Refusal(Reason.UPSTREAM_DOWN)
WORKS = Refusal(Reason.UPSTREAM_REJECTED, status=404)
SAYS_NOTHING = Refusal(Reason.MALFORMED)


class Clock:
    """time.monotonic, as the test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("relay.upstreams.health.time.monotonic", clock)
    return clock


def health(table: UpstreamTable, name: str = "a:1") -> Health:
    return Health(name, table, failures=3, ejection=5.0, max_ejection=60.0)


def yes() -> bool:
    return True


def fail(address: Health, times: int = 3, others: Callable[[], bool] = yes) -> None:
    for _ in range(times):
        address.judge(FAILS, others)


@pytest.fixture
def table(clock: Clock) -> UpstreamTable:
    return UpstreamTable()


def test_failures_in_a_row_leave_an_address_out(table: UpstreamTable, clock: Clock) -> None:
    address = health(table)
    fail(address, 2)
    assert address.available(clock.now)
    fail(address, 1)
    assert not address.available(clock.now)
    assert not address.available(clock.now + 4.9)
    assert address.available(clock.now + 5)


@pytest.mark.parametrize("refusal", [WORKS, None], ids=["a 4xx", "an answer"])
def test_an_answer_ends_a_row(table: UpstreamTable, clock: Clock, refusal: Refusal | None) -> None:
    address = health(table)
    for _ in range(5):
        fail(address, 2)
        address.judge(refusal, yes) if refusal is not None else address.worked()
    assert address.available(clock.now)


def test_what_says_nothing_neither_counts_nor_ends_a_row(table: UpstreamTable, clock: Clock) -> None:
    address = health(table)
    fail(address, 2)
    for _ in range(5):
        address.judge(SAYS_NOTHING, yes)
    assert address.available(clock.now)
    fail(address, 1)
    assert not address.available(clock.now)


def test_the_time_doubles_with_each_in_a_row_up_to_its_bound(table: UpstreamTable, clock: Clock) -> None:
    address = health(table)
    times = []
    for _ in range(7):
        fail(address)
        times.append(address.state.ejected_until - clock.now)
        clock.now = address.state.ejected_until
    assert times == [5, 10, 20, 40, 60, 60, 60]
    address.worked()
    fail(address)
    assert address.state.ejected_until - clock.now == 5


def test_a_late_answer_does_not_end_an_ejection(table: UpstreamTable, clock: Clock) -> None:
    address = health(table)
    fail(address)
    address.worked()
    assert not address.available(clock.now)


def test_the_last_address_is_never_left_out(table: UpstreamTable, clock: Clock) -> None:
    address = health(table)
    fail(address, 100, lambda: False)
    assert address.available(clock.now)
    fail(address, 1)
    assert not address.available(clock.now)


def test_workers_agree_and_an_ejection_counts_once(table: UpstreamTable, clock: Clock) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("relay_upstream_ejections_total", {"address": "a:1"}) or 0.0

    first, second, before = health(table), health(table), counted()
    fail(first)
    second.look()
    assert not second.available(clock.now)
    fail(second, 9)
    assert second.state.ejections == 1
    assert counted() == before + 1


def test_an_address_that_is_down_is_not_available_until_a_call_goes_well(
    table: UpstreamTable, clock: Clock
) -> None:
    address = health(table)
    table.change("a:1", lambda state: state._replace(down=True, down_since=clock.now, misses=3))
    address.look()
    assert not address.available(clock.now)
    address.worked()
    assert address.available(clock.now)
    assert (address.state.misses, address.state.down_since) == (0, 0.0)


def test_an_answer_of_a_sound_address_costs_nothing(
    table: UpstreamTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = health(table)
    monkeypatch.setattr(table, "change", None)
    address.worked()


def test_the_clock_is_the_one_that_all_processes_share() -> None:
    assert health(UpstreamTable()).available(time.monotonic())
