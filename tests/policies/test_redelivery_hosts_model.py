"""Redelivery of two hosts with one real Redis, against the model of `test_redelivery_model`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from relay.policies.redelivery import Redelivery
from relay.stores import kept_hosts
from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.kept_hosts import KeptOnHosts
from relay.stores.kept_redis import KeptRedis
from relay.stores.records import HostRecords
from tests.policies.test_redelivery_model import (
    DELIVERIES,
    HARMLESS,
    HOSTS,
    NODES,
    WORKERS,
    Event,
    Host,
    Schedule,
    World,
    _id,
    schedules,
)
from tests.redis_server import RedisServer

pytestmark = pytest.mark.timeout(300)

#: Of a claim whose worker was killed; real seconds, while the clock of the model jumps.
LEASE = 0.02


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is not given up because this machine is slow."""
    monkeypatch.setattr(kept_hosts, "PATIENCE", 30.0)


class SharedHost(Host):
    """A host whose workers share what they keep with other hosts; the first of them listens."""

    def __init__(self, clock: Any, url: str) -> None:
        records, table = HostRecords(512, PIECE), HostTable(64)
        self.workers = [
            Redelivery(
                enabled=True,
                max_size=4096,
                deliveries=DELIVERIES,
                records=records,
                table=table,
                redis=KeptRedis(url, "", lease=LEASE),
                now=clock,
            )
            for _ in range(WORKERS)
        ]
        self.workers[0].start()

    async def told(self) -> None:
        for worker in self.workers:
            assert isinstance(worker._kept, KeptOnHosts)
            while worker._kept._link._telling is not None:
                await asyncio.sleep(0)

    async def close(self) -> None:
        for worker in self.workers:
            await worker.close()


class SharedWorld(World):
    """Hosts that lose their memory lose no message: Redis has it."""

    def __init__(self, url: str) -> None:
        super().__init__(0)
        self.url = url
        self.hosts = [SharedHost(self.clock, url) for _ in range(HOSTS)]
        self.restarted = 0

    async def live(self, event: Event, node: int, where: int) -> None:
        if event is Event.RESTART:
            at = where // WORKERS % HOSTS
            await self.hosts[at].close()  # type: ignore[attr-defined]
            self.hosts[at] = SharedHost(self.clock, self.url)
            self.restarted += 1
            return
        await super().live(event, node, where)
        for host in self.hosts:
            await host.told()  # type: ignore[attr-defined]

    async def quiet(self) -> None:
        await asyncio.sleep(LEASE + 0.1)  # for the lease, and until everybody has heard of everything
        await super().quiet()


async def _run(schedule: Schedule, url: str) -> SharedWorld:
    world = SharedWorld(url)
    try:
        await world.heartbeats()
        for event, node, where in schedule:
            await world.live(event, node, where)
        await world.quiet()
    finally:
        for host in world.hosts:
            await host.close()  # type: ignore[attr-defined]
    return world


def _flushed(server: RedisServer) -> str:
    with server.client() as raw:
        raw.flushall()
    return server.url


SETTINGS = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(schedules([*HARMLESS, Event.RESTART]))
def test_no_message_is_lost_before_it_was_handed_out_so_often(
    server: RedisServer, patient: None, schedule: Schedule
) -> None:
    world = asyncio.run(_run(schedule, _flushed(server)))
    lost = {message for message in world.lost() if world.deliveries[message] < DELIVERIES}
    assert lost == set()
    assert all(not waiting for waiting in world.superlink.waiting.values())


@SETTINGS
@given(schedules(list(Event)))
def test_whatever_happens_nobody_gets_what_is_not_his_or_twice(
    server: RedisServer, patient: None, schedule: Schedule
) -> None:
    world = asyncio.run(_run(schedule, _flushed(server)))
    assert all(count == 1 for count in world.superlink.answered.values())
    for message in world.lost():
        node = int(message, 16) // 16
        assert (
            message in world.excused
            or node in world.superlink.stopped
            or world.deliveries[message] >= DELIVERIES
        )


def test_a_message_that_one_host_lost_another_saves(server: RedisServer, patient: None) -> None:
    schedule = [(Event.CUT, NODES[0], 0), (Event.RESTART, NODES[0], 0)]
    world = asyncio.run(_run(schedule, _flushed(server)))
    assert world.executed[_id(NODES[0], 0)] == 1
    assert world.restarted == 1
