"""Active checks: what counts as an answer, who asks, and when an address is down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from relay.stores.upstreams import UpstreamTable
from relay.superlink import QUESTIONS, UPSTREAMS
from relay.upstreams.check import Check, Question
from tests.sockets import PATIENCE, Listener, response, until

if TYPE_CHECKING:
    from relay.upstreams.pool import Pool

    MakePool = Callable[..., Pool]

HEALTH = Question("/health", 200)


def check(
    pool: Pool,
    table: UpstreamTable,
    *,
    interval: float = 60,
    timeout: float = PATIENCE,
    told: list[int] | None = None,
) -> Check:
    told = [] if told is None else told
    return Check(
        pool,
        table,
        HEALTH,
        interval=interval,
        timeout=timeout,
        failures=2,
        on_result=lambda: told.append(1),
    )


async def test_a_superlink_is_asked_what_it_answers_by_itself(
    make_pool: MakePool, upstream: Listener
) -> None:
    asking = asyncio.ensure_future(check(make_pool(), UpstreamTable()).ask())
    peer = await upstream.accept()
    asked = await peer.message()
    assert asked.start == b"GET /health HTTP/1.1"
    assert asked.one(b"host") == b"127.0.0.1:%d" % upstream.port
    await peer.send_all(response())
    assert await asking is None


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (response(status=b"503 Busy"), "answered with 503"),
        (b"SSH-2.0-OpenSSH_9.2\r\n" * 9, "no HTTP"),
        (b"", "closed"),
        (None, "no answer within"),
    ],
    ids=["503", "no HTTP", "closed", "silent"],
)
async def test_anything_else_is_a_miss(
    make_pool: MakePool, upstream: Listener, answer: bytes | None, why: str
) -> None:
    timeout = 0.5 if answer is None else PATIENCE
    asking = asyncio.ensure_future(check(make_pool(), UpstreamTable(), timeout=timeout).ask())
    peer = await upstream.accept()
    await peer.message()
    if answer is not None:
        await peer.send_all(answer)
        peer.writer.close()
    assert why in (await asking or "")


async def test_a_closed_port_is_a_miss(make_pool: MakePool) -> None:
    async with Listener() as gone:
        pass
    assert "no connection" in (await check(make_pool(port=gone.port), UpstreamTable()).ask() or "")


async def test_a_name_that_stands_for_nothing_is_a_miss(make_pool: MakePool) -> None:
    found = await check(make_pool(host="nobody.invalid", port=1), UpstreamTable()).ask()
    assert "no connection" in (found or "")


async def test_an_address_is_down_after_misses_in_a_row_and_up_with_the_first_answer(
    make_pool: MakePool,
) -> None:
    listener = Listener()
    async with listener:
        port = listener.port
    table, told = UpstreamTable(), list[int]()
    pool = make_pool(port=port)
    name = pool.name
    one = check(pool, table, interval=0.0001, told=told)

    async def ask() -> None:
        await asyncio.sleep(0.001)
        one.tick()
        await until(lambda: one._asking is None)

    await ask()
    assert (table.get(name).down, table.get(name).checked) == (False, True)
    await ask()
    since = table.get(name).down_since
    assert table.get(name).down
    await ask()
    assert table.get(name).down_since == since
    assert len(told) == 3
    server = await asyncio.start_server(_healthy, "127.0.0.1", port)
    await ask()
    assert not table.get(name).down
    assert table.get(name).misses == 0
    server.close()


async def _healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(response())
    writer.close()


async def test_one_worker_of_the_host_asks(make_pool: MakePool, upstream: Listener) -> None:
    table = UpstreamTable()
    checks = [check(make_pool(), table) for _ in range(4)]
    for _ in range(3):
        for one in checks:
            one.tick()
    await upstream.accept()
    await asyncio.sleep(0.05)
    assert len(upstream.peers) == 1
    for one in checks:
        one.close()
    await until(lambda: all(one._asking is None for one in checks))


async def test_checks_have_connections_of_their_own(make_pool: MakePool, upstream: Listener) -> None:
    """So that they are neither refused in an overload nor take a call's place."""
    pool = make_pool(max_connections=1)
    held = await pool.acquire()
    await upstream.accept()
    asking = asyncio.ensure_future(check(pool, UpstreamTable()).ask())
    peer = await upstream.accept()
    await peer.message()
    await peer.send_all(response())
    assert await asking is None
    assert pool.state()["connections"] == 1
    held.abort()


def test_each_wire_has_its_question() -> None:
    assert set(QUESTIONS) == set(UPSTREAMS)  # gRPC has one address, which nobody checks
