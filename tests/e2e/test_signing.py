"""Legacy REST nodes in a federation of flwr 1.42, whose SuperLink demands signatures that they cannot make.

The runs have the same seed as one of flwr 1.42 alone, without a relay, and must leave the same arrays.
"""

import http.client
import json
import re
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from drills import nginx
from drills.nginx import Nginx
from relay.call import Wire
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.key import generate
from relay.demo.federation import Federation, Generation, RunResult
from relay.demo.processes import reserve_port, wait_ready
from relay.fleet import Method
from relay.wireformat import encode_bytes, encode_uint
from tests.e2e.conftest import end_undisturbed
from tests.e2e.leaks import leaked
from tests.e2e.test_auth import hand_out
from tests.e2e.test_federation import ACCESS

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
        text = end_undisturbed(federation, result, direct, ROUNDS)
    assert len(known) == 1
    assert list((tmp_path / "signing" / "nodes").iterdir()) == []  # it has unregistered
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
        end_undisturbed(federation, federation.run(RUN_CONFIG), direct, ROUNDS)


def asked(port: int, method: Method, node: int, userinfo: str) -> int:
    """Ask as a legacy node with this id would; return the status, 0 if the connection was cut."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        headers = {"content-type": "application/protobuf"}
        if userinfo:
            headers["authorization"] = f"Basic {b64encode(userinfo.encode()).decode()}"
        body = encode_bytes(1, encode_uint(1, node)) + (encode_uint(2, 9) if method.ids.run else b"")
        connection.request("POST", f"/api/v0/fleet/{method.path}", body, headers)
        return connection.getresponse().status
    except ConnectionError:
        return 0
    finally:
        connection.close()


def test_a_key_gets_the_signatures_of_its_own_node_alone(
    flower: Callable[[str], Path], direct: RunResult, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    """A legacy node is known by nothing but an id, and by the API key that its user gave it."""
    store, directory = FileKeys(tmp_path / "keys.jsonl"), tmp_path / "signing"
    keys = hand_out(store, 3)
    users = [f"node-{number}:{key}" for number, key in enumerate(keys)]
    with Federation(
        flower(NEW),
        nodes=[Generation(flower(LEGACY), Wire.REST_V0)] * 2,
        relay_config={
            "signing": {"directory": str(directory)},
            "keys": {"file": str(store.path)},
            "log": {"level": "debug"},
        },
        listener_config={"auth": {"accept": ["api_key"]}},
        userinfo=users[:2],
        superlink_log_level="DEBUG",
    ) as federation:
        federation.up()
        owners = {
            json.loads(path.read_text())["owner"]["name"]: int(path.name)
            for path in (directory / "nodes").iterdir()
        }
        assert set(owners) == {"node-0", "node-1"}
        port, node = federation.relay_port, owners["node-0"]
        for stranger in (users[1], users[2], "", f"node-0:{generate()}"):
            assert asked(port, Method.PULL_MESSAGES, node, stranger) == 401
            assert asked(port, Method.GET_RUN, node, stranger) == 0
        result = federation.run(RUN_CONFIG)
        strangers = {"PullMessages": 4, "GetRun": 4}
        text = end_undisturbed(federation, result, direct, ROUNDS, failed=strangers)
        served = Counter(ACCESS.findall(federation.superlink.output()))
        assert leaked(federation, keys, signed=True) == []
    assert 'relay_signing_refusals_total{cause="not_its_node"} 4.0' in text
    assert {status for _, status in served} == {"200"}
    assert served["get-run", "200"] == 2, "those of the two nodes"
    assert list((directory / "nodes").iterdir()) == []
