"""HTTP/1.1 messages off a socket, without I/O: one reader for requests and for answers.

It is written for cheapness, because load generator and stub share a core: heads that were seen before are
not parsed again, and the bytes of a body with a Content-Length are counted and not copied. A chunked body,
which a proxy may choose, takes the slow way through httptools.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import httptools

MAX_HEAD: Final = 65_536
KEPT: Final = 4_096  # bytes of each body that are kept for checks and error texts
_CACHED_HEADS: Final = 4_096

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_TYPE = re.compile(rb"\r\ncontent-type:[ \t]*([^\r]*?)[ \t]*\r\n", re.IGNORECASE)
_KEY = re.compile(rb"\r\nflwr-public-key:[ \t]*([^\r]*?)[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)


class WireError(Exception):
    """Bytes that are not the one HTTP/1.1 message that was expected."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the benchmark reads of a head: `target` is the path of a request or the status of an answer."""

    target: str
    length: int | None  # None: chunked
    content_type: str
    key: str  # the node's public key, "" in answers
    close: bool


def parse_head(raw: bytes) -> Head:
    """Parse `raw`, which ends with the empty line.

    Raises:
        WireError: no second word in the first line, or a body without a stated end.
    """
    words = raw.split(b"\r\n", 1)[0].split(b" ")
    if len(words) < 2:
        raise WireError(f"not a head: {raw[:80]!r}")
    length = _LENGTH.search(raw)
    kind = _TYPE.search(raw)
    key = _KEY.search(raw)
    if length is None and _CHUNKED.search(raw) is None:
        raise WireError(f"neither Content-Length nor chunked: {raw[:300]!r}")
    return Head(
        target=words[1].decode("latin-1"),
        length=int(length[1]) if length else None,
        content_type=kind[1].decode("latin-1") if kind else "",
        key=key[1].decode("latin-1") if key else "",
        close=_CLOSE.search(raw) is not None,
    )


class Reader:
    """Reads one message after another from one connection.

    After `feed` returned True, `head`, `size` (bytes of the body), `kept` (its first bytes) and `digest`
    describe the message, until the next `feed` begins a new one.
    """

    __slots__ = (
        "_chunks",
        "_done",
        "_hash",
        "_hash_from",
        "_heads",
        "_pending",
        "_requests",
        "_wanted",
        "head",
        "kept",
        "size",
    )

    head: Head
    kept: bytes
    size: int

    def __init__(
        self, *, requests: bool, heads: dict[bytes, Head], hash_from: Callable[[Head], int | None]
    ) -> None:
        """Of requests or of answers.

        `heads` remembers parsed heads and is shared by the connections of a process. `hash_from` is asked
        once per message: the offset in the body from which to hash it with SHA-256, or None for no hash.
        """
        self._requests = requests
        self._heads = heads
        self._hash_from = hash_from
        self._wanted = 0
        self._chunks: Any = None
        self._pending = b""
        self._done = True
        self._hash: Any = None

    @property
    def digest(self) -> str | None:
        """The SHA-256 that `hash_from` asked for, or None."""
        digest: str | None = self._hash.hexdigest() if self._hash is not None else None
        return digest

    def feed(self, data: memoryview) -> bool:
        """Take the next bytes; True when they complete a message.

        Raises:
            WireError: the bytes are no HTTP, or go on after the end of the message.
        """
        if self._done:
            return self._begin(data)
        if self._chunks is not None:
            self._feed_chunks(data)
        else:
            self._body(data)
        return self._end()

    def _begin(self, data: memoryview) -> bool:
        raw = self._pending + bytes(data)
        end = raw.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(raw) > MAX_HEAD:
                raise WireError(f"no end of a head: {raw[:300]!r}")
            self._pending = raw
            return False
        self._pending = b""
        self.head = self._head(raw[:end])
        self._done = False
        self.size = 0
        self.kept = b""
        wanted = self._hash_from(self.head)
        self._hash = None if wanted is None else hashlib.sha256()
        self._wanted = wanted or 0
        if self.head.length is None:
            parser = httptools.HttpRequestParser if self._requests else httptools.HttpResponseParser
            self._chunks = parser(self)
            self._feed_chunks(memoryview(raw))
        else:
            self._body(memoryview(raw)[end:])
        return self._end()

    def _head(self, raw: bytes) -> Head:
        head = self._heads.get(raw)
        if head is None:
            if len(self._heads) >= _CACHED_HEADS:
                self._heads.clear()  # each run brings heads of new nodes
            head = self._heads[raw] = parse_head(raw)
        return head

    def _body(self, data: memoryview) -> None:
        before = self.size
        self.size += len(data)
        if before < KEPT:
            self.kept += data[: KEPT - before]
        if self._hash is not None:
            self._hash.update(data[max(0, self._wanted - before) :])

    def _feed_chunks(self, data: memoryview) -> None:
        try:
            self._chunks.feed_data(data)
        except httptools.HttpParserError as error:
            raise WireError(f"chunked body: {error}") from error

    def on_body(self, body: bytes) -> None:
        """Called by httptools with each piece of a chunked body."""
        self._body(memoryview(body))

    def on_message_complete(self) -> None:
        """Called by httptools at the end of a chunked body."""
        self._done = True

    def _end(self) -> bool:
        if self._chunks is not None:
            if self._done:
                self._chunks = None
            return self._done
        length = self.head.length or 0
        if self.size > length:
            raise WireError(f"{self.size - length} bytes after a body of {length}")
        self._done = self.size == length
        return self._done
