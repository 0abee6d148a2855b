"""Certificates of `flwr-relay certs create`, and SuperNodes that are given the authority's: they connect."""

from __future__ import annotations

import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from relay.authority import Authority
from relay.call import Payload, Reply, Source, Wire
from relay.demo.flower import environment, supernode_argv
from relay.fleet import Method
from tests.relay_process import free_port
from tests.served import Served

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relay.call import Call

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180), pytest.mark.xdist_group("flower")]

START_SECONDS = 90.0


@pytest.mark.parametrize(
    ("wire", "requirement"),
    [(Wire.HTTP_V1, "flwr==1.42.0"), (Wire.REST_V0, "flwr[rest]==1.32.1")],
    ids=["http_v1", "rest_v0"],
)
def test_an_unmodified_supernode_trusts_the_development_authority(
    tmp_path: Path, flower: Callable[[str], Path], wire: Wire, requirement: str
) -> None:
    commands = flower(requirement)
    authority = Authority(tmp_path / "ca")
    authority.issue_relay(["relay.example", "127.0.0.1"])
    joined = threading.Event()
    calls: list[tuple[Wire, Method]] = []

    async def note(call: Call) -> Reply:
        calls.append((call.wire, call.method))
        joined.set()
        return Reply(Payload(), Source.LOCAL)

    home = tmp_path / "home"
    home.mkdir()
    log = tmp_path / "node.log"
    with Served(note, pair=authority.files("relay")) as served, log.open("wb") as output:
        argv = supernode_argv(
            wire, commands, served.port, free_port(), {}, root_certificates=authority.files("ca")[0]
        )
        with subprocess.Popen(argv, env=environment(commands, home), stdout=output, stderr=output) as node:
            try:
                assert joined.wait(START_SECONDS), log.read_text()
            finally:
                node.kill()
    assert calls[0] == (wire, Method.REGISTER_NODE)
    assert "ertificate" not in log.read_text()
