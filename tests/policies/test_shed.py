"""How many calls the SuperLink is given, who waits, who is refused, and what long bodies count for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from relay.call import Call, Ending, Payload, Reply, Source
from relay.concurrency import FixedLimit
from relay.fleet import Kind, Method
from relay.policies.shed import RESERVE, Shed
from relay.refusal import NodeGone, Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Hashable

MakeCall = Callable[..., Call]


class Upstream:
    """Answers when the test says so.

    Attributes:
        at_work: calls that have no answer yet, in the order in which they came.
        answer: what it answers with.
    """

    def __init__(self) -> None:
        self.at_work: list[tuple[Call, asyncio.Future[None]]] = []
        self.answer: Callable[[], Payload] = Payload
        self.read = True

    async def __call__(self, call: Call) -> Reply:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (call, turn)
        self.at_work.append(entry)
        try:
            if self.read:
                async for _ in call.payload.stream():
                    pass
            await turn
        finally:
            self.at_work.remove(entry)
        return Reply(self.answer(), Source.UPSTREAM)

    @property
    def methods(self) -> list[Method]:
        return [call.method for call, _ in self.at_work]

    def finish(self, error: BaseException | None = None) -> None:
        """Answer the oldest call."""
        turn = self.at_work[0][1]
        if error is None:
            turn.set_result(None)
        else:
            turn.set_exception(error)


class Body:
    """A body that comes when the test says so."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes | BaseException] = asyncio.Queue()
        self.closed = False

    async def read(self) -> bytes:
        piece = await self.pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self) -> None:
        self.closed = True


class Learning(FixedLimit):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.told: list[tuple[Hashable, int]] = []

    def answered(self, what: Hashable, seconds: float, in_flight: int) -> None:
        assert 0 <= seconds < 5
        self.told.append((what, in_flight))


def shed(limit: int | FixedLimit = 2, *, queue: int = 10, timeout: float = 5.0, most: int = 1000) -> Shed:
    chosen = FixedLimit(limit) if isinstance(limit, int) else limit
    return Shed(limit=chosen, queue=queue, queue_timeout=timeout, max_bytes=most)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


def start(policy: Shed, upstream: Upstream, *calls: Call) -> list[asyncio.Task[Reply]]:
    return [asyncio.ensure_future(policy.handle(call, upstream)) for call in calls]


