"""What the admin port says of nodes: all of them or those that are asked for, and how many of each kind."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from relay import admin_nodes
from relay.call import Wire
from relay.fleet import Method
from relay.stores.nodes import Facts, Nodes, Refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PULL = Method.PULL_MESSAGES


@pytest.fixture
def nodes() -> Nodes:
    return Nodes(256)


@pytest.fixture
async def client(nodes: Nodes) -> AsyncIterator[TestClient[Any, Any]]:
    app = web.Application()
    admin_nodes.add_routes(app, nodes)
    async with TestClient(TestServer(app)) as client:
        yield client


def note(nodes: Nodes, node_id: int, *, ago: float = 0.0, wire: Wire = Wire.HTTP_V1, **facts: Any) -> None:
    facts = {"version": "1.42.0", "accepted": True, **facts}
    nodes.note(node_id, PULL, time.monotonic() - ago, facts=Facts(wire, **facts))


async def ids(client: TestClient[Any, Any], query: str = "") -> list[str]:
    response = await client.get(f"/nodes{query}")
    assert response.status == 200, await response.text()
    return [node["node_id"] for node in (await response.json())["nodes"]]


async def test_a_node_is_shown_with_all_that_is_known(client: TestClient[Any, Any], nodes: Nodes) -> None:
    node_id = (1 << 64) - 1
    note(nodes, node_id, ago=10, peer="192.0.2.7", identity="b", tenant="north", key=b"k" * 32, skew=0.25)
    refused = Refused("unauthenticated:clock", Method.GET_RUN, time.monotonic() - 5)
    nodes.note(node_id, PULL, time.monotonic() - 5, refusals=1, refused=refused)
    shown = await (await client.get(f"/nodes/{node_id}")).json()
    for name, ago in (("last_call", 5), ("first_call", 10)):
        assert time.time() - datetime.fromisoformat(shown.pop(name)).timestamp() == pytest.approx(ago, abs=2)
    refusal = shown.pop("last_refusal")
    assert time.time() - datetime.fromisoformat(refusal.pop("at")).timestamp() == pytest.approx(5, abs=2)
    assert refusal == {"reason": "unauthenticated:clock", "method": "GetRun"}
    assert shown.pop("silent_for") == pytest.approx(5, abs=2)
    assert shown == {
        "node_id": "18446744073709551615",
        "accepted": True,
        "last_method": "PullMessages",
        "calls": 2,
        "refusals": 1,
        "wire": "http_v1",
        "version": "1.42.0",
        "address": "192.0.2.7",
        "identity": "b",
        "tenant": "north",
        "key": "SHA256:a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s",
        "clock_skew": 0.25,
    }


async def test_what_is_not_known_is_shown_as_nothing(client: TestClient[Any, Any], nodes: Nodes) -> None:
    nodes.note(7, PULL, time.monotonic())
    shown = await (await client.get("/nodes/7")).json()
    assert (shown["wire"], shown["key"], shown["clock_skew"], shown["last_refusal"]) == (None,) * 4
    assert (shown["accepted"], shown["version"]) == (False, "")
    nodes.note(0, Method.REGISTER_NODE, time.monotonic(), facts=Facts(Wire.HTTP_V1, key=b"k" * 32))
    assert None in await ids(client)


@pytest.mark.parametrize("node_id", ["1", "x", "-1", "9" * 30, "%00", "7.0", "\u0667"])
async def test_a_node_that_was_not_seen_is_said_to_be_none(
    client: TestClient[Any, Any], nodes: Nodes, node_id: str
) -> None:
    note(nodes, 7)
    response = await client.get(f"/nodes/{node_id}")
    assert response.status == 404
    assert "was seen" in (await response.json())["error"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["1", "2", "3", "4"]),
        ("?identity=b", ["1", "3"]),
        ("?tenant=north", ["3"]),
        ("?version=1.42", ["1", "2"]),
        ("?version=1.4", ["1", "2", "3"]),
        ("?wire=rest_v0", ["4"]),
        ("?silent_for=60s", ["2"]),
        ("?silent_for=1h", []),
        ("?accepted=true", ["1", "3", "4"]),
        ("?accepted=false", ["2"]),
        ("?identity=b&version=1.40", ["3"]),
        ("?limit=2", ["1", "2"]),
        ("?limit=2&offset=1", ["2", "3"]),
        ("?offset=9", []),
        ("?limit=0", []),
    ],
)
async def test_a_list_holds_those_that_are_asked_for(
    client: TestClient[Any, Any], nodes: Nodes, query: str, expected: list[str]
) -> None:
    note(nodes, 1, identity="b")
    note(nodes, 2, ago=100, accepted=False)
    note(nodes, 3, identity="b", tenant="north", version="1.40.1")
    note(nodes, 4, wire=Wire.REST_V0, version="python-requests/2.34.2")
    assert await ids(client, query) == expected
    everybody = {"?limit=2": 4, "?limit=2&offset=1": 4, "?offset=9": 4, "?limit=0": 4}
    said = await (await client.get(f"/nodes{query}")).json()
    assert said["total"] == everybody.get(query, len(expected))


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("?silent_for=soon", "silent_for must be a duration such as 60s or 5m"),
        ("?limit=x", "limit must be a whole number up to 10000"),
        ("?limit=10001", "limit must be a whole number up to 10000"),
        ("?offset=-1", "offset must be a whole number"),
        ("?accepted=yes", "accepted must be true or false"),
        ("?wire=http_v2", "wire must be one of http_v1, rest_v0, grpc, grpc_adapter"),
        ("?colour=red", "'colour' is no filter"),
    ],
)
async def test_a_filter_that_cannot_be_is_refused(
    client: TestClient[Any, Any], query: str, problem: str
) -> None:
    response = await client.get(f"/nodes{query}")
    assert response.status == 400
    assert problem in (await response.json())["error"]


async def test_nothing_can_be_changed(client: TestClient[Any, Any], nodes: Nodes) -> None:
    note(nodes, 1)
    for path in ("/nodes", "/nodes/1"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert (await client.request(method, path)).status == 405
    assert await ids(client) == ["1"]


def gauges(nodes: Nodes) -> dict[tuple[str, str], float]:
    (family,) = text_string_to_metric_families(admin_nodes.metrics(nodes).decode())
    assert (family.name, family.type) == ("relay_nodes", "gauge")
    return {(sample.labels["wire"], sample.labels["flwr_version"]): sample.value for sample in family.samples}


def test_nodes_of_the_last_minute_are_counted_by_wire_and_version(nodes: Nodes) -> None:
    assert gauges(nodes) == {}
    note(nodes, 1)
    note(nodes, 2, version="1.42.1")
    note(nodes, 3, version="1.40.0.dev1")
    note(nodes, 4, wire=Wire.REST_V0, version="1.32.1")
    note(nodes, 5, version="")
    note(nodes, 6, version="next")
    note(nodes, 7, ago=61)
    note(nodes, 8, accepted=False)
    nodes.note(9, PULL, time.monotonic())
    assert gauges(nodes) == {
        ("http_v1", "1.42"): 2,
        ("http_v1", "1.40"): 1,
        ("http_v1", "unknown"): 2,
        ("rest_v0", "unknown"): 1,
    }


def test_versions_that_nodes_make_up_are_bounded(nodes: Nodes) -> None:
    for number in range(40):
        note(nodes, number + 1, version=f"9.{number}")
    note(nodes, 100, version="9.39.1")
    counts = gauges(nodes)
    assert len(counts) == admin_nodes.VERSIONS + 1
    assert counts["http_v1", "9.39"] == 2, "what most nodes have is told apart"
    assert counts["http_v1", "other"] == 41 - 21
