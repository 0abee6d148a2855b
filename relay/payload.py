"""A body on its way: how much of it is at hand, and who may look at how much."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol, TypeVar

from google.protobuf.message import DecodeError

from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from google.protobuf.message import Message

    M = TypeVar("M", bound=Message)


class View(enum.IntEnum):
    """How much of a payload a policy looks at; decides where the chain buffers."""

    HEAD = 0
    PEEK = 1
    BYTES = 2
    MESSAGE = 3


class ViewError(AssertionError):
    """A policy looked at more of a payload than its `sees` declares."""


class Body(Protocol):
    """The sending end of a body that is still arriving."""

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end.

        Raises:
            Refusal: the sender broke the body off, or broke a rule.
            NodeGone: the sender was the node, and it is gone.
        """

    def close(self) -> None:
        """Give up what has not been read. Harmless after the end and when repeated."""


class Payload:
    """A body on its way: bytes at hand, or pieces that are read once. It only ever moves forward.

    Attributes:
        size: length in bytes, None if the sender did not say.
        passed: bytes that have been read from it so far.
        allowed: the most that may be looked at now; lowered only by a strict pipeline.
    """

    __slots__ = ("_body", "_data", "_message", "allowed", "passed", "size")

    def __init__(self, data: bytes = b"", *, body: Body | None = None, size: int | None = None) -> None:
        """Hold `data`, or, when `body` is given, the pieces that it will bring (`size` bytes in all)."""
        self._data = data
        self._body = body
        self._message: Message | None = None
        self.size = len(data) if body is None else size
        self.passed = len(data) if body is None else 0
        self.allowed = View.MESSAGE

    @property
    def data(self) -> bytes | None:
        """The whole body if it is at hand, else None. For wires and upstreams."""
        return self._data if self._body is None else None

    @property
    def head(self) -> bytes:
        """What is at hand of the body from its first byte on; b"" once that was passed on."""
        return self._data if len(self._data) == self.passed else b""

    @property
    def replayable(self) -> bool:
        """Whether the body can be sent a second time: it is at hand, and was not streamed away."""
        return self._body is None and len(self._data) == self.size

    async def peek(self, size: int) -> bytes:
        """Return the first `size` bytes, fewer if the body is shorter; they stay unread.

        Raises: what `Body.read` raises.
        """
        self._look(View.PEEK)
        while self._body is not None and len(self._data) < size:
            piece = await self._pull(self._body)
            if not piece:
                break
            self._data += piece
        return self._data[:size]

    async def read(self, limit: int) -> bytes:
        """Return the whole body and keep it, so that it can be read again.

        Raises:
            Refusal: TOO_LARGE if it is longer than `limit` bytes; else what `Body.read` raises.
        """
        self._look(View.BYTES)
        if self._body is not None:
            pieces = [self._data]
            total = len(self._data)
            while piece := await self._pull(self._body):
                total += len(piece)
                if total > limit:
                    raise Refusal(Reason.TOO_LARGE, f"more than {limit} bytes to be held", by="payload")
                pieces.append(piece)
            self._data = b"".join(pieces)
            self._body = None
            self.size = total
        if len(self._data) > limit:
            raise Refusal(
                Reason.TOO_LARGE, f"{len(self._data)} bytes, at most {limit} to be held", by="payload"
            )
        return self._data

    async def message(self, of: type[M], limit: int) -> M:
        """Return the body parsed as `of`, a Fleet message class; parsed once.

        Raises:
            Refusal: MALFORMED if it does not parse, TOO_LARGE over `limit` bytes.
        """
        self._look(View.MESSAGE)
        if isinstance(self._message, of):
            return self._message
        message = of()
        try:
            message.ParseFromString(await self.read(limit))
        except DecodeError as error:
            raise Refusal(Reason.MALFORMED, f"no {of.__name__}: {error}", by="payload") from error
        self._message = message
        return message

    def stream(self) -> Payload:
        """Return an async iterator over the rest of the body, in pieces as they came."""
        return self

    def __aiter__(self) -> Payload:
        return self

    async def __anext__(self) -> bytes:
        if self._data:
            piece, self._data = self._data, b""
            return piece
        if self._body is None:
            raise StopAsyncIteration
        piece = await self._pull(self._body)
        if not piece:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Give up what has not been read, so that nobody waits for it. May be repeated."""
        if self._body is not None:
            self._body.close()

    async def _pull(self, body: Body) -> bytes:
        piece = await body.read()
        self.passed += len(piece)
        return piece

    def _look(self, view: View) -> None:
        if view > self.allowed:
            raise ViewError(f"a policy that sees {self.allowed.name} looked at {view.name}")
