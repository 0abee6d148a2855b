"""Whose turn it is to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from relay.wires.http2_turns import Turns

if TYPE_CHECKING:
    from relay.wires.http2_stream import Stream


class Woken:
    """A stream that notes when it is to look again."""

    def __init__(self, order: list[str], name: str) -> None:
        self._order = order
        self._name = name

    def wake(self) -> None:
        self._order.append(self._name)


def test_one_at_a_time_in_their_order_and_data_only_into_room() -> None:
    order: list[str] = []
    streams = [cast("Stream", Woken(order, name)) for name in "abcd"]
    turns = Turns()
    turns.give(100)
    assert turns.given == 0
    for stream in streams[:2]:
        turns.waiting[stream] = None
    for stream in streams[2:]:
        turns.asking[stream] = None
    for room in (0, -5, 0, -1):
        turns.give(room)
    assert order == ["c", "d"]
    assert turns.given == 2
    turns.give(1)
    turns.waiting[streams[0]] = None  # it needs more
    turns.give(1)
    turns.give(1)
    turns.give(1)
    assert order == ["c", "d", "a", "b", "a"]
    assert not turns.waiting
