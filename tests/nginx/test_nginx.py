"""The edge as a whole: its configuration, which calls it passes on, and with what headers."""

from __future__ import annotations

import asyncio
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from relay.call import Wire
from relay.fleet import Method
from tests.nginx.edge import (
    CALLS,
    EMPTY,
    NOT_FOUND,
    OK,
    PULL,
    PUSH,
    answer,
    answers,
    path_of,
    play,
    replace,
    request,
    shipped,
)
from tests.relay_process import RelayProcess, free_port
from tests.sockets import Message, Peer, response

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.nginx.edge import Certificates, Edge

    StartEdge = Callable[..., Edge]


@pytest.mark.parametrize("options", [False, True])
def test_shipped_configuration(
    nginx: str, version: tuple[int, ...], certificates: Certificates, tmp_path: Path, options: bool
) -> None:
    """It is valid as it is, and with every optional line that stands in it."""
    config = shipped(tmp_path, certificates)
    site = config.parent / "site"
    if options:
        lines = "listen [0-9]|server |set_real_ip_from|real_ip_header|limit_|include grpc"
        if version >= (1, 25, 1):
            lines += "|http2 on"
            replace(site / "grpc" / "listen.conf", (" http2 default", " default"))
        if version >= (1, 27, 4):
            lines += "|keepalive_min_timeout"
        for file in config.parent.rglob("*.conf"):
            file.write_text(re.sub(f"^( *)# ({lines})", r"\1\2", file.read_text(), flags=re.MULTILINE))
    # `nginx -t` binds what it would listen on.
    for file in (site / "listen.conf", site / "grpc" / "listen.conf"):
        listen = file.read_text()
        listen = re.sub(
            r"^listen \d+", lambda _: f"listen 127.0.0.1:{free_port()}", listen, flags=re.MULTILINE
        )
        file.write_text(listen)
    replace(site / "status.conf", (":8081", f":{free_port()}"))
    command = [nginx, "-t", "-p", str(tmp_path), "-e", str(tmp_path / "start.log"), "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


# -- which calls ----------------------------------------------------------------------------------------


async def test_fleet_paths(start_edge: StartEdge) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        paths = [path_of(wire, method) for wire, method in CALLS]
        # Versions to come are the relay's to answer: a 404 would end their nodes.
        paths += ["/v2/fleet/pull-messages", "/api/v1/fleet/pull-messages", PULL + "/", PULL + "?a=%20b"]
        for path in paths:
            assert await edge.ask(request(path)) == OK
        assert [message.start for message in relay.seen] == [
            f"POST {path} HTTP/1.1".encode() for path in paths
        ]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/metrics",
        "/nginx_status",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/x/../../control/list-runs",
        "/v1/fleet/%2e%2e/runtime/acquire-task",
        "/v1/fleet/pull-messages/more",
        "/api/fleet/pull-messages",
        "/V1/fleet/pull-messages",
        "/prefix/v1/fleet/pull-messages",
    ],
)
async def test_stray_paths(start_edge: StartEdge, path: str) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        for verb in ("GET", "POST"):
            assert await edge.ask(request(path, verb=verb)) == NOT_FOUND
        assert relay.seen == []


async def test_where_errors_go_is_no_path(start_edge: StartEdge) -> None:
    edge = start_edge(free_port())
    assert (await edge.ask(request("/.edge/closed"))).status == 404


# -- headers --------------------------------------------------------------------------------------------

NODE = {
    b"user-agent": b"python-httpx/0.28.1",
    b"accept": b"application/protobuf",
    b"accept-encoding": b"gzip, deflate",
    b"flwr-package-name": b"flwr",
    b"flwr-package-version": b"1.42.0",
    b"flwr-component-name": b"SuperNode",
    b"flwr-public-key": b"LS0tLS1CRUdJTiBQVUJMSUMgS0VZLS0tLS0K" * 8 + b"==",
    b"flwr-timestamp": b"2026-10-24T07:31:05.123456+00:00",
    b"flwr-signature": b"MGUCMQDx+/" * 14 + b"==",
    b"authorization": b"Basic " + 900 * b"dXNlcjprZXk=",
}


async def test_headers_of_a_node(start_edge: StartEdge) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        more = b"".join(b"%b: %b\r\n" % pair for pair in NODE.items())
        assert await edge.ask(request(PUSH, b"body", more=more)) == OK
        (message,) = relay.seen
        have = {name: value for name, value in message.headers if name in NODE}
        assert have == NODE
        assert message.one(b"content-type") == b"application/protobuf"
        assert message.one(b"content-length") == b"4"
        assert message.all(b"connection") == []
        assert len(message.headers) == len(NODE) + 8, "Host, X-Request-Id and four forwarding headers are new"


