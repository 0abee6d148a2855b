"""The settings become a relay: each part gets its own section, and a call goes all the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from shutil import copyfile
from typing import TYPE_CHECKING

import certifi
import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as TheMessage
from flwr.proto.message_pb2 import Metadata
from prometheus_client import REGISTRY
from structlog.testing import CapturingLogger

from relay.app import SPECS, build, chains, policies
from relay.call import Call, Ending, Payload, Reply, Source, Wire
from relay.fleet import MAX_REQUEST, Kind, Method
from relay.limits import Limits
from relay.pipeline import compose
from relay.policies import ORDER, Metrics, access_log
from relay.refusal import Reason, Refusal
from relay.settings import load
from relay.stores.host import HostTable
from relay.superlink import UPSTREAMS
from relay.wires.http import Front
from relay.wires.http_server import NodeServer
from tests.certificates import make_pair
from tests.sockets import Listener, Message, connect, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from relay.settings import Settings

MakeCall = Callable[..., Call]

V1, REST = "/v1/fleet/", "/api/v0/fleet/"
PULL, GET_RUN, PUSH_OBJECT = V1 + "pull-messages", V1 + "get-run", V1 + "push-object"

each_method = pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)


def settings(port: int = 1, **environ: str) -> Settings:
    """Return settings for a SuperLink at `port`; `environ` are RELAY_ variables without the prefix."""
    given = {
        "UPSTREAM__URL": f"http://127.0.0.1:{port}",
        "LISTENERS__0__ADDRESS": "127.0.0.1:0",
        "LIMITS__CHECK_CALLS": "false",  # most bodies here are no messages
    } | environ
    return load(None, {f"RELAY_{name}": value for name, value in given.items()})


@asynccontextmanager
async def running(chosen: Settings) -> AsyncIterator[list[int]]:
    """Run a relay on loopback; give the ports of its listeners."""
    relay = build(chosen, HostTable(64))
    await relay.prepare()
    loop = asyncio.get_running_loop()
    servers = [
        NodeServer(front, here.keepalive)
        for front, here in zip(relay.fronts, chosen.listeners, strict=True)
        if isinstance(front, Front)
    ]
    listening = [await loop.create_server(server, "127.0.0.1", 0) for server in servers]
    try:
        yield [server.sockets[0].getsockname()[1] for server in listening]
    finally:
        for listener, server in zip(listening, servers, strict=True):
            listener.close()
            await server.shutdown(0.1)
        await relay.close()


async def ask(port: int, path: str, body: bytes = b"", *headers: bytes, verb: bytes = b"POST") -> Message:
    """Send one request to the relay and return its answer."""
    peer = await connect(port)
    lines = [
        b"%b %b HTTP/1.1" % (verb, path.encode()),
        b"host: relay",
        b"content-type: application/protobuf",
        b"content-length: %d" % len(body),
        *headers,
    ]
    await peer.send_all(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    try:
        return await peer.message()
    finally:
        await peer.close()


# -- composition --------------------------------------------------------------------------------------


async def test_the_limits_of_the_settings_are_those_of_each_listener() -> None:
    given = {
        "MAX_BODY": "1MiB",
        "HEADER_COUNT": "30",
        "HEADER_SIZE": "2KiB",
        "HEAD_SIZE": "4KiB",
        "HEAD_TIMEOUT": "3s",
        "MIN_RATE": "5KiB",
        "RATE_WINDOW": "7s",
        "CONNECTIONS": "11",
        "CONNECTIONS_PER_PEER": "13",
        "REQUESTS__HEARTBEAT": "100",
    }
    relay = build(
        load(None, {f"RELAY_LIMITS__{name}": value for name, value in given.items()}), HostTable(64)
    )
    (front,) = relay.fronts
    assert isinstance(front, Front)
    bodies = {method: {Kind.PUSH: 1 << 20, Kind.HEARTBEAT: 100}.get(method.kind) for method in Method}
    assert front.limits == Limits(
        {method: size or MAX_REQUEST[method.kind] for method, size in bodies.items()},
        header_count=30,
        header_size=2048,
        head_size=4096,
        head_timeout=3.0,
        min_rate=5120,
        rate_window=7.0,
        connections=11,
        connections_per_peer=13,
    )


async def test_what_no_node_sends_is_refused_by_default() -> None:
    async with running(settings(LIMITS__CHECK_CALLS="true")) as (port,):
        answer = await ask(port, GET_RUN, b"\x08\x01")
        assert (answer.status, answer.body) == (503, b"malformed")


def test_the_policies_stand_in_their_order() -> None:
    assert tuple(type(policy) for policy in policies(settings(), HostTable(64), Metrics())) == ORDER


@pytest.mark.parametrize(("level", "lines"), [("debug", 1), ("info", 0), ("error", 0)])
async def test_every_call_is_written_down_at_the_level_debug_alone(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch, level: str, lines: int
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(access_log, "log", log)
    handler = compose(
        policies(settings(LOG__LEVEL=level), HostTable(64), Metrics()),
        _answering,
        Method.GET_RUN,
        buffer_limit=100,
    ).handler
    call = make_call(Method.GET_RUN)
    await handler(call)
    call.end(Ending("ok", seconds=0, source=Source.UPSTREAM))
    assert len(log.calls) == lines


@pytest.mark.parametrize("fault", [None, Refusal(Reason.MALFORMED)], ids=["sound", "broken"])
@pytest.mark.parametrize("wire", Wire, ids=lambda wire: wire.value)
@each_method
async def test_no_policy_looks_at_more_of_a_call_than_it_declares(
    make_call: MakeCall, method: Method, wire: Wire, fault: Refusal | None
) -> None:
    chosen = policies(settings(LOG__LEVEL="debug"), HostTable(64), Metrics())
    chain = compose(chosen, _answering, method, buffer_limit=1000, strict=True)
    call = make_call(method, b"\x0a\x02\x08\x07", wire=wire, fault=fault)
    with suppress(Refusal):
        await chain.handler(call)
    call.end(Ending("malformed" if fault else "ok", seconds=0, refusal=fault))


async def _answering(call: Call) -> Reply:
    return Reply(Payload(b"answer"), Source.UPSTREAM)


def test_every_wire_can_be_served_and_sent_to() -> None:
    assert set(SPECS) == set(UPSTREAMS) == {wire for wire in Wire if not wire.grpc}
    assert all(SPECS[wire].wire is wire for wire in SPECS)


def test_the_chains_are_explained_for_every_listener_wire_and_method() -> None:
    chosen = settings(LISTENERS__1__ADDRESS="[::1]:9")
    explained = list(chains(chosen))
    assert [(str(listener.address), wire, method) for listener, wire, method, _ in explained] == [
        (address, Wire.HTTP_V1, method) for address in ("127.0.0.1:0", "[::1]:9") for method in Method
    ]


def test_an_explained_chain_runs_from_the_metrics_to_the_superlink() -> None:
    chosen = settings(9, UPSTREAM__WIRE="rest_v0")
    for _, wire, _, chain in chains(chosen):
        assert wire is Wire.REST_V0
        assert chain.steps[0] == "metrics"
        assert chain.steps[-1] == "rest_v0 http://127.0.0.1:9"


def test_an_explained_chain_says_where_calls_are_limited() -> None:
    more = {"UPSTREAM__STANDBY": "[http://127.0.0.1:8]"}
    *_, chain = next(chains(settings(9, **more)))
    assert "shed" not in chain.steps
    assert chain.steps[-1] == "shed of each of http_v1 http://127.0.0.1:9 | http://127.0.0.1:8"
    *_, chain = next(chains(settings(9, **more, SHED__MODE="off")))
    assert chain.steps[-1] == "http_v1 http://127.0.0.1:9 | http://127.0.0.1:8"


async def test_an_explained_chain_cannot_be_called(make_call: MakeCall) -> None:
    _, _, method, chain = next(chains(settings()))
    with pytest.raises(AssertionError, match="not called"):
        await chain.handler(make_call(method))


async def test_building_a_relay_connects_to_nobody() -> None:
    relay = build(settings(), HostTable(64))
    assert relay.pool.state()["connections"] == 0
    await relay.pool.close()


async def test_a_relay_is_not_built_without_the_authorities_that_it_is_to_trust(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    copyfile(certifi.where(), ca_file)
    chosen = settings(UPSTREAM__URL="https://superlink", UPSTREAM__CA_FILE=str(ca_file))
    ca_file.unlink()
    with pytest.raises(OSError, match="No such file"):
        build(chosen, HostTable(64))


@pytest.mark.parametrize("wire", ["http_v1", "grpc"])
async def test_the_files_of_an_upstream_are_watched(tmp_path: Path, wire: str) -> None:
    ca_file, _ = make_pair(tmp_path)
    given = {"UPSTREAM__URL": "https://superlink", "UPSTREAM__CA_FILE": str(ca_file), "UPSTREAM__WIRE": wire}
    relay = build(settings(1, **given, LISTENERS__0__ADDRESS="127.0.0.1:9"), HostTable(64))
    assert relay.tls.upstream is not None
    await relay.close()


# -- a call all the way -------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire", "prefix"), [("http_v1", V1), ("rest_v0", REST)], ids=["http_v1", "rest_v0"])
@each_method
async def test_a_call_of_every_method_reaches_the_superlink_and_its_answer_the_node(
    wire: str, prefix: str, method: Method
) -> None:
    async with (
        Listener() as superlink,
        running(settings(superlink.port, UPSTREAM__WIRE=wire)) as (port,),
        asyncio.TaskGroup() as tasks,
    ):
        answer = tasks.create_task(ask(port, prefix + method.path, b"\x0a\x02\x08\x07"))
        peer = await superlink.accept()
        asked = await peer.message()
        await peer.send_all(response(b"\x08\x07"))
        assert (await answer).body == b"\x08\x07"
    assert asked.start == f"POST {prefix}{method.path} HTTP/1.1".encode()
    assert asked.body == b"\x0a\x02\x08\x07"


@pytest.mark.parametrize(("wire", "prefix"), [("http_v1", V1), ("rest_v0", REST)], ids=["http_v1", "rest_v0"])
@pytest.mark.parametrize("enabled", ["true", "false"], ids=["redelivery", "none"])
async def test_a_message_is_handed_out_again_if_that_was_set(wire: str, prefix: str, enabled: str) -> None:
    metadata = Metadata(run_id=9, message_id="ab" * 32, dst_node_id=7, ttl=3600.0, created_at=time.time())
    message = PullMessagesResponse(messages_list=[TheMessage(metadata=metadata)]).SerializeToString()
    poll, is_there = b"\x0a\x02\x08\x07", b"\x08\x01\x10\x01"
    chosen = {"UPSTREAM__WIRE": wire, "REDELIVERY__ENABLED": enabled}
    async with (
        Listener() as superlink,
        running(settings(superlink.port, **chosen)) as (port,),
        asyncio.TaskGroup() as tasks,
    ):
        first = tasks.create_task(ask(port, prefix + "pull-messages", poll))
        peer = await superlink.accept()
        await peer.message()
        await peer.send_all(response(message))
        assert (await first).body == message
        second = tasks.create_task(ask(port, prefix + "pull-messages", poll))
        await peer.message()
        await peer.send_all(response(b""))
        if enabled == "true":
            question = await peer.message()
            assert question.start == f"POST {prefix}pull-object HTTP/1.1".encode()
            await peer.send_all(response(is_there))
        answer = await second
        assert answer.body == (message if enabled == "true" else b"")
        assert answer.all(b"content-type") == [b"application/protobuf"]


async def test_a_listener_serves_its_own_wires_alone() -> None:
    chosen = settings(UPSTREAM__WIRE="rest_v0")
    async with Listener() as superlink, running(chosen) as (port,):
        assert (await ask(port, GET_RUN)).status == 503
        assert superlink.peers == []


async def test_in_an_emergency_too_only_calls_go_on() -> None:
    """What their bytes mean is not looked at then: SuperLink and nodes may be newer than the relay."""
    chosen = {"MODE": "pass_through", "LIMITS__CHECK_CALLS": "true"}
    async with Listener() as superlink, running(settings(superlink.port, **chosen)) as (port,):
        answer = await ask(port, PULL, b"", b"upgrade: h2c")
        assert (answer.status, answer.body) == (200, b"")
        assert (await ask(port, GET_RUN, b"", b"upgrade: h2c")).body == b"malformed"
        assert superlink.peers == []
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(ask(port, PULL, b"\xff"))
            peer = await superlink.accept()
            assert (await peer.message()).body == b"\xff"
            await peer.send_all(response(b"\x08\x07"))
            assert (await asking).body == b"\x08\x07"


async def test_each_listener_believes_its_own_proxies_alone() -> None:
    trusting = {"LISTENERS__0__TRUSTED_PROXIES": "[127.0.0.0/8]", "LISTENERS__1__ADDRESS": "127.0.0.1:0"}
    told: list[bytes] = []
    async with Listener() as superlink, running(settings(superlink.port, **trusting)) as ports:
        for port in ports:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ask(port, PULL, b"", b"x-forwarded-for: 203.0.113.9"))
                peer = superlink.peers[0] if superlink.peers else await superlink.accept()
                told.append((await peer.message()).one(b"x-forwarded-for"))
                await peer.send_all(response())
    assert told == [b"203.0.113.9, 127.0.0.1", b"127.0.0.1"]


async def test_a_body_over_the_limit_is_refused_before_the_superlink_hears_of_it() -> None:
    async with Listener() as superlink, running(settings(superlink.port, LIMITS__MAX_BODY="10")) as (port,):
        answer = await ask(port, PUSH_OBJECT, b"x" * 11)
        assert (answer.status, answer.body) == (403, b"too_large")
        assert superlink.peers == []


@pytest.mark.parametrize(
    ("variable", "path"),
    [
        ("UPSTREAM__RESPONSE_TIMEOUT", GET_RUN),
        ("UPSTREAM__HEARTBEAT_TIMEOUT", V1 + "send-node-heartbeat"),
    ],
    ids=["a call", "a heartbeat"],
)
async def test_a_superlink_that_says_nothing_is_waited_for_as_long_as_was_set(
    variable: str, path: str
) -> None:
    async with Listener() as superlink, running(settings(superlink.port, **{variable: "100ms"})) as (port,):
        async with asyncio.timeout(2):  # either default is longer
            answer = await ask(port, path)
    assert (answer.status, answer.body) == (503, b"upstream_timeout")


async def test_a_superlink_that_stops_in_the_middle_of_its_answer_is_waited_for_as_long_as_was_set() -> None:
    async with (
        Listener() as superlink,
        running(settings(superlink.port, UPSTREAM__IDLE_TIMEOUT="100ms")) as (port,),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(superlink.serve(response(b"x", size=9)))
        answer = await ask(port, GET_RUN)
    assert (answer.status, answer.body) == (503, b"upstream_timeout")


@pytest.mark.parametrize(
    ("keepalive", "connections"), [("50ms", 2), ("4s", 1)], ids=["is not used", "is used"]
)
async def test_a_connection_that_was_idle_for_longer_than_was_set_is_not_used_again(
    keepalive: str, connections: int
) -> None:
    chosen = {"UPSTREAM__KEEPALIVE": keepalive}
    async with Listener() as superlink, running(settings(superlink.port, **chosen)) as (port,):
        serving = asyncio.create_task(superlink.serve(response(), response()))
        await ask(port, PULL)
        await asyncio.sleep(0.2)
        if connections == 2:
            serving.cancel()
            serving = asyncio.create_task(superlink.serve(response()))
        await ask(port, PULL)
        await serving
        assert len(superlink.peers) == connections


async def test_a_node_that_stops_in_the_middle_of_its_body_is_waited_for_as_long_as_was_set() -> None:
    async with running(settings(UPSTREAM__IDLE_TIMEOUT="100ms")) as (port,):
        node = await connect(port)
        node.send(b"POST %b HTTP/1.1\r\nhost: relay\r\ncontent-length: 9\r\n" % PUSH_OBJECT.encode())
        node.send(b"content-type: application/protobuf\r\n\r\nx")
        answer = await node.message()
        await node.close()
    assert (answer.status, answer.body) == (503, b"malformed")


async def test_calls_share_as_many_connections_as_were_set_and_wait_for_one_as_long() -> None:
    limits = {"UPSTREAM__MAX_CONNECTIONS": "1", "UPSTREAM__QUEUE_TIMEOUT": "50ms", "RETRY__ENABLED": "false"}
    async with Listener() as superlink, running(settings(superlink.port, **limits)) as (port,):
        first = asyncio.create_task(ask(port, PULL))
        peer = await superlink.accept()
        second = await ask(port, GET_RUN)
        assert (second.status, second.body) == (503, b"overloaded")
        await peer.message()
        await peer.send_all(response(b"\x12\x00"))
        assert (await first).body == b"\x12\x00"
        assert len(superlink.peers) == 1


async def test_the_superlink_is_given_as_many_calls_at_a_time_as_were_set() -> None:
    chosen = {"SHED__MODE": "fixed", "SHED__LIMIT": "4"}
    async with Listener() as superlink, running(settings(superlink.port, **chosen)) as (port,):
        asking = [asyncio.create_task(ask(port, GET_RUN)) for _ in range(5)]
        peers = [await superlink.accept() for _ in range(4)]
        for peer in peers:
            await peer.message()
        await asyncio.sleep(0.1)
        assert len(superlink.peers) == 4
        await peers[0].send_all(response(b"\x08\x07"))
        await peers[0].message()
        for peer in peers:
            await peer.send_all(response(b"\x08\x07"))
        assert [answer.body for answer in await asyncio.gather(*asking)] == [b"\x08\x07"] * 5


async def test_each_of_several_addresses_is_given_as_many() -> None:
    """What one is slow with costs nobody a place at the other."""
    async with Listener() as first, Listener() as second:
        chosen = {
            "SHED__MODE": "fixed",
            "SHED__LIMIT": "4",
            "UPSTREAM__ADDRESSES": f"[http://127.0.0.1:{second.port}]",
            "UPSTREAM__SHARED_STATE": "true",
        }
        async with running(settings(first.port, **chosen)) as (port,):
            asking = [asyncio.create_task(ask(port, GET_RUN)) for _ in range(9)]
            peers = [await listener.accept() for listener in (first, second) for _ in range(4)]
            await asyncio.sleep(0.1)
            assert (len(first.peers), len(second.peers)) == (4, 4)
            for peer in peers:
                await peer.message()
                await peer.send_all(response(b"\x08\x07"))
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            for task in asking:
                task.cancel()


async def test_a_superlink_that_is_not_there_costs_no_node_its_life() -> None:
    async with Listener() as gone:
        pass
    once = {"UPSTREAM__CONNECT_TIMEOUT": "100ms", "RETRY__ENABLED": "false"}
    async with running(settings(gone.port, **once)) as (port,):
        assert (await ask(port, GET_RUN)).status == 503
        nothing = await ask(port, PULL)
        assert (nothing.status, nothing.body) == (200, b"")


@pytest.mark.parametrize(
    ("verb", "path", "status"), [(b"GET", "/", 404), (b"GET", PULL, 405)], ids=["no path", "no verb"]
)
async def test_a_request_that_is_no_call_is_counted_and_goes_no_further(
    verb: bytes, path: str, status: int
) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("relay_strays_total", {"answer": str(status)}) or 0.0

    before = counted()
    async with Listener() as superlink, running(settings(superlink.port)) as (port,):
        assert (await ask(port, path, verb=verb)).status == status
        assert superlink.peers == []
    assert counted() == before + 1
