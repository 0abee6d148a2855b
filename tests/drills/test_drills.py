"""The drills that an operator does without thinking about it, on all wires: nothing may be lost in them."""

import os
from pathlib import Path

import pytest

from drills import releases
from drills.catalogue import DRILLS
from drills.matrix import WIRES, Configuration, Edge
from drills.releases import ReleaseError
from drills.runner import Result, Runner
from relay.call import Wire

# Two federations side by side take about three minutes; a loaded machine may take twice that.
pytestmark = [pytest.mark.e2e, pytest.mark.drill, pytest.mark.timeout(900)]

CHOSEN = ("upstream-port-closed", "worker-killed", "reload-three-times", "relay-restarted")
#: In these the relay has time to finish what it has begun.
ORDERLY = {"reload-three-times", "relay-restarted"}


def commands(wire: Wire) -> Path:
    """Where Flower's commands are; skips where a person lacks them, which would hide broken tests in CI."""
    try:
        return releases.commands(releases.RELEASES[wire])
    except ReleaseError as error:
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            raise
        pytest.skip(str(error))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(wire, id=wire.value, marks=pytest.mark.xdist_group(f"drills-{wire.value}"))
        for wire in WIRES
    ],
)
def results(request: pytest.FixtureRequest) -> list[Result]:
    runner = Runner(commands, print)
    runner.run(Configuration(request.param, tls=False, edge=Edge.DIRECT), [DRILLS[name] for name in CHOSEN])
    return runner.results


def test_every_drill_is_survived(results: list[Result]) -> None:
    configuration = results[0].configuration
    expected = [name for name in DRILLS if name in CHOSEN and not DRILLS[name].needs.missing(configuration)]
    assert [result.drill for result in results] == expected
    assert {result.drill: result.problems for result in results if not result.survived} == {}


def test_every_run_that_may_not_fail_is_complete(results: list[Result]) -> None:
    failed = {result.drill for result in results if result.run != "complete"}
    assert {drill for drill in failed if not DRILLS[drill].may_fail} == set()


def test_no_answer_is_lost_in_an_orderly_change(results: list[Result]) -> None:
    lost = {result.drill: result.lost + result.unclaimed for result in results if result.drill in ORDERLY}
    assert {drill: count for drill, count in lost.items() if count} == {}


def test_the_relay_has_nothing_to_complain_of(results: list[Result]) -> None:
    assert {result.drill: result.complaints for result in results if result.complaints} == {}
