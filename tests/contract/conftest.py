"""Every answer of the dialect, and answers that it avoids, given to real nodes of several Flower releases."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import uvloop

from relay.call import Wire
from relay.fleet import Method
from tests.contract.faults import Case, faults
from tests.contract.nodes import Nodes, Observation, Outcome, observe
from tests.contract.superlink import SuperLink
from tests.e2e.conftest import flower, leftovers

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["flower", "leftovers"]

PROBE = Path(__file__).with_name("node_probe.py")
#: Nodes at a time. They mostly wait.
PARALLEL = 12


class Release(NamedTuple):
    """A Flower release, and the wire that its nodes speak.

    Attributes:
        requirement: how to install it; "" for the one that the relay itself uses.
    """

    requirement: str
    wire: Wire

    def __str__(self) -> str:
        return f"{self.requirement or 'flwr'}{f'-{self.wire.value}' if self.wire.grpc else ''}"


RELEASES = (
    Release("", Wire.HTTP_V1),
    Release("flwr==1.42.0", Wire.HTTP_V1),
    Release("flwr[rest]==1.32.1", Wire.REST_V0),
    Release("flwr[rest]==1.32.1", Wire.GRPC),
    Release("flwr==1.39.0", Wire.GRPC),
    Release("flwr==1.39.0", Wire.GRPC_ADAPTER),
)

#: What flwr < 1.40 calls them.
TRANSPORTS = {Wire.REST_V0: "rest", Wire.GRPC: "grpc-rere", Wire.GRPC_ADAPTER: "grpc-adapter"}


class Observed(NamedTuple):
    """What became of the nodes of one release.

    Attributes:
        version: the release, as it calls itself.
        outcomes: for every case.
    """

    version: str
    outcomes: dict[Case, Observation]


@pytest.fixture(scope="session")
def observed(
    flower: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Release], Observed]:
    """A function that returns what became of a release's nodes; they are run when it is first asked.

    Workers of one test run share what they see, through files.
    """
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent

    @cache
    def observed(release: Release) -> Observed:
        path = directory / f"contract-{release}.json"
        with path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            if text:
                return _from_json(text)
            python = flower(release.requirement) / "python" if release.requirement else Path(sys.executable)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                seen = runner.run(_observe_all(release, python, tmp_path_factory.mktemp("nodes")))
            file.write(_to_json(seen))
            return seen

    return observed


def _to_json(seen: Observed) -> str:
    rows = [
        [case.method.name, case.answer, observation.outcome.value, observation.detail, observation.log]
        for case, observation in seen.outcomes.items()
    ]
    return json.dumps([seen.version, rows])


def _from_json(text: str) -> Observed:
    version, rows = json.loads(text)
    outcomes = {
        Case(Method[method], answer): Observation(Outcome(outcome), detail, log)
        for method, answer, outcome, detail, log in rows
    }
    return Observed(version, outcomes)


async def _observe_all(release: Release, python: Path, directory: Path) -> Observed:
    slots = asyncio.Semaphore(PARALLEL)
    outcomes: dict[Case, Observation] = {}
    async with Nodes(python, PROBE, directory, TRANSPORTS.get(release.wire, "")) as nodes:

        async def one(case: Case) -> None:
            async with slots:
                for turn in ("", "-again"):  # on a busy machine a node may not come so far
                    superlink = SuperLink(release.wire, case.method, wrong[case])
                    name = f"{case.method.rpc}-{case.answer}{turn}"
                    outcomes[case] = await observe(nodes, name, superlink)
                    if superlink.faults:
                        break
                assert superlink.faults, f"{case} was not asked for\n{outcomes[case].log}"

        wrong = faults(release.wire)
        async with asyncio.TaskGroup() as group:
            for case in wrong:
                group.create_task(one(case))
    return Observed(nodes.version, outcomes)
