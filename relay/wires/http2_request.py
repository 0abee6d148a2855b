"""The head of an HTTP/2 request, and what must hold of it (RFC 9113, 8.2 and 8.3)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from relay.call import Metadata

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"[^\0\r\n]*")
_PSEUDO = frozenset({b":method", b":path", b":scheme", b":authority"})
_NEEDED = _PSEUDO - {b":authority"}
_OF_HTTP_1 = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
#: Names that were looked at and found sound: nodes send few.
_MOST_KNOWN = 1024
_LONGEST_KNOWN = 64
_known: set[bytes] = set()


class Head(NamedTuple):
    """The head of a request.

    Attributes:
        method, path: what is asked.
        fields: all but the pseudo-fields.
        size: bytes of those.
        length: what it says that the body has; None if it does not say.
    """

    method: bytes
    path: bytes
    fields: Metadata
    size: int
    length: int | None


def read(fields: Metadata, size: int) -> Head | None:
    """Return the head that these fields are, `size` bytes of them; None if it is not sound."""
    pseudo: dict[bytes, bytes] = {}
    for name, value in fields:
        if name not in _PSEUDO:
            break
        if name in pseudo:
            return None
        pseudo[name] = value
        size -= len(name) + len(value)
    fields = fields[len(pseudo) :]
    if not pseudo.keys() >= _NEEDED or not pseudo[b":path"] or not names_are_sound(fields):
        return None
    length = None
    for name, value in fields:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18 or length is not None:
                return None
            length = int(value)
        elif name == b"te" and value != b"trailers":
            return None
    return Head(pseudo[b":method"], pseudo[b":path"], fields, size, length)


def names_are_sound(fields: Metadata) -> bool:
    """Return whether these may be fields of a request, or trailers: no pseudo-fields, none of HTTP/1.1.

    Binary metadata of gRPC may stand there as they are, behind a zero.
    """
    for name, value in fields:
        if _VALUE.fullmatch(value) is None and not (value[:1] == b"\0" and name.endswith(b"-bin")):
            return False
        if name in _known:
            continue
        if name in _OF_HTTP_1 or _NAME.fullmatch(name) is None:
            return False
        if len(_known) < _MOST_KNOWN and len(name) <= _LONGEST_KNOWN:
            _known.add(name)
    return True
