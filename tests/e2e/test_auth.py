"""API keys with unmodified SuperNodes, which are given theirs as `--superlink name:key@host:port`.

The SuperLink's own access log is the witness of what reached it.
"""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from drills import certificates, nginx
from drills.nginx import Nginx
from relay.call import Wire
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.key import Key, generate
from relay.credentials.keys.record import KeyRecord, hashed
from relay.credentials.keys.redis import KEYS, VERSION, RedisKeys
from relay.credentials.keys.stores import KeyStore
from relay.demo.federation import Federation, Generation
from relay.demo.processes import Process, wait_ready
from tests.e2e.conftest import WRITTEN
from tests.e2e.leaks import leaked, private
from tests.e2e.test_federation import ACCESS
from tests.redis_server import RedisServer
from tests.relay_process import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("auth")]

PATIENCE = 90.0
PASSWORD = "hunter2hunter2"
WIRES = [
    pytest.param(Wire.HTTP_V1, "flwr==1.42.0", id="http_v1"),
    pytest.param(Wire.REST_V0, "flwr[rest]==1.32.1", id="rest_v0"),
]
#: What ends a node that was refused when it came: HTTP v1 nodes leave by themselves, legacy ones give up.
REFUSED_EXIT = {Wire.HTTP_V1: 0, Wire.REST_V0: 1}


def hand_out(store: KeyStore, count: int) -> list[Key]:
    """Make keys for node-0, node-1, ... and keep them in the store."""
    keys = [generate() for _ in range(count)]
    records = [
        KeyRecord(key.id.decode(), f"node-{number}", hashed(key.secret, b""), int(time.time()))
        for number, key in enumerate(keys)
    ]
    store.change(lambda present: present.update((record.id, record) for record in records), init=True)
    return keys


def revoke(store: KeyStore, key: Key) -> None:
    key_id = key.id.decode()
    store.change(lambda records: records.update({key_id: records[key_id]._replace(revoked=int(time.time()))}))


def until(condition: Callable[[], bool], what: str, *processes: Process) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        logs = "\n".join(f"{process.name}: {process.output()[-2000:]}" for process in processes)
        assert time.monotonic() < end, f"{what}\n{logs}"
        time.sleep(0.1)


def metric(federation: Federation, name: str, **labels: str) -> float:
    """Return the sum of the samples of a metric of the relay that have these labels."""
    total = 0.0
    for line in (federation.relay_metrics() or "").splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match is not None and match[1] == name:
            have = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            total += float(match[3]) * all(have.get(key) == value for key, value in labels.items())
    return total


