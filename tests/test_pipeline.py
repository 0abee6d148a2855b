"""A chain holds the policies that apply, in their order, and lets none look at more than it declares."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest

from relay.call import Call, Payload, Reply, Source, View, ViewError
from relay.fleet import Method
from relay.pipeline import Chain, compose
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from relay.pipeline import Handler, Policy

PULL = Method.PULL_MESSAGES
DATA = PullMessagesRequest(message_ids=["a"]).SerializeToString()
LIMIT = 1000

Look = Callable[[Payload], Awaitable[object]]
Handle = Callable[[Call, "Handler"], Awaitable[Reply]]
MakeCall = Callable[..., Call]

LOOKS: dict[View, Look] = {
    View.PEEK: lambda payload: payload.peek(1),
    View.BYTES: lambda payload: payload.read(LIMIT),
    View.MESSAGE: lambda payload: payload.message(PullMessagesRequest, LIMIT),
}


class Pieces:
    """A body that arrives in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.left = list(pieces)

    async def read(self) -> bytes:
        return self.left.pop(0) if self.left else b""

    def close(self) -> None:
        self.left.clear()


async def passing(call: Call, next: Handler) -> Reply:  # noqa: A002
    return await next(call)


async def upstream(call: Call) -> Reply:
    return Reply(Payload(DATA), Source.UPSTREAM)


def made(
    policy: str, *, view: View = View.HEAD, only: Method | None = None, handle: Handle = passing
) -> Policy:
    """Return a policy called `policy`."""

    class Made:
        name: ClassVar[str] = policy
        sees: ClassVar[View] = view

        def applies(self, method: Method) -> bool:
            return only is None or method is only

        async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
            return await handle(call, next)

    return Made()


def noting(policy: str, notes: list[str], *, view: View = View.HEAD) -> Policy:
    """Return a policy that notes when a call comes by, how much of it is at hand, and when its reply does."""

    async def handle(call: Call, next: Handler) -> Reply:  # noqa: A002
        notes.append(f"{policy} {'whole' if call.payload.replayable else 'arriving'}")
        reply = await next(call)
        notes.append(f"{policy} back")
        return reply

    return made(policy, view=view, handle=handle)


def composed(*policies: Policy, last: Handler = upstream, strict: bool = False, limit: int = LIMIT) -> Chain:
    return compose(policies, last, PULL, upstream_name="superlink", buffer_limit=limit, strict=strict)


# -- what a chain is made of --------------------------------------------------------------------------


async def test_a_chain_without_policies_is_the_upstream_itself() -> None:
    assert composed().handler is upstream


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
async def test_a_call_meets_the_policies_in_their_order_and_its_reply_in_the_reverse(
    make_call: MakeCall, strict: bool
) -> None:
    notes: list[str] = []
    chain = composed(noting("a", notes), noting("b", notes), noting("c", notes), strict=strict)
    reply = await chain.handler(make_call(PULL))
    assert notes == ["a whole", "b whole", "c whole", "c back", "b back", "a back"]
    assert reply.source is Source.UPSTREAM


async def test_a_policy_that_does_not_apply_leaves_no_trace_in_the_chain(make_call: MakeCall) -> None:
    async def wrong(call: Call, next: Handler) -> Reply:  # noqa: A002
        raise AssertionError("asked of a method that it does not apply to")

    absent = made("absent", only=Method.GET_RUN, handle=wrong, view=View.MESSAGE)
    chain = composed(made("here", only=PULL), absent)
    await chain.handler(make_call(PULL))
    assert chain.steps == ("here", "superlink")


async def test_a_policy_that_answers_keeps_the_call_from_those_behind_it(make_call: MakeCall) -> None:
    async def answer(call: Call, next: Handler) -> Reply:  # noqa: A002
        return Reply(Payload(), Source.LOCAL)

    notes: list[str] = []
    chain = composed(noting("before", notes), made("answers", handle=answer), noting("behind", notes))
    assert (await chain.handler(make_call(PULL))).source is Source.LOCAL
    assert notes == ["before whole", "before back"]


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
async def test_a_refusal_passes_through_every_policy_unchanged(make_call: MakeCall, strict: bool) -> None:
    refusal = Refusal(Reason.UPSTREAM_DOWN, "no connection", by="superlink")

    async def refuse(call: Call) -> Reply:
        raise refusal

    with pytest.raises(Refusal) as caught:
        await composed(made("a"), made("b", view=View.BYTES), last=refuse, strict=strict).handler(
            make_call(PULL)
        )
    assert caught.value is refusal


async def test_one_chain_serves_many_calls(make_call: MakeCall) -> None:
    notes: list[str] = []
    chain = composed(noting("a", notes), strict=True)
    for _ in range(2):
        await chain.handler(make_call(PULL))
    assert notes == ["a whole", "a back"] * 2


