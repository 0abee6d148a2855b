"""When the breaker opens, who may try, and what is agreed between the workers of a host."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Method
from relay.refusal import NodeGone, Reason, Refusal
from relay.stores.upstreams import CLOSED, HALF_OPEN, OPEN, UpstreamTable
from relay.upstreams.breaker import Breaker
from relay.upstreams.health import Verdict, verdict
from tests.sockets import until

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

MakeCall = Callable[..., Call]

FORK = get_context("fork")
ADDRESS = "superlink:8000"
DOWN = Refusal(Reason.UPSTREAM_DOWN, "refused", sent=False)
#: Short, and yet longer than a test of a worker that has no processor for a moment.
OPEN_SECONDS = 0.3


class Body:
    """One that is still arriving."""

    closed = False

    async def read(self) -> bytes:
        return b""

    def close(self) -> None:
        self.closed = True


class Upstream:
    """Does what the test says: `error` is raised, or the call is answered; `hold` makes it wait before.

    With `body`, the answer is one that is still arriving.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.hold: asyncio.Event | None = None
        self.body: Body | None = None
        self.calls = 0
        self.at_a_time = 0
        self.most = 0

    async def __call__(self, call: Call) -> Reply:
        self.calls += 1
        self.at_a_time += 1
        self.most = max(self.most, self.at_a_time)
        error = self.error
        try:
            if self.hold is not None:
                await self.hold.wait()
                error = self.error
            await asyncio.sleep(0)
        finally:
            self.at_a_time -= 1
        if error is not None:
            raise error
        return Reply(Payload(b"ok", body=self.body), Source.UPSTREAM)


class Worker:
    """A breaker with an upstream, as one worker has it."""

    def __init__(self, table: UpstreamTable, failures: int = 3, seconds: float = OPEN_SECONDS) -> None:
        self.upstream = Upstream()
        self.opened = 0
        self.table = table
        self.breaker = Breaker(
            ADDRESS, self.upstream, table, failures=failures, open_seconds=seconds, on_open=self._opened
        )

    def _opened(self) -> None:
        self.opened += 1

    async def ask(self, call: Call) -> str:
        """Return `ok` or what the call was refused with."""
        try:
            await self.breaker(call)
        except Refusal as refusal:
            return refusal.reason.value
        except NodeGone:
            return "gone"
        return "ok"

    async def fail(self, call: Call, times: int = 3, error: BaseException = DOWN) -> None:
        self.upstream.error = error
        for _ in range(times):
            assert await self.ask(call) != "breaker_open"
        self.upstream.error = None

    @property
    def state(self) -> int:
        return self.table.get(ADDRESS).breaker


@pytest.fixture
def table() -> UpstreamTable:
    return UpstreamTable()


@pytest.fixture
def worker(table: UpstreamTable) -> Worker:
    return Worker(table)


@pytest.fixture
def call(make_call: MakeCall) -> Call:
    return make_call(Method.PULL_MESSAGES, b"x")


async def until_due(worker: Worker) -> None:
    async with asyncio.timeout(5):
        while not worker.breaker.probe_is_due:
            await asyncio.sleep(0.01)


async def until_it_is(worker: Worker, state: int) -> float:
    """Wait until the breaker is in this state; return since when."""
    async with asyncio.timeout(5):
        while worker.state != state:
            await asyncio.sleep(0)
    return worker.table.get(ADDRESS).turned


