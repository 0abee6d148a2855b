"""Nodes and SuperLinks of other generations meet at the relay, and a run ends as it would without one.

Each run has the same seed as one of flwr 1.42 alone, without a relay, and must leave the same arrays.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from relay.call import Wire
from relay.demo import metrics
from relay.demo.federation import Federation, Generation, RunResult
from tests.e2e.conftest import end_undisturbed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("bridging")]

NODES = 2
ROUNDS = 3
RUN_CONFIG = {"num-server-rounds": ROUNDS, "seed": 7, "array-size": 6_000_000}
V42, V39, V32 = "flwr==1.42.0", "flwr==1.39.0", "flwr[rest]==1.32.1"


class Meeting(NamedTuple):
    """A SuperLink and its nodes: what each is, and what it speaks."""

    superlink: str
    spoken: Wire
    node: str
    wire: Wire


MEETINGS = [
    Meeting(V39, Wire.GRPC, V39, Wire.GRPC),
    Meeting(V42, Wire.HTTP_V1, V39, Wire.GRPC),
    Meeting(V39, Wire.GRPC, V42, Wire.HTTP_V1),
    Meeting(V42, Wire.HTTP_V1, V32, Wire.GRPC),
    Meeting(V42, Wire.HTTP_V1, V39, Wire.GRPC_ADAPTER),
]


@pytest.fixture(scope="module")
def direct(flower: Callable[[str], Path]) -> RunResult:
    with Federation(flower(V42), nodes=NODES, relayed=False) as federation:
        federation.up()
        return federation.run(RUN_CONFIG)


@pytest.mark.parametrize(
    "meeting",
    MEETINGS,
    ids=lambda meeting: f"{meeting.wire.value} {meeting.node} to {meeting.spoken.value} {meeting.superlink}",
)
def test_a_run_ends_as_it_would_without_a_relay(
    flower: Callable[[str], Path],
    direct: RunResult,
    leftovers: Callable[[], list[str]],
    meeting: Meeting,
) -> None:
    nodes = [Generation(flower(meeting.node), meeting.wire)] * NODES
    with Federation(
        flower(meeting.superlink), wire=meeting.spoken, nodes=nodes, relay_config={"log": {"level": "debug"}}
    ) as federation:
        federation.up()
        text = end_undisturbed(federation, federation.run(RUN_CONFIG), direct, ROUNDS)
    assert metrics.parse(text)["ConfirmMessageReceived"].total == NODES * ROUNDS * 2
    assert f'wire="{meeting.wire.value}"' in text
