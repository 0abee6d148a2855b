"""Who reads the body of a response has nothing to do with the exchange that comes after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from relay.refusal import Reason, Refusal
from relay.upstreams.response_body import ResponseBody

if TYPE_CHECKING:
    from relay.upstreams.connection import Connection


class Played:
    """A connection that gives these pieces, and then b"" as its response ends."""

    def __init__(self, *pieces: bytes | Refusal) -> None:
        self.pieces = list(pieces)
        self.closed = 0

    async def read(self) -> bytes:
        piece = self.pieces.pop(0)
        if isinstance(piece, Refusal):
            raise piece
        return piece

    def close(self) -> None:
        self.closed += 1


def rest_of(connection: Played) -> ResponseBody:
    return ResponseBody(cast("Connection", connection))


async def test_after_its_end_it_takes_nothing_of_the_next_response_and_does_not_end_it() -> None:
    connection = Played(b"one", b"two", b"", b"of the next exchange")
    rest = rest_of(connection)
    assert [await rest.read() for _ in range(5)] == [b"one", b"two", b"", b"", b""]
    rest.close()
    assert (connection.pieces, connection.closed) == ([b"of the next exchange"], 0)


async def test_who_gives_it_up_ends_the_connection_once_and_reads_no_more() -> None:
    connection = Played(b"one", b"two")
    rest = rest_of(connection)
    assert await rest.read() == b"one"
    rest.close()
    rest.close()
    assert connection.closed == 1
    assert await rest.read() == b""
    assert connection.pieces == [b"two"]


async def test_a_response_that_breaks_off_is_told_to_its_reader() -> None:
    refusal = Refusal(Reason.UPSTREAM_BAD_ANSWER, "broke off")
    rest = rest_of(Played(b"one", refusal))
    assert await rest.read() == b"one"
    with pytest.raises(Refusal) as caught:
        await rest.read()
    assert caught.value is refusal
