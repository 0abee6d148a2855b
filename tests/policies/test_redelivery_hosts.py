"""Two hosts with one real Redis: what one keeps the other hands out, once at a time and not too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.message_pb2 import PullObjectResponse
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.call import Ending, Identity, Payload, Reply, Source
from relay.fleet import Method
from relay.policies.redelivery import Redelivery
from relay.refusal import Reason, Refusal
from relay.stores import kept_hosts
from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.kept_hosts import PATIENCE, KeptOnHosts
from relay.stores.kept_redis import PREFIX, KeptRedis
from relay.stores.records import HostRecords
from tests.policies.test_redelivery import (
    BYTES,
    MAX_SIZE,
    MESSAGE,
    NODE,
    Counted,
    Relay,
    answer,
    fresh,
    node_of,
    ok,
)
from tests.redis_server import RedisServer

pytestmark = pytest.mark.timeout(60)

MakeHost = Callable[..., "Host"]


class Host(Relay):
    """A host with one worker."""

    def __init__(self, make_call: Any, url: str) -> None:
        self.records, self.table = HostRecords(512, PIECE), HostTable(256)
        super().__init__(make_call, self.records, self.table, time.monotonic)  # type: ignore[arg-type]
        self.policy = self.worker(url)

    def worker(self, url: str) -> Redelivery:
        """Return one more worker of this host, which listens."""
        policy = Redelivery(
            enabled=True,
            max_size=MAX_SIZE,
            deliveries=3,
            records=self.records,
            table=self.table,
            redis=KeptRedis(url, "redis://shown", lease=2.0),
        )
        policy.start()
        return policy

    @property
    def kept(self) -> KeptOnHosts:
        assert isinstance(self.policy._kept, KeptOnHosts)
        return self.policy._kept

    async def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < end, "nothing came of it"
            await asyncio.sleep(0.01)

    async def told(self) -> None:
        """Wait until Redis knows what this host knows."""
        await self.until(lambda: self.kept._link._telling is None)

    async def knows(self, *, something: bool = True) -> None:
        """Wait until this host knows whether something is kept for the node."""
        await self.until(lambda: self.kept.has(NODE) is something)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def raw(server: RedisServer) -> Iterator[Any]:
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
async def host(make_call: Any, server: RedisServer, raw: Any) -> AsyncIterator[MakeHost]:
    made: list[Host] = []

    def make(url: str = server.url) -> Host:
        made.append(Host(make_call, url))
        return made[-1]

    yield make
    for each in made:
        await each.policy.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is not given up because this machine is slow."""
    monkeypatch.setattr(kept_hosts, "PATIENCE", 10.0)


def asked() -> dict[str, float]:
    return {
        outcome: REGISTRY.get_sample_value("relay_redelivery_redis_total", {"outcome": outcome}) or 0.0
        for outcome in ("answered", "failed", "skipped")
    }


async def kept_by_one(one: Host, other: Host, **options: Any) -> None:
    assert await one.pull(fresh(), **options) == BYTES
    await one.told()
    await other.knows()


# -- Redis answers ----------------------------------------------------------------------------------


async def test_what_one_host_keeps_another_hands_out(host: MakeHost, patient: None) -> None:
    counted, one, other = Counted(), host(), host()
    await kept_by_one(one, other)
    assert await other.pull() == BYTES
    assert len(other.superlink.asked) == 1, "the SuperLink comes first"
    assert len(other.superlink.questions) == 1
    assert counted() == {"kept": 1, "redelivered": 1}


async def test_three_times_in_all_hosts(host: MakeHost, patient: None) -> None:
    counted, one, other = Counted(), host(), host()
    await kept_by_one(one, other)
    got = []
    for each in (other, one, other, one, other, one):
        got.append(bool(await each.pull()))
        await each.told()
    assert got == [True, True, False, False, False, False]
    assert counted() == {"kept": 1, "redelivered": 2, "exhausted": 1}
    assert not one.kept.has(NODE)
    assert not other.kept.has(NODE)


