"""gRPC nodes of flwr 1.39 in a federation of 1.42, behind nginx, which answers while the relay is away."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drills import nginx
from drills.nginx import Nginx
from relay.call import Wire
from relay.demo.federation import Federation, Generation, RunResult
from relay.demo.processes import reserve_port, wait_ready

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("grpc_edge"),
    pytest.mark.skipif(nginx.missing() is not None, reason="nginx is not installed"),
]

ROUNDS = 3
RUN_CONFIG = {"num-server-rounds": ROUNDS, "seed": 7, "array-size": 300_000}
#: Seconds without a relay: longer than a pause between two heartbeats of a node.
OUTAGE = 25.0


@pytest.fixture(scope="module")
def direct(flower: Callable[[str], Path]) -> RunResult:
    with Federation(flower("flwr==1.42.0"), nodes=2, relayed=False) as federation:
        federation.up()
        return federation.run(RUN_CONFIG)


def test_grpc_nodes_live_through_a_restart_of_the_relay(
    flower: Callable[[str], Path], direct: RunResult, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    with (
        reserve_port() as entry,
        reserve_port() as status,
        Federation(
            flower("flwr==1.42.0"),
            nodes=[Generation(flower("flwr==1.39.0"), Wire.GRPC)] * 2,
            entry_port=entry.getsockname()[1],
        ) as federation,
        Nginx(
            tmp_path,
            port=entry.getsockname()[1],
            status_port=status.getsockname()[1],
            relay_port=federation.relay_port,
            tls=None,
            grpc=True,
        ),
    ):
        federation.up()
        assert federation.relay is not None
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
        federation.down()
    told = (tmp_path / "log" / "relay.json").read_text()
    assert '"edge_answer":"unavailable"' in told
    assert '"edge_answer":"unimplemented"' not in told
    assert [done.number for done in result.rounds] == list(range(1, ROUNDS + 1))
    assert result.arrays == direct.arrays
    assert [node.returncode for node in federation.supernodes] == [0, 0]
