"""Two hosts that share what they know of nodes, over a real Redis."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from relay.call import Wire
from relay.fleet import Method
from relay.stores.host import HostTable
from relay.stores.nodes import Facts, Nodes, Refused
from relay.stores.nodes_redis import PREFIX, NodesAcrossHosts
from tests.redis_server import RedisServer
from tests.sockets import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def host(redis: RedisServer, name: str) -> tuple[Nodes, NodesAcrossHosts]:
    nodes = Nodes(64)
    return nodes, NodesAcrossHosts(nodes, redis.url, "redis://shown", host=name, keep=60)


def facts(**said: object) -> Facts:
    return Facts(Wire.HTTP_V1, "1.42.0", "10.0.0.1", accepted=True, **said)  # type: ignore[arg-type]


def test_each_host_shows_the_nodes_of_all(redis: RedisServer) -> None:
    (one, here), (other, there) = host(redis, "a"), host(redis, "b")
    now = time.monotonic()
    one.note(1, Method.PULL_MESSAGES, now - 9, calls=3, facts=facts(identity="site-1"))
    other.note(
        1, Method.GET_RUN, now, calls=2, refusals=1, refused=Refused("overloaded", Method.GET_RUN, now)
    )
    other.note(1, Method.GET_RUN, now, calls=0, facts=facts(identity="site-1"))
    other.note(2, Method.PULL_MESSAGES, now, facts=facts(identity="site-2"))
    other.note(3, Method.PULL_MESSAGES, now, facts=Facts(Wire.HTTP_V1))  # the SuperLink never accepted it
    there.push()
    here.push()
    seen = {record.node_id: record for record in here.all()}
    assert set(seen) == {1, 2}
    assert (seen[1].calls, seen[1].refusals, seen[1].method) == (5, 1, Method.GET_RUN)
    assert seen[1].last == pytest.approx(now, abs=0.1)
    assert seen[1].first == pytest.approx(now - 9, abs=0.1)
    assert seen[1].refused is not None
    assert seen[1].refused.at == pytest.approx(now, abs=0.1)
    assert (found := here.get(2)) is not None
    assert found.facts is not None
    assert found.facts.identity == "site-2"
    assert here.get(4) is None
    assert {record.node_id for record in there.all()} == {1, 2, 3}


def test_garbage_of_another_host_is_passed_over(redis: RedisServer) -> None:
    _, here = host(redis, "a")
    here._client.hset(PREFIX + "b", "7", b"no record")
    assert list(here.all()) == []


def test_without_redis_a_host_shows_its_own(redis: RedisServer) -> None:
    nodes, here = host(redis, "a")
    nodes.note(1, Method.PULL_MESSAGES, time.monotonic(), facts=facts())
    redis.kill()
    here.push()
    assert [record.node_id for record in here.all()] == [1]
    assert here.get(1) is not None


async def test_one_worker_of_a_host_writes_and_not_at_each_tick(redis: RedisServer) -> None:
    nodes, here = host(redis, "a")
    nodes.note(1, Method.PULL_MESSAGES, time.monotonic(), facts=facts())
    table, written = HostTable(64), []
    here.push = lambda: written.append(1)  # type: ignore[method-assign]
    for _ in range(3):
        here.tick(table)
    await until(lambda: written)
    await asyncio.sleep(0.1)
    assert written == [1]
