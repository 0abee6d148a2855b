"""The frames of an HTTP/2 connection out of its bytes (RFC 9113, 4 to 6).

Data is passed on as it comes, also in the middle of a frame; any other frame is short, and passed on whole,
and a head as well.
"""

from __future__ import annotations

import time
from typing import Protocol, cast

from relay.wires import http2
from relay.wires.http2 import Code, Http2Error

#: Longest frame that is welcome: longer ones of DATA than RFC 9113's least save heads in an upload.
MOST_FRAME = 1024 * 1024
_OF_HEADS = frozenset({http2.HEADERS, http2.CONTINUATION})
#: Data of less than this is copied out of what it came in. More of it is passed on as a view, which is all
#: that bodies are used for: joined, measured and written.
_COPIED = 4096


class Receiver(Protocol):
    """Who gets the frames. Each method may raise Http2Error."""

    def data_begins(self, number: int, size: int, padding: int) -> None:
        """A DATA frame of `size` bytes has begun, of which so many carry nothing."""

    def data(self, piece: bytes) -> None:
        """Data came."""

    def data_ends(self, *, last: bool) -> None:
        """The DATA frame is here to its end; `last`: and the body."""

    def head(self, number: int, block: bytes, *, ended: bool) -> None:
        """A header block came; `ended`: no data follows."""

    def frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Any other frame came."""


class Reader:
    """Reads what one client sends.

    Attributes:
        greeted: whether it has begun as RFC 9113 wants it.
    """

    __slots__ = (
        "_block",
        "_last",
        "_left",
        "_most_head",
        "_padding",
        "_preface",
        "_receiver",
        "_rest",
        "_since",
        "greeted",
    )

    def __init__(self, receiver: Receiver, most_head: int) -> None:
        """Read for `receiver`; a header block of more than `most_head` bytes is not read to its end."""
        self._receiver = receiver
        self._most_head = most_head
        self._rest = b""
        self._since = 0.0
        self._preface = http2.PREFACE
        self.greeted = False
        # A DATA frame that is coming: what is still to come of it, of its padding, and if it is the last.
        self._left = self._padding = 0
        self._last = False
        # A head that is coming: its stream, whether data follows, its bytes, and when it began.
        self._block: tuple[int, bool, bytearray, float] | None = None

    def close(self) -> None:
        """Let go of who gets the frames: they hold each other, and there are many of them."""
        del self._receiver

    @property
    def is_http2(self) -> bool:
        """Whether the client has said that it speaks it."""
        return not self._preface

    @property
    def head_since(self) -> float | None:
        """`time.monotonic()` when the head, or any frame but DATA, began that is coming; None if none is."""
        if self._block is not None:
            return self._block[3]
        return self._since if self._rest else None

    def take(self, data: bytes) -> None:
        """Take the next bytes. Raises Http2Error."""
        if self._rest:
            data = self._rest + data
        at: int | None = self._take_preface(data) if self._preface else 0
        done = 0
        while at is not None:
            done = at
            at = self._next(data, at)
        if done < len(data):
            if done or not self._rest:
                self._since = time.monotonic()
            self._rest = data[done:]
        else:
            self._rest = b""

    def _take_preface(self, data: bytes) -> int:
        size = min(len(data), len(self._preface))
        if data[:size] != self._preface[:size]:
            raise Http2Error(Code.PROTOCOL_ERROR, "not HTTP/2")
        self._preface = self._preface[size:]
        return size

    def _next(self, data: bytes, at: int) -> int | None:
        """Take what stands at `at`; return where that ends, or None if there is not enough of it."""
        end = len(data)
        if self._left and at < end:
            here = min(self._left, end - at)
            if here == end:
                self._data(data)
            elif here < _COPIED:
                self._data(data[at : at + here])
            else:
                self._data(cast("bytes", memoryview(data)[at : at + here]))
            return at + here
        begin = at + http2.HEAD.size
        if end < begin:
            return None
        high, low, kind, flags, number = http2.HEAD.unpack_from(data, at)
        size: int = high << 8 | low
        number &= http2.LAST_STREAM
        if not self.greeted or self._block is not None:
            self._check(kind, flags, number)
        if kind == http2.DATA:
            if flags & http2.PADDED and end == begin:
                return None  # how long it is padded stands in the next byte
            return self._begin_data(data, begin, size, flags, number)
        if size > http2.FIRST_FRAME:
            if size > MOST_FRAME or kind not in _OF_HEADS:
                raise Http2Error(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes, type {kind}")
            if size > self._most_head:
                raise Http2Error(Code.ENHANCE_YOUR_CALM, f"a head of {size} bytes")
        if end - begin < size:
            return None
        self._frame(kind, flags, number, data[begin : begin + size])
        return begin + size

    def _check(self, kind: int, flags: int, number: int) -> None:
        """Raise Http2Error for a frame that is not the one which must come."""
        if not self.greeted:
            if kind != http2.SETTINGS or flags & http2.ACK:
                raise Http2Error(Code.PROTOCOL_ERROR, "no settings at first")
            self.greeted = True
        if self._block is not None and (kind != http2.CONTINUATION or number != self._block[0]):
            raise Http2Error(Code.PROTOCOL_ERROR, "a frame within a head")

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == http2.HEADERS:
            self._headers(flags, number, payload)
        elif kind == http2.CONTINUATION:
            self._continuation(flags, payload)
        else:
            self._receiver.frame(kind, flags, number, payload)

    # -- data ---------------------------------------------------------------------------------------

    def _begin_data(self, data: bytes, at: int, size: int, flags: int, number: int) -> int:
        """Take the head of a DATA frame; return where its data begins."""
        if size > MOST_FRAME:
            raise Http2Error(Code.FRAME_SIZE_ERROR, f"data of {size} bytes")
        padding = 0
        self._left, self._last = size, bool(flags & http2.END_STREAM)
        if flags & http2.PADDED:
            if not size or data[at] >= size:
                raise Http2Error(Code.PROTOCOL_ERROR, "more padding than payload")
            padding = data[at]
            self._left -= 1
            at += 1
        self._padding = padding
        self._receiver.data_begins(number, size, size - self._left + padding)
        if not self._left:
            self._receiver.data_ends(last=self._last)
        return at

    def _data(self, piece: bytes) -> None:
        self._left -= len(piece)
        # Of a piece that reaches into the padding only the beginning is data.
        beyond = self._padding - self._left
        data = piece if beyond <= 0 else piece[: max(len(piece) - beyond, 0)]
        if data:
            self._receiver.data(data)
        if not self._left:
            self._receiver.data_ends(last=self._last)

    # -- heads --------------------------------------------------------------------------------------

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = http2.unpadded(flags, payload)
        if flags & http2.PRIORITIZED:
            if len(payload) < 5:
                raise Http2Error(Code.FRAME_SIZE_ERROR, "a head without its priority")
            if http2.UINT32.unpack_from(payload)[0] & http2.LAST_STREAM == number:
                raise Http2Error(Code.PROTOCOL_ERROR, "a call that waits for itself")
            payload = payload[5:]
        if not number % 2:
            raise Http2Error(Code.PROTOCOL_ERROR, f"a call with the number {number}")
        ended = bool(flags & http2.END_STREAM)
        if flags & http2.END_HEADERS:
            self._receiver.head(number, payload, ended=ended)
        else:
            self._block = (number, ended, bytearray(payload), time.monotonic())

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Http2Error(Code.PROTOCOL_ERROR, "a head that goes on without a beginning")
        number, ended, block, _ = self._block
        block += payload
        if len(block) > self._most_head or not payload:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, "a head without an end")
        if flags & http2.END_HEADERS:
            self._block = None
            self._receiver.head(number, bytes(block), ended=ended)
