"""The header blocks of gRPC's answers in HTTP/2.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from relay.wires.hpack import encode

if TYPE_CHECKING:
    from relay.call import Metadata

#: The numbers of gRPC's statuses, by their names.
CODES = {
    name: number
    for number, name in enumerate(
        (
            "OK",
            "CANCELLED",
            "UNKNOWN",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
            "ABORTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "INTERNAL",
            "UNAVAILABLE",
            "DATA_LOSS",
            "UNAUTHENTICATED",
        )
    )
}
_TYPE = b"application/grpc"
_HEAD: Metadata = [(b":status", b"200"), (b"content-type", _TYPE)]
_OK: Metadata = [(b"grpc-status", b"0")]
HEAD = encode(_HEAD)
OK = encode(_OK)
UNIMPLEMENTED = encode([*_HEAD, (b"grpc-status", b"12"), (b"grpc-message", b"Method not found!")])
NO_GRPC = encode([(b":status", b"415")])
NO_POST = encode([(b":status", b"405"), (b"allow", b"POST")])
#: What may stand in `grpc-message` as it is: printable ASCII but for the sign of escapes.
_PLAIN = bytes(byte for byte in range(0x20, 0x7F) if byte != ord("%")).decode()


def end(trailing: Metadata) -> bytes:
    """Return the trailers of an answer that is well, with this metadata."""
    return encode([*_OK, *trailing]) if trailing else OK


def broken(request_id: str) -> bytes:
    """Return the trailers of an answer that broke off: the status counts, and what came of it does not."""
    code = b"%d" % CODES["UNAVAILABLE"]
    return encode(
        [(b"grpc-status", code), (b"grpc-message", b"cut"), (b"x-request-id", request_id.encode("ascii"))]
    )


def status(code: str, details: str, trailing: Metadata) -> bytes:
    """Return the head of an answer that is nothing but a status."""
    message = quote(details, safe=_PLAIN).encode("ascii")
    status = b"%d" % CODES[code]
    return encode([*_HEAD, (b"grpc-status", status), (b"grpc-message", message), *trailing])


def is_grpc(fields: Metadata) -> bool:
    """Return whether a request with these fields speaks gRPC."""
    for name, value in fields:
        if name == b"content-type":
            return value == _TYPE or value.startswith((_TYPE + b"+", _TYPE + b";"))
    return False
