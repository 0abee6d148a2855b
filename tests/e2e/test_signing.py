"""Legacy REST nodes in a federation of flwr 1.42, whose SuperLink demands signatures that they cannot make.

The runs have the same seed as one of flwr 1.42 alone, without a relay, and must leave the same arrays.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from drills import nginx
from drills.nginx import Nginx
from relay.call import Wire
from relay.demo import metrics
from relay.demo.federation import Federation, Generation, RunResult
from relay.demo.processes import reserve_port, wait_ready

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("signing")]

ROUNDS = 3
RUN_CONFIG = {"num-server-rounds": ROUNDS, "seed": 7, "array-size": 300_000}
#: Seconds without a relay: longer than a pause between two heartbeats of a node.
OUTAGE = 25.0
NEW, BETWEEN, LEGACY = "flwr==1.42.0", "flwr==1.39.0", "flwr[rest]==1.32.1"


@pytest.fixture(scope="module")
def direct(flower: Callable[[str], Path]) -> RunResult:
    with Federation(flower(NEW), nodes=2, relayed=False) as federation:
        federation.up()
        return federation.run(RUN_CONFIG)


def _federation(
    flower: Callable[[str], Path],
    legacy: Sequence[bool],
    keys: Path,
    entry_port: int | None = None,
    superlink: tuple[str, Wire] = (NEW, Wire.HTTP_V1),
) -> Federation:
    nodes = [
        Generation(flower(LEGACY), Wire.REST_V0) if old else Generation(flower(NEW), Wire.HTTP_V1)
        for old in legacy
    ]
    release, wire = superlink
    signing = {"directory": str(keys), "unauthenticated": True}
    config = {"signing": signing, "log": {"level": "debug"}}
    return Federation(flower(release), wire=wire, nodes=nodes, relay_config=config, entry_port=entry_port)


def test_two_generations_in_one_run(
    flower: Callable[[str], Path], direct: RunResult, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    with _federation(flower, [True, False], tmp_path / "signing") as federation:
        federation.up()
        result = federation.run(RUN_CONFIG)
        known = list((tmp_path / "signing" / "nodes").iterdir())
        federation.stop_supernodes()
        text = federation.relay_metrics()
        federation.down()
        assert federation.relay is not None
        log = [json.loads(line) for line in federation.relay.output().splitlines()]
    assert [done.number for done in result.rounds] == list(range(1, ROUNDS + 1))
    assert result.arrays == direct.arrays
    assert [node.returncode for node in federation.supernodes] == [0, 0]
    assert len(known) == 1
    assert list((tmp_path / "signing" / "nodes").iterdir()) == []  # it has unregistered
    assert text is not None
    assert {method: calls.failed for method, calls in metrics.parse(text).items() if calls.failed} == {}
    assert [line for line in log if line["level"] in {"warning", "error", "critical"}] == []
    served = re.findall(r'relay_calls_total\{[^}]*method="PullObject"[^}]*wire="(\w+)"', text)
    assert set(served) == {"http_v1", "rest_v0"}


@pytest.mark.skipif(nginx.missing() is not None, reason="nginx is not installed")
def test_legacy_nodes_live_through_a_restart_of_the_relay(
    flower: Callable[[str], Path], direct: RunResult, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    """Behind nginx: a heartbeat that meets no listening port would end the heartbeats of a legacy node."""
    keys, edge = tmp_path / "signing", tmp_path / "edge"
    edge.mkdir()
    with (
        reserve_port() as entry,
        reserve_port() as status,
        _federation(flower, [True, True], keys, entry.getsockname()[1]) as federation,
        Nginx(
            edge,
            port=entry.getsockname()[1],
            status_port=status.getsockname()[1],
            relay_port=federation.relay_port,
            tls=None,
        ),
    ):
        federation.up()
        assert federation.relay is not None
        before = sorted(path.name for path in (keys / "nodes").iterdir())
        run = federation.start_run(RUN_CONFIG)
        while not run.rounds():
            assert run.process.running, run.process.output()
            time.sleep(0.1)
        federation.relay.stop()
        time.sleep(OUTAGE)
        federation.relay.start()
        wait_ready([federation.relay])
        result = run.wait()
        assert all(node.running for node in federation.supernodes)
        assert sorted(path.name for path in (keys / "nodes").iterdir()) == before
        federation.down()
    assert [done.number for done in result.rounds] == list(range(1, ROUNDS + 1))
    assert result.arrays == direct.arrays
    assert [node.returncode for node in federation.supernodes] == [0, 0]


def test_a_superlink_that_speaks_grpc(
    flower: Callable[[str], Path], direct: RunResult, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    keys = tmp_path / "signing"
    with _federation(flower, [True, False], keys, superlink=(BETWEEN, Wire.GRPC)) as federation:
        federation.up()
        result = federation.run(RUN_CONFIG)
        federation.stop_supernodes()
        text = federation.relay_metrics()
        federation.down()
        assert federation.relay is not None
        log = [json.loads(line) for line in federation.relay.output().splitlines()]
    assert [done.number for done in result.rounds] == list(range(1, ROUNDS + 1))
    assert result.arrays == direct.arrays
    assert [node.returncode for node in federation.supernodes] == [0, 0]
    assert text is not None
    assert {method: calls.failed for method, calls in metrics.parse(text).items() if calls.failed} == {}
    assert [line for line in log if line["level"] in {"warning", "error", "critical"}] == []
