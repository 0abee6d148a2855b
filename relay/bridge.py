"""What HTTP and gRPC call the same things, so that a call can come in on one and leave on the other.

Inside the relay the words are HTTP's: header pairs and statuses, on every wire. A gRPC wire or upstream
translates at its edge. The bytes of a message are the same on both, and so is a node's proof: gRPC carries
the key and the signature as raw bytes under names in `-bin`, HTTP v1 in base64 under the names without it.
Any other binary metadata keeps its name and is base64 in HTTP, as gRPC itself writes it over HTTP/2.

What belongs to one of the two protocols alone stays behind: framing, content types, user agents, `grpc-*`.

Source: flwr 1.39 `client/grpc_rere_client/node_auth_client_interceptor.py`, flwr 1.42
`supernode/node_auth_http_interceptor.py`; https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay.call import Metadata

    #: gRPC metadata as grpcio takes and gives it: text, or bytes under a name in `-bin`.
    GrpcMetadata = Iterable[tuple[str, str | bytes]]

T = TypeVar("T")

CONTENT_TYPE = (b"content-type", b"application/protobuf")
#: Most bytes of a status' text, which is metadata like any other.
MOST_DETAILS = 1024
#: What each pair of metadata counts beyond its bytes (RFC 7541, 4.1).
_ENTRY = 32
_BIN = "-bin"

#: Names in HTTP of binary metadata that Flower calls otherwise in gRPC.
_PROOF = {f"{name}{_BIN}": name.encode() for name in ("flwr-public-key", "flwr-signature")}

#: Headers that say something of HTTP's framing, of one hop, of a body, or of the client's HTTP library. A
#: gRPC client could send them as metadata too, and would then decide where its request ends upstream.
_HTTP_ONLY = frozenset(
    {
        "accept",
        "accept-encoding",
        "accept-language",
        "alt-svc",
        "cache-control",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "date",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "vary",
    }
)
_NAME = re.compile(r"[0-9a-z_.-]{1,256}")
_TEXT = re.compile(rb"[ -~]*")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*={0,2}")


class _Name(NamedTuple):
    """A name on the other side, and whether its values are binary in gRPC."""

    name: bytes
    binary: bool


class _Key(NamedTuple):
    """A key of gRPC metadata, as text and as HTTP/2 has it."""

    key: str
    field: bytes
    binary: bool


def to_headers(metadata: GrpcMetadata) -> Metadata:
    """Return the headers that mean what this gRPC metadata means.

    What is not a header by the rules of HTTP is left out: it could end a header and begin another.
    """
    headers: Metadata = []
    for key, value in metadata:
        known = _header(key)
        if known is None:
            continue
        if known.binary:
            headers.append((known.name, b64encode(value if isinstance(value, bytes) else value.encode())))
        elif isinstance(value, str) and value.isascii() and value.isprintable():
            headers.append((known.name, value.encode("ascii")))
    return headers


def from_fields(fields: Metadata) -> Metadata:
    """Return the headers that mean what these fields of a gRPC call mean, as they stand in HTTP/2.

    Binary ones are base64 there, with padding or without, or as they are behind a zero. What is not a header
    by the rules of HTTP/1.1 is left out: it could end a header and begin another.
    """
    headers: Metadata = []
    for name, value in fields:
        known = _field(name)
        if known is None:
            continue
        if known.binary:
            if value[:1] == b"\0":
                headers.append((known.name, b64encode(value[1:])))
            elif _BASE64.fullmatch(value) is not None:
                bare = value.rstrip(b"=")
                headers.append((known.name, bare + b"=" * (-len(bare) % 4)))
        elif _TEXT.fullmatch(value) is not None:
            headers.append((known.name, value))
    return headers


def to_fields(headers: Metadata) -> Metadata:
    """Return the fields that these headers of an answer are in gRPC's HTTP/2; as `to_metadata` otherwise."""
    fields: Metadata = []
    for name, value in headers:
        known = _metadata_key(name)
        if known is not None and (_BASE64 if known.binary else _TEXT).fullmatch(value) is not None:
            fields.append((known.field, value))
    return fields


