"""KeptRedis with a real server: claims of several hosts, what ends an answer, what stays behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis as redis_library

from relay.stores.kept import PER_NODE, digest
from relay.stores.kept_hosts import Keeping
from relay.stores.kept_redis import CHANGES, PREFIX, STREAM, KeptRedis
from relay.stores.redis_link import OutageError
from tests.redis_server import RedisServer
from tests.relay_process import free_port

pytestmark = pytest.mark.timeout(60)

NODE = 2**64 - 7
KEY = f"{PREFIX}{NODE:016x}"
ME, OTHER = b"me      ", b"other   "
BODY = bytes(range(256)) * 3
FIRST, SECOND = b"claim 01", b"claim 02"


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
async def here(server: RedisServer, raw: Any) -> AsyncIterator[KeptRedis]:
    store = KeptRedis(server.url, "redis://shown")
    yield store
    await store.close()


@pytest.fixture
async def there(server: RedisServer, raw: Any) -> AsyncIterator[KeptRedis]:
    store = KeptRedis(server.url, "redis://shown")
    yield store
    await store.close()


def kept(
    message: str = "m1",
    *,
    token: bytes = b"token 01",
    body: bytes = BODY,
    node: int = NODE,
    holder: bytes = ME,
    expires: float = 3600.0,
    online: float = 60.0,
    deliveries: int = 1,
    busy: bool = False,
) -> Keeping:
    return Keeping(node, digest(message), holder, token, body, expires, online, deliveries, busy)


async def test_another_host_gets_what_was_kept_to_the_last_byte(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept())
    found = await there.claim(NODE, ME, FIRST, 3)
    assert found.granted == (digest("m1"), 2, BODY)


async def test_nobody_else_gets_it(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept())
    assert await there.claim(NODE, OTHER, FIRST, 3) == (None, True, 0)
    assert await there.claim(NODE - 1, ME, FIRST, 3) == (None, False, 0)
    assert (await there.acquire(kept(holder=OTHER), FIRST, 3)).state == "busy"


async def test_one_host_at_a_time(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept(busy=True))
    assert await there.claim(NODE, ME, FIRST, 9) == (None, True, 0)
    await here.settle(NODE, b"token 01", delivered=True)
    answers = await asyncio.gather(
        *(store.claim(NODE, ME, bytes([number]) * 8, 9) for number, store in enumerate([here, there] * 10))
    )
    assert sum(answer.granted is not None for answer in answers) == 1
    assert (await here.acquire(kept(), FIRST, 9)).state == "busy"


async def test_the_lease_of_a_host_that_is_gone_ends(server: RedisServer, raw: Any) -> None:
    store = KeptRedis(server.url, "", lease=1.0)
    await store.keep(kept(busy=True))
    assert (await store.claim(NODE, ME, FIRST, 3)).granted is None
    await asyncio.sleep(1.1)
    assert (await store.claim(NODE, ME, FIRST, 3)).granted is not None
    await store.close()


async def test_three_deliveries_in_all_whoever_counts(here: KeptRedis, there: KeptRedis, raw: Any) -> None:
    await here.keep(kept())
    for claim, delivery in ((FIRST, 2), (SECOND, 3)):
        found = await there.claim(NODE, ME, claim, 3)
        assert found.granted is not None
        assert found.granted.delivery == delivery
        await there.settle(NODE, claim, delivered=True)
    assert await there.claim(NODE, ME, FIRST, 3) == (None, False, 1)
    assert await there.claim(NODE, ME, FIRST, 3) == (None, False, 0)
    assert not raw.hexists(KEY, b"b" + digest("m1")), "its bytes are gone"
    assert (await here.acquire(kept(), FIRST, 3)).state == "exhausted", "its count is not"


async def test_a_delivery_that_was_none_does_not_count(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept())
    for _ in range(5):
        found = await there.claim(NODE, ME, FIRST, 3)
        assert found.granted is not None
        assert found.granted.delivery == 2
        await there.settle(NODE, FIRST, delivered=False)


async def test_the_end_of_an_old_delivery_does_not_end_the_next(server: RedisServer, raw: Any) -> None:
    store = KeptRedis(server.url, "", lease=0.1)
    await store.keep(kept())
    assert (await store.claim(NODE, ME, FIRST, 9)).granted is not None
    await asyncio.sleep(0.15)
    slow = KeptRedis(server.url, "")
    assert (await slow.claim(NODE, ME, SECOND, 9)).granted is not None
    for delivered in (True, False):
        await store.settle(NODE, FIRST, delivered=delivered)
        assert (await store.claim(NODE, ME, b"claim 03", 9)).later
    await slow.settle(NODE, SECOND, delivered=True)
    found = await store.claim(NODE, ME, b"claim 03", 9)
    assert found.granted is not None
    assert found.granted.delivery == 4
    await store.close()
    await slow.close()


async def test_a_host_may_deliver_what_redis_does_not_know_and_that_counts(
    here: KeptRedis, there: KeptRedis
) -> None:
    assert await here.acquire(kept(), FIRST, 3) == ("granted", 2, False)
    assert await there.claim(NODE, ME, SECOND, 3) == (None, False, 0), "it has no bytes yet"
    await here.keep(kept())
    await here.settle(NODE, FIRST, delivered=True)
    found = await there.claim(NODE, ME, SECOND, 3)
    assert found.granted == (digest("m1"), 3, BODY)


async def test_what_a_host_delivered_in_an_outage_counts(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept())
    assert (await here.acquire(kept(deliveries=3), FIRST, 3)).state == "exhausted"
    assert await there.claim(NODE, ME, FIRST, 3) == (None, False, 0)


async def test_a_late_copy_changes_no_count(here: KeptRedis, there: KeptRedis) -> None:
    assert (await here.acquire(kept(), FIRST, 3)).delivery == 2
    await here.keep(kept(deliveries=1, busy=False))
    assert (await there.claim(NODE, ME, SECOND, 3)).later, "the claim is in force"


async def test_the_superlink_may_hand_it_out_again_and_that_counts(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept())
    await there.keep(kept(token=b"token 02", body=b"again"))
    found = await here.claim(NODE, ME, FIRST, 9)
    assert found.granted == (digest("m1"), 3, b"again")


@pytest.mark.parametrize("holder", [ME, None])
@pytest.mark.parametrize("messages", [[digest("m1"), digest("m2")], None])
async def test_an_end_leaves_nothing(
    here: KeptRedis, there: KeptRedis, raw: Any, holder: bytes | None, messages: list[bytes] | None
) -> None:
    await here.keep(kept())
    await here.keep(kept("m2", token=b"token 02"))
    assert await there.end(NODE, OTHER, messages) == 0
    assert await there.end(NODE, ME, []) == 0
    assert await there.end(NODE, ME, [digest("m3")]) == 0
    assert await there.end(NODE, holder, messages) == 2
    assert raw.keys("*") == [STREAM.encode()]


async def test_changes_are_told_in_their_order(here: KeptRedis, there: KeptRedis) -> None:
    await here.keep(kept())
    await here.keep(kept("m2", token=b"token 02"))
    await here.end(NODE, ME, [digest("m1")])
    after, changes = await there.changes("0")
    await here.end(NODE, ME, None)
    _, more = await there.changes(after)
    assert [(change.what, change.node, change.message) for change in (*changes, *more)] == [
        (b"kept", NODE, digest("m1")),
        (b"kept", NODE, digest("m2")),
        (b"ended", NODE, digest("m1")),
        (b"over", NODE, digest("m2")),
    ]
    assert all(abs(change.at / 1000 - time.time()) < 60 for change in changes)


async def test_a_change_is_waited_for(here: KeptRedis, there: KeptRedis) -> None:
    waiting = asyncio.create_task(there.changes("0"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await here.keep(kept())
    assert (await waiting)[1]


@pytest.mark.parametrize("times", [{"expires": 0.2}, {"online": 0.2}])
async def test_it_ends_with_its_ttl_or_its_node(here: KeptRedis, raw: Any, times: dict[str, float]) -> None:
    await here.keep(kept(**times))  # type: ignore[arg-type]
    await here.keep(kept("m2", token=b"token 02", node=NODE - 1))
    await asyncio.sleep(0.3)
    assert await here.claim(NODE, ME, FIRST, 3) == (None, False, 0)
    assert not raw.exists(KEY)
    assert raw.exists(f"{PREFIX}{NODE - 1:016x}")


async def test_an_ended_one_goes_from_among_others(here: KeptRedis, raw: Any) -> None:
    await here.keep(kept(expires=0.2))
    await here.keep(kept("m2", token=b"token 02"))
    await asyncio.sleep(0.3)
    found = await here.claim(NODE, ME, FIRST, 3)
    assert found.granted is not None
    assert found.granted.message == digest("m2")
    assert raw.hlen(KEY) == 3


async def test_a_heartbeat_prolongs_it(here: KeptRedis, there: KeptRedis, raw: Any) -> None:
    await there.available(NODE, 60.0)
    assert not raw.exists(KEY), "nothing is written for a node of which nothing is kept"
    await here.keep(kept(online=5.0))
    await there.available(NODE, 60.0)
    assert 50_000 < raw.pttl(KEY) <= 60_000
    await there.available(NODE, 7200.0)
    assert 3_500_000 < raw.pttl(KEY) <= 3_600_000, "not longer than the message lives"


async def test_everything_is_bounded(here: KeptRedis, raw: Any) -> None:
    for number in range(PER_NODE + 3):
        await here.keep(kept(f"m{number}", token=b"token%3d" % number))
        await asyncio.sleep(0.002)
    assert raw.hlen(KEY) == 2 * PER_NODE + 1
    found = await here.claim(NODE, ME, FIRST, 3)
    assert found.granted is not None
    assert found.granted.message == digest("m3"), "the oldest go first"
    assert 0 < raw.pttl(KEY) <= 60_000
    assert 0 < raw.pttl(STREAM) <= 86_400_000
    with raw.pipeline(transaction=False) as many:
        for _ in range(CHANGES + 500):
            many.xadd(STREAM, {"kept": bytes(24)})
        many.execute()
    await here.keep(kept())
    assert raw.xlen(STREAM) <= CHANGES + 200


async def test_garbage_is_not_handed_out(here: KeptRedis, raw: Any) -> None:
    raw.hset(KEY, mapping={b"online": 10**14, b"e" + digest("m1"): b"no entry", b"b" + digest("m1"): b"x"})
    raw.hset(KEY, b"\xff", b"\xff")
    assert await here.claim(NODE, ME, FIRST, 3) == (None, False, 0)
    assert not raw.hexists(KEY, b"b" + digest("m1"))
    raw.set(KEY, "a text")
    with pytest.raises(OutageError, match=r"^ResponseError$"):
        await here.claim(NODE, ME, FIRST, 3)
    raw.xadd(STREAM, {b"\xff": b"short"})
    _, (change,) = await here.changes("0")
    assert change.message == b""


async def test_a_server_that_has_forgotten_the_scripts_gets_them_again(here: KeptRedis, raw: Any) -> None:
    await here.keep(kept())
    raw.script_flush()
    assert (await here.claim(NODE, ME, FIRST, 3)).granted is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "a" * 300])
async def test_an_outage_is_told_by_its_kind_alone(host: str) -> None:
    store = KeptRedis(f"redis://user:secret@{host}:{free_port()}/0", "redis://shown")
    for question in (store.keep(kept()), store.changes("0")):
        with pytest.raises(OutageError, match=r"^[A-Za-z]+$"):
            await question
    await store.close()


async def test_commands_and_keys_are_those_that_are_documented(server: RedisServer, raw: Any) -> None:
    commands = "evalsha script|load xread time hkeys hget hexists hset hdel del pexpireat pexpire xadd"
    raw.acl_setuser(
        "relay",
        enabled=True,
        passwords=["+secret"],
        reset=True,
        keys=[f"{PREFIX}*"],
        commands=["-@all", *(f"+{command}" for command in commands.split())],
    )
    store = KeptRedis(f"redis://relay:secret@127.0.0.1:{server.port}/0", "")
    await store.keep(kept())
    assert (await store.acquire(kept(), FIRST, 3)).state == "granted"
    await store.settle(NODE, FIRST, delivered=True)
    assert (await store.claim(NODE, ME, FIRST, 3)).granted is not None
    await store.available(NODE, 60.0)
    assert (await store.acquire(kept(deliveries=9), FIRST, 3)).state == "busy"
    assert await store.end(NODE, ME, None) == 1
    assert len((await store.changes("0"))[1]) == 2
    await store.close()
    with pytest.raises(redis_library.exceptions.ResponseError):
        raw.hget(STREAM, "x")
