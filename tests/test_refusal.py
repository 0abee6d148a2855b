"""A refusal says why, who said it, and what happened; its reasons are a closed set."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest

from relay.refusal import NodeGone, Reason, Refusal


def test_a_refusal_carries_its_reason_its_detail_and_who_said_it() -> None:
    refusal = Refusal(Reason.UPSTREAM_REJECTED, "no such run", by="superlink:9092", sent=True, status=403)
    assert (refusal.reason, refusal.detail, refusal.by) == (
        Reason.UPSTREAM_REJECTED,
        "no such run",
        "superlink:9092",
    )
    assert (refusal.sent, refusal.status) == (True, 403)


def test_a_refusal_that_does_not_say_otherwise_may_have_followed_the_call_to_the_upstream() -> None:
    """A retry must not take silence for a promise that the SuperLink never saw the call."""
    assert Refusal(Reason.UPSTREAM_DOWN).sent
    assert Refusal(Reason.UPSTREAM_DOWN).status is None


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (Refusal(Reason.INTERNAL), "internal by relay"),
        (Refusal(Reason.TOO_LARGE, "5 bytes"), "too_large by relay: 5 bytes"),
        (Refusal(Reason.RATE_LIMITED, by="rate_limit"), "rate_limited by rate_limit"),
    ],
    ids=["bare", "with a detail", "by a policy"],
)
def test_a_refusal_reads_as_one_line_of_a_log(refusal: Refusal, text: str) -> None:
    assert str(refusal) == text


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_named_alike_in_code_metrics_and_logs(reason: Reason) -> None:
    assert reason.value == reason.name.lower()
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", reason.value)


def test_a_reason_is_found_by_its_name_in_a_table() -> None:
    """Reasons hash by identity: equal ones must be identical, also after a round trip through their value."""
    table = dict.fromkeys(Reason)
    assert all(Reason(reason.value) in table for reason in Reason)


def test_a_node_that_has_gone_is_not_refused() -> None:
    assert not issubclass(NodeGone, Refusal)
    assert not issubclass(Refusal, NodeGone)


@pytest.mark.timeout(10)
def test_frames_are_let_go_of_also_in_a_ring_of_errors() -> None:
    """`raise a from b` where `b` came out of the handling of `a`, when the same error is raised again."""
    refusal, other = Refusal(Reason.UPSTREAM_DOWN, by="test"), OSError("no connection")
    for error in (refusal, other):
        with suppress(Refusal, OSError):
            raise error
    refusal.__cause__, other.__context__ = other, refusal
    refusal.forget()
    assert refusal.__traceback__ is None
    assert other.__traceback__ is None
