"""A call knows who calls, what for, and how it ended; another one that is asked beside it shares that."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from relay.call import Call, Certificate, Ending, Identity, Payload, Reply, Source
from relay.fleet import NO_IDS, Ids, Method, peek
from relay.refusal import NodeGone, Reason, Refusal
from relay.wireformat import encode_bytes, encode_uint
from tests.test_payload import FakeBody, arriving

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeCall = Callable[..., Call]

NODE = encode_bytes(1, encode_uint(1, 7))
OTHER = encode_bytes(1, encode_uint(1, 8))
OBJECT = NODE + encode_uint(2, 3) + encode_bytes(3, b"ab" * 32)
OF_OBJECT = Ids(7, 3, "ab" * 32)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """From which bytes ids were read."""
    found: list[bytes] = []

    def reading(method: Method, head: bytes) -> Ids:
        found.append(head)
        return peek(method, head)

    monkeypatch.setattr("relay.call.peek", reading)
    return found


# -- its ids --------------------------------------------------------------------------------------------


async def test_the_ids_of_a_call_are_read_once(make_call: MakeCall, reads: list[bytes]) -> None:
    call = make_call(Method.PULL_OBJECT, OBJECT)
    for _ in range(3):
        assert await call.ids() == OF_OBJECT
        assert call.ids_at_hand() == OF_OBJECT
    assert reads == [OBJECT]


async def test_the_ids_of_a_body_that_is_arriving_are_waited_for(
    make_call: MakeCall, reads: list[bytes]
) -> None:
    pieces = [OBJECT[at : at + 5] for at in range(0, len(OBJECT), 5)]
    call = make_call(Method.PUSH_OBJECT, arriving(*pieces, b"x" * 1000))
    assert call.ids_at_hand() == NO_IDS
    assert await call.ids() == OF_OBJECT
    assert await call.payload.read(10_000) == OBJECT + b"x" * 1000
    assert len(reads) == 1


async def test_ids_stay_known_when_the_body_has_been_passed_on(make_call: MakeCall) -> None:
    call = make_call(Method.PUSH_OBJECT, arriving(OBJECT + b"x" * 500, OTHER * 200))
    await call.ids()
    async for _ in call.payload.stream():
        assert call.ids_at_hand() == OF_OBJECT
    assert call.ids_at_hand() == await call.ids() == OF_OBJECT


async def test_what_stands_in_the_middle_of_a_body_is_not_taken_for_its_ids(make_call: MakeCall) -> None:
    call = make_call(Method.PUSH_OBJECT, arriving(OBJECT, OTHER + b"x" * 500))
    await anext(call.payload.stream())
    assert await call.ids() == NO_IDS


@pytest.mark.parametrize("whole", [True, False])
async def test_an_id_that_stands_there_twice_is_none_as_soon_as_that_is_at_hand(
    make_call: MakeCall, *, whole: bool
) -> None:
    filler = encode_bytes(15, b"x" * 300)
    call = make_call(Method.PUSH_MESSAGES, arriving(NODE + filler, OTHER))
    assert (await call.ids()).node_id == 7
    await (call.payload.read(10_000) if whole else call.payload.peek(len(NODE + filler) + 1))
    assert await call.ids() == call.ids_at_hand() == NO_IDS


async def test_another_body_in_place_of_the_requests_leaves_its_ids(make_call: MakeCall) -> None:
    call = make_call(Method.PUSH_OBJECT, arriving(OBJECT + b"x" * 500))
    await call.ids()
    call.payload = arriving(OTHER)
    assert call.ids_at_hand() == OF_OBJECT


async def test_a_call_beside_another_has_the_ids_of_its_own_request(make_call: MakeCall) -> None:
    call = make_call(Method.PUSH_OBJECT, OBJECT)
    await call.ids()
    beside = call.beside(Method.SEND_NODE_HEARTBEAT, OTHER)
    assert beside.ids_at_hand() == await beside.ids() == Ids(8)
    assert call.ids_at_hand() == OF_OBJECT


async def test_whoever_waits_for_ids_learns_that_the_node_is_gone(make_call: MakeCall) -> None:
    call = make_call(Method.PUSH_OBJECT, Payload(body=FakeBody([b"x"], NodeGone())))
    with pytest.raises(NodeGone):
        await call.ids()


# -- the call and its reply ---------------------------------------------------------------------------


def test_everybody_who_asked_is_told_once_and_in_order_how_a_call_ended(
    make_call: Callable[..., Call],
) -> None:
    call = make_call(Method.PULL_MESSAGES)
    told: list[tuple[str, Call, str]] = []
    call.on_end(lambda call, ending: told.append(("first", call, ending.outcome)))
    call.on_end(lambda call, ending: told.append(("second", call, ending.outcome)))
    call.end(Ending("ok", seconds=0.1))
    call.end(Ending("node_gone", seconds=0.2))
    assert told == [("first", call, "ok"), ("second", call, "ok")]


def test_a_call_that_nobody_asked_about_can_end(make_call: Callable[..., Call]) -> None:
    make_call(Method.PULL_MESSAGES).end(Ending("ok", seconds=0.1))


def test_a_reply_is_a_success_without_headers_unless_it_says_otherwise() -> None:
    first, second = Reply(Payload(), Source.LOCAL), Reply(Payload(), Source.LOCAL)
    assert first.status == 200
    first.metadata.append((b"a", b"b"))
    assert second.metadata == []


def test_another_call_of_the_same_node_differs_in_what_it_asks_alone(make_call: Callable[..., Call]) -> None:
    call = make_call(
        Method.PUSH_OBJECT, b"object", metadata=[(b"a", b"b")], fault=Refusal(Reason.MALFORMED), deadline=7.0
    )
    call.identity = Identity("alice")
    call.certificate = Certificate("CN=alice")
    told: list[Ending] = []
    call.on_end(lambda _, ending: told.append(ending))
    other = call.beside(Method.PULL_OBJECT, b"question")
    assert (other.method, other.payload.data, other.fault) == (Method.PULL_OBJECT, b"question", None)
    for name in ("wire", "metadata", "peer", "request_id", "started", "deadline", "identity", "certificate"):
        assert getattr(other, name) == getattr(call, name)
    other.end(Ending("ok", seconds=1))
    assert told == []
    assert (call.method, call.payload.data) == (Method.PUSH_OBJECT, b"object")
    call.end(Ending("ok", seconds=1))
    assert len(told) == 1


def test_who_asks_after_the_end_is_told_at_once(make_call: Callable[..., Call]) -> None:
    call = make_call(Method.PULL_MESSAGES)
    call.end(Ending("node_gone", seconds=0.1))
    told: list[str] = []
    call.on_end(lambda _, ending: told.append(ending.outcome))
    assert told == ["node_gone"]


def test_a_question_ends_with_the_call_that_it_is_asked_for(make_call: Callable[..., Call]) -> None:
    call = make_call(Method.PUSH_OBJECT)
    question = call.beside(Method.PULL_OBJECT, b"")
    told: list[tuple[object, str]] = []
    question.on_end(lambda ended, ending: told.append((ended, ending.outcome)))
    assert told == []
    call.end(Ending("ok", seconds=0.1))
    assert told == [(call, "ok")]
    question.on_end(lambda ended, ending: told.append((ended, ending.outcome)))
    assert len(told) == 2


def test_a_refusal_lets_go_of_its_call_when_that_has_ended(make_call: MakeCall) -> None:
    """Else each refused call is a cycle, by way of the frames of its traceback."""

    def send(call: Call) -> None:
        try:
            raise OSError(f"no connection for {call.method}")
        except OSError:
            raise Refusal(Reason.UPSTREAM_DOWN, by="test") from None

    def handle(call: Call) -> None:
        try:
            send(call)
        except Refusal as refusal:
            call.end(Ending("upstream_down", seconds=0.1, refusal=refusal))

    def calls() -> int:
        return sum(isinstance(found, Call) for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = calls()
        handle(make_call(Method.PULL_MESSAGES))
        assert calls() == before
    finally:
        gc.enable()
