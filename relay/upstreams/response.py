"""The response to one exchange, parsed as it comes in: what a connection to an upstream reads.

httptools parses it and calls the `on_` methods. Once it has parsed the head of a body of known length, the
rest of that passes around it, since it would only copy.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING

import httptools

if TYPE_CHECKING:
    from relay.call import Metadata

# RFC 9110 section 7.6.1, and framing; and the request id, since the node gets the relay's own.
_NOT_PASSED = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)
_NOTED = _NOT_PASSED | {b"content-type"}


class Response(asyncio.Protocol, ABC):
    """The reading half of `Connection`, which is one object with it: each piece of a body passes through.

    Attributes:
        status, headers: of the response, 0 before its head is here; `headers` are the end-to-end ones,
            without framing.
        content_type: of the response, b"" if it has none.
        size: bytes of the response body, None if the upstream did not say.
        received: bytes of it that have come.
    """

    __slots__ = (
        "_buffered",
        "_chunked",
        "_head_size",
        "_informational",
        "_named",
        "_parser",
        "_pieces",
        "_raw_left",
        "_response_done",
        "_until_close",
        "content_type",
        "headers",
        "received",
        "size",
        "status",
    )

    def __init__(self) -> None:
        """Stand where a response has ended, so that bytes which come unasked are too many."""
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._informational = False
        self._expect()
        self._response_done = True

    def _expect(self) -> None:
        """Forget the last response; the next begins."""
        self.status = 0
        self.headers: Metadata = []
        self.content_type = b""
        self._named = b""
        self.size: int | None = None
        self._buffered = 0
        self._head_size = 0
        self.received = 0
        self._raw_left = 0
        self._chunked = False
        self._until_close = False
        self._response_done = False

    @abstractmethod
    def _message_ended(self, *, keep: bool) -> None:
        """Told that the response is whole, and whether the upstream keeps the connection."""

    def _take_raw(self, data: bytes) -> None:
        """Take the next piece of a body whose length is known."""
        left = self._raw_left - len(data)
        self._raw_left = max(0, left)
        self.on_body(data if left >= 0 else data[:left])
        if left <= 0:
            # The parser still stands within the body.
            keeps = self._parser.should_keep_alive()
            self._parser = httptools.HttpResponseParser(self)
            self._message_ended(keep=keeps and left == 0)

    # -- httptools callbacks ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._response_done:
            raise ValueError("a second response to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer; nothing in Flower sends or reads one
        lower = name.lower()
        if lower not in _NOTED:
            self.headers.append((name, value))
        elif lower == b"content-length":
            # llhttp has refused anything but digits, and two that differ
            self.size = int(value)
        elif lower == b"content-type":
            self.content_type = value
            self.headers.append((name, value))
        elif lower == b"transfer-encoding":
            self._chunked = True
        elif lower == b"connection":
            self._named += b"," + value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._informational = True
            self.headers = []
            self._named = b""
            self.size = None
            return
        if self._named:
            named = {token.strip().lower() for token in self._named.split(b",")}
            self.headers = [pair for pair in self.headers if pair[0].lower() not in named]
        if self._chunked:
            self.size = None
        elif self.size is None:
            if status in (204, 304):
                self.size = 0
            else:
                self._until_close = True
        self.status = status

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._buffered += len(body)
        self.received += len(body)

    def on_message_complete(self) -> None:
        if self._informational:
            self._informational = False
            return
        self._message_ended(keep=self._parser.should_keep_alive())
