"""How limits are kept, apart from the wires that ask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.call import Call, Ending
from relay.fleet import MAX_REQUEST, Kind, Method
from relay.limits import Pace, Peers, bodies
from relay.refusal import Reason, Refusal
from tests.test_fleet import IDS, build

MakeCall = Callable[..., Call]


def test_what_carries_a_model_is_bounded_by_the_whole_and_all_else_by_its_kind() -> None:
    sizes = bodies(1 << 30)
    assert {method for method in Method if sizes[method] == 1 << 30} == {
        Method.PUSH_MESSAGES,
        Method.PUSH_OBJECT,
    }
    assert set(MAX_REQUEST) == set(Kind) - {Kind.PUSH}


def test_no_call_may_be_longer_than_the_longest() -> None:
    assert set(bodies(100).values()) == {100}
    assert bodies(1 << 30, {Kind.HEARTBEAT: 50})[Method.SEND_NODE_HEARTBEAT] == 50


@given(ids=IDS)
def test_what_nodes_send_is_far_below_the_bounds(ids: object) -> None:
    for method in Method:
        if method.kind is not Kind.PUSH:
            size = build(method, ids, filling=300).ByteSize()  # type: ignore[arg-type]
            assert 8 * size < MAX_REQUEST[method.kind]


# -- pace ---------------------------------------------------------------------------------------------


def test_a_pace_is_averaged_over_each_window() -> None:
    pace = Pace(100, 10.0)
    assert all(pace.holds(1.0, 0) for _ in range(9))
    assert pace.holds(1.0, 1000)
    # A new window owes nothing to the one before.
    assert all(pace.holds(1.0, 99) for _ in range(9))
    assert not pace.holds(1.0, 99)


@given(
    moves=st.lists(st.tuples(st.floats(0.001, 5), st.integers(0, 1000)), max_size=60),
    rate=st.integers(0, 500),
)
def test_who_is_never_slower_than_the_rate_is_never_given_up(
    moves: list[tuple[float, int]], rate: int
) -> None:
    pace = Pace(rate, 10.0)
    assert all(pace.holds(seconds, moved + int(rate * seconds) + 1) for seconds, moved in moves)


@given(seconds=st.floats(0.1, 9), rate=st.integers(10, 500))
def test_who_is_always_slower_is_given_up_within_two_windows(seconds: float, rate: int) -> None:
    pace, waited = Pace(rate, 10.0), 0.0
    while pace.holds(seconds, int(rate * seconds * 0.9)):
        waited += seconds
        assert waited < 20


def test_no_rate_is_no_bound() -> None:
    pace = Pace(0, 1.0)
    assert all(pace.holds(100.0, 0) for _ in range(3))


# -- peers --------------------------------------------------------------------------------------------


def test_each_peer_has_its_own_number() -> None:
    peers = Peers(2)
    assert [peers.enter("a") is None for _ in range(3)] == [True, True, False]
    assert peers.enter("b") is None
    for _ in range(2):
        peers.leave("a")
    assert peers.enter("a") is None


def test_nothing_is_kept_of_who_has_left() -> None:
    peers = Peers(1)
    for _ in range(3):
        peers.enter("a")
    for _ in range(3):
        peers.leave("a")
    assert not peers._held


@pytest.mark.parametrize("fault", [None, Refusal(Reason.MALFORMED)])
def test_a_call_counts_until_it_has_ended(make_call: MakeCall, fault: Refusal | None) -> None:
    peers = Peers(1)
    first, second = make_call(Method.GET_RUN), make_call(Method.GET_RUN, fault=fault)
    peers.enter_call(first)
    peers.enter_call(second)
    assert first.fault is None
    assert second.fault is not None
    assert second.fault is fault or second.fault.reason is Reason.OVERLOADED
    for call in (first, second, first):
        call.end(Ending("ok", seconds=0))
    third = make_call(Method.GET_RUN)
    peers.enter_call(third)
    assert third.fault is None