@pytest.mark.parametrize(
    "edge",
    [
        pytest.param(False, id="tls"),
        pytest.param(
            True,
            id="nginx",
            marks=pytest.mark.skipif(nginx.missing() is not None, reason="nginx is not installed"),
        ),
    ],
)
@pytest.mark.parametrize(("wire", "requirement"), WIRES)
@pytest.mark.usefixtures("leftovers")
def test_nodes_with_a_key_get_in_a_wrong_one_never_reaches_the_superlink_and_a_revoked_one_ends_its_node(
    flower: Callable[[str], Path], tmp_path: Path, wire: Wire, requirement: str, edge: bool
) -> None:
    """Over TLS, which ends in the relay or in nginx before it."""
    store = FileKeys(tmp_path / "keys.jsonl")
    keys, wrong = hand_out(store, 2), generate()
    made, entry = certificates.make(tmp_path), free_port() if edge else None
    listener: dict[str, Any] = {"auth": {"accept": ["api_key"]}}
    if not edge:
        listener["tls"] = {"certificate": str(made.certificate), "key": str(made.key)}
    with ExitStack() as stack:
        federation = stack.enter_context(
            Federation(
                flower(requirement),
                wire=wire,
                nodes=2,
                relay_config={"keys": {"file": str(store.path)}, "log": {"level": "debug"}},
                listener_config=listener,
                entry_port=entry,
                root_certificates=made.authority,
                userinfo=[f"node-{number}:{key}" for number, key in enumerate(keys)],
                superlink_log_level="DEBUG",
            )
        )
        logs = tmp_path / "edge"
        if entry is not None:
            logs.mkdir()
            stack.enter_context(
                Nginx(logs, port=entry, status_port=free_port(), relay_port=federation.relay_port, tls=made)
            )
        federation.up(wait_for_nodes=False)
        generation = Generation(flower(requirement), wire)
        stranger = federation._supernode(
            2, generation, entry or federation.relay_port, made.authority, f"node-0:{wrong}"
        )
        stranger.start(may_end=True)
        wait_ready(federation.supernodes)
        until(lambda: not stranger.running, "the stranger stays", stranger)
        assert stranger.returncode == REFUSED_EXIT[wire], stranger.output()
        assert metric(federation, "relay_auth_refusals_total", cause="unknown_key", action="refused") >= 1

        polled = metric(federation, "relay_calls_total", method="PullMessages", outcome="ok")
        revoke(store, keys[1])
        until(lambda: not federation.supernodes[1].running, "the revoked stays", federation.supernodes[1])
        assert federation.supernodes[1].returncode == 0
        assert metric(federation, "relay_auth_refusals_total", cause="revoked", action="refused") >= 1
        until(
            lambda: metric(federation, "relay_calls_total", method="PullMessages", outcome="ok") > polled + 1,
            "the other node does not go on",
            federation.supernodes[0],
        )
        assert federation.supernodes[0].running
        federation.supernodes[0].stop()
        time.sleep(WRITTEN)
        passed_on = metric(federation, "relay_calls_total", source="upstream")
        federation.down()
        served = ACCESS.findall(federation.superlink.output())
        assert {status for _, status in served} == {"200"}
        assert len(served) == passed_on
        assert [path for path, _ in served].count("register-node") == 2
        secrets: list[Key | bytes] = [*keys, wrong, private(made.key)]
        assert leaked(federation, secrets, [logs / "log"] if edge else [], signed=True) == []
        assert not edge or (logs / "log" / "relay.json").stat().st_size > 0


@pytest.mark.parametrize(("wire", "requirement"), WIRES)
@pytest.mark.usefixtures("leftovers")
def test_redis_may_be_away_in_the_middle_of_a_run_for_longer_than_its_keys_stay_valid(
    flower: Callable[[str], Path], tmp_path: Path, wire: Wire, requirement: str
) -> None:
    with RedisServer(tmp_path, password=PASSWORD) as redis:
        store = RedisKeys(redis.url, "redis")
        keys = hand_out(store, 2)
        with redis.client() as client:
            version, rows = client.get(VERSION), client.hgetall(KEYS)
        with Federation(
            flower(requirement),
            wire=wire,
            nodes=2,
            relay_config={"keys": {"redis": redis.url, "stale": "4s"}, "log": {"level": "debug"}},
            listener_config={"auth": {"accept": ["api_key"]}},
            userinfo=[f"node-{number}:{key}" for number, key in enumerate(keys)],
        ) as federation:
            federation.up()
            run = federation.start_run({"num-server-rounds": 2})
            until(lambda: len(run.rounds()) > 0, "no round", run.process, *federation.supernodes)
            redis.kill()
            until(
                lambda: (
                    metric(
                        federation, "relay_auth_refusals_total", cause="keys_unavailable", action="deferred"
                    )
                    >= 4
                ),
                "no call was deferred",
            )
            assert all(node.running for node in federation.supernodes)
            redis.start()
            with redis.client() as client:
                client.hset(KEYS, mapping=rows)
                client.set(VERSION, version)
            result = run.wait()
            assert [done.number for done in result.rounds] == [1, 2]
            federation.stop_supernodes()
            assert [node.returncode for node in federation.supernodes] == [0, 0]
            assert metric(federation, "relay_auth_refusals_total", action="refused") == 0
            assert leaked(federation, [*keys, PASSWORD.encode()], signed=True) == []
        store.close()