# -- what counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Refusal(Reason.UPSTREAM_DOWN, sent=False), Verdict.FAILS),
        (Refusal(Reason.UPSTREAM_DOWN), Verdict.FAILS),
        (Refusal(Reason.UPSTREAM_DOWN, status=502), Verdict.FAILS),
        (Refusal(Reason.UPSTREAM_DOWN, status=503), Verdict.FAILS),
        (Refusal(Reason.UPSTREAM_DOWN, status=504), Verdict.FAILS),
        (Refusal(Reason.UPSTREAM_TIMEOUT), Verdict.FAILS),
        (Refusal(Reason.UPSTREAM_TIMEOUT, sent=False), Verdict.SAYS_NOTHING),
        (Refusal(Reason.OVERLOADED, status=429), Verdict.WORKS),
        (Refusal(Reason.UPSTREAM_REJECTED, status=404), Verdict.WORKS),
        (Refusal(Reason.UPSTREAM_BAD_ANSWER, status=200), Verdict.WORKS),
        (Refusal(Reason.UPSTREAM_REJECTED, status=500), Verdict.SAYS_NOTHING),
        (Refusal(Reason.UPSTREAM_BAD_ANSWER), Verdict.SAYS_NOTHING),
        (Refusal(Reason.OVERLOADED, sent=False), Verdict.SAYS_NOTHING),
        (Refusal(Reason.MALFORMED), Verdict.SAYS_NOTHING),
        (Refusal(Reason.TOO_LARGE), Verdict.SAYS_NOTHING),
        (NodeGone(), Verdict.SAYS_NOTHING),
        (asyncio.CancelledError(), Verdict.SAYS_NOTHING),
    ],
    ids=repr,
)
async def test_what_an_exchange_says_about_its_address(
    worker: Worker, call: Call, error: BaseException, expected: Verdict
) -> None:
    assert verdict(error) is expected
    for _ in range(10):
        worker.upstream.error = error
        with pytest.raises(type(error)):
            await worker.breaker(call)
        if worker.state != CLOSED:
            break
    assert (worker.state == OPEN) is (expected is Verdict.FAILS)


async def test_failures_count_only_in_a_row(worker: Worker, call: Call) -> None:
    for _ in range(5):
        await worker.fail(call, 2)
        assert await worker.ask(call) == "ok"
    assert worker.state == CLOSED


async def test_what_says_nothing_does_not_end_a_row(worker: Worker, call: Call) -> None:
    await worker.fail(call, 2)
    await worker.fail(call, 5, NodeGone())
    assert worker.state == CLOSED
    await worker.fail(call, 1)
    assert worker.state == OPEN


async def test_the_refusal_of_the_upstream_comes_out_as_it_is(worker: Worker, call: Call) -> None:
    worker.upstream.error = DOWN
    for _ in range(3):
        with pytest.raises(Refusal) as caught:
            await worker.breaker(call)
        assert caught.value is DOWN


# -- open, half open, closed ----------------------------------------------------------------------------


async def test_an_open_breaker_refuses_at_once_without_asking(worker: Worker, call: Call) -> None:
    await worker.fail(call)
    asked = worker.upstream.calls
    with pytest.raises(Refusal) as caught:
        await worker.breaker(call)
    assert (caught.value.reason, caught.value.sent, caught.value.by) == (Reason.BREAKER_OPEN, False, ADDRESS)
    assert worker.upstream.calls == asked
    assert worker.opened == 1


async def test_after_its_time_one_call_tries_and_closes_it(worker: Worker, call: Call) -> None:
    await worker.fail(call)
    await until_due(worker)
    worker.upstream.hold = asyncio.Event()
    probe = asyncio.ensure_future(worker.ask(call))
    await asyncio.sleep(0)
    assert worker.state == HALF_OPEN
    assert [await worker.ask(call) for _ in range(5)] == ["breaker_open"] * 5
    worker.upstream.hold.set()
    assert await probe == "ok"
    assert worker.state == CLOSED
    assert await worker.ask(call) == "ok"
    assert worker.upstream.most == 1


@pytest.mark.parametrize(
    ("error", "expected", "closes"),
    [
        (None, "ok", True),
        (Refusal(Reason.UPSTREAM_REJECTED, status=404), "upstream_rejected", True),
        (Refusal(Reason.UPSTREAM_TIMEOUT), "upstream_timeout", False),
        (NodeGone(), "gone", False),
    ],
    ids=repr,
)
async def test_a_probe_that_hangs_leaves_it_to_the_next_and_closes_it_when_it_is_answered(
    worker: Worker,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    expected: str,
    *,
    closes: bool,
) -> None:
    monkeypatch.setattr("relay.upstreams.breaker.PROBE_SECONDS", 0.2)
    await worker.fail(call)
    await until_due(worker)
    worker.upstream.hold = asyncio.Event()
    hanging = [asyncio.ensure_future(worker.ask(call))]
    for _ in range(2):
        probed = await until_it_is(worker, HALF_OPEN)
        assert await worker.ask(call) == "breaker_open"
        assert await until_it_is(worker, OPEN) > probed, "it waits its whole time once more"
        await until_due(worker)
        hanging.append(asyncio.ensure_future(worker.ask(call)))
    await until_it_is(worker, HALF_OPEN)
    await until_it_is(worker, OPEN)
    assert worker.upstream.at_a_time == 3  # none was cut off
    worker.upstream.error = error
    worker.upstream.hold.set()
    for probe in hanging:
        assert await probe == expected
    assert worker.state == (CLOSED if closes else OPEN)


