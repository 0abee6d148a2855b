"""Messages of nodes before a gRPC SuperLink: their share of the memory, and when it is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from relay.call import Call, Ending, Payload, Reply, Source, Wire
from relay.concurrency import FixedLimit
from relay.fleet import Kind, Method
from relay.pipeline import Handler, Policy, compose
from relay.policies import Held, Shed
from relay.quota import GUESS, STEP, Quota, Share
from relay.refusal import Reason, Refusal

MakeCall = Callable[..., Call]

OK = Ending("ok", seconds=0.0)
#: All but the one that has its messages whole.
STREAMING = [wire for wire in Wire if wire is not Wire.GRPC_ADAPTER]


class Body:
    """A body of one piece."""

    def __init__(self, piece: bytes) -> None:
        self.pieces = [piece]

    async def read(self) -> bytes:
        return self.pieces.pop() if self.pieces else b""

    def close(self) -> None:
        pass


def streamed(data: bytes, size: int | None = None) -> Payload:
    return Payload(body=Body(data), size=size)


async def short(call: Call) -> Reply:
    if call.payload.data is None:
        await call.payload.read(1 << 30)
    return Reply(Payload(b"\x08\x01"), Source.UPSTREAM)


async def long(_: Call) -> Reply:
    return Reply(streamed(b"x" * 5000, 5000), Source.UPSTREAM)


def test_only_what_may_be_long_meets_it_and_nothing_before_an_http_superlink() -> None:
    held = Held(Quota(1))
    assert {method for method in Method if held.applies(method)} == {
        method for method in Method if method.kind is Kind.PUSH or method is Method.PULL_OBJECT
    }
    assert not any(Held(None).applies(method) for method in Method)


@pytest.mark.parametrize("wire", STREAMING)
@pytest.mark.parametrize(("size", "taken"), [(300, 300), (None, GUESS)])
async def test_an_upload_has_its_share_while_it_lasts(
    make_call: MakeCall, size: int | None, taken: int, wire: Wire
) -> None:
    quota, seen = Quota(1 << 30), []

    async def upstream(call: Call) -> Reply:
        seen.append(quota.held)
        return await short(call)

    call = make_call(Method.PUSH_OBJECT, streamed(b"x" * 300, size), wire=wire)
    await Held(quota).handle(call, upstream)
    assert seen == [taken]
    assert quota.held == 0, "and what is answered is short"


@pytest.mark.parametrize("wire", STREAMING)
async def test_a_long_answer_has_its_share_until_the_node_has_it(make_call: MakeCall, wire: Wire) -> None:
    quota, seen = Quota(1 << 30), []

    async def upstream(call: Call) -> Reply:
        seen.append(quota.held)
        return await long(call)

    call = make_call(Method.PULL_OBJECT, b"x", wire=wire)
    await Held(quota).handle(call, upstream)
    assert seen == [GUESS]
    assert quota.held == 5000
    call.end(OK)
    assert quota.held == 0


async def test_a_short_answer_gives_it_back_at_once(make_call: MakeCall) -> None:
    quota = Quota(1 << 30)
    await Held(quota).handle(make_call(Method.PULL_OBJECT, b"x"), short)
    assert quota.held == 0


@pytest.mark.parametrize(
    ("method", "wire"),
    [
        (Method.PUSH_OBJECT, Wire.HTTP_V1),
        (Method.PUSH_OBJECT, Wire.GRPC),
        (Method.PUSH_OBJECT, Wire.GRPC_ADAPTER),
        (Method.PULL_OBJECT, Wire.GRPC_ADAPTER),
    ],
)
async def test_what_is_here_already_or_is_its_wires_to_hold_needs_no_share(
    make_call: MakeCall, method: Method, wire: Wire
) -> None:
    quota = Quota(1)
    await quota.take(1)
    await Held(quota).handle(make_call(method, b"x", wire=wire), short)
    assert quota.held == 1


async def test_who_gets_no_share_is_told_to_come_back(make_call: MakeCall) -> None:
    quota = Quota(100)
    await quota.take(100)
    with pytest.raises(Refusal) as caught:
        await Held(quota, queue_timeout=0.02).handle(make_call(Method.PUSH_OBJECT, streamed(b"x", 1)), short)
    refusal = caught.value
    assert (refusal.reason, refusal.by, refusal.sent) == (Reason.OVERLOADED, "held", False)
    assert quota.held == 100


async def test_who_gets_one_in_time_goes_on(make_call: MakeCall) -> None:
    quota = Quota(100)
    await quota.take(100)
    asking = asyncio.ensure_future(
        Held(quota, queue_timeout=20.0).handle(make_call(Method.PUSH_OBJECT, streamed(b"x", 1)), short)
    )
    await asyncio.sleep(0.01)
    assert not asking.done()
    quota.give(100)
    assert (await asking).status == 200
    assert quota.held == 0


async def test_an_upload_of_unknown_length_grows_and_is_read_no_further_than_there_is_room(
    make_call: MakeCall,
) -> None:
    quota, read = Quota(GUESS + 10), []

    class Endless:
        async def read(self) -> bytes:
            read.append(1)
            return b"x" * (1 << 20)

        def close(self) -> None:
            pass

    await quota.take(10)
    quota.outgrown = Share(quota)

    async def upstream(call: Call) -> Reply:
        await call.payload.read(1 << 40)
        raise AssertionError

    call = make_call(Method.PUSH_OBJECT, Payload(body=Endless()))
    with pytest.raises(Refusal) as caught:
        await Held(quota, queue_timeout=0.02).handle(call, upstream)
    assert caught.value.reason is Reason.OVERLOADED
    assert len(read) == GUESS // (1 << 20) + 1
    assert quota.held == 10


async def test_an_upload_of_unknown_length_is_whole_and_counted(make_call: MakeCall) -> None:
    quota, seen = Quota(GUESS), []
    data = b"x" * (3 * GUESS + 5)

    async def upstream(call: Call) -> Reply:
        await call.payload.peek(3)
        assert await call.payload.read(1 << 40) == data
        seen.append(quota.held)
        return await short(call)

    call = make_call(Method.PUSH_OBJECT, streamed(data))
    await call.payload.peek(10)
    await Held(quota).handle(call, upstream)
    assert len(data) <= seen[0] <= len(data) + STEP
    assert quota.held == 0


async def test_a_failure_gives_the_share_back(make_call: MakeCall) -> None:
    quota = Quota(100)

    async def fail(_: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN)

    with pytest.raises(Refusal):
        await Held(quota).handle(make_call(Method.PUSH_OBJECT, streamed(b"x", 1)), fail)
    assert quota.held == 0


async def test_who_waits_for_memory_keeps_nobody_from_the_superlink(make_call: MakeCall) -> None:
    """With one place at the SuperLink, which a call that waits for its share must not have."""
    quota = Quota(100)
    await quota.take(100)
    shed = Shed(limit=FixedLimit(1), queue=0, queue_timeout=0.0, max_bytes=1 << 30)

    def chain(method: Method) -> Handler:
        policies: tuple[Policy, ...] = (Held(quota, queue_timeout=20.0), shed)
        return compose(policies, short, method, buffer_limit=1 << 20).handler

    waiting = asyncio.ensure_future(chain(Method.PULL_OBJECT)(make_call(Method.PULL_OBJECT, b"x")))
    await asyncio.sleep(0.01)
    assert shed.slots.inside == 0
    reply = await chain(Method.PULL_MESSAGES)(make_call(Method.PULL_MESSAGES, b"x"))
    assert reply.status == 200
    quota.give(100)
    await waiting
