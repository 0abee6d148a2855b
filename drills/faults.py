"""What can go wrong between the relay and the SuperLink, and the bytes of it."""

import enum
import re
from collections.abc import Mapping
from typing import Final

_LENGTH: Final = re.compile(rb"^content-length:[ \t]*(\d+)[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
_ENCODED: Final = re.compile(rb"^transfer-encoding:", re.IGNORECASE | re.MULTILINE)


class Fault(enum.Enum):
    """What happens to a call; but for the cuts, the SuperLink does not see it. The value is for people."""

    NONE = "passed on"
    REFUSED = "refused: the port is closed, and open connections are reset"
    STATUS_500 = "answered with 500"
    STATUS_503 = "answered with 503"
    STATUS_429 = "answered with 429"
    GARBAGE = "answered with bytes that are no answer of a SuperLink"
    HANG = "never answered"
    SLOW = "answered 100 ms later, and eight at a time"
    CUT = "carried out, and their answers cut in the middle"
    CUT_LONG = "carried out, and their answers cut in the middle if they are objects of more than 1 MB"
    CUT_MESSAGE = "carried out, and the first answer with each message lost"


#: Seconds that a slow SuperLink takes for a call, and how many it works on at a time.
SLOW_SECONDS: Final = 0.1
AT_A_TIME: Final = 8

#: Bytes of a body from which on an answer is long; a relay begins to pass it on before it has it whole.
LONG: Final = 1_000_000


class UnknownFramingError(Exception):
    """A message has no Content-Length where one is needed."""


def _response(status: str, content_type: str, body: bytes, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\n{more}content-length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body


#: Whole answers by fault, given in turn. After garbage the connection is closed.
ANSWERS: Final[Mapping[Fault, tuple[bytes, ...]]] = {
    Fault.STATUS_500: (_response("500 Internal Server Error", "text/plain", b"Internal Server Error"),),
    Fault.STATUS_503: (_response("503 Service Unavailable", "text/plain", b"Service Unavailable"),),
    Fault.STATUS_429: (
        _response("429 Too Many Requests", "text/html", b"<h1>Too many</h1>", "retry-after: 1\r\n"),
    ),
    Fault.GARBAGE: (
        bytes(range(128, 192)),  # not HTTP
        _response("200 OK", "text/html", b"<h1>Please log in</h1>"),
        b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: many\r\n\r\nbytes",
        b"",  # closed without a word
    ),
}


def body_size(head: bytes, *, request: bool) -> int:
    """Return the bytes of body that follow a head; a request without a length has none.

    Raises UnknownFramingError for anything that is not said by a Content-Length.
    """
    found = _LENGTH.search(head)
    if found is not None:
        return int(found[1])
    if request and not _ENCODED.search(head):
        return 0
    raise UnknownFramingError(head[:200])


def cut_at(head: bytes, size: int) -> int:
    """Return after how many bytes an answer (its head, and `size` bytes of body) ends when it is cut."""
    return len(head) + size // 2 if size > 1 else len(head) // 2
