"""Names with several addresses: one at a time for all workers, or all in turn, and asked for again."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from relay.refusal import Reason, Refusal
from relay.stores.upstreams import UpstreamTable
from relay.upstreams.resolve import Resolver, is_name
from tests.sockets import Listener, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.upstreams.pool import Pool

    MakePool = Callable[..., Pool]


class Names:
    """What the name stands for, as the test says; an OSError if that is nothing."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = 0

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked += 1
        await asyncio.sleep(0)
        if not self.addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(2, 1, 6, "", (address, port)) for address in self.addresses for _ in range(2)]


class Loop:
    """The running loop, but for names."""

    def __init__(self, names: Names) -> None:
        self._loop = asyncio.get_running_loop()
        self.getaddrinfo = names.getaddrinfo
        self.ahead = 0.0

    def time(self) -> float:
        return self._loop.time() + self.ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class Made:
    def __init__(self, names: Names, table: UpstreamTable, *, spread: bool = False) -> None:
        self.changes = 0
        self.resolver = Resolver(
            "superlink", 8000, table, interval=30, spread=spread, on_change=self._changed
        )
        self.loop = self.resolver._loop = Loop(names)  # type: ignore[assignment]

    def _changed(self) -> None:
        self.changes += 1

    async def addresses(self) -> list[str]:
        return await self.resolver.addresses()

    async def asked_again(self, names: Names) -> None:
        """Have the interval pass."""
        before = names.asked
        self.loop.ahead += 31
        self.resolver.look()
        await until(lambda: names.asked > before and self.resolver._asking is None)


@pytest.fixture
def table() -> UpstreamTable:
    return UpstreamTable()


async def test_a_name_is_asked_for_once_by_all_who_wait(table: UpstreamTable) -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    made = Made(names, table)
    assert await asyncio.gather(*(made.addresses() for _ in range(3))) == [["10.0.0.1", "10.0.0.2"]] * 3
    assert names.asked == 1


async def test_a_name_that_stands_for_nothing_is_an_error_until_it_does(table: UpstreamTable) -> None:
    names = Names()
    made = Made(names, table)
    for _ in range(2):
        with pytest.raises(OSError, match="not known"):
            await made.addresses()
    assert names.asked == 1  # at most once a second
    names.addresses = ("10.0.0.1",)
    made.loop.ahead += 1
    assert await made.addresses() == ["10.0.0.1"]


async def test_all_workers_use_the_same_address_whatever_order_they_are_told(table: UpstreamTable) -> None:
    first = Made(Names("10.0.0.1", "10.0.0.2"), table)
    second = Made(Names("10.0.0.2", "10.0.0.1"), table)
    assert await first.addresses() == ["10.0.0.1", "10.0.0.2"]
    assert await second.addresses() == ["10.0.0.1", "10.0.0.2"]


async def test_when_it_takes_no_connection_the_next_one_is_used_and_kept(table: UpstreamTable) -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    first, second = Made(names, table), Made(names, table)
    await first.addresses()
    await second.addresses()
    first.resolver.failed("10.0.0.1")
    assert await first.addresses() == ["10.0.0.2", "10.0.0.1"]
    first.resolver.connected("10.0.0.2")
    assert first.changes == 1
    second.resolver.look()
    assert second.changes == 1
    assert await second.addresses() == ["10.0.0.2", "10.0.0.1"]
    # It stays, also when the first is back.
    second.resolver.connected("10.0.0.2")
    assert await first.addresses() == ["10.0.0.2", "10.0.0.1"]


async def test_an_address_that_the_name_has_no_more_is_left(table: UpstreamTable) -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    made = Made(names, table)
    await made.addresses()
    names.addresses = ("10.0.0.1", "10.0.0.3")
    await made.asked_again(names)
    assert made.changes == 0
    names.addresses = ("10.0.0.3",)
    await made.asked_again(names)
    assert made.changes == 1
    assert await made.addresses() == ["10.0.0.3"]


