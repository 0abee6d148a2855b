"""Breakers on the admin port: what they are, and how an operator closes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from relay.admin_breakers import add_routes
from relay.settings import load
from relay.stores.upstreams import CLOSED, OPEN, UpstreamTable
from relay.superlink import superlink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ADDRESS = "127.0.0.1:8000"


@pytest.fixture
def table() -> UpstreamTable:
    return UpstreamTable()


@pytest.fixture
async def client(table: UpstreamTable) -> AsyncIterator[TestClient[Any, Any]]:
    balance = superlink(load(None, {}), table, None)
    app = web.Application()
    add_routes(app, balance)
    async with TestClient(TestServer(app)) as client:
        yield client
    await balance.close()


async def test_breakers_are_shown(client: TestClient[Any, Any], table: UpstreamTable) -> None:
    closed = {"address": ADDRESS, "state": "closed", "failures_in_a_row": 0, "seconds": None}
    assert await (await client.get("/breakers")).json() == [closed]
    table.change(ADDRESS, lambda state: state._replace(breaker=OPEN, turned=1.0))
    (shown,) = await (await client.get("/breakers")).json()
    assert shown["state"] == "open"
    assert shown["seconds"] > 0


async def test_a_reset_closes_a_breaker_for_all_workers(
    client: TestClient[Any, Any], table: UpstreamTable
) -> None:
    table.change(ADDRESS, lambda state: state._replace(breaker=OPEN, turned=1.0))
    answer = await client.post(f"/breakers/{ADDRESS}/reset")
    assert answer.status == 200
    assert (await answer.json())["state"] == "closed"
    assert table.get(ADDRESS).breaker == CLOSED


async def test_a_reset_of_an_unknown_address_says_which_there_are(client: TestClient[Any, Any]) -> None:
    answer = await client.post("/breakers/other:1/reset")
    assert answer.status == 404
    assert (await answer.json())["known"] == [ADDRESS]


async def test_a_look_resets_nothing(client: TestClient[Any, Any], table: UpstreamTable) -> None:
    table.change(ADDRESS, lambda state: state._replace(breaker=OPEN, turned=1.0))
    assert (await client.get(f"/breakers/{ADDRESS}/reset")).status == 405
    assert table.get(ADDRESS).breaker == OPEN