@pytest.mark.parametrize("tls", [False, True])
async def test_forwarding_headers(start_edge: StartEdge, tls: bool) -> None:
    forged = (
        b"x-forwarded-for: 192.0.2.1\r\nx-forwarded-proto: gopher\r\nx-forwarded-host: evil\r\n"
        b"forwarded: for=192.0.2.1\r\nx-request-id: of the node\r\n"
    )
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        assert await edge.ask(request(PULL, more=forged), tls=tls) == OK
        assert await edge.ask(request(PULL, more=b"x-request-id: node-7.1\r\n"), tls=tls) == OK
        first, second = relay.seen
        proto = b"https" if tls else b"http"
        assert first.one(b"host") == b"edge.example"
        assert first.one(b"x-forwarded-for") == b"127.0.0.1"
        assert first.one(b"x-forwarded-proto") == proto
        assert first.one(b"x-forwarded-host") == b"edge.example"
        assert first.one(b"forwarded") == b"for=127.0.0.1;proto=" + proto
        assert len(first.one(b"x-request-id")) == 32, "what is no sound id is replaced"
        assert second.one(b"x-request-id") == b"node-7.1"


async def test_ipv6_in_forwarded(start_edge: StartEdge) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server="set_real_ip_from 127.0.0.1; real_ip_header x-real-ip;")
        assert await edge.ask(request(PULL, more=b"x-real-ip: 2001:db8::7\r\n")) == OK
        (message,) = relay.seen
        assert message.one(b"forwarded") == b'for="[2001:db8::7]";proto=http'
        assert message.one(b"x-forwarded-for") == b"2001:db8::7"


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 413, 429, 500, 502, 503, 504])
async def test_answer_of_the_relay(start_edge: StartEdge, status: int) -> None:
    """It passes untouched, whatever it is."""
    more = (
        b"flwr-version-incompatibility-message: update\r\nx-request-id: r-1\r\nlocation: http://relays/x\r\n"
    )
    told = response(
        b"why",
        status=b"%d Because" % status,
        content_type=b"text/plain; charset=utf-8",
        more=more + b"x-accel-redirect: /docs\r\nx-accel-buffering: yes\r\n",
    )
    async with play(answers(told)) as relay:
        edge = start_edge(relay.port)
        for wire in (Wire.HTTP_V1, Wire.REST_V0):
            peer = await edge.connect()
            peer.send(request(path_of(wire, Method.PULL_MESSAGES)))
            message = await peer.message()
            assert (message.status, message.body) == (status, b"why")
            assert message.one(b"content-type") == b"text/plain; charset=utf-8"
            assert message.one(b"flwr-version-incompatibility-message") == b"update"
            assert message.one(b"x-request-id") == b"r-1"
            assert message.one(b"location") == b"http://relays/x"


# -- with a real relay ----------------------------------------------------------------------------------


async def test_answers_of_a_real_relay(start_edge: StartEdge, tmp_path: Path) -> None:
    """Behind the edge a node is told what the relay tells it without one, for every method of both wires."""
    for name in ("v1", "rest"):
        (tmp_path / name).mkdir()
    both = {
        Wire.HTTP_V1: RelayProcess(tmp_path / "v1", free_port(), workers=1, mode="maintenance"),
        Wire.REST_V0: RelayProcess(
            tmp_path / "rest", free_port(), workers=1, wire="rest_v0", mode="maintenance"
        ),
    }
    for wire, relay in both.items():
        with relay:
            edge = start_edge(relay.port)
            for method in Method:
                data = request(path_of(wire, method), b"x")
                direct = Peer(*await asyncio.open_connection("127.0.0.1", relay.port))
                direct.send(data)
                assert await edge.ask(data) == await answer(direct), method
                await direct.close()
            assert await edge.ask(request(path_of(wire, Method.PULL_MESSAGES))) == EMPTY


async def test_node_address_at_a_real_relay(start_edge: StartEdge, tmp_path: Path) -> None:
    """A relay that trusts the edge tells the SuperLink of the node, as it was told."""
    seen: list[Message] = []
    async with play(answers(response(b"ok"))) as superlink:
        relay = RelayProcess(tmp_path, superlink.port, workers=1)
        relay.settings["listeners"][0]["trusted_proxies"] = ["127.0.0.0/8"]
        with relay:
            edge = start_edge(relay.port, server="set_real_ip_from 127.0.0.1; real_ip_header x-real-ip;")
            assert await edge.ask(request(PUSH, b"body", more=b"x-real-ip: 192.0.2.7\r\n"), tls=True) == OK
        seen += superlink.seen
    (message,) = seen
    assert message.body == b"body"
    assert message.one(b"x-forwarded-for") == b"192.0.2.7, 127.0.0.1"
    assert message.one(b"x-forwarded-proto") == b"https"
    assert message.one(b"x-forwarded-host") == b"edge.example"
    assert message.one(b"forwarded").startswith(b"for=192.0.2.7;proto=https, for=127.0.0.1;")


async def test_stalled_body_at_a_real_relay(start_edge: StartEdge, tmp_path: Path) -> None:
    """The relay's patience ends before nginx's, which could only close; that would end a REST heartbeat."""
    relay = RelayProcess(tmp_path, free_port(), workers=1, wire="rest_v0")
    relay.settings["upstream"]["idle_timeout"] = "300ms"
    with relay:
        edge = start_edge(relay.port)
        data = request(path_of(Wire.REST_V0, Method.SEND_NODE_HEARTBEAT), b"12345")[:-1]
        assert (await edge.ask(data)).status == 503
