"""Flower releases for the end-to-end tests, and what holds at the end of each: nothing failed or is left."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from drills.releases import ReleaseError, commands
from relay.demo import metrics
from relay.demo.federation import Federation, RunResult

MARK = "FLOWER_END_TO_END_TEST"

#: Seconds after which a worker has written what it counted.
WRITTEN = 1.5


@pytest.fixture(scope="session")
def flower() -> Callable[[str], Path]:
    """A function from a requirement, such as `flwr==1.42.0`, to the directory of its commands."""

    def available(requirement: str) -> Path:
        try:
            return commands(requirement)
        except ReleaseError as error:
            _unavailable(str(error))

    return available


def _unavailable(reason: str) -> NoReturn:
    """Skip where a person lacks uv or the network; in continuous integration that hides broken tests."""
    if os.environ.get("CI", "").lower() in {"true", "1"}:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def leftovers(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[[], list[str]]]:
    """A function that lists the processes that descend from this test and still live.

    Found through psutil by an environment variable that the test sets, independently of how the demo finds
    its processes. The test fails at its end when there is one.
    """
    value = f"{os.getpid()}-{request.node.nodeid}"
    monkeypatch.setenv(MARK, value)

    def living() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == value:
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:  # it has ended meanwhile, or it is another user's
                continue
        return found

    yield living
    left = living()
    for line in left:
        psutil.Process(int(line.split()[0])).kill()
    assert left == []


def end_undisturbed(
    federation: Federation,
    result: RunResult,
    direct: RunResult,
    rounds: int,
    *,
    failed: Mapping[str, int] | None = None,
) -> str:
    """End a federation, whose run must have come to what a direct one came to, undisturbed.

    Args:
        federation: what is ended.
        result: of its run.
        direct: of a run without a relay.
        rounds: how many there were.
        failed: how many calls of each method failed; none if not given.

    Returns:
        The metrics of the relay once its nodes had left.
    """
    federation.stop_supernodes()
    time.sleep(WRITTEN)
    text = federation.relay_metrics()
    federation.down()
    assert federation.relay is not None
    log = [json.loads(line) for line in federation.relay.output().splitlines()]
    assert [done.number for done in result.rounds] == list(range(1, rounds + 1))
    assert result.arrays == direct.arrays
    assert [node.returncode for node in federation.supernodes] == [0] * len(federation.supernodes)
    assert text is not None
    counted = metrics.parse(text)
    assert {method: calls.failed for method, calls in counted.items() if calls.failed} == (failed or {})
    assert [line for line in log if line["level"] in {"warning", "error", "critical"}] == []
    return text
