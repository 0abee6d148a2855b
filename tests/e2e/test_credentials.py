"""Unmodified SuperNodes over TLS with a key of their own, or behind the client certificate of their site.

What each can carry, and how the others get in, is in docs/security.md; API keys are in test_auth.py. The
SuperLink's own access log is the witness of what reached it. Each run has the same seed as one of flwr 1.42
alone, without a relay, and must leave the same arrays.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from relay.authority import Authority
from relay.call import Wire
from relay.demo import flower as commands
from relay.demo.federation import Federation, Generation, RunResult
from relay.demo.processes import Process, wait_ready
from tests.e2e.conftest import WRITTEN
from tests.e2e.leaks import leaked, private
from tests.e2e.test_auth import metric, until
from tests.e2e.test_federation import ACCESS
from tests.relay_process import RelayProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("credentials")]

V42, V39, V32 = "flwr==1.42.0", "flwr==1.39.0", "flwr[rest]==1.32.1"
ROUNDS, NODES = 1, 3
RUN_CONFIG = {"num-server-rounds": ROUNDS, "seed": 7, "array-size": 100_000}


@pytest.fixture(scope="module")
def direct(flower: Callable[[str], Path]) -> RunResult:
    with Federation(flower(V42), nodes=NODES, relayed=False) as federation:
        federation.up()
        return federation.run(RUN_CONFIG)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca")
    made.issue_relay(["localhost", "127.0.0.1"])
    return made


def tls(authority: Authority, **more: str) -> dict[str, str]:
    certificate, key = map(str, authority.files("relay"))
    return {"certificate": certificate, "key": key, **more}


def key_pair(directory: Path, name: str) -> Path:
    """Write a key as `ssh-keygen -t ecdsa -b 384` does; return the private one, beside it lies NAME.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = directory / name
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private.chmod(0o600)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private.with_suffix(".pub").write_bytes(public + b"\n")
    return private


