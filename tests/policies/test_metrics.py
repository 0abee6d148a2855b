"""Every call is counted once, when it ends, whatever became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from relay.call import Call, Ending, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.policies import Metrics
from relay.policies.metrics import SECONDS, stray
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from relay.pipeline import Handler

MakeCall = Callable[..., Call]

PULL = {"method": "PullMessages", "wire": "http_v1"}


async def upstream(call: Call) -> Reply:
    return Reply(Payload(b"answer"), Source.UPSTREAM)


async def refusing(call: Call) -> Reply:
    raise Refusal(Reason.UPSTREAM_DOWN)


class Meter:
    """How far the numbers have moved since this was made; the registry belongs to the whole process."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name.startswith("relay_") and not sample.name.endswith("_created")
        }

    def moved(self, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return self._now().get(key, 0.0) - self.start.get(key, 0.0)

    def all_moved(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        now = self._now()
        moves = {key: value - self.start.get(key, 0.0) for key, value in now.items() if key[0] == name}
        return {labels: move for (_, labels), move in moves.items() if move}


@pytest.fixture
def meter() -> Meter:
    return Meter()


async def run(call: Call, last: Handler = upstream, policy: Metrics | None = None) -> Metrics:
    policy = policy or Metrics()
    try:
        await policy.handle(call, last)
    except Refusal:
        assert last is refusing
    return policy


async def test_a_call_is_in_flight_until_it_ends(make_call: MakeCall, meter: Meter) -> None:
    call = make_call(Method.PULL_MESSAGES, wire=Wire.REST_V0)
    policy = Metrics()

    async def looking(_: Call) -> Reply:
        policy.sample()
        assert meter.moved("relay_calls_in_flight", wire="rest_v0") == 1
        return Reply(Payload(), Source.LOCAL)

    await run(call, looking, policy)
    policy.sample()
    assert meter.moved("relay_calls_in_flight", wire="rest_v0") == 1, "its answer is still being written"
    call.end(Ending("ok", seconds=0.1))
    policy.sample()
    assert meter.moved("relay_calls_in_flight", wire="rest_v0") == 0
    assert meter.moved("relay_calls_in_flight", wire="http_v1") == 0


@pytest.mark.parametrize(
    ("ending", "labels"),
    [
        (Ending("ok", seconds=0, source=Source.UPSTREAM), ("ok", "upstream")),
        (Ending("ok", seconds=0, source=Source.LOCAL), ("ok", "local")),
        (Ending("upstream_403", seconds=0, source=Source.UPSTREAM), ("upstream_403", "upstream")),
        (Ending("cut", seconds=0, source=Source.UPSTREAM, lost=True), ("cut", "upstream")),
        (Ending("node_gone", seconds=0), ("node_gone", "local")),
        (
            Ending("upstream_down", seconds=0, refusal=Refusal(Reason.UPSTREAM_DOWN)),
            ("upstream_down", "local"),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
async def test_a_call_is_counted_by_its_outcome_and_by_who_answered_it(
    make_call: MakeCall, meter: Meter, ending: Ending, labels: tuple[str, str]
) -> None:
    call = make_call(Method.PULL_MESSAGES)
    policy = await run(call, refusing if ending.refusal else upstream)
    policy.sample()
    assert meter.all_moved("relay_calls_total") == {}, "counted before it has ended"
    call.end(ending)
    for _ in range(2):  # a second sample must not count it again
        policy.sample()
    outcome, source = labels
    expected = frozenset({**PULL, "outcome": outcome, "source": source}.items())
    assert meter.all_moved("relay_calls_total") == {expected: 1}


async def test_calls_of_one_kind_add_up_and_calls_of_another_are_apart(
    make_call: MakeCall, meter: Meter
) -> None:
    policy = Metrics()
    kinds = [(Method.PULL_MESSAGES, Wire.HTTP_V1), (Method.GET_RUN, Wire.HTTP_V1)]
    rest = (Method.PULL_MESSAGES, Wire.REST_V0)
    for method, wire in (*kinds, rest, *kinds):
        call = make_call(method, wire=wire)
        await run(call, policy=policy)
        call.end(Ending("ok", seconds=0, source=Source.UPSTREAM))
    policy.sample()
    for method, wire, count in ((*kinds[0], 2), (*kinds[1], 2), (*rest, 1)):
        labels = {"method": method.rpc, "wire": wire.value}
        assert meter.moved("relay_calls_total", **labels, outcome="ok", source="upstream") == count
        assert meter.moved("relay_call_duration_seconds_count", **labels) == count


async def test_calls_of_one_outcome_are_told_apart_by_who_answered(make_call: MakeCall, meter: Meter) -> None:
    policy = Metrics()
    for source in (Source.UPSTREAM, Source.LOCAL):
        call = make_call(Method.PULL_MESSAGES)
        await run(call, policy=policy)
        call.end(Ending("ok", seconds=0, source=source))
    policy.sample()
    for source in (Source.UPSTREAM, Source.LOCAL):
        assert meter.moved("relay_calls_total", **PULL, outcome="ok", source=source.value) == 1


async def test_two_instances_count_into_the_same_metrics(make_call: MakeCall, meter: Meter) -> None:
    """As after a reload within one process."""
    for policy in (Metrics(), Metrics()):
        call = make_call(Method.PULL_MESSAGES)
        await run(call, policy=policy)
        call.end(Ending("ok", seconds=0, source=Source.UPSTREAM))
        policy.sample()
    assert meter.moved("relay_calls_total", **PULL, outcome="ok", source="upstream") == 2


async def test_the_whole_time_of_a_call_is_observed(make_call: MakeCall, meter: Meter) -> None:
    policy = Metrics()
    for seconds in (0.2, 0.2, 500.0):
        call = make_call(Method.PULL_MESSAGES)
        await run(call, policy=policy)
        call.end(Ending("ok", seconds=seconds))
    for _ in range(2):  # a second sample must not count them again
        policy.sample()
    assert meter.moved("relay_call_duration_seconds_count", **PULL) == 3
    assert meter.moved("relay_call_duration_seconds_sum", **PULL) == pytest.approx(500.4)
    for bound, calls in (("0.1", 0), ("0.25", 2), ("120.0", 2), ("+Inf", 3)):
        assert meter.moved("relay_call_duration_seconds_bucket", **PULL, le=bound) == calls


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.00100001, 0.0025, 30, 120, 120.5])
async def test_a_time_falls_into_the_bucket_that_the_library_would_choose(
    make_call: MakeCall, meter: Meter, seconds: float
) -> None:
    call = make_call(Method.PULL_MESSAGES)
    policy = await run(call)
    call.end(Ending("ok", seconds=seconds))
    policy.sample()
    gathered = meter.all_moved("relay_call_duration_seconds_bucket")
    again = Meter()
    SECONDS.labels(*PULL.values()).observe(seconds)
    assert again.all_moved("relay_call_duration_seconds_bucket") == gathered


async def test_bytes_are_counted_as_they_passed_and_not_as_they_were_declared(
    make_call: MakeCall, meter: Meter
) -> None:
    class CutOff:
        async def read(self) -> bytes:
            return b"abc"

        def close(self) -> None:
            pass

    call = make_call(Method.PUSH_OBJECT, Payload(body=CutOff(), size=1000))
    await call.payload.peek(1)
    policy = Metrics()
    await run(call, policy=policy)
    call.end(Ending("node_gone", seconds=0, sent=5))
    for _ in range(2):  # a second sample must not count them again
        policy.sample()
    labels = {"method": "PushObject", "wire": "http_v1"}
    assert meter.moved("relay_bytes_total", **labels, direction="in") == 3
    assert meter.moved("relay_bytes_total", **labels, direction="out") == 5


async def test_the_reply_of_the_chain_is_passed_on(make_call: MakeCall) -> None:
    reply = Reply(Payload(), Source.UPSTREAM)

    async def last(_: Call) -> Reply:
        return reply

    assert await Metrics().handle(make_call(Method.PULL_MESSAGES), last) is reply


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_calls_of_every_method_are_counted(method: Method) -> None:
    assert Metrics().applies(method)


async def test_no_label_can_take_a_value_for_each_node_or_run(make_call: MakeCall) -> None:
    call = make_call(Method.PULL_MESSAGES)
    policy = await run(call)
    call.end(Ending("ok", seconds=0, sent=1, source=Source.UPSTREAM))
    policy.sample()
    labels = {
        label
        for family in REGISTRY.collect()
        if family.name.startswith("relay_call") or family.name == "relay_bytes"
        for sample in family.samples
        for label in sample.labels
    }
    assert labels == {"method", "wire", "outcome", "source", "direction", "le"}


def test_a_request_that_is_no_call_is_counted_by_what_it_got(meter: Meter) -> None:
    stray("404")
    stray("404")
    stray("dropped")
    assert meter.moved("relay_strays_total", answer="404") == 2
    assert meter.moved("relay_strays_total", answer="dropped") == 1
