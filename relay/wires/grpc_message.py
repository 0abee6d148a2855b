"""The message of a gRPC call, as it comes: a byte that tells of compression, four of length, and itself.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import asyncio
import struct
import time
from typing import TYPE_CHECKING

from relay.call import Payload
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from relay.call import Body
    from relay.limits import Pace
    from relay.wires.http2_stream import Stream

#: What stands before a message.
PREFIX = struct.Struct(">BL")
#: A message of up to this size is received whole before the chain starts, so that it can be sent twice.
WHOLE = 64 * 1024


def at_hand(stream: Stream) -> bytes | None:
    """Return the message of a call if all of it is here and it is short, else None.

    Raises:
        Refusal: MALFORMED, if that is no message.
    """
    data = stream.at_hand()
    size = length(data)
    if size is not None and len(data) == PREFIX.size + size:
        return data[PREFIX.size :] if size <= WHOLE else None
    if stream.ended and (size is None or len(data) < PREFIX.size + size):
        raise _malformed(f"{len(data)} bytes that are no message")
    return None


def length(data: bytes) -> int | None:
    """Return what a message that begins so says its length is; None if it does not say it yet.

    Raises:
        Refusal: MALFORMED: it is compressed. No node does that, and a MB of zeros would become a GB here.
    """
    if len(data) < PREFIX.size:
        return None
    compressed, size = PREFIX.unpack_from(data)
    if compressed:
        raise _malformed("a compressed message")
    return int(size)


class Message(Payload):
    """A message whose length is known as soon as its beginning is here: before it is passed on, it is."""

    __slots__ = ("_node",)

    def __init__(self, body: NodeMessage, size: int | None) -> None:
        """Hold what `body` brings, `size` bytes if that is known already."""
        super().__init__(body=body, size=size)
        self._node = body

    async def _pull(self, body: Body) -> bytes:
        piece = await super()._pull(body)
        if self.size is None:
            self.size = self._node.size
        return piece


class NodeMessage:
    """A message that is still arriving from its node; see `relay.call.Body`.

    Attributes:
        size: its length; None before that is here.
    """

    __slots__ = ("_idle_timeout", "_left", "_limit", "_pace", "_stream", "size")

    def __init__(self, stream: Stream, limit: int, idle_timeout: float, pace: Pace) -> None:
        """Read from `stream`.

        Args:
            stream: whose message it is.
            limit: most bytes that it may have.
            idle_timeout: most seconds between two pieces.
            pace: how fast it must come on the whole.
        """
        self._stream = stream
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._pace = pace
        self._left: int | None = None
        self.size: int | None = None

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end. See `relay.call.Body`."""
        if self._left == 0:
            return b""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._idle_timeout):
                piece = await (self._begin() if self._left is None else self._stream.read())
        except TimeoutError:
            why = f"the message stalled for {self._idle_timeout:g} s"
            raise _malformed(why) from None
        if not self._pace.holds(time.monotonic() - started, len(piece)):
            raise _malformed("the message comes slower than limits.min_rate")
        left = (self._left or 0) - len(piece)
        if left < 0:
            raise _malformed("more than one message")
        if not piece and left:
            raise _malformed(f"the message ended {left} bytes early")
        self._left = left
        return piece

    async def _begin(self) -> bytes:
        """Read the prefix; return what came behind it."""
        data = b""
        while (size := length(data)) is None:
            piece = await self._stream.read()
            if not piece:
                raise _malformed("no message")
            data += piece
        if size > self._limit:
            raise too_large(size, self._limit)
        self._left = self.size = size
        rest = data[PREFIX.size :]
        if size and not rest:
            return await self._stream.read()
        return rest

    def close(self) -> None:
        """Nothing to give up: the rest is refused when the call is answered."""


def too_large(size: int, limit: int) -> Refusal:
    """Return the refusal for a message of so many bytes."""
    return Refusal(Reason.TOO_LARGE, f"{size} bytes, at most {limit}", by="wire", sent=False)


def _malformed(why: str) -> Refusal:
    return Refusal(Reason.MALFORMED, why, by="wire", sent=False)
