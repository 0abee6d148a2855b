"""Two real relays and one real Redis: what one handed out the other hands out again, also when it is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.policies.test_redelivery_processes import SuperLink, pull
from tests.redis_server import RedisServer
from tests.relay_process import RelayProcess
from tests.served import Served

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, password="a-password") as server:
        yield server


def relay_at(directory: Path, upstream: int, redis: RedisServer) -> RelayProcess:
    directory.mkdir()
    return RelayProcess(directory, upstream, workers=2, redelivery={"redis": redis.url})


def pulled_until(relay: RelayProcess, message: bytes) -> None:
    """Pull as a node does, until the message comes."""
    end = time.monotonic() + 20
    while (got := pull(relay)) != message:
        assert got == b""
        assert time.monotonic() < end, "the message did not come"
        time.sleep(0.1)


def test_it_outlives_its_relay_and_an_outage_of_redis(tmp_path: Path, redis: RedisServer) -> None:
    superlink = SuperLink()
    with (
        Served(superlink) as served,
        relay_at(tmp_path / "one", served.port, redis) as one,
        relay_at(tmp_path / "other", served.port, redis) as other,
    ):
        assert pull(one) == superlink.message
        pulled_until(other, superlink.message)
        one.end()
        redis.freeze()
        began = time.monotonic()
        for _ in range(40):
            assert pull(other) == b""
        assert time.monotonic() - began < 15, "no poll waits for Redis"
        redis.thaw()
        pulled_until(other, superlink.message)
        time.sleep(0.3)
        assert pull(other) == b"", "three times in all"
        assert other.metric("relay_redelivery_total", outcome="redelivered") == 2
        assert other.metric("relay_redelivery_redis_total", outcome="failed") > 0
        for relay in (one, other):
            assert "a-password" not in relay.log.read_text()
