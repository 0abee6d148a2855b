"""A payload only moves forward, is counted as it moves, and is looked at no more than is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from relay.payload import Payload, View, ViewError
from relay.refusal import NodeGone, Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PULL = PullMessagesRequest(node=Node(node_id=7)).SerializeToString()
BIG = 10**9


class FakeBody:
    """The sending end of a body: pieces, then the end or an error."""

    def __init__(self, pieces: Iterable[bytes], error: Exception | None = None) -> None:
        self.pieces = list(pieces)
        self.error = error
        self.closed = 0

    async def read(self) -> bytes:
        if self.pieces:
            return self.pieces.pop(0)
        if self.error is not None:
            raise self.error
        return b""

    def close(self) -> None:
        self.closed += 1


async def drained(payload: Payload) -> list[bytes]:
    return [piece async for piece in payload.stream()]


def arriving(*pieces: bytes, size: int | None = None) -> Payload:
    return Payload(body=FakeBody(pieces), size=size)


# -- bytes at hand ------------------------------------------------------------------------------------


async def test_bytes_at_hand_can_be_looked_at_in_every_way_and_stay() -> None:
    payload = Payload(PULL)
    for _ in range(2):
        assert await payload.peek(2) == PULL[:2]
        assert await payload.read(BIG) == PULL
        assert (await payload.message(PullMessagesRequest, BIG)).node.node_id == 7
    assert payload.data == PULL
    assert payload.replayable


def test_bytes_at_hand_have_a_size_and_have_passed() -> None:
    payload = Payload(b"abc")
    assert (payload.size, payload.passed) == (3, 3)


def test_a_payload_without_anything_is_empty_and_at_hand() -> None:
    payload = Payload()
    assert (payload.data, payload.size, payload.passed, payload.replayable) == (b"", 0, 0, True)


async def test_streaming_bytes_at_hand_brings_them_in_one_piece() -> None:
    assert await drained(Payload(b"abc")) == [b"abc"]


async def test_streaming_an_empty_payload_brings_nothing() -> None:
    assert await drained(Payload()) == []


async def test_what_was_streamed_away_cannot_be_sent_again() -> None:
    payload = Payload(b"abc")
    await drained(payload)
    assert not payload.replayable


# -- a body that is still arriving --------------------------------------------------------------------


async def test_a_body_that_is_arriving_is_streamed_in_the_pieces_in_which_it_came() -> None:
    payload = arriving(b"ab", b"c", b"def")
    assert payload.data is None
    assert await drained(payload) == [b"ab", b"c", b"def"]


async def test_a_body_that_was_streamed_is_not_replayable() -> None:
    payload = arriving(b"ab", b"c")
    assert not payload.replayable
    await drained(payload)
    assert not payload.replayable


async def test_bytes_that_were_peeked_at_are_still_streamed() -> None:
    payload = arriving(b"ab", b"cd", b"ef")
    assert await payload.peek(3) == b"abc"
    assert await drained(payload) == [b"abcd", b"ef"]


async def test_a_peek_takes_no_more_pieces_than_it_needs() -> None:
    body = FakeBody([b"ab", b"cd", b"ef"])
    payload = Payload(body=body)
    assert await payload.peek(2) == b"ab"
    assert await payload.peek(1) == b"a"
    assert body.pieces == [b"cd", b"ef"]


async def test_a_peek_beyond_the_end_brings_what_there_is() -> None:
    payload = arriving(b"ab", b"c")
    assert await payload.peek(100) == b"abc"
    assert await drained(payload) == [b"abc"]


async def test_reading_keeps_the_whole_body_so_that_it_can_be_sent_again() -> None:
    payload = arriving(b"ab", b"cd")
    assert await payload.read(4) == b"abcd"
    assert (payload.data, payload.size, payload.replayable) == (b"abcd", 4, True)
    assert await payload.read(4) == b"abcd"


async def test_reading_after_a_peek_brings_the_whole_body() -> None:
    payload = arriving(b"ab", b"cd")
    await payload.peek(1)
    assert await payload.read(BIG) == b"abcd"


async def test_the_size_that_the_sender_declared_is_known_before_anything_came() -> None:
    payload = arriving(b"ab", b"cd", size=4)
    assert (payload.size, payload.passed) == (4, 0)


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=20), max_size=8),
    peeks=st.lists(st.integers(min_value=0, max_value=100), max_size=3),
    whole=st.booleans(),
)
async def test_whatever_is_peeked_at_no_byte_is_lost_doubled_or_counted_twice(
    pieces: list[bytes], peeks: list[int], whole: bool
) -> None:
    body = b"".join(pieces)
    payload = arriving(*pieces)
    for size in peeks:
        assert await payload.peek(size) == body[:size]
        assert payload.passed <= len(body)
    got = await payload.read(BIG) if whole else b"".join(await drained(payload))
    assert got == body
    assert payload.passed == len(body)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(lambda: Payload(b"abcd"), id="at hand"),
        pytest.param(lambda: arriving(b"abcd"), id="in one piece"),
        pytest.param(lambda: arriving(b"ab", b"cd"), id="in two pieces"),
        pytest.param(lambda: arriving(b"ab", b"cd", size=4), id="of a known size"),
    ],
)
@pytest.mark.parametrize("peek", [0, 4], ids=["not peeked at", "peeked at"])
async def test_a_body_may_be_as_long_as_the_limit_and_no_byte_longer(
    payload: Callable[[], Payload], peek: int
) -> None:
    fitting, too_long = payload(), payload()
    await fitting.peek(peek)
    await too_long.peek(peek)
    assert await fitting.read(4) == b"abcd"
    with pytest.raises(Refusal) as caught:
        await too_long.read(3)
    assert caught.value.reason is Reason.TOO_LARGE
    assert "3" in caught.value.detail


async def test_an_endless_body_is_refused_at_the_limit_and_not_held() -> None:
    class Endless(FakeBody):
        async def read(self) -> bytes:
            return b"x" * 1000

    payload = Payload(body=Endless([]))
    with pytest.raises(Refusal):
        await payload.read(10_000)
    assert payload.passed <= 11_000


@pytest.mark.parametrize("error", [Refusal(Reason.MALFORMED, "broken off"), NodeGone()], ids=type)
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda payload: payload.peek(100), id="peek"),
        pytest.param(lambda payload: payload.read(100), id="read"),
        pytest.param(lambda payload: payload.message(PullMessagesRequest, 100), id="message"),
        pytest.param(drained, id="stream"),
    ],
)
async def test_what_the_sender_raises_reaches_whoever_looks(
    error: Exception, use: Callable[[Payload], object]
) -> None:
    payload = Payload(body=FakeBody([b"ab"], error))
    with pytest.raises(type(error)) as caught:
        await use(payload)  # type: ignore[misc]
    assert caught.value is error
    assert payload.passed == 2


async def test_closing_gives_the_body_up_and_may_be_repeated() -> None:
    body = FakeBody([b"ab"])
    payload = Payload(body=body)
    payload.close()
    payload.close()
    assert body.closed == 2


async def test_a_body_that_was_read_whole_is_not_given_up_by_closing() -> None:
    body = FakeBody([b"ab"])
    payload = Payload(body=body)
    await payload.read(BIG)
    payload.close()
    assert body.closed == 0
    assert payload.data == b"ab"


# -- the parsed message -------------------------------------------------------------------------------


async def test_a_body_that_arrives_in_pieces_is_parsed_whole() -> None:
    payload = arriving(PULL[:1], PULL[1:])
    assert (await payload.message(PullMessagesRequest, BIG)).node.node_id == 7
    assert payload.data == PULL


async def test_a_message_is_parsed_once() -> None:
    payload = Payload(PULL)
    first = await payload.message(PullMessagesRequest, BIG)
    assert await payload.message(PullMessagesRequest, BIG) is first


async def test_the_same_bytes_can_be_parsed_as_another_message() -> None:
    payload = Payload(PULL)
    await payload.message(PullMessagesRequest, BIG)
    other = await payload.message(PushMessagesRequest, BIG)
    assert type(other) is PushMessagesRequest
    assert other.node.node_id == 7


@pytest.mark.parametrize("data", [b"\x0a\xff", b"<html></html>", b"\x0a\x02\x08"])
async def test_bytes_that_are_no_such_message_are_malformed(data: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        await Payload(data).message(PullMessagesRequest, BIG)
    assert caught.value.reason is Reason.MALFORMED
    assert "PullMessagesRequest" in caught.value.detail


async def test_a_message_over_the_limit_is_too_large_before_it_is_parsed() -> None:
    with pytest.raises(Refusal) as caught:
        await Payload(b"\xff" * 5).message(PullMessagesRequest, 4)
    assert caught.value.reason is Reason.TOO_LARGE


# -- what may be looked at ----------------------------------------------------------------------------

LOOKS: dict[View, Callable[[Payload], object]] = {
    View.PEEK: lambda payload: payload.peek(1),
    View.BYTES: lambda payload: payload.read(BIG),
    View.MESSAGE: lambda payload: payload.message(PullMessagesRequest, BIG),
}


@pytest.mark.parametrize("allowed", View)
@pytest.mark.parametrize("look", LOOKS)
async def test_a_look_is_an_error_if_it_goes_further_than_is_allowed(allowed: View, look: View) -> None:
    payload = Payload(PULL)
    payload.allowed = allowed
    if look <= allowed:
        await LOOKS[look](payload)  # type: ignore[misc]
        return
    with pytest.raises(ViewError, match=f"sees {allowed.name} looked at {look.name}"):
        await LOOKS[look](payload)  # type: ignore[misc]


async def test_everything_may_be_looked_at_unless_somebody_lowers_it() -> None:
    assert Payload(PULL).allowed is View.MESSAGE


# -- what its first bytes are ---------------------------------------------------------------------------


async def test_the_head_is_what_is_at_hand_until_it_is_passed_on() -> None:
    payload = arriving(b"ab", b"cd", b"ef")
    assert payload.head == b""
    await payload.peek(3)
    assert payload.head == b"abcd"
    assert await anext(payload.stream()) == b"abcd"
    assert payload.head == b""
    assert await payload.peek(1) == b"e"  # which is not where the body begins
    assert payload.head == b""


async def test_the_head_of_a_body_at_hand_is_all_of_it() -> None:
    assert Payload(b"abc").head == b"abc"
    payload = arriving(b"ab", b"c")
    await payload.read(BIG)
    assert payload.head == b"abc"