async def test_a_name_server_that_is_away_changes_nothing(table: UpstreamTable) -> None:
    names = Names("10.0.0.1")
    made = Made(names, table)
    await made.addresses()
    names.addresses = ()
    await made.asked_again(names)
    assert await made.addresses() == ["10.0.0.1"]
    assert made.changes == 0


async def test_it_is_not_asked_again_before_its_time(table: UpstreamTable) -> None:
    names = Names("10.0.0.1")
    made = Made(names, table)
    made.resolver.look()
    assert names.asked == 0
    await made.addresses()
    made.loop.ahead += 29
    made.resolver.look()
    assert names.asked == 1


async def test_addresses_that_share_their_state_are_used_in_turn(table: UpstreamTable) -> None:
    names = Names("10.0.0.1", "10.0.0.2", "10.0.0.3")
    made = Made(names, table, spread=True)
    assert {(await made.addresses())[0] for _ in range(3)} == set(names.addresses)
    made.resolver.connected("10.0.0.2")
    made.resolver.look()
    assert made.changes == 0
    made.resolver.failed("10.0.0.2")
    assert {(await made.addresses())[-1] for _ in range(3)} == {"10.0.0.2"}
    names.addresses = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
    await made.asked_again(names)
    assert made.changes == 1
    # The one that failed has its turn again.
    assert len({(await made.addresses())[0] for _ in range(4)}) == 4


@pytest.mark.parametrize(
    ("host", "name"),
    [("127.0.0.1", False), ("::1", False), ("localhost", True), ("superlink.example", True), ("10", True)],
)
def test_an_address_is_no_name(host: str, name: bool) -> None:
    assert is_name(host) is name


# -- with a pool ----------------------------------------------------------------------------------------


async def test_a_pool_connects_to_the_first_address_that_takes_it(
    make_pool: MakePool, upstream: Listener, table: UpstreamTable
) -> None:
    made = Made(Names("127.0.0.9", "127.0.0.1"), table)
    pool = make_pool(host="superlink")
    pool.resolver = made.resolver
    await pool.acquire()
    await upstream.accept()
    assert table.choice("ip of superlink") == "127.0.0.1"


async def test_a_pool_whose_name_stands_for_nothing_is_down(
    make_pool: MakePool, table: UpstreamTable
) -> None:
    pool = make_pool(host="superlink")
    pool.resolver = Made(Names(), table).resolver
    with pytest.raises(Refusal, match="not known") as caught:
        await pool.acquire()
    assert caught.value.cause == "no_name"
    assert pool.state()["connections"] == 0


async def test_a_name_that_cannot_be_one_is_an_error(table: UpstreamTable) -> None:
    made = Made(Names(), table)

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise UnicodeError("label too long")

    made.loop.getaddrinfo = getaddrinfo
    for _ in range(2):
        with pytest.raises(UnicodeError, match="too long"):
            await made.addresses()


async def test_a_question_that_is_given_up_is_an_error(table: UpstreamTable) -> None:
    made = Made(Names("10.0.0.1"), table)
    asking = asyncio.ensure_future(made.addresses())
    await asyncio.sleep(0)
    made.resolver.close()
    with pytest.raises(OSError, match="not resolved"):
        await asking


async def test_a_name_server_that_hangs_is_not_the_superlinks_fault(
    make_pool: MakePool, table: UpstreamTable
) -> None:
    made = Made(Names(), table)
    made.loop.getaddrinfo = lambda *_, **__: asyncio.sleep(9)  # type: ignore[assignment]
    pool = make_pool(host="superlink", connect_timeout=0.05)
    pool.resolver = made.resolver
    with pytest.raises(Refusal, match="no address of superlink within") as caught:
        await pool.acquire()
    assert caught.value.cause == "no_name"
    made.resolver.close()


async def test_an_address_whose_name_is_known_and_takes_no_connection_is_at_fault(
    make_pool: MakePool, table: UpstreamTable
) -> None:
    pool = make_pool(host="superlink")
    pool.resolver = Made(Names("127.0.0.9"), table).resolver
    with pytest.raises(Refusal) as caught:
        await pool.acquire()
    assert (caught.value.reason, caught.value.cause) == (Reason.UPSTREAM_DOWN, "")


