"""What is written of a body: all of it, in pieces, and one that is at hand stays there."""

from __future__ import annotations

import pytest

from relay.call import Payload
from relay.upstreams.request_body import AT_ONCE, pieces
from tests.upstreams.conftest import body


@pytest.mark.parametrize("size", [0, 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE])
async def test_a_body_at_hand_is_cut_without_a_copy_and_can_be_sent_again(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    payload = Payload(data)
    for _ in range(2):
        found = [piece async for piece in pieces(payload)]
        assert b"".join(found) == data
        assert all(len(piece) <= AT_ONCE for piece in found)
        assert all(piece.obj is data for piece in found if isinstance(piece, memoryview))
    assert payload.replayable


async def test_a_body_that_still_arrives_is_passed_on_as_it_comes() -> None:
    payload = body(b"one", b"two", b"")
    assert [piece async for piece in pieces(payload)] == [b"one", b"two"]
    assert not payload.replayable