def to_metadata(headers: Metadata) -> list[tuple[str, str | bytes]]:
    """Return the gRPC metadata that means what these headers mean.

    What gRPC would not carry is left out: it refuses the whole call for one such value.
    """
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        known = _metadata_key(name)
        if known is None:
            continue
        if known.binary:
            try:
                metadata.append((known.key, b64decode(value + b"=" * (-len(value) % 4), validate=True)))
            except ValueError:
                continue  # a proof without it is refused by the SuperLink, as it would be over HTTP
        elif value.isascii() and (text := value.decode("ascii")).isprintable():
            metadata.append((known.key, text))
    return metadata


def bounded(metadata: list[tuple[str, str | bytes]], most: int) -> list[str]:
    """Shorten metadata to `most` bytes, as gRPC counts them; return the keys that were taken off.

    Flower's own stays before all other: a gRPC that gets more than 8 KiB of it may fail the call, whatever
    the call has done, and beyond 16 KiB does.
    """
    return _bounded(metadata, [(key, len(key) + _size(value)) for key, value in metadata], most)


def bounded_fields(fields: Metadata, most: int) -> list[str]:
    """Shorten metadata as it stands in HTTP/2; see `bounded`."""
    sizes = [(key.decode("ascii"), len(key) + len(value) + _ENTRY) for key, value in fields]
    return _bounded(fields, sizes, most)


def _bounded(pairs: list[T], sizes: list[tuple[str, int]], most: int) -> list[str]:
    if sum(size for _, size in sizes) <= most:
        return []
    dropped, kept, left = [], set(), most
    for own in (True, False):
        for at, (key, size) in enumerate(sizes):
            if key.startswith("flwr-") is own:
                if size <= left:
                    left -= size
                    kept.add(at)
                else:
                    dropped.append(key)
    pairs[:] = [pair for at, pair in enumerate(pairs) if at in kept]
    return dropped


def _size(value: str | bytes) -> int:
    return (len(value) if isinstance(value, str) else 4 * (len(value) + 2) // 3) + _ENTRY


def details(data: bytes) -> str:
    """Return an error's body as the text of a gRPC status, cut to what a status carries safely."""
    text, size = data[:MOST_DETAILS].decode("utf-8", "replace"), 0
    for at, char in enumerate(text):
        # What is not printable ASCII travels as %XX, byte by byte.
        size += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())
        if size > MOST_DETAILS:
            return text[:at]
    return text


# Nodes send few names, and the same ones with each call.
@lru_cache(maxsize=512)
def _header(key: str) -> _Name | None:
    # A gRPC client's name is one to an HTTP server's log as well.
    if key in _HTTP_ONLY - {"user-agent"} or key.startswith("grpc-") or not _NAME.fullmatch(key):
        return None
    if f"{key}{_BIN}" in _PROOF:
        return None  # in gRPC a proof has other names: a SuperLink would not look at this one
    return _Name(_PROOF.get(key, key.encode("ascii")), key.endswith(_BIN))


@lru_cache(maxsize=512)
def _field(name: bytes) -> _Name | None:
    return _header(name.decode("latin-1"))


@lru_cache(maxsize=512)
def _metadata_key(name: bytes) -> _Key | None:
    key = name.decode("latin-1").lower()
    if key in _HTTP_ONLY or key in _PROOF or key.startswith("grpc-") or not _NAME.fullmatch(key):
        return None  # in HTTP a proof has other names, and only those were looked at
    if f"{key}{_BIN}" in _PROOF:
        key = f"{key}{_BIN}"
    return _Key(key, key.encode("ascii"), key.endswith(_BIN))


#: What a gRPC status is in HTTP. The first four failures say to a node what they say in HTTP v1; CANCELLED is
#: what a server that stops makes of its calls. (Nearly as in googleapis `google/rpc/code.proto`.)
STATUS = {
    "OK": 200,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "FAILED_PRECONDITION": 412,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "CANCELLED": 503,
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "UNIMPLEMENTED": 501,
    "DEADLINE_EXCEEDED": 504,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "DATA_LOSS": 500,
}

_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    412: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    # All three say "come back", and of gRPC's statuses only this one does.
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}


def code_of(status: int) -> str:
    """Return the name of the gRPC status that means what this HTTP status means."""
    return _CODES.get(status, "INTERNAL" if status >= 500 else "UNKNOWN")
