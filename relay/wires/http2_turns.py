"""Whose turn it is to write, of the streams of one connection that wait for its client to take more.

One at a time looks again, and passes its turn on when it is done: to have a thousand look for the sake of
each byte that the client takes would cost milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.wires.http2_stream import Stream


class Turns:
    """See the module.

    Attributes:
        asking: streams that begin when the client has taken enough of other answers.
        waiting: streams that go on when it takes more data. Both in the order in which they came.
        given: how many turns there were.
    """

    __slots__ = ("asking", "given", "waiting")

    def __init__(self) -> None:
        """Begin with no stream."""
        self.asking: dict[Stream, None] = {}
        self.waiting: dict[Stream, None] = {}
        self.given = 0

    def give(self, room: int) -> None:
        """Have the stream look again that waits longest, if `room` bytes of data are of use to it."""
        queue = self.asking or (self.waiting if room > 0 else None)
        if queue:
            stream = next(iter(queue))
            del queue[stream]
            self.given += 1
            stream.wake()