async def test_a_probe_that_is_cancelled_takes_its_call_with_it(worker: Worker, call: Call) -> None:
    await worker.fail(call)
    await until_due(worker)
    worker.upstream.hold = asyncio.Event()
    probe = asyncio.ensure_future(worker.ask(call))
    await until(lambda: worker.upstream.at_a_time == 1)
    probe.cancel()
    await until(lambda: worker.upstream.at_a_time == 0)
    worker.upstream.hold = None
    assert await worker.ask(call) == "ok"


@pytest.mark.parametrize("hangs", [False, True])
async def test_an_answer_whose_probe_is_cancelled_in_that_moment_is_closed(
    worker: Worker, call: Call, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    if hangs:
        monkeypatch.setattr("relay.upstreams.breaker.PROBE_SECONDS", 0.05)
    await worker.fail(call)
    await until_due(worker)
    worker.upstream.hold, worker.upstream.body = asyncio.Event(), Body()
    probe = asyncio.ensure_future(worker.ask(call))
    await asyncio.sleep(0.2 if hangs else 0.01)
    worker.upstream.hold.set()
    while worker.upstream.at_a_time:
        await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    await asyncio.sleep(0)
    assert worker.upstream.body.closed


async def test_what_hung_before_a_reset_does_not_open_it_again(
    worker: Worker, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.upstreams.breaker.PROBE_SECONDS", 0.05)
    await worker.fail(call)
    await until_due(worker)
    worker.upstream.hold = asyncio.Event()
    hanging = asyncio.ensure_future(worker.ask(call))
    await asyncio.sleep(0.1)
    worker.breaker.reset()
    worker.upstream.error = DOWN
    worker.upstream.hold.set()
    assert await hanging == "upstream_down"
    assert worker.state == CLOSED


async def test_a_probe_that_fails_opens_it_for_as_long_again(worker: Worker, call: Call) -> None:
    await worker.fail(call)
    await until_due(worker)
    await worker.fail(call, 1)
    assert worker.state == OPEN
    assert not worker.breaker.probe_is_due
    assert await worker.ask(call) == "breaker_open"
    await until_due(worker)
    assert await worker.ask(call) == "ok"


@pytest.mark.parametrize("how", ["gone", "cancelled"])
async def test_a_node_that_leaves_during_the_probe_leaves_it_to_the_next(
    worker: Worker, call: Call, how: str
) -> None:
    await worker.fail(call)
    await until_due(worker)
    if how == "gone":
        worker.upstream.error = NodeGone()
        assert await worker.ask(call) == "gone"
    else:
        worker.upstream.hold = asyncio.Event()
        probe = asyncio.ensure_future(worker.ask(call))
        await asyncio.sleep(0)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        worker.upstream.hold = None
    assert worker.state == HALF_OPEN
    worker.upstream.error = None
    assert await worker.ask(call) == "ok"
    assert worker.state == CLOSED


class Arriving:
    """A body that never comes to its end."""

    async def read(self) -> bytes:
        raise AssertionError("an open breaker reads no body")

    def close(self) -> None:
        pass


async def test_a_call_whose_body_is_still_arriving_is_not_the_probe(
    worker: Worker, call: Call, make_call: MakeCall
) -> None:
    """It may take hours, in which all other calls would be refused."""
    await worker.fail(call)
    await until_due(worker)
    asked = worker.upstream.calls
    slow = make_call(Method.PUSH_OBJECT, Payload(body=Arriving(), size=1 << 30))
    assert await worker.ask(slow) == "breaker_open"
    assert (worker.upstream.calls, worker.state) == (asked, OPEN)
    assert await worker.ask(call) == "ok"
    assert worker.state == CLOSED


async def test_an_answer_that_a_node_does_not_like_closes_it_too(worker: Worker, call: Call) -> None:
    await worker.fail(call)
    await until_due(worker)
    await worker.fail(call, 1, Refusal(Reason.UPSTREAM_REJECTED, status=404))
    assert worker.state == CLOSED


async def test_calls_that_began_before_it_turned_are_not_counted(worker: Worker, call: Call) -> None:
    """Else the timeouts of an outage would open it again when the outage is over."""
    worker.upstream.hold = hold = asyncio.Event()
    old = [asyncio.ensure_future(worker.ask(call)) for _ in range(10)]
    await asyncio.sleep(0)
    worker.upstream.hold = None
    await worker.fail(call)
    await until_due(worker)
    assert await worker.ask(call) == "ok"
    worker.upstream.error = DOWN
    hold.set()
    assert await asyncio.gather(*old) == ["upstream_down"] * 10
    assert worker.state == CLOSED
    assert worker.breaker.state()["failures_in_a_row"] == 0


async def test_failures_that_come_while_it_is_open_do_not_keep_it_open(worker: Worker, call: Call) -> None:
    worker.upstream.hold = hold = asyncio.Event()
    old = [asyncio.ensure_future(worker.ask(call)) for _ in range(10)]
    await asyncio.sleep(0)
    worker.upstream.hold = None
    await worker.fail(call)
    turned = worker.table.get(ADDRESS).turned
    worker.upstream.error = DOWN
    hold.set()
    await asyncio.gather(*old)
    assert worker.table.get(ADDRESS).turned == turned


async def test_a_clock_that_is_set_changes_nothing(
    worker: Worker, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.fail(call)
    await until_due(worker)

    class Past(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) - timedelta(days=365)

    monkeypatch.setattr("pybreaker.datetime", Past)
    monkeypatch.setattr("relay.upstreams.breaker.datetime", Past)
    assert await worker.ask(call) == "ok"


async def test_a_probe_whose_turn_another_worker_had_meanwhile_is_none(
    worker: Worker, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.fail(call)
    await until_due(worker)
    asked, claim = worker.upstream.calls, worker.table.claim

    def late(name: str) -> bool:
        """Get the claim when a probe of another worker has just failed."""
        worker.table.change(ADDRESS, lambda state: state._replace(breaker=OPEN, turned=time.monotonic()))
        return claim(name)

    with monkeypatch.context() as patch:
        patch.setattr(worker.table, "claim", late)
        assert await worker.ask(call) == "breaker_open"
    assert (worker.upstream.calls, worker.state) == (asked, OPEN)
    await until_due(worker)
    assert await worker.ask(call) == "ok", "the claim was given back"


# -- several workers ------------------------------------------------------------------------------------


async def test_what_one_worker_finds_out_holds_for_all(table: UpstreamTable, call: Call) -> None:
    first, second = Worker(table), Worker(table)
    await first.fail(call)
    assert await second.ask(call) == "breaker_open"
    assert (first.opened, second.opened) == (1, 1)
    await until_due(second)
    assert await second.ask(call) == "ok"
    assert await first.ask(call) == "ok"


@pytest.mark.parametrize("error", [DOWN, None], ids=["fails", "goes well"])
async def test_a_call_that_ends_after_another_worker_opened_it_ends_as_it_would_have(
    table: UpstreamTable, call: Call, error: Refusal | None
) -> None:
    first, second = Worker(table), Worker(table)
    await second.fail(call, 1)
    second.upstream.hold = asyncio.Event()
    held = asyncio.ensure_future(second.ask(call))
    await asyncio.sleep(0)
    await first.fail(call)
    turned = table.get(ADDRESS).turned
    second.upstream.error = error
    second.upstream.hold.set()
    assert await held == ("ok" if error is None else "upstream_down")
    assert (second.state, table.get(ADDRESS).turned) == (OPEN, turned)


async def test_a_reset_closes_it_for_all(table: UpstreamTable, call: Call) -> None:
    first, second = Worker(table, seconds=60), Worker(table, seconds=60)
    await first.fail(call)
    assert await second.ask(call) == "breaker_open"
    second.breaker.reset()
    assert await first.ask(call) == "ok"
    assert first.breaker.state() == {
        "address": ADDRESS,
        "state": "closed",
        "failures_in_a_row": 0,
        "seconds": pytest.approx(0, abs=5),
    }


async def test_a_reset_forgets_the_failures_of_a_closed_one(worker: Worker, call: Call) -> None:
    await worker.fail(call, 2)
    worker.breaker.reset()
    await worker.fail(call, 2)
    assert worker.state == CLOSED


async def test_a_worker_that_serves_nothing_notices_once_a_second(table: UpstreamTable, call: Call) -> None:
    first, idle = Worker(table), Worker(table)
    await first.fail(call)
    idle.breaker.look()
    assert idle.opened == 1


async def test_changes_are_counted_once_on_the_host(table: UpstreamTable, call: Call) -> None:
    def counted(to: str) -> float:
        labels = {"address": ADDRESS, "to": to}
        return REGISTRY.get_sample_value("relay_breaker_transitions_total", labels) or 0.0

    before = [counted(to) for to in ("open", "half-open", "closed")]
    workers = [Worker(table) for _ in range(3)]
    await workers[0].fail(call)
    for worker in workers:
        await worker.ask(call)
    assert REGISTRY.get_sample_value("relay_breaker_state", {"address": ADDRESS}) == 2
    await until_due(workers[1])
    await workers[1].ask(call)
    for worker in workers:
        await worker.ask(call)
    assert [counted(to) for to in ("open", "half-open", "closed")] == [n + 1 for n in before]
    assert REGISTRY.get_sample_value("relay_breaker_state", {"address": ADDRESS}) == 0


def run_worker(table: UpstreamTable, call: Call, seconds: float, probes: int, hold: float) -> None:
    """Be a worker whose upstream is out: each call that reaches it writes two lines to the pipe `probes`."""

    async def upstream(_: Call) -> Reply:
        os.write(probes, b"%d in %d\n" % (os.getpid(), time.monotonic_ns()))
        await asyncio.sleep(hold)
        os.write(probes, b"%d out %d\n" % (os.getpid(), time.monotonic_ns()))
        raise DOWN

    async def work() -> None:
        breaker = Breaker(ADDRESS, upstream, table, failures=3, open_seconds=0.05, on_open=lambda: None)
        end = time.monotonic() + seconds

        async def node() -> None:
            while time.monotonic() < end:
                try:
                    await breaker(call)
                except Refusal:
                    await asyncio.sleep(0.002)

        await asyncio.gather(*(node() for _ in range(5)))

    asyncio.run(work())


def read_all(pipe: int) -> list[tuple[int, str, int]]:
    data = b""
    while piece := os.read(pipe, 1 << 20):
        data += piece
    found = []
    for line in data.decode().splitlines():
        pid, what, at = line.split()
        found.append((int(pid), what, int(at)))
    return sorted(found, key=lambda entry: entry[2])


@pytest.mark.timeout(60)
def test_one_call_at_a_time_probes_on_the_host_also_when_its_worker_is_killed(
    table: UpstreamTable, call: Call
) -> None:
    """Four workers with five nodes each, an upstream that stays out, a SIGKILL to a worker that probes."""
    table.change(ADDRESS, lambda state: state._replace(breaker=OPEN, turned=time.monotonic()))
    read, write = os.pipe()
    workers: list[BaseProcess] = [
        FORK.Process(target=run_worker, args=(table, call, 3.0, write, 0.05)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    os.close(write)
    first = b""
    while b" in " not in first:
        first += os.read(read, 1)
    while not first.endswith(b"\n"):
        first += os.read(read, 1)
    victim, _, _ = first.split()
    os.kill(int(victim), signal.SIGKILL)
    lines = read_all(read)
    for worker in workers:
        worker.join(20)
    os.close(read)
    holder: int | None = int(victim)
    probes = 0
    for pid, what, _ in lines:
        if what == "in":
            probes += 1
            # The victim said `in` and never `out`: its claim ends with it.
            assert holder in (None, int(victim)), f"{pid} probed beside {holder}"
            holder = pid
        else:
            assert pid == holder
            holder = None
    assert probes > 3
    assert len({pid for pid, _, _ in lines}) >= 2
