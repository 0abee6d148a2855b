"""Flower's own code is asked whether the dialect is right: no answer of it ends a node that was not to go.

What became of each node is also kept in `outcomes.json`, which docs/flower-compatibility.md shows. When the
dialect or a release of Flower changes, `UPDATE_OUTCOMES=1 scripts/test tests/contract` writes it anew.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from relay.call import Wire
from relay.dialect import TABLE
from relay.fleet import Kind, Method
from relay.refusal import Reason
from tests.contract.conftest import RELEASES, Release
from tests.contract.faults import Case, Cell, cells, name_of
from tests.contract.nodes import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.conftest import Observed

# Longer than that only where a release has to be installed first.
pytestmark = pytest.mark.timeout(900)

OUTCOMES = Path(__file__).with_name("outcomes.json")

#: The same bytes again would be refused again.
LASTING = {Reason.FORBIDDEN, Reason.TOO_LARGE, Reason.UPSTREAM_REJECTED}

CONTINUES, LATE, DROPS, LEAVES, EXITS, SILENT = Outcome


#: What nodes of 1.32 do not survive, and those of 1.39 do: on any status here they wait for ever for a reply
#: that cannot come. Asked again and again they would wait as well.
UNSPARED = {(Wire.GRPC, Case(Method.PULL_OBJECT, "PERMISSION_DENIED"))}


def promised(wire: Wire, reason: Reason, method: Method) -> set[Outcome]:
    """Return what may become of a node that is refused for this reason."""
    if method.kind is Kind.LEAVE:
        return {LEAVES}
    in_a_message = method.kind in (Kind.FETCH, Kind.PUSH, Kind.CONFIRM)
    if wire is Wire.GRPC_ADAPTER:
        return _promised_to_an_adapter(reason, method)
    if reason is Reason.UNAUTHENTICATED:
        if wire in (Wire.HTTP_V1, Wire.GRPC) or method.kind in (Kind.JOIN, Kind.PULL):
            return {EXITS}
        return {CONTINUES, DROPS} if in_a_message else {CONTINUES}
    return {CONTINUES, DROPS} if in_a_message and reason in LASTING else {CONTINUES}


def _promised_to_an_adapter(reason: Reason, method: Method) -> set[Outcome]:
    """It repeats nothing, so that the relay can only spare it the refusal, or wait."""
    match method:
        case Method.REGISTER_NODE | Method.ACTIVATE_NODE | Method.GET_RUN | Method.GET_FAB:
            return {EXITS}
        case Method.PULL_MESSAGES:
            return {EXITS if reason is Reason.UNAUTHENTICATED else CONTINUES}
        case Method.PULL_OBJECT | Method.PUSH_OBJECT | Method.PUSH_MESSAGES:
            return {DROPS}
        case _:
            return {CONTINUES}


@pytest.mark.parametrize(
    ("release", "cell"),
    [
        pytest.param(release, cell, id=f"{release}-{cell.case.method.rpc}-{cell.case.answer}")
        for release in RELEASES
        for cell in cells(release.wire)
    ],
)
def test_a_node_does_what_the_dialect_wishes(
    observed: Callable[[Release], Observed], release: Release, cell: Cell
) -> None:
    allowed = set.intersection(*(promised(release.wire, reason, cell.case.method) for reason in cell.reasons))
    assert allowed, "these reasons wish for different things"
    if (release.wire, cell.case) in UNSPARED and "1.32" in release.requirement:
        allowed = {SILENT}
    outcome, detail, log = observed(release).outcomes[cell.case]
    assert outcome in allowed, f"{detail}\n{log}"
    if outcome is LEAVES:
        assert detail == "exit code 0", log


#: Answers that the dialect avoids, and why.
AVOIDED: dict[Wire, list[tuple[Outcome, tuple[Method, ...], tuple[str, ...]]]] = {
    Wire.HTTP_V1: [
        (
            EXITS,
            (
                Method.REGISTER_NODE,
                Method.ACTIVATE_NODE,
                Method.PULL_MESSAGES,
                Method.GET_RUN,
                Method.GET_FAB,
            ),
            ("404", "413", "429", "500", "html", "garbage"),
        ),
        (EXITS, (Method.REGISTER_NODE, Method.ACTIVATE_NODE), ("403",)),
        (EXITS, (Method.ACTIVATE_NODE, Method.GET_RUN, Method.GET_FAB), ("empty",)),
        (
            SILENT,
            (Method.SEND_NODE_HEARTBEAT,),
            ("403", "404", "413", "429", "500", "html", "garbage", "empty"),
        ),
        (DROPS, (Method.PULL_OBJECT, Method.PUSH_MESSAGES, Method.PUSH_OBJECT), ("404", "413", "429", "500")),
        (DROPS, (Method.PULL_OBJECT, Method.PUSH_MESSAGES, Method.PUSH_OBJECT), ("html", "garbage", "empty")),
        (LATE, (Method.CONFIRM_MESSAGE_RECEIVED,), ("403",)),
    ],
    Wire.REST_V0: [
        (
            EXITS,
            (
                Method.REGISTER_NODE,
                Method.ACTIVATE_NODE,
                Method.PULL_MESSAGES,
                Method.GET_RUN,
                Method.GET_FAB,
            ),
            ("403", "404", "413", "429", "500", "502", "503", "504", "html", "garbage", "other type", "cut"),
        ),
        (SILENT, (Method.ACTIVATE_NODE,), ("empty",)),
        (
            SILENT,
            (Method.PULL_OBJECT, Method.CONFIRM_MESSAGE_RECEIVED),
            ("403", "404", "413", "429", "500", "502", "503", "504", "html", "garbage", "other type", "cut"),
        ),
        (SILENT, (Method.SEND_NODE_HEARTBEAT,), ("garbage", "empty", "cut", "drop")),
        (
            DROPS,
            (Method.PUSH_MESSAGES,),
            ("404", "413", "429", "500", "502", "503", "504", "html", "garbage"),
        ),
    ],
    Wire.GRPC: [
        (
            EXITS,
            (
                Method.REGISTER_NODE,
                Method.ACTIVATE_NODE,
                Method.PULL_MESSAGES,
                Method.GET_RUN,
                Method.GET_FAB,
            ),
            ("NOT_FOUND", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "UNKNOWN", "garbage"),
        ),
        (EXITS, (Method.ACTIVATE_NODE, Method.GET_RUN, Method.GET_FAB), ("empty",)),
        (
            SILENT,
            (Method.SEND_NODE_HEARTBEAT,),
            ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "garbage", "empty"),
        ),
        (
            DROPS,
            (Method.PUSH_MESSAGES, Method.PUSH_OBJECT),
            ("RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "garbage", "empty"),
        ),
        (LATE, (Method.CONFIRM_MESSAGE_RECEIVED,), ("PERMISSION_DENIED",)),
    ],
    Wire.GRPC_ADAPTER: [
        (
            EXITS,
            (Method.PULL_MESSAGES,),
            ("UNAVAILABLE", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "INTERNAL", "garbage"),
        ),
        (SILENT, (Method.SEND_NODE_HEARTBEAT,), ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "empty")),
        (DROPS, (Method.CONFIRM_MESSAGE_RECEIVED,), ("UNAVAILABLE", "PERMISSION_DENIED")),
    ],
}


@pytest.mark.parametrize(
    ("release", "case", "outcome"),
    [
        pytest.param(release, Case(method, answer), outcome, id=f"{release}-{method.rpc}-{answer}")
        for release in RELEASES
        for outcome, methods, answers in AVOIDED[release.wire]
        for method in methods
        for answer in answers
    ],
)
def test_a_node_does_not_survive_what_the_dialect_avoids(
    observed: Callable[[Release], Observed], release: Release, case: Case, outcome: Outcome
) -> None:
    """Guards the test above: it can see a node end."""
    seen = observed(release).outcomes[case]
    assert seen.outcome is outcome, f"{seen.detail}\n{seen.log}"


def test_the_dialect_gives_nothing_that_it_avoids() -> None:
    avoided = {
        (wire, method, answer)
        for wire, rows in AVOIDED.items()
        for outcome, methods, answers in rows
        if outcome is not DROPS
        for method in methods
        for answer in answers
    }
    given = {(wire, method, name_of(cell.answer)) for (wire, _, method), cell in TABLE.items()}
    assert not avoided & given


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_the_outcomes_are_those_on_record(observed: Callable[[Release], Observed], release: Release) -> None:
    version, outcomes = observed(release)
    seen: dict[str, dict[str, str]] = {}
    for case, observation in outcomes.items():
        seen.setdefault(case.method.rpc, {})[case.answer] = observation.outcome.value
    entry = {"wire": release.wire.value, "outcomes": seen}
    if release.wire.grpc:
        version = f"{version} {release.wire.value}"
    if os.environ.get("UPDATE_OUTCOMES"):
        _record(version, entry)
    with OUTCOMES.open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert json.load(file).get(version) == entry


def _record(version: str, entry: dict[str, Any]) -> None:
    with OUTCOMES.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another worker may write of another release
        file.seek(0)
        text = file.read()
        record = json.loads(text) if text else {}
        record[version] = entry
        file.truncate(0)
        file.write(json.dumps(record, indent=1, sort_keys=True) + "\n")