async def test_one_host_at_a_time(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    got = await asyncio.gather(*(each.pull(end=False) for each in (one, other) * 5))
    assert [body for body in got if body] == [BYTES]


async def test_a_first_delivery_that_could_not_be_written_does_not_count(
    host: MakeHost, patient: None
) -> None:
    one, other = host(), host()
    await kept_by_one(one, other, outcome="node_gone")
    for _ in range(3):
        assert await other.pull() == BYTES
        await other.told()
    assert await other.pull() == b""


async def test_who_came_while_another_host_delivers_may_come_again(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    assert await other.pull(end=False) == BYTES
    assert await one.pull() == b""
    await asyncio.sleep(2.1)  # the lease of the other ends
    assert await one.pull() == BYTES
    await one.told()
    assert await one.pull() == b"", "three times in all"


async def test_while_the_first_delivery_is_under_way_no_host_gets_it(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other, end=False)
    assert await other.pull() == b""
    await asyncio.sleep(2.1)
    assert await other.pull() == BYTES, "the lease has ended: the host may be gone"


async def test_it_outlives_its_host(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    await one.policy.close()
    assert await other.pull() == BYTES
    late = host()
    await late.knows()
    await other.told()
    assert await late.pull() == BYTES, "a host that was started later knows of it, too"


async def test_a_stranger_gets_nothing_and_ends_nothing(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    mine = Identity("edge-7", "a")
    await kept_by_one(one, other, identity=mine)
    for stranger in (Identity("edge-8", "a"), Identity("edge-7", "b"), None):
        assert await other.pull(identity=stranger) == b""
        await other.push(identity=stranger)
        await other.told()
    assert await other.pull(node=NODE + 1, identity=mine) == b""
    for status in (401, 403):
        refused = Reply(Payload(b"no"), Source.UPSTREAM, status=status)
        request = PullMessagesRequest(node=node_of(NODE))
        assert await other.call(Method.PULL_MESSAGES, request, refused, identity=mine) is refused
    assert not other.superlink.questions
    assert await other.pull(identity=mine) == BYTES


async def _confirm(host: Host) -> None:
    await host.confirm()


async def _reply(host: Host) -> None:
    await host.push()


async def _leave(host: Host) -> None:
    await host.call(Method.DEACTIVATE_NODE, DeactivateNodeRequest(node_id=NODE), ok())


async def _refused(host: Host) -> None:
    host.superlink.question = Refusal(Reason.UPSTREAM_REJECTED, status=403)
    assert await host.pull() == b""


async def _confirmed_elsewhere(host: Host) -> None:
    host.superlink.question = ok(PullObjectResponse(object_found=False))
    assert await host.pull() == b""


@pytest.mark.parametrize("end", [_confirm, _reply, _leave, _refused, _confirmed_elsewhere])
@pytest.mark.parametrize("here", [True, False], ids=["where it was kept", "elsewhere"])
async def test_an_end_at_any_host_is_the_end_at_all(
    host: MakeHost, raw: Any, patient: None, end: Any, here: bool
) -> None:
    counted, one, other = Counted(), host(), host()
    await kept_by_one(one, other)
    await end(one if here else other)
    await one.knows(something=False)
    await other.knows(something=False)
    assert raw.keys(f"{PREFIX}[0-9a-f]*[0-9a-f]") == [], "nothing is left in Redis"
    for each in (one, other):
        before = len(each.superlink.questions)
        assert await each.pull() == b""
        assert len(each.superlink.questions) == before
    outcomes = counted()
    assert outcomes.pop("kept") == 1
    assert sum(outcomes.values()) == 1, "it is counted once"


async def test_an_end_that_the_superlink_did_not_accept_is_none(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    await other.confirm(step=Reply(Payload(b"no"), Source.UPSTREAM, status=401))
    await other.told()
    assert await one.pull() == BYTES


async def test_a_superlink_that_cannot_be_asked_takes_no_delivery(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    there, other.superlink.question = other.superlink.question, Refusal(Reason.UPSTREAM_DOWN)
    for _ in range(5):
        assert await other.pull() == b""
        await other.told()
    other.superlink.question = there
    assert await other.pull() == BYTES
    await other.told()
    assert await other.pull() == BYTES


async def test_a_heartbeat_at_any_host_prolongs_it(host: MakeHost, raw: Any, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    await other.heartbeat(interval=600.0)
    await other.told()
    (key,) = raw.keys(f"{PREFIX}[0-9a-f]*[0-9a-f]")
    assert raw.pttl(key) > 1_000_000


async def test_an_idle_poll_asks_redis_nothing(host: MakeHost, raw: Any, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    await other.confirm()
    await one.knows(something=False)
    await other.knows(something=False)
    before = asked()
    for _ in range(20):
        assert await one.pull(node=NODE + 1) == b""
        assert await one.pull() == b""
        assert await other.pull() == b""
    assert asked() == before


async def test_what_ended_without_a_word_is_asked_for_once(host: MakeHost, raw: Any, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    raw.delete(*raw.keys(f"{PREFIX}[0-9a-f]*[0-9a-f]"))
    before = asked()["answered"]
    for _ in range(5):
        assert await other.pull() == b""
    assert asked()["answered"] == before + 1


async def test_what_redis_has_lost_it_learns_again(host: MakeHost, raw: Any, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    raw.flushall()
    assert await one.pull() == BYTES
    await one.told()
    assert raw.keys("*")
    assert await other.pull() == BYTES
    await other.told()
    assert await one.pull() == b"", "three times in all"


async def test_several_messages_of_a_node(host: MakeHost, patient: None) -> None:
    one, other = host(), host()
    second = answer("cd" * 32).SerializeToString()
    await kept_by_one(one, other)
    assert await other.pull(fresh(second)) == second
    await other.told()
    got = []
    for each in (one, other, one, other, one, other, one, other):
        got.append(await each.pull())
        await each.told()
        await asyncio.sleep(0.06)
    assert sorted(body for body in got if body) == sorted([BYTES, BYTES, second, second])


# -- Redis does not answer --------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["frozen", "killed"])
async def test_in_an_outage_a_host_goes_by_itself_and_soon(
    host: MakeHost, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    with RedisServer(tmp_path) as mortal:
        one, other = host(mortal.url), host(mortal.url)
        await kept_by_one(one, other)
        mortal.freeze() if outage == "frozen" else mortal.kill()
        before = asked()
        with capture_logs() as lines:
            began = time.monotonic()
            assert await other.pull() == b"", "it has no copy"
            assert [await one.pull() for _ in range(4)] == [BYTES, BYTES, b"", b""]
            took = time.monotonic() - began
        assert took < 4 * PATIENCE, "each worker waited once, and not with each of 5 polls"
        after = asked()
        assert after["failed"] - before["failed"] >= 2
        assert after["skipped"] > before["skipped"]
        warnings = [line for line in lines if line["log_level"] == "warning"]
        assert [line["store"] for line in warnings] == ["redis redis://shown"] * 2
        assert str(mortal.port) not in str(lines)
        mortal.thaw() if outage == "frozen" else mortal.start()
        monkeypatch.setattr(kept_hosts, "PATIENCE", 10.0)
        end, node = time.monotonic() + 20, NODE
        while True:  # what is kept while a host asks nothing, it keeps alone
            assert time.monotonic() < end
            node += 1
            body = answer(node=node).SerializeToString()
            assert await one.pull(fresh(body), node=node) == body
            await asyncio.sleep(0.3)
            if other.kept.has(node) and await other.pull(node=node) == body:
                break


async def test_an_outage_loses_no_message_and_delays_no_answer(host: MakeHost, make_call: Any) -> None:
    alone = Host(make_call, "redis://127.0.0.1:1/0")
    assert await alone.pull(fresh()) == BYTES
    assert [await alone.pull() for _ in range(4)] == [BYTES, BYTES, b"", b""]
    await alone.confirm()
    await alone.policy.close()


async def test_what_was_delivered_in_an_outage_counts_afterwards(
    host: MakeHost, patient: None, raw: Any
) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    one.kept._link.failed("a test")
    assert await one.pull() == BYTES
    assert await one.pull() == BYTES
    one.kept._link._off_until = 0.0
    assert await one.pull() == b""
    assert await other.pull() == b""


async def test_a_grant_that_came_too_late_is_given_back(host: MakeHost, monkeypatch: Any) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    granted = other.kept._redis.claim

    async def slow(*arguments: Any) -> Any:
        found = await granted(*arguments)
        await asyncio.sleep(0.2)
        return found

    monkeypatch.setattr(other.kept._redis, "claim", slow)
    assert await other.pull() == b""
    await asyncio.sleep(0.4)
    await other.told()
    monkeypatch.setattr(kept_hosts, "PATIENCE", 10.0)
    assert await one.pull() == BYTES
    await one.told()
    assert await one.pull() == BYTES


async def test_no_delivery_is_lost_in_a_frozen_server(host: MakeHost, tmp_path: Any) -> None:
    with RedisServer(tmp_path) as mortal:
        one, other = host(mortal.url), host(mortal.url)
        await kept_by_one(one, other)
        mortal.freeze()
        for _ in range(3):
            assert await other.pull() == b""
            await asyncio.sleep(1.2)  # until nobody waits for the answer any more
        mortal.thaw()
        got = []
        for _ in range(60):
            if body := await other.pull():
                got.append(body)
            await asyncio.sleep(0.1)
        assert got == [BYTES, BYTES], "what it granted to nobody was given back"


async def test_the_answer_does_not_wait_for_redis(host: MakeHost, raw: Any) -> None:
    one = host()
    data = PullMessagesRequest(node=node_of(NODE)).SerializeToString()
    one.superlink.steps.append(fresh())
    call = one.make_call(Method.PULL_MESSAGES, data)
    pulling = one.policy.handle(call, one.superlink).__await__()
    with pytest.raises(StopIteration):  # it ends without giving the event loop a turn
        next(pulling)
    assert not raw.exists(f"{PREFIX}{NODE:016x}")
    call.end(Ending("ok", seconds=0.0))
    await one.policy.close()
    entry = raw.hgetall(f"{PREFIX}{NODE:016x}")
    assert BYTES in entry.values(), "what is to be told is told before the worker ends"
    assert not is_busy(entry)


def is_busy(entry: dict[bytes, bytes]) -> bool:
    (words,) = (value.split() for name, value in entry.items() if name[:1] == b"e")
    return int(words[4]) > int(words[6])


async def test_what_is_not_understood_is_not_handed_out(host: MakeHost, raw: Any, patient: None) -> None:
    one, other = host(), host()
    await kept_by_one(one, other)
    key = f"{PREFIX}{NODE:016x}"
    (body,) = (name for name in raw.hkeys(key) if name[:1] == b"b")
    for garbage in (b"\xff\xff", b"garbage", answer(node=NODE + 1).SerializeToString()):
        raw.hset(key, body, garbage)
        assert await other.pull() == b""
        await other.told()
        assert not raw.exists(key)
        assert await one.pull(fresh(answer(MESSAGE))) != b""
        await one.told()
        await other.knows()


async def test_without_redis_nothing_is_there(make_call: Any) -> None:
    relay = Relay(make_call, HostRecords(64, PIECE), HostTable(64), time.monotonic)  # type: ignore[arg-type]
    assert not isinstance(relay.policy._kept, KeptOnHosts)
    relay.policy.start()
    await relay.policy.close()
    assert len(asyncio.all_tasks()) == 1