def run_command(argv: commands.Words, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def change_list(federation: Federation, *words: str | Path) -> None:
    """Run `flwr-relay nodes`."""
    config = federation.directory / "relay.yaml"
    run_command([sys.executable, "-m", "relay", "nodes", *words, "--config", config])


def register(federation: Federation, flwr_bin: Path, key: Path) -> None:
    """Have the SuperLink know the key of a node, which does not register itself if it was given one."""
    home = federation.directory / "homes" / key.name
    home.mkdir()
    commands.write_connection(home, federation.ports.control)
    argv: commands.Words = [flwr_bin / "flwr", "supernode", "register", key.with_suffix(".pub"), "local"]
    run_command(argv, commands.environment(flwr_bin, home))


def connect_to(node: Process, old: int, new: int) -> None:
    """Have a node that was not started yet connect to another port."""
    assert any(f"127.0.0.1:{old}" in word for word in node.argv)
    node.argv = [word.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}") for word in node.argv]


def until_ended(node: Process) -> None:
    until(lambda: not node.running, f"{node.name} stays", node)


def start_servers(federation: Federation) -> None:
    assert federation.relay is not None
    servers = [federation.superlink, federation.relay]
    for server in servers:
        server.start()
    wait_ready(servers)


def served(federation: Federation) -> Counter[str]:
    """Return how often the SuperLink was asked for what; it refused nothing."""
    found = ACCESS.findall(federation.superlink.output())
    assert {status for _, status in found} == {"200"}
    return Counter(path for path, _ in found)


def test_nodes_whose_key_is_allowed_get_in_and_no_other_reaches_the_superlink(
    flower: Callable[[str], Path],
    direct: RunResult,
    tmp_path: Path,
    authority: Authority,
    leftovers: Callable[[], list[str]],
) -> None:
    """The SuperLink knows the keys of three strangers, too; the other two make their own."""
    allowed, grpc_port = tmp_path / "allowed", free_port()
    generations = [
        Generation(flower(V42), Wire.HTTP_V1),
        Generation(flower(V39), Wire.GRPC),
        Generation(flower(V32), Wire.GRPC),
    ]
    others = [*generations, generations[0], Generation(flower(V39), Wire.GRPC_ADAPTER)]
    keys = [key_pair(tmp_path, f"node-{number}") for number in range(len(generations))]
    unknown = [key_pair(tmp_path, f"stranger-{number}") for number in range(len(generations))]
    common = {"tls": tls(authority), "auth": {"accept": ["node_signature"]}}
    with Federation(
        flower(V42),
        nodes=generations,
        relay_config={"node_keys": {"allow": str(allowed)}, "log": {"level": "debug"}},
        root_certificates=authority.files("ca")[0],
        superlink_log_level="DEBUG",
    ) as federation:
        _listen(
            federation,
            {"address": f"127.0.0.1:{federation.relay_port}", "wires": ["http_v1"], **common},
            {"address": f"127.0.0.1:{grpc_port}", "wires": ["grpc", "grpc_adapter"], **common},
        )
        strangers = [
            federation._supernode(
                NODES + number, generation, federation.relay_port, authority.files("ca")[0], ""
            )
            for number, generation in enumerate(others)
        ]
        for node, generation in zip(federation.supernodes + strangers, generations + others, strict=True):
            if generation.wire.grpc:
                connect_to(node, federation.relay_port, grpc_port)
        for node, key in zip(federation.supernodes + strangers[:NODES], keys + unknown, strict=True):
            node.argv += ["--auth-supernode-private-key", str(key)]
        for key in keys:
            change_list(federation, "allow", key.with_suffix(".pub"), "--name", key.name)
        start_servers(federation)
        for key in keys + unknown:
            register(federation, flower(V42), key)
        for node in federation.supernodes:
            node.start()
        for stranger in strangers:
            stranger.start(may_end=True)
        wait_ready(federation.supernodes)
        for stranger in strangers:
            until_ended(stranger)
        assert [stranger.returncode for stranger in strangers] == [0, 0, 0, 0, 1]
        causes = {"action": "refused", "cause": "not_allowed"}
        assert metric(federation, "relay_auth_refusals_total", **causes) == len(strangers)
        result = federation.run(RUN_CONFIG)

        change_list(federation, "disallow", "node-1")
        node = federation.supernodes[1]
        until_ended(node)
        assert node.returncode == 0, node.output()
        assert [other.running for other in federation.supernodes] == [True, False, True]
        federation.stop_supernodes()
        time.sleep(WRITTEN)
        passed_on = metric(federation, "relay_calls_total", source="upstream")
        assert metric(federation, "relay_auth_refusals_total", action="refused") == metric(
            federation, "relay_auth_refusals_total", **causes
        )
        federation.down()
        asked = served(federation)
        secrets = [private(key) for key in (*keys, *unknown, authority.files("relay")[1])]
        assert leaked(federation, secrets, signed=True) == []
    assert result.arrays == direct.arrays
    assert asked.total() == passed_on
    assert asked["activate-node"] == NODES
    assert asked["register-node"] == 0


def test_nodes_of_a_site_are_let_in_by_the_certificate_of_its_relay(
    flower: Callable[[str], Path],
    direct: RunResult,
    tmp_path: Path,
    authority: Authority,
    leftovers: Callable[[], list[str]],
) -> None:
    """No SuperNode can show a certificate: a relay at its site does, for nodes of every generation."""
    generations = [
        Generation(flower(V42), Wire.HTTP_V1),
        Generation(flower(V39), Wire.GRPC),
        Generation(flower(V32), Wire.REST_V0),
    ]
    for name in ("site-a", "site-b"):
        authority.issue_client(name)
    ca = authority.files("ca")[0]
    with ExitStack() as stack:
        entry = free_port()
        federation = stack.enter_context(
            Federation(
                flower(V42),
                nodes=generations,
                entry_port=entry,
                relay_config={
                    "client_certificates": {"allow": [{"match": "CN:site-a"}]},
                    "log": {"level": "debug"},
                },
                listener_config={
                    "wires": ["http_v1"],
                    "tls": tls(authority, client_ca=str(ca), client_certificates="needed"),
                    "auth": {"accept": ["certificate"]},
                },
                root_certificates=ca,
                superlink_log_level="DEBUG",
            )
        )
        start_servers(federation)
        sites = {
            name: stack.enter_context(_site(tmp_path, name, authority, federation.relay_port))
            for name in ("site-a", "site-b")
        }
        strangers = [
            federation._supernode(NODES + number, generation, entry, ca, "")
            for number, generation in enumerate(generations)
        ]
        for name, nodes in (("site-a", federation.supernodes), ("site-b", strangers)):
            for node, generation in zip(nodes, generations, strict=True):
                port = _grpc(sites[name]) if generation.wire.grpc else sites[name].port
                connect_to(node, entry, port)
                node.start(may_end=node in strangers)
        wait_ready(federation.supernodes)
        *ending, legacy = strangers
        for stranger in ending:
            until_ended(stranger)
        # Its own relay signs for it, and takes a first 401 for the fault of a clock: it is told to come back.
        until(lambda: "retrying" in legacy.output(), "the legacy node was not refused", legacy)
        assert "SuperNode ID: " not in legacy.output()
        legacy.stop()
        refused = metric(federation, "relay_auth_refusals_total", cause="certificate_not_allowed")
        assert refused >= len(strangers)
        result = federation.run(RUN_CONFIG)
        federation.stop_supernodes()
        assert metric(federation, "relay_auth_refusals_total", action="refused") == refused
        time.sleep(WRITTEN)
        passed_on = metric(federation, "relay_calls_total", source="upstream")
        assert sites["site-a"].complaints() == []
        assert [site.stop() for site in sites.values()] == [0, 0]
        federation.down()
        asked = served(federation)
        secrets = [private(authority.files(name)[1]) for name in ("relay", *sites)]
        assert leaked(federation, secrets, [site.log for site in sites.values()], signed=True) == []
    assert result.arrays == direct.arrays
    assert [node.returncode for node in federation.supernodes] == [0] * NODES
    assert asked.total() == passed_on
    assert asked["register-node"] == asked["activate-node"] == NODES


def _listen(federation: Federation, *listeners: dict[str, Any]) -> None:
    """Have the relay listen on these ports in place of its own."""
    path = federation.directory / "relay.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["listeners"] = list(listeners)
    path.write_text(yaml.safe_dump(settings))


def _site(directory: Path, name: str, authority: Authority, central: int) -> RelayProcess:
    """Return the relay of a site, which speaks to its nodes as a SuperLink with TLS does."""
    folder = directory / name
    folder.mkdir()
    certificate, key = map(str, authority.files(name))
    site = RelayProcess(folder, central, workers=1, limits={}, log={"level": "debug", "format": "json"})
    site.settings["upstream"] |= {
        "url": f"https://localhost:{central}",
        "ca_file": str(authority.files("ca")[0]),
        "certificate": certificate,
        "key": key,
    }
    site.settings["listeners"] = [
        {"address": f"127.0.0.1:{site.port}", "wires": ["http_v1", "rest_v0"], "tls": tls(authority)},
        {"address": f"127.0.0.1:{free_port()}", "wires": ["grpc"], "tls": tls(authority)},
    ]
    site.settings["signing"] = {"directory": str(folder / "signing"), "unauthenticated": True}
    return site


def _grpc(site: RelayProcess) -> int:
    return int(site.settings["listeners"][1]["address"].rpartition(":")[2])
