"""More calls than the SuperLink can do: heartbeats are answered, pulls are told "nothing now"."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.fleet import Method
from tests.overload import (
    HEARTBEAT,
    HEARTBEAT_PATIENCE,
    PATIENCE,
    PULL,
    Caller,
    Tally,
    memory,
    overload,
    slow_superlink,
)
from tests.relay_process import RelayProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(110)

#: The SuperLink's 100 ms a call, 8 at a time: 80 calls a second.
SECONDS, AT_A_TIME = 0.1, 8
#: 500 calls that wait make it twice as slow.
DRAG = 0.002


async def test_2000_calls_at_once_cost_no_node_its_life(tmp_path: Path) -> None:
    tally = Tally()
    async with slow_superlink(SECONDS, AT_A_TIME) as superlink:
        with RelayProcess(tmp_path, superlink.port, workers=2) as relay:
            nodes = [Caller(relay.port, number, tally) for number in range(2000)]
            for node in nodes:
                await node.connect()
            before = memory(relay)
            # 125 heartbeats, which the SuperLink needs 1.6 s for.
            await asyncio.gather(
                *(
                    node.ask(HEARTBEAT, HEARTBEAT_PATIENCE) if number % 16 == 0 else node.ask(PULL, PATIENCE)
                    for number, node in enumerate(nodes)
                )
            )
            grown = memory(relay) - before
            for node in nodes:
                await node.close()
            shed = relay.metric("relay_shed_total", method=Method.PULL_MESSAGES.rpc)
    assert tally.calls == 2000
    assert not tally.broken
    assert not tally.statuses
    assert tally.messages[HEARTBEAT] == 125
    assert tally.messages[PULL] + tally.empty[PULL] == 1875
    assert tally.empty[PULL] == shed > 1000
    assert superlink.done[PULL] == tally.messages[PULL] >= 2 * 8
    assert tally.slowest[HEARTBEAT] < HEARTBEAT_PATIENCE
    assert grown < 64 << 20
    assert superlink.most <= 2 * (32 + 4)


async def test_a_minute_of_four_times_too_many_calls_is_survived(tmp_path: Path) -> None:
    async with slow_superlink(SECONDS, AT_A_TIME, DRAG) as superlink:
        with RelayProcess(tmp_path, superlink.port, workers=2) as relay:
            found = await overload(relay, superlink, seconds=60.0, times=4)
    tally = found.tally
    assert tally.calls == found.offered
    assert not tally.broken
    assert not tally.statuses
    assert tally.messages[HEARTBEAT] == found.heartbeats
    assert tally.slowest[HEARTBEAT] < HEARTBEAT_PATIENCE
    assert tally.empty[PULL] > tally.calls / 3
    assert found.share > 0.9
    assert max(found.memory[30:]) - max(found.memory[5:30]) < 8 << 20
    assert found.afterwards.messages == {HEARTBEAT: 32, PULL: 32}


async def test_without_a_limit_the_same_calls_take_the_superlink_from_each_other(tmp_path: Path) -> None:
    async with slow_superlink(SECONDS, AT_A_TIME, DRAG) as superlink:
        with RelayProcess(tmp_path, superlink.port, workers=2, shed={"mode": "off"}) as relay:
            found = await overload(relay, superlink, seconds=8.0, times=4)
    assert found.share < 0.7