@pytest.mark.parametrize("spread", [False, True])
async def test_a_pool_asks_at_once_where_a_superlink_is_that_takes_no_connection(
    make_pool: MakePool, upstream: Listener, table: UpstreamTable, *, spread: bool
) -> None:
    names = Names("127.0.0.9")
    made = Made(names, table, spread=spread)
    pool = make_pool(host="superlink")
    pool.resolver = made.resolver
    with pytest.raises(Refusal):
        await pool.acquire()
    names.addresses = ("127.0.0.1",)
    with pytest.raises(Refusal):
        await pool.acquire()  # it was asked for a moment ago
    assert names.asked == 1
    made.loop.ahead += 1
    await pool.acquire()
    await upstream.accept()
    assert names.asked == 2
    assert made.changes


async def test_a_pool_goes_on_with_what_is_known_when_nobody_answers_the_question(
    make_pool: MakePool, table: UpstreamTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.upstreams.resolve._PATIENCE", 0.01)
    made = Made(Names("127.0.0.9"), table)
    pool = make_pool(host="superlink")
    pool.resolver = made.resolver
    await made.addresses()
    made.loop.getaddrinfo = lambda *_, **__: asyncio.sleep(9)  # type: ignore[assignment]
    made.loop.ahead += 1
    for _ in range(2):
        with pytest.raises(Refusal) as caught:
            await pool.acquire()
        assert caught.value.cause == ""  # it is the SuperLink that takes no connection
    assert made.resolver._asking is not None
    made.resolver.close()


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_worker_that_is_not_answered_uses_what_the_others_use(
    make_pool: MakePool,
    upstream: Listener,
    table: UpstreamTable,
    monkeypatch: pytest.MonkeyPatch,
    *,
    hangs: bool,
) -> None:
    monkeypatch.setattr("relay.upstreams.resolve._PATIENCE", 0.01)
    first = make_pool(host="superlink")
    first.resolver = Made(Names("127.0.0.1"), table).resolver
    await first.acquire()
    made = Made(Names(), table)
    if hangs:
        made.loop.getaddrinfo = lambda *_, **__: asyncio.sleep(9)  # type: ignore[assignment]
    second = make_pool(host="superlink")
    second.resolver = made.resolver
    for _ in range(2):
        await second.acquire()
    made.resolver.close()


async def test_a_worker_asks_for_a_name_when_another_uses_what_it_does_not_know(table: UpstreamTable) -> None:
    names = Names("10.0.0.1")
    made = Made(names, table)
    await made.addresses()
    names.addresses = ("10.0.0.2",)
    other = Made(names, table)
    await other.addresses()
    other.resolver.connected("10.0.0.2")
    made.resolver.look()
    await until(lambda: made.resolver._known == ["10.0.0.2"])


async def test_a_question_in_vain_is_logged_now_and_then(table: UpstreamTable) -> None:
    names = Names("10.0.0.1")
    made = Made(names, table)
    await made.addresses()
    names.addresses = ()
    with capture_logs() as lines:
        for _ in range(40):
            made.loop.ahead += 1
            made.resolver.failed("10.0.0.1")
            await made.resolver.other(["10.0.0.1"])
    assert names.asked == 41
    assert [line["event"] for line in lines] == ["upstream name cannot be resolved"] * 2
    assert await made.addresses() == ["10.0.0.1"]


async def test_a_pool_tries_another_address_after_one_that_swallows_everything(
    make_pool: MakePool, upstream: Listener, table: UpstreamTable
) -> None:
    made = Made(Names("127.0.0.9", "127.0.0.1"), table)
    pool = make_pool(host="superlink", connect_timeout=0.1)
    pool.resolver = made.resolver
    swallow, opening = asyncio.Event(), pool._open_to

    async def open_to(address: str, make: Any) -> Any:
        if address == "127.0.0.9":
            await swallow.wait()
        return await opening(address, make)

    pool._open_to = open_to  # type: ignore[method-assign]
    with pytest.raises(Refusal, match="within"):
        await pool.acquire()
    await pool.acquire()
    assert table.choice("ip of superlink") == "127.0.0.1"
