"""Who is let in by a whole relay: each listener asks for what it was told to, but in maintenance."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from relay.app import build, chains
from relay.call import Wire
from relay.credentials.keys.file import FileKeys
from relay.credentials.keys.key import generate
from relay.credentials.keys.record import KeyRecord, hashed, pepper_name
from relay.fleet import Method
from relay.settings import Settings
from relay.stores.host import HostTable
from relay.wireformat import encode_bytes
from relay.wires import grpc_adapter
from relay.wires.grpc_fleet import GrpcFront
from relay.wires.grpc_server import GrpcServer
from tests.grpc_ends import GrpcNode, GrpcSuperLink
from tests.sockets import CutError, Listener, response
from tests.test_app import GET_RUN, PULL, REST, V1, ask, running
from tests.test_app import settings as settings_for

HEARTBEAT = V1 + "send-node-heartbeat"
KEY = generate()
PEPPER = b"0123456789abcdef"
BASIC = b"Authorization: Basic " + base64.b64encode(f"node-a:{KEY}".encode())
WRONG = b"X-API-Key: " + str(generate()).encode()


def settings(tmp_path: Path, port: int, **environ: str) -> Settings:
    keys = tmp_path / "keys.jsonl"
    pepper = PEPPER if "KEYS__PEPPER_FILE" in environ else b""
    record = KeyRecord(KEY.id.decode(), "node-a", hashed(KEY.secret, pepper), 1, pepper=pepper_name(pepper))
    FileKeys(keys).change(lambda records: records.update({record.id: record}), init=True)
    given = {"LISTENERS__0__AUTH__ACCEPT": "[api_key]", "KEYS__FILE": str(keys), "RETRY__ENABLED": "false"}
    return settings_for(port, **(given | environ))


@pytest.mark.parametrize("mode", ["normal", "pass_through"])
async def test_a_key_lets_in_and_stays_here_in_every_mode_that_serves(tmp_path: Path, mode: str) -> None:
    async with Listener() as superlink, running(settings(tmp_path, superlink.port, MODE=mode)) as (port,):
        for headers in ((), (WRONG,)):
            answer = await ask(port, PULL, b"", *headers)
            assert (answer.status, answer.body) == (401, b"unauthenticated")
        assert superlink.peers == []
        asking = asyncio.create_task(ask(port, PULL, b"", BASIC, b"flwr-signature: proof"))
        peer = await superlink.accept()
        sent = await peer.message()
        await peer.send_all(response(b"\x12\x00"))
        assert (await asking).body == b"\x12\x00"
        assert sent.all(b"authorization") == []
        assert sent.one(b"flwr-signature") == b"proof"


@pytest.mark.parametrize("mode", ["normal", "pass_through"])
@pytest.mark.parametrize("wire", ["http_v1", "rest_v0"])
@pytest.mark.parametrize("forward", [False, True])
async def test_a_credential_that_nobody_asks_for_stays_here_unless_it_is_to_be_sent_on(
    mode: str, wire: str, forward: bool
) -> None:
    given = {"MODE": mode, "UPSTREAM__WIRE": wire}
    if forward:
        given["LISTENERS__0__AUTH__FORWARD"] = "true"
    prefix = V1 if wire == "http_v1" else REST
    async with Listener() as superlink, running(settings_for(superlink.port, **given)) as (port,):
        asking = asyncio.create_task(
            ask(port, prefix + "pull-messages", b"", BASIC, b"X-api-KEY: secret", b"flwr-signature: proof")
        )
        peer = await superlink.accept()
        sent = await peer.message()
        await peer.send_all(response(b"\x12\x00"))
        assert (await asking).body == b"\x12\x00"
        assert len(sent.all(b"authorization")) == forward
        assert sent.all(b"x-api-key") == ([b"secret"] if forward else [])
        assert sent.one(b"flwr-signature") == b"proof"


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("wire", [Wire.GRPC, Wire.GRPC_ADAPTER])
async def test_a_credential_that_nobody_asks_for_stays_here_over_grpc_too(wire: Wire, forward: bool) -> None:
    given = {
        "UPSTREAM__WIRE": "grpc",
        "LISTENERS__0__ADDRESS": "127.0.0.1:1",
        **({"LISTENERS__0__AUTH__FORWARD": "true"} if forward else {}),
    }
    secrets: list[tuple[str, str | bytes]] = [("authorization", "Bearer secret"), ("x-api-key", "secret")]
    async with GrpcSuperLink() as superlink:
        relay = build(settings_for(superlink.port, **given), HostTable(64))
        (front,) = relay.fronts
        assert isinstance(front, GrpcFront)
        server = GrpcServer(front, "127.0.0.1", 0, keepalive=75.0)
        await server.start()
        try:
            async with GrpcNode(server.port) as node:
                path = Method.PULL_MESSAGES if wire is Wire.GRPC else grpc_adapter.PATH
                body = b"" if wire is Wire.GRPC else encode_bytes(2, b"PullMessagesRequest")
                answer = await node.ask(path, body, [*secrets, ("flwr-timestamp", "now")])
            assert answer.code == "OK"
        finally:
            await server.drain(0.0)
            await relay.close()
    (asked,) = superlink.asked
    assert [pair for pair in asked.metadata if pair in secrets] == (secrets if forward else [])
    assert ("flwr-timestamp", "now") in asked.metadata


async def test_a_call_in_maintenance_needs_no_credential(tmp_path: Path) -> None:
    async with running(settings(tmp_path, 1, MODE="maintenance")) as (port,):
        assert (await ask(port, HEARTBEAT)).body == b"draining"


async def test_a_credential_is_sent_on_where_that_is_wanted(tmp_path: Path) -> None:
    forwarding = {"LISTENERS__0__AUTH__FORWARD": "true"}
    async with Listener() as superlink, running(settings(tmp_path, superlink.port, **forwarding)) as (port,):
        asking = asyncio.create_task(ask(port, PULL, b"", BASIC))
        peer = await superlink.accept()
        assert (await peer.message()).one(b"authorization") == BASIC.partition(b": ")[2]
        await peer.send_all(response())
        await asking


async def test_each_listener_asks_for_what_it_was_told_to(tmp_path: Path) -> None:
    others = {
        "LISTENERS__1__ADDRESS": "127.0.0.1:0",
        "LISTENERS__2__ADDRESS": "127.0.0.1:0",
        "LISTENERS__2__AUTH": "{accept: [api_key], strangers: drop}",
        "LISTENERS__3__ADDRESS": "127.0.0.1:0",
        "LISTENERS__3__AUTH": "{accept: [api_key], enforce: false}",
    }
    async with Listener() as gone:
        pass
    async with running(settings(tmp_path, gone.port, **others)) as (asks, asks_nobody, drops, counts):
        assert (await ask(asks, HEARTBEAT)).body == b"unauthenticated"
        assert (await ask(asks_nobody, HEARTBEAT)).body == b"upstream_down"
        assert (await ask(drops, HEARTBEAT)).body == b"stranger"  # a close would silence a legacy node
        with pytest.raises(CutError):
            await ask(drops, PULL)
        assert (await ask(counts, HEARTBEAT)).body == b"upstream_down"
        assert (await ask(drops, HEARTBEAT, b"", BASIC)).body == b"upstream_down"


async def test_a_pepper_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_bytes(PEPPER + b"\n")
    chosen = settings(tmp_path, 1, KEYS__PEPPER_FILE=str(tmp_path / "pepper"))
    async with running(chosen) as (port,):
        assert (await ask(port, HEARTBEAT, b"", BASIC)).body == b"upstream_down"
        assert (await ask(port, HEARTBEAT, b"", WRONG)).body == b"unauthenticated"


@pytest.mark.parametrize(("path", "status", "body"), [(PULL, 200, b""), (GET_RUN, 503, b"upstream_down")])
async def test_while_no_keys_can_be_read_every_node_lives(
    tmp_path: Path, path: str, status: int, body: bytes
) -> None:
    chosen = settings(tmp_path, 1)
    (tmp_path / "keys.jsonl").write_text("garbage")
    async with running(chosen) as (port,):
        for headers in ((BASIC,), (WRONG,)):
            answer = await ask(port, path, b"", *headers)
            assert (answer.status, answer.body) == (status, body)


async def test_a_legacy_node_that_is_a_stranger_is_told_what_ends_it_or_nothing(tmp_path: Path) -> None:
    legacy = {
        "UPSTREAM__WIRE": "rest_v0",
        "LISTENERS__1__ADDRESS": "127.0.0.1:0",
        "LISTENERS__1__AUTH": "{accept: [api_key], strangers: drop}",
    }
    async with running(settings(tmp_path, 1, **legacy)) as (refuses, drops):
        assert (await ask(refuses, "/api/v0/fleet/pull-messages")).status == 401
        assert (await ask(refuses, "/api/v0/fleet/pull-messages", b"", BASIC)).status == 200
        with pytest.raises(CutError):
            await ask(drops, "/api/v0/fleet/pull-messages")
        assert (await ask(drops, "/api/v0/fleet/send-node-heartbeat")).status == 503


def test_the_chains_say_where_somebody_is_asked(tmp_path: Path) -> None:
    chosen = settings(tmp_path, 1, LISTENERS__1__ADDRESS="127.0.0.1:9")
    asked = {
        (str(listener.address), "auth" in chain.steps)
        for listener, wire, method, chain in chains(chosen)
        if wire is Wire.HTTP_V1 and method in Method
    }
    assert asked == {("127.0.0.1:0", True), ("127.0.0.1:9", False)}
