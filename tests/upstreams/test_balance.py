"""Which address a call goes to, and when a standby takes over."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Method
from relay.refusal import NodeGone, Reason, Refusal
from relay.stores.upstreams import UpstreamTable
from relay.upstreams.balance import Address, Balance
from relay.upstreams.breaker import Breaker
from relay.upstreams.health import Health

if TYPE_CHECKING:
    from relay.upstreams.pool import Pool

MakeCall = Callable[..., Call]

REFUSED = Refusal(Reason.UPSTREAM_DOWN, "refused", sent=False)
BROKEN = Refusal(Reason.UPSTREAM_DOWN, "broke the connection")
OPEN_SECONDS = 0.2
NAMES = ("a:1", "b:1", "c:1")


class Superlinks:
    """Addresses that answer with their name, or fail as the test says.

    Attributes:
        errors: what an address answers with instead.
        asked: calls by address.
        hold: addresses whose calls wait.
    """

    def __init__(
        self, names: tuple[str, ...] = NAMES[:2], *, shared: bool = True, after: float = 5.0
    ) -> None:
        self.names, self.shared, self.after = names, shared, after
        self.errors: dict[str, BaseException] = {}
        self.asked: Counter[str] = Counter()
        self.hold: dict[str, asyncio.Event] = {}
        self.table = UpstreamTable()

    def worker(self) -> Balance:
        """Return the addresses as one worker has them."""
        return Balance(
            [self._address(name) for name in self.names],
            self.table,
            shared_state=self.shared,
            standby_after=self.after,
        )

    def _address(self, name: str) -> Address:
        async def upstream(call: Call) -> Reply:
            self.asked[name] += 1
            if name in self.hold:
                await self.hold[name].wait()
            if name in self.errors:
                raise self.errors[name]
            return Reply(Payload(name.encode()), Source.UPSTREAM)

        pool = SimpleNamespace(name=name, state=lambda: {"address": name}, close=_nothing)
        breaker = Breaker(
            name, upstream, self.table, failures=5, open_seconds=OPEN_SECONDS, on_open=lambda: None
        )
        health = Health(name, self.table, failures=3, ejection=5.0, max_ejection=60.0)
        return Address(cast("Pool", pool), breaker, health, breaker=breaker)

    def down(self, name: str, seconds: float) -> None:
        """Have active checks say that an address has been down for so long."""
        since = time.monotonic() - seconds
        self.table.change(
            name, lambda state: state._replace(checked=True, misses=9, down=True, down_since=since)
        )

    def up(self, name: str) -> None:
        """Have active checks say that an address is up."""
        self.table.change(
            name, lambda state: state._replace(checked=True, misses=0, down=False, down_since=0.0)
        )


async def _nothing() -> None:
    pass


async def ask(balance: Balance, call: Call) -> str:
    """Return the name of the address that answered."""
    return (await balance.handler(call)).payload.data.decode()  # type: ignore[union-attr]


@pytest.fixture
def call(make_call: MakeCall) -> Call:
    return make_call(Method.PULL_MESSAGES, b"x")


# -- one address ----------------------------------------------------------------------------------------


async def test_one_address_is_asked_without_a_choice(call: Call) -> None:
    superlinks = Superlinks(("a:1",))
    balance = superlinks.worker()
    assert balance.handler is balance.addresses[0].handler
    assert await ask(balance, call) == "a:1"
    assert balance.state() == {"address": "a:1"}


# -- shared state ---------------------------------------------------------------------------------------


async def test_calls_are_spread_over_the_addresses(call: Call) -> None:
    superlinks = Superlinks(NAMES)
    balance = superlinks.worker()
    for _ in range(30):
        await ask(balance, call)
    assert superlinks.asked == Counter(dict.fromkeys(NAMES, 10))


async def test_the_address_with_the_fewest_calls_in_flight_is_next(call: Call) -> None:
    superlinks = Superlinks()
    superlinks.hold = {"a:1": asyncio.Event()}
    balance = superlinks.worker()
    held = [asyncio.ensure_future(ask(balance, call)) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert balance.addresses[0].in_flight == 1
    assert {await ask(balance, call) for _ in range(10)} == {"b:1"}
    superlinks.hold["a:1"].set()
    assert sorted(await asyncio.gather(*held)) == ["a:1", "b:1"]
    assert [address.in_flight for address in balance.addresses] == [0, 0]


async def test_a_call_that_never_left_is_tried_on_the_next_address_at_once(call: Call) -> None:
    superlinks = Superlinks(NAMES)
    superlinks.errors = {"a:1": REFUSED, "b:1": REFUSED}
    balance = superlinks.worker()
    assert [await ask(balance, call) for _ in range(20)] == ["c:1"] * 20
    # Each was tried until it was left out.
    assert (superlinks.asked["a:1"], superlinks.asked["b:1"]) == (3, 3)


async def test_a_call_that_may_have_arrived_is_not(call: Call) -> None:
    superlinks = Superlinks()
    superlinks.errors = dict.fromkeys(superlinks.names, BROKEN)
    with pytest.raises(Refusal, match="broke"):
        await ask(superlinks.worker(), call)
    assert superlinks.asked.total() == 1


async def test_a_call_whose_body_has_begun_to_leave_is_not(make_call: MakeCall) -> None:
    superlinks = Superlinks()
    superlinks.errors = dict.fromkeys(superlinks.names, REFUSED)
    payload = Payload(body=cast("Any", object()), size=9)
    payload.passed = 3
    with pytest.raises(Refusal):
        await ask(superlinks.worker(), make_call(Method.PUSH_OBJECT, payload))
    assert superlinks.asked.total() == 1


async def test_when_all_are_out_the_last_refusal_comes_out_and_one_stays_in(call: Call) -> None:
    superlinks = Superlinks()
    superlinks.errors = dict.fromkeys(superlinks.names, REFUSED)
    balance = superlinks.worker()
    for _ in range(3):
        with pytest.raises(Refusal) as caught:
            await ask(balance, call)
        assert caught.value is REFUSED
    now = time.monotonic()
    assert sum(address.health.available(now) for address in balance.addresses) == 1


async def test_an_answer_that_ends_a_message_costs_no_address_its_place(call: Call) -> None:
    superlinks = Superlinks()
    superlinks.errors = dict.fromkeys(superlinks.names, Refusal(Reason.UPSTREAM_REJECTED, status=404))
    balance = superlinks.worker()
    for _ in range(20):
        with pytest.raises(Refusal):
            await ask(balance, call)
    assert superlinks.asked == Counter({"a:1": 10, "b:1": 10})


async def test_a_node_that_leaves_frees_the_place(call: Call) -> None:
    superlinks = Superlinks()
    superlinks.errors = dict.fromkeys(superlinks.names, NodeGone())
    balance = superlinks.worker()
    for _ in range(20):
        with pytest.raises(NodeGone):
            await ask(balance, call)
    assert [address.in_flight for address in balance.addresses] == [0, 0]
    assert all(address.health.available(time.monotonic()) for address in balance.addresses)


async def test_what_one_worker_finds_out_the_others_heed_with_their_next_call(call: Call) -> None:
    superlinks = Superlinks()
    first, second = superlinks.worker(), superlinks.worker()
    superlinks.errors = {"a:1": BROKEN}
    for _ in range(6):
        try:
            await ask(first, call)
        except Refusal:
            continue
    superlinks.errors = {}
    assert {await ask(second, call) for _ in range(10)} == {"b:1"}


async def test_an_address_that_is_down_by_its_checks_gets_no_call_unless_all_are(call: Call) -> None:
    superlinks = Superlinks()
    balance = superlinks.worker()
    superlinks.down("a:1", 1)
    assert {await ask(balance, call) for _ in range(10)} == {"b:1"}
    superlinks.down("b:1", 1)
    assert await ask(balance, call) in superlinks.names


async def test_an_open_breaker_is_tried_by_a_call_that_can_be_repeated_alone(
    make_call: MakeCall, call: Call
) -> None:
    superlinks = Superlinks()
    balance = superlinks.worker()
    superlinks.table.change("a:1", lambda state: state._replace(breaker=2, turned=time.monotonic()))
    assert {await ask(balance, call) for _ in range(5)} == {"b:1"}
    await asyncio.sleep(OPEN_SECONDS + 0.05)
    assert {await ask(balance, call) for _ in range(5)} == {"b:1"}
    assert await ask(balance, make_call(Method.GET_RUN, b"x")) == "a:1"
    assert {await ask(balance, call) for _ in range(6)} == {"a:1", "b:1"}


async def test_the_gauges_and_the_state_say_who_is_in(call: Call) -> None:
    superlinks = Superlinks()
    balance = superlinks.worker()
    superlinks.down("a:1", 1)
    balance.tick()
    found = [REGISTRY.get_sample_value("relay_upstream_up", {"address": name}) for name in superlinks.names]
    assert found == [0, 1]
    assert balance.state()["addresses"] == [
        {"address": "a:1", "active": True, "available": False, "in_flight": 0},
        {"address": "b:1", "active": True, "available": True, "in_flight": 0},
    ]
    await balance.close()


# -- standby --------------------------------------------------------------------------------------------


def active(balance: Balance) -> str:
    balance.tick()
    found = [
        address.name
        for address in balance.addresses
        if REGISTRY.get_sample_value("relay_upstream_active", {"address": address.name})
    ]
    assert len(found) == 1
    return found[0]


async def test_a_standby_gets_no_call_while_it_stands_by(call: Call) -> None:
    superlinks = Superlinks(shared=False)
    balance = superlinks.worker()
    superlinks.errors = {"a:1": REFUSED}
    for _ in range(20):
        with pytest.raises(Refusal):
            await ask(balance, call)
    assert superlinks.asked["b:1"] == 0
    assert active(balance) == "a:1"


async def test_it_takes_over_for_all_workers_when_the_first_has_been_down_for_long(call: Call) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("relay_upstream_failovers_total", {"address": "c:1"}) or 0.0

    before = counted()
    superlinks = Superlinks(NAMES, shared=False)
    first, second = superlinks.worker(), superlinks.worker()
    superlinks.up("c:1")
    superlinks.down("b:1", 100)
    superlinks.down("a:1", 4)
    first.reconsider()
    assert active(first) == "a:1"
    superlinks.down("a:1", 6)
    first.reconsider()
    # The next in the order is down, too.
    assert await ask(second, call) == "c:1"
    assert active(first) == active(second) == "c:1"
    assert counted() == before + 1


async def test_it_stays_when_the_first_is_back_and_until_it_is_down_itself() -> None:
    superlinks = Superlinks(shared=False)
    balance = superlinks.worker()
    superlinks.up("b:1")
    superlinks.down("a:1", 6)
    balance.reconsider()
    superlinks.up("a:1")
    balance.reconsider()
    assert active(balance) == "b:1"
    superlinks.down("b:1", 6)
    balance.reconsider()
    assert active(balance) == "a:1"


@pytest.mark.parametrize("known", ["down", "never asked"])
async def test_it_does_not_take_over_unless_it_answers_itself(known: str) -> None:
    superlinks = Superlinks(shared=False)
    balance = superlinks.worker()
    if known == "down":
        superlinks.down("b:1", 1)
    superlinks.down("a:1", 600)
    balance.reconsider()
    assert active(balance) == "a:1"


async def test_a_call_that_goes_well_keeps_the_first_in_place_whatever_its_checks_say(call: Call) -> None:
    superlinks = Superlinks(shared=False)
    balance = superlinks.worker()
    superlinks.up("b:1")
    superlinks.down("a:1", 600)
    assert await ask(balance, call) == "a:1"
    balance.reconsider()
    assert active(balance) == "a:1"


@pytest.mark.parametrize("names", [("a:1", "b:1", "c:1"), ("a:1", "c:1", "b:1"), ("b:1",), ("c:1", "b:1")])
async def test_a_reload_stays_with_the_one_in_use_while_it_is_among_the_addresses(
    names: tuple[str, ...], call: Call
) -> None:
    """The database of the first is old by then."""
    superlinks = Superlinks(shared=False)
    before = superlinks.worker()
    superlinks.up("b:1")
    superlinks.down("a:1", 6)
    before.reconsider()
    superlinks.up("a:1")
    superlinks.names = names
    with capture_logs() as lines:
        after = superlinks.worker()
        assert active(after) == "b:1"
    assert await ask(after, call) == await ask(before, call) == "b:1"
    expected = [] if names == ("b:1",) else [("calls go to a SuperLink that stood by", "b:1")]
    assert [(line["event"], line["address"]) for line in lines] == expected
    superlinks.names = ("a:1", "b:1")
    assert active(superlinks.worker()) == "b:1"


async def test_a_reload_without_the_one_in_use_begins_with_the_first_and_does_not_come_back() -> None:
    superlinks = Superlinks(shared=False)
    superlinks.up("b:1")
    superlinks.down("a:1", 6)
    before = superlinks.worker()
    before.reconsider()
    superlinks.up("a:1")
    superlinks.names = ("c:1", "a:1")
    with capture_logs() as lines:
        after = superlinks.worker()
    assert lines[0]["was"] == "b:1"
    assert lines[0]["log_level"] == "warning"
    assert active(after) == "c:1"
    assert active(before) == "b:1"  # which goes on with what it knows, and drains
    superlinks.down("b:1", 6)
    before.reconsider()
    assert active(after) == "c:1"
    superlinks.names = ("a:1", "b:1", "c:1")
    assert active(superlinks.worker()) == "c:1"


async def test_one_address_alone_is_a_choice_that_a_reload_keeps() -> None:
    superlinks = Superlinks(("a:1",), shared=False)
    superlinks.worker()
    superlinks.names = ("b:1", "a:1")
    assert active(superlinks.worker()) == "a:1"


async def test_a_start_begins_with_the_first_and_says_so() -> None:
    with capture_logs() as lines:
        Superlinks(shared=False).worker()
        Superlinks(("a:1",), shared=False).worker()
        Superlinks(shared=True).worker()
    assert [(line["event"], line["address"]) for line in lines] == [
        ("calls go to the first SuperLink", "a:1")
    ]