# -- buffering ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "steps"),
    [
        ([View.HEAD, View.PEEK], "0 1 superlink"),
        ([View.HEAD, View.BYTES], "0 buffer 1 superlink"),
        ([View.MESSAGE, View.HEAD], "buffer 0 1 superlink"),
        ([View.PEEK, View.MESSAGE, View.BYTES, View.HEAD], "0 buffer 1 2 3 superlink"),
    ],
    ids=["nobody needs it whole", "the last needs it", "the first needs it", "two need it"],
)
async def test_one_step_that_buffers_stands_before_the_first_policy_that_needs_the_body_whole(
    make_call: MakeCall, views: list[View], steps: str
) -> None:
    notes: list[str] = []
    policies = [noting(str(index), notes, view=view) for index, view in enumerate(views)]
    chain = composed(*policies)
    assert " ".join(chain.steps) == steps
    await chain.handler(make_call(PULL, Payload(body=Pieces(b"ab", b"cd"))))
    before, buffer, _ = steps.partition("buffer")
    whole = {name: name not in before.split() and bool(buffer) for name in "0123"[: len(views)]}
    assert notes[: len(views)] == [f"{n} {'whole' if w else 'arriving'}" for n, w in whole.items()]


async def test_a_policy_that_needs_the_whole_body_and_does_not_apply_causes_no_buffering() -> None:
    chain = composed(made("a", view=View.MESSAGE, only=Method.GET_RUN), made("b"))
    assert chain.steps == ("b", "superlink")


async def test_a_body_over_the_limit_is_refused_before_the_policy_that_needs_it(make_call: MakeCall) -> None:
    notes: list[str] = []
    chain = composed(noting("before", notes), noting("reader", notes, view=View.BYTES), limit=3)
    with pytest.raises(Refusal) as caught:
        await chain.handler(make_call(PULL, Payload(body=Pieces(b"ab", b"cd"))))
    assert caught.value.reason is Reason.TOO_LARGE
    assert notes == ["before arriving"]


# -- strict: no policy looks at more than it declares -------------------------------------------------


@pytest.mark.parametrize("of", ["call", "late"])
@pytest.mark.parametrize("sees", View)
@pytest.mark.parametrize("look", LOOKS)
async def test_a_strict_chain_lets_a_policy_look_as_far_as_it_declares(
    make_call: MakeCall, of: str, sees: View, look: View
) -> None:
    """`late` is a look at the call after its reply has come."""

    async def handle(call: Call, next: Handler) -> Reply:  # noqa: A002
        if of == "call":
            await LOOKS[look](call.payload)
        reply = await next(call)
        if of != "call":
            await LOOKS[look](call.payload)
        return reply

    call = make_call(PULL, DATA)
    outer, inner = made("outer", view=View.MESSAGE), made("inner", view=View.HEAD)
    handler = composed(outer, made("tested", view=sees, handle=handle), inner, strict=True).handler
    if look <= sees:
        await handler(call)
        return
    with pytest.raises(ViewError):
        await handler(call)


@pytest.mark.parametrize("look", LOOKS)
async def test_a_policy_may_read_of_a_reply_what_it_asks_for(make_call: MakeCall, look: View) -> None:
    async def handle(call: Call, next: Handler) -> Reply:  # noqa: A002
        reply = await next(call)
        await LOOKS[look](reply.payload)
        return reply

    await composed(made("tested", handle=handle), strict=True).handler(make_call(PULL, DATA))


@pytest.mark.parametrize("look", LOOKS)
async def test_a_lenient_chain_does_not_guard(make_call: MakeCall, look: View) -> None:
    async def handle(call: Call, next: Handler) -> Reply:  # noqa: A002
        await LOOKS[look](call.payload)
        return await next(call)

    await composed(made("tested", handle=handle)).handler(make_call(PULL, DATA))


async def test_a_strict_chain_guards_a_policy_that_looks_at_the_call_after_a_refusal(
    make_call: MakeCall,
) -> None:
    async def refuse(call: Call) -> Reply:
        raise Refusal(Reason.UPSTREAM_DOWN)

    async def handle(call: Call, next: Handler) -> Reply:  # noqa: A002
        try:
            return await next(call)
        except Refusal:
            await call.payload.read(LIMIT)
            raise

    chain = composed(made("tested", view=View.PEEK, handle=handle), last=refuse, strict=True)
    with pytest.raises(ViewError):
        await chain.handler(make_call(PULL, DATA))


async def test_a_strict_chain_does_not_guard_the_upstream_nor_the_wire(make_call: MakeCall) -> None:
    async def reading(call: Call) -> Reply:
        assert await call.payload.read(LIMIT) == DATA
        return Reply(Payload(DATA), Source.UPSTREAM)

    reply = await composed(made("blind"), last=reading, strict=True).handler(make_call(PULL, DATA))
    assert await reply.payload.read(LIMIT) == DATA


async def test_a_strict_chain_lets_its_own_step_buffer(make_call: MakeCall) -> None:
    notes: list[str] = []
    chain = composed(made("blind"), noting("reader", notes, view=View.BYTES), strict=True)
    await chain.handler(make_call(PULL, Payload(body=Pieces(b"ab", b"cd"))))
    assert notes[0] == "reader whole"


async def test_the_guard_of_one_policy_does_not_narrow_the_next(make_call: MakeCall) -> None:
    async def read(call: Call, next: Handler) -> Reply:  # noqa: A002
        assert await call.payload.read(LIMIT) == DATA
        return await next(call)

    chain = composed(made("blind"), made("reader", view=View.BYTES, handle=read), made("blind"), strict=True)
    await chain.handler(make_call(PULL, DATA))
