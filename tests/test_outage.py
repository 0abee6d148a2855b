"""An outage of the SuperLink with a breaker that all workers of a real relay share."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from relay.call import Call, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.policies.retry import Budget, Retry
from relay.refusal import Reason, Refusal
from relay.stores.upstreams import OPEN, UpstreamTable
from relay.upstreams.breaker import Breaker
from tests.overload import HEARTBEAT, PULL, Caller, Tally, slow_superlink
from tests.relay_process import RelayProcess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(110)


def post(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", path)
        return connection.getresponse().status
    finally:
        connection.close()


async def all_ask(nodes: list[Caller], name: str = PULL) -> None:
    await asyncio.gather(*(node.ask(name, 30.0) for node in nodes))


async def test_one_call_at_a_time_finds_out_that_the_superlink_is_back(tmp_path: Path) -> None:
    async with slow_superlink(0.05, 100) as superlink:
        address = f"127.0.0.1:{superlink.port}"
        breaker = {"failures": 3, "open_seconds": "300ms"}
        with RelayProcess(tmp_path, superlink.port, breaker=breaker, retry={"enabled": False}) as relay:
            nodes = [Caller(relay.port, number, Tally()) for number in range(20)]
            superlink.down = True
            while relay.metric("relay_breaker_transitions_total", to="open") < 1:
                await all_ask(nodes)
            superlink.most, before = 0, superlink.done.total()
            for _ in range(15):
                await all_ask(nodes)
                await asyncio.sleep(0.1)
            probes = superlink.done.total() - before
            assert superlink.most == 1
            assert 1 <= probes <= 15
            superlink.down = False
            tally = Tally()
            nodes += [Caller(relay.port, number, tally) for number in range(20, 40)]
            async with asyncio.timeout(20):
                while not tally.messages[PULL]:
                    await all_ask(nodes)
                    await asyncio.sleep(0.05)
            for _ in range(3):
                await all_ask(nodes)
            assert tally.messages[PULL] >= 60
            assert relay.metric("relay_breaker_state", address=address) == 0
            assert relay.metric("relay_breaker_transitions_total", to="closed") == 1
            for node in nodes:
                await node.close()


async def test_a_reset_is_effective_on_all_workers_within_a_second(tmp_path: Path) -> None:
    async with slow_superlink(0.01, 100) as superlink:
        breaker = {"failures": 3, "open_seconds": "60s"}
        with RelayProcess(tmp_path, superlink.port, breaker=breaker, retry={"enabled": False}) as relay:
            tally = Tally()
            nodes = [Caller(relay.port, number, tally) for number in range(30)]
            superlink.down = True
            while relay.metric("relay_breaker_transitions_total", to="open") < 1:
                await all_ask(nodes)
            superlink.down = False
            asked = superlink.done.total()
            await all_ask(nodes)
            await all_ask(nodes, HEARTBEAT)
            assert superlink.done.total() == asked
            assert tally.statuses[HEARTBEAT, 503] == 30
            path = f"/breakers/127.0.0.1:{superlink.port}/reset"
            assert await asyncio.to_thread(post, relay.admin, path) == 200
            await asyncio.sleep(1.0)
            tally.messages.clear()
            await all_ask(nodes)
            assert tally.messages[PULL] == 30
            for node in nodes:
                await node.close()


class Superlink:
    """An upstream that is out until the test says otherwise."""

    def __init__(self) -> None:
        self.out = True

    async def __call__(self, call: Call) -> Reply:
        if self.out:
            raise Refusal(Reason.UPSTREAM_DOWN, "refused", sent=False)
        return Reply(Payload(b"message"), Source.UPSTREAM)


@pytest.mark.parametrize(
    ("wire", "method", "waits"),
    [
        (Wire.REST_V0, Method.PULL_MESSAGES, True),
        (Wire.HTTP_V1, Method.PULL_MESSAGES, False),
        (Wire.HTTP_V1, Method.PUSH_OBJECT, True),
        (Wire.REST_V0, Method.SEND_NODE_HEARTBEAT, True),
    ],
    ids=lambda value: getattr(value, "rpc", None) or str(value),
)
async def test_a_call_that_meets_an_open_breaker_waits_for_it_unless_its_node_comes_back_by_itself(
    make_call: Callable[..., Call], wire: Wire, method: Method, waits: bool
) -> None:
    upstream, table = Superlink(), UpstreamTable()
    breaker = Breaker("a:1", upstream, table, failures=5, open_seconds=1.0, on_open=lambda: None)
    table.change("a:1", lambda state: state._replace(breaker=OPEN, turned=time.monotonic()))
    # No budget at all: what the breaker refuses is no load.
    retry = Retry(enabled=True, base=0.05, cap=0.1, budget=Budget(0.0, 1e-9))
    retry._budget._saved = 0.0
    call = make_call(method, b"x", wire=wire, deadline=time.monotonic() + 20)
    asking = asyncio.ensure_future(retry.handle(call, breaker))
    if not waits:
        with pytest.raises(Refusal, match="breaker_open"):
            await asking
        assert time.monotonic() < call.deadline - 10, "at once"
        return
    await asyncio.sleep(0.3)
    assert not asking.done()
    upstream.out = False
    assert (await asking).payload.data == b"message"
