"""Whole federations of real Flower processes: through the relay they end as they do without it.

Each generation of Flower runs twice with the same seed, directly and through two workers of the relay; the
tests look at what is left of both. The SuperLink's own access log is the witness of what the relay counted.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay.call import Wire
from relay.demo import metrics
from relay.demo.federation import Federation, RunResult
from relay.demo.metrics import Calls
from relay.fleet import BY_PATH, Method
from tests.e2e.conftest import WRITTEN

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NODES = 2
WORKERS = 2
ROUNDS = 3
MESSAGES = NODES * ROUNDS * 2  # train and evaluate
# Flower cuts arrays into chunks of 5 MiB: this one needs two.
RUN_CONFIG = {"num-server-rounds": ROUNDS, "seed": 7, "array-size": 6_000_000}

ACCESS = re.compile(r'"POST /(?:v1|api/v0)/fleet/([a-z-]+) HTTP/1\.1" (\d{3})')


@dataclass(frozen=True)
class Outcome:
    """Both runs of one generation, and what the relay and the SuperLink behind it recorded of the second."""

    wire: Wire
    direct: RunResult
    relayed: RunResult
    calls: Mapping[str, Calls]
    access: Counter[tuple[str, int]]
    node_exits: tuple[int | None, ...]
    relay_log: tuple[Mapping[str, object], ...]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((Wire.HTTP_V1, "flwr==1.42.0"), id="http_v1", marks=pytest.mark.xdist_group("http_v1")),
        pytest.param(
            (Wire.REST_V0, "flwr[rest]==1.32.1"), id="rest_v0", marks=pytest.mark.xdist_group("rest_v0")
        ),
    ],
)
def outcome(request: pytest.FixtureRequest, flower: Callable[[str], Path]) -> Outcome:
    wire, requirement = request.param
    flwr_bin = flower(requirement)

    with Federation(flwr_bin, wire=wire, nodes=NODES, relayed=False) as federation:
        federation.up()
        direct = federation.run(RUN_CONFIG)

    with Federation(
        flwr_bin,
        wire=wire,
        nodes=NODES,
        workers=WORKERS,
        relay_config={"log": {"level": "debug"}},
        superlink_log_level="DEBUG",
    ) as federation:
        federation.up()
        relayed = federation.run(RUN_CONFIG)
        federation.stop_supernodes()
        time.sleep(WRITTEN)
        text = federation.relay_metrics()
        federation.down()
        assert federation.relay is not None
        assert text is not None
        return Outcome(
            wire,
            direct,
            relayed,
            metrics.parse(text),
            Counter((path, int(status)) for path, status in ACCESS.findall(federation.superlink.output())),
            tuple(node.returncode for node in federation.supernodes),
            tuple(map(json.loads, federation.relay.output().splitlines())),
        )


def test_every_round_is_finished(outcome: Outcome) -> None:
    for result in (outcome.direct, outcome.relayed):
        assert result.returncode == 0
        assert [done.number for done in result.rounds] == list(range(1, ROUNDS + 1))
        losses = [done.evaluate_loss for done in result.rounds]
        assert losses == sorted(losses, reverse=True)


def test_the_final_arrays_are_those_of_a_direct_run(outcome: Outcome) -> None:
    assert outcome.relayed.arrays is not None
    assert len(outcome.relayed.arrays) > RUN_CONFIG["array-size"]
    assert outcome.relayed.arrays == outcome.direct.arrays
    assert [(done.train_loss, done.evaluate_loss) for done in outcome.relayed.rounds] == [
        (done.train_loss, done.evaluate_loss) for done in outcome.direct.rounds
    ]


def test_the_relay_counted_what_the_superlink_served(outcome: Outcome) -> None:
    served = {BY_PATH[path].rpc: count for (path, status), count in outcome.access.items() if status == 200}
    assert {method: calls.upstream for method, calls in outcome.calls.items()} == served
    assert set(served) == {method.rpc for method in Method}
    assert {status for _, status in outcome.access} == {200}


def test_no_call_failed(outcome: Outcome) -> None:
    assert {method: calls.failed for method, calls in outcome.calls.items() if calls.failed} == {}
    assert {method: calls.total - calls.timed for method, calls in outcome.calls.items()} == dict.fromkeys(
        outcome.calls, 0
    )
    assert [line for line in outcome.relay_log if line["level"] in {"warning", "error", "critical"}] == []


def test_each_message_and_each_node_was_seen_as_often_as_it_should(outcome: Outcome) -> None:
    expected = {
        "RegisterNode": NODES,
        "ActivateNode": NODES,
        "GetRun": NODES,
        "GetFab": NODES,
        "ConfirmMessageReceived": MESSAGES,
        "PushMessages": MESSAGES,
        "DeactivateNode": NODES,
        "UnregisterNode": NODES,
    }
    assert {method: outcome.calls[method].total for method in expected} == expected
    # Down the array goes twice a round (train and evaluate), up it goes once.
    size = RUN_CONFIG["array-size"]
    assert outcome.calls["PullObject"].bytes_out > 2 * ROUNDS * NODES * size
    assert outcome.calls["PushObject"].bytes_in > ROUNDS * NODES * size


def test_the_nodes_left_in_peace(outcome: Outcome) -> None:
    assert outcome.node_exits == (0,) * NODES


def test_every_worker_serves(outcome: Outcome) -> None:
    started = [line for line in outcome.relay_log if line["event"] == "worker serves"]
    assert len(started) == WORKERS
    # A request id begins with what its worker has drawn at its start.
    served = {str(line["request_id"]).split("-")[0] for line in outcome.relay_log if "request_id" in line}
    # An HTTP v1 node keeps a few connections, which may all have come to one worker; a REST v0 node opens one
    # for every call.
    assert len(served) == WORKERS if outcome.wire is Wire.REST_V0 else 1 <= len(served) <= WORKERS