async def test_as_many_calls_as_the_limit_allows_are_at_the_superlink(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy = shed(2)
    tasks = start(policy, upstream, *(make_call(Method.GET_RUN) for _ in range(5)))
    await settle()
    assert (len(upstream.at_work), policy.slots.inside, policy.slots.waiting) == (2, 2, 3)
    for left in (4, 3, 2, 1, 0):
        upstream.finish()
        await settle()
        assert len(upstream.at_work) == min(left, 2)
    await asyncio.gather(*tasks)
    assert (policy.slots.inside, policy.slots.waiting) == (0, 0)


@pytest.mark.parametrize(
    "error",
    [Refusal(Reason.UPSTREAM_DOWN), NodeGone(), asyncio.CancelledError(), RuntimeError()],
    ids=lambda error: type(error).__name__,
)
async def test_a_slot_comes_back_however_the_call_ends(
    make_call: MakeCall, upstream: Upstream, error: BaseException
) -> None:
    policy = shed(1)
    first, second = start(policy, upstream, *(make_call(Method.GET_RUN) for _ in range(2)))
    await settle()
    upstream.finish(error)
    await settle()
    assert first.cancelled() or first.exception() is error
    assert len(upstream.at_work) == 1
    upstream.finish()
    await second
    assert policy.slots.inside == 0


async def test_a_call_that_is_cancelled_while_it_waits_leaves_nothing(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy = shed(1)
    first, second = start(policy, upstream, *(make_call(Method.GET_RUN) for _ in range(2)))
    await settle()
    second.cancel()
    await settle()
    assert policy.slots.waiting == 0
    upstream.finish()
    await first
    assert policy.slots.inside == 0


async def test_heartbeats_go_first_then_messages_then_nodes_that_come_then_pulls(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy = shed(1)
    methods = [
        Method.PULL_MESSAGES,
        Method.ACTIVATE_NODE,
        Method.PULL_OBJECT,
        Method.CONFIRM_MESSAGE_RECEIVED,
        Method.DEACTIVATE_NODE,
        Method.PUSH_MESSAGES,
    ]
    tasks = start(policy, upstream, make_call(Method.GET_RUN), *map(make_call, methods))
    await settle()
    seen = []
    for _ in tasks:
        seen += upstream.methods
        upstream.finish()
        await settle()
    assert seen == [
        Method.GET_RUN,
        Method.PULL_OBJECT,
        Method.CONFIRM_MESSAGE_RECEIVED,
        Method.PUSH_MESSAGES,
        Method.ACTIVATE_NODE,
        Method.DEACTIVATE_NODE,
        Method.PULL_MESSAGES,
    ]


async def test_heartbeats_have_slots_of_their_own(make_call: MakeCall, upstream: Upstream) -> None:
    policy = shed(1)
    calls = [make_call(Method.PULL_MESSAGES) for _ in range(3)]
    calls += [make_call(Method.SEND_NODE_HEARTBEAT) for _ in range(RESERVE + 1)]
    tasks = start(policy, upstream, *calls)
    await settle()
    assert upstream.methods == [Method.PULL_MESSAGES] + [Method.SEND_NODE_HEARTBEAT] * RESERVE
    upstream.finish()
    await settle()
    # The limit is 1: the pulls wait until the heartbeats are done.
    assert upstream.methods == [Method.SEND_NODE_HEARTBEAT] * (RESERVE + 1)
    for task in tasks:
        task.cancel()
    await settle()


async def test_a_call_that_waits_for_too_long_is_refused_and_counted(
    make_call: MakeCall, upstream: Upstream
) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("relay_shed_total", {"method": "PullMessages"}) or 0.0

    policy, before = shed(1, timeout=0.02), counted()
    first, second = start(policy, upstream, *(make_call(Method.PULL_MESSAGES) for _ in range(2)))
    with pytest.raises(Refusal) as caught:
        await second
    assert (caught.value.reason, caught.value.by, caught.value.sent) == (Reason.OVERLOADED, "shed", False)
    assert counted() == before + 1
    upstream.finish()
    await first


async def test_a_call_does_not_wait_beyond_the_patience_of_its_node(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy = shed(1)
    first, _ = start(policy, upstream, *(make_call(Method.GET_RUN) for _ in range(2)))
    await settle()
    started = time.monotonic()
    with pytest.raises(Refusal):
        await policy.handle(make_call(Method.GET_RUN, deadline=started + 0.03), upstream)
    assert time.monotonic() - started < 4.5
    upstream.finish()
    await first
    upstream.finish()


async def test_a_full_queue_refuses_pulls_and_no_heartbeat(make_call: MakeCall, upstream: Upstream) -> None:
    policy = shed(1, queue=3)
    pulls = start(policy, upstream, *(make_call(Method.PULL_MESSAGES) for _ in range(4)))
    await settle()
    beats = start(policy, upstream, *(make_call(Method.SEND_NODE_HEARTBEAT) for _ in range(RESERVE + 3)))
    await settle()
    refused = [task for task in pulls if task.done()]
    assert len(refused) == 3
    assert not any(beat.done() for beat in beats)
    for _ in range(1 + len(beats)):
        upstream.finish()
        await settle()
    assert all(beat.done() and beat.exception() is None for beat in beats)
    assert all(isinstance(task.exception(), Refusal) for task in refused)


async def test_only_whole_small_answers_tell_how_fast_the_superlink_is(
    make_call: MakeCall, upstream: Upstream
) -> None:
    limit = Learning(2)
    policy = shed(limit)
    call = make_call(Method.PULL_OBJECT)
    (task,) = start(policy, upstream, call)
    await settle()
    upstream.finish()
    await task
    assert limit.told == [(Method.PULL_OBJECT, 1)]
    upstream.answer = lambda: Payload(body=Body(), size=500)
    (task,) = start(policy, upstream, call)
    await settle()
    upstream.finish()
    await task
    (task,) = start(policy, upstream, call)
    await settle()
    upstream.finish(Refusal(Reason.UPSTREAM_TIMEOUT))
    await asyncio.gather(task, return_exceptions=True)
    assert len(limit.told) == 1


# -- long bodies ----------------------------------------------------------------------------------------


async def test_an_upload_has_a_slot_only_while_the_superlink_works_on_it(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy, body = shed(1), Body()
    (task,) = start(policy, upstream, make_call(Method.PUSH_OBJECT, Payload(body=body, size=10)))
    body.pieces.put_nowait(b"12345")
    await settle()
    assert (policy.slots.inside, policy.bytes.inside) == (0, 10)
    (other,) = start(policy, upstream, make_call(Method.PUSH_MESSAGES))
    await settle()
    assert upstream.methods == [Method.PUSH_OBJECT, Method.PUSH_MESSAGES]
    body.pieces.put_nowait(b"67890")
    await settle()
    # The other has the only slot: the last piece waits for it.
    payload = upstream.at_work[0][0].payload
    assert payload.passed == 5
    upstream.at_work[1][1].set_result(None)
    await other
    await settle()
    assert (payload.passed, policy.slots.inside) == (10, 1)
    body.pieces.put_nowait(b"")
    await settle()
    upstream.finish()
    await task
    assert (policy.slots.inside, policy.bytes.inside) == (0, 0)


async def test_an_upload_without_a_length_asks_for_its_slot_at_its_end(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy, body = shed(1, most=1 << 30), Body()
    (task,) = start(policy, upstream, make_call(Method.PUSH_OBJECT, Payload(body=body)))
    body.pieces.put_nowait(b"12345")
    await settle()
    assert policy.slots.inside == 0
    assert policy.bytes.inside > 0
    body.pieces.put_nowait(b"")
    await settle()
    assert policy.slots.inside == 1
    upstream.finish()
    await task
    assert (policy.slots.inside, policy.bytes.inside) == (0, 0)


async def test_the_bytes_of_an_upload_reach_the_superlink_as_they_came(make_call: MakeCall) -> None:
    got = []

    async def upstream(call: Call) -> Reply:
        got.extend([piece async for piece in call.payload.stream()])
        return Reply(Payload(), Source.UPSTREAM)

    body = Body()
    for piece in (b"12345", b"67", b"890", b""):
        body.pieces.put_nowait(piece)
    call = make_call(Method.PUSH_OBJECT, Payload(body=body, size=10))
    assert await call.payload.peek(3) == b"123"
    await shed().handle(call, upstream)
    assert b"".join(got) == b"1234567890"
    assert call.payload.passed == 10


async def test_an_upload_that_was_not_begun_may_be_sent_again(make_call: MakeCall) -> None:
    async def down(call: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN, sent=False)

    payload = Payload(body=Body(), size=10)
    call = make_call(Method.PUSH_OBJECT, payload)
    policy = shed()
    for _ in range(3):
        with pytest.raises(Refusal):
            await policy.handle(call, down)
        assert call.payload is payload
    assert policy.bytes.inside == 0


async def test_closing_a_call_closes_what_is_left_of_its_upload(
    make_call: MakeCall, upstream: Upstream
) -> None:
    body = Body()
    call = make_call(Method.PUSH_OBJECT, Payload(body=body, size=10))
    (task,) = start(shed(), upstream, call)
    body.pieces.put_nowait(b"123")
    await settle()
    body.pieces.put_nowait(NodeGone())
    with pytest.raises(NodeGone):
        await task
    call.payload.close()
    assert body.closed


async def test_uploads_wait_while_too_many_bytes_are_on_their_way_and_a_larger_one_passes_alone(
    make_call: MakeCall, upstream: Upstream
) -> None:
    upstream.read = False
    policy = shed(10, most=100)

    def upload(size: int) -> Call:
        return make_call(Method.PUSH_OBJECT, Payload(body=Body(), size=size))

    tasks = start(policy, upstream, upload(1000), upload(60), upload(40), upload(10))
    await settle()
    assert [call.payload.size for call, _ in upstream.at_work] == [1000]
    upstream.finish()
    await settle()
    assert [call.payload.size for call, _ in upstream.at_work] == [60, 40]
    upstream.finish()
    await settle()
    assert [call.payload.size for call, _ in upstream.at_work] == [40, 10]
    upstream.finish()
    upstream.finish() if len(upstream.at_work) == 1 else upstream.at_work[1][1].set_result(None)
    await asyncio.gather(*tasks)
    assert policy.bytes.inside == 0


async def test_a_long_answer_counts_until_its_node_has_it(make_call: MakeCall, upstream: Upstream) -> None:
    policy = shed(1, most=100, timeout=0.5)
    upstream.answer = lambda: Payload(body=Body(), size=150)
    first = make_call(Method.PULL_OBJECT)
    (task,) = start(policy, upstream, first)
    await settle()
    upstream.finish()
    await task
    assert (policy.slots.inside, policy.bytes.inside) == (0, 150)
    with pytest.raises(Refusal, match="overloaded"):
        await policy.handle(make_call(Method.PULL_OBJECT), upstream)
    (beat,) = start(policy, upstream, make_call(Method.SEND_NODE_HEARTBEAT))
    await settle()
    upstream.answer = Payload
    upstream.finish()
    await beat
    (other,) = start(policy, upstream, make_call(Method.PULL_OBJECT))
    await settle()
    first.end(Ending("ok", seconds=0))
    await settle()
    assert policy.bytes.inside == 0
    upstream.finish()
    await other


async def test_the_long_answer_to_a_question_counts_until_the_call_has_ended(
    make_call: MakeCall, upstream: Upstream
) -> None:
    """What repair and redelivery ask beside a call has no node of its own that would end it."""
    policy = shed(1, most=100)
    upstream.answer = lambda: Payload(body=Body(), size=150)
    call = make_call(Method.PUSH_OBJECT)
    (task,) = start(policy, upstream, call.beside(Method.PULL_OBJECT, b""))
    await settle()
    upstream.finish()
    await task
    assert policy.bytes.inside == 150
    call.end(Ending("ok", seconds=0))
    assert policy.bytes.inside == 0


async def test_the_bound_of_bytes_holds_for_heartbeats_neither_when_it_is_reached(
    make_call: MakeCall, upstream: Upstream
) -> None:
    policy = shed(1, most=10)
    policy.bytes.force(1000)
    for method in Method:
        if method.kind in (Kind.HEARTBEAT, Kind.CONFIRM, Kind.JOIN):
            (task,) = start(policy, upstream, make_call(method))
            await settle()
            upstream.finish()
            await task


# -- off, and the gauges --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_every_method_is_limited_unless_it_is_off(method: Method) -> None:
    assert shed().applies(method)
    assert not Shed(limit=None, queue=1, queue_timeout=1, max_bytes=1).applies(method)


async def test_the_gauges_show_what_is_under_way(make_call: MakeCall, upstream: Upstream) -> None:
    policy = shed(2)
    tasks = start(policy, upstream, *(make_call(Method.GET_RUN) for _ in range(5)))
    policy.bytes.force(7)
    await settle()
    Shed.sample([policy])
    assert [
        REGISTRY.get_sample_value(f"relay_{name}")
        for name in ("concurrency_limit", "in_flight", "queued", "in_flight_bytes")
    ] == [2, 2, 3, 7]
    for task in tasks:
        task.cancel()
    await settle()
    policy.bytes.leave(7)
    Shed.sample([policy, shed(3)])
    Shed.sample([Shed(limit=None, queue=1, queue_timeout=1, max_bytes=1)])
    assert REGISTRY.get_sample_value("relay_concurrency_limit") == 5
