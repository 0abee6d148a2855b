"""As much of HTTP/2 as a client with bad manners needs: bytes of a gRPC call, and frames of its answer."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Final, NamedTuple

from relay import bridge
from relay.fleet import BY_PATH

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay.call import Metadata
    from relay.fleet import Method

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
#: Most bytes that a frame has, before the other side has said that it takes more.
MOST: Final = 16_384
#: Bytes of a frame before its payload.
HEAD_SIZE: Final = 9


class Head(NamedTuple):
    """The head of a frame that has come, and how many bytes it has beside."""

    kind: int
    flags: int
    stream: int
    size: int

    @property
    def ends(self) -> bool:
        """Whether it is the last one of its call."""
        return self.kind == RST_STREAM or (self.kind in {DATA, HEADERS} and bool(self.flags & END_STREAM))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


#: What a client says first.
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def message(data: bytes) -> bytes:
    """Return a gRPC message as it stands in DATA frames."""
    return b"\0" + len(data).to_bytes(4, "big") + data


def call(
    method: Method,
    body: bytes,
    *,
    metadata: Iterable[tuple[str, str | bytes]] = (),
    stream: int = 1,
    authority: str = "127.0.0.1",
    scheme: str = "http",
) -> bytes:
    """Return a whole call of a Fleet method; the preface of the connection is not part of it."""
    pairs: list[tuple[str, str | bytes]] = [
        (":method", "POST"),
        (":scheme", scheme),
        (":path", method.grpc),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *metadata,
    ]
    whole = message(body)
    pieces = [whole[start : start + MOST] for start in range(0, len(whole), MOST)]
    data = [
        frame(DATA, END_STREAM if number == len(pieces) else 0, stream, piece)
        for number, piece in enumerate(pieces, start=1)
    ]
    block = b"".join(literal(name.encode("ascii"), _ascii(value)) for name, value in pairs)
    return frame(HEADERS, END_HEADERS, stream, block) + b"".join(data)


def from_http(request: bytes) -> tuple[Method, Metadata, bytes]:
    """Return method, headers and body of a whole HTTP/1.1 request of a relay to its SuperLink."""
    head, body = request.split(b"\r\n\r\n", 1)
    first, *lines = head.split(b"\r\n")
    headers = [(name, value.strip()) for name, value in (line.split(b":", 1) for line in lines)]
    return BY_PATH[first.split(b" ")[1].decode("ascii").rsplit("/", 1)[-1]], headers, body


def call_again(request: bytes, request_id: str, *, stream: int = 1) -> bytes:
    """Return a gRPC call that asks what this HTTP/1.1 request asks, with the same proof."""
    method, headers, body = from_http(request)
    proof = [(name, value) for name, value in headers if name.lower().startswith(b"flwr-")]
    metadata = [*bridge.to_metadata(proof), ("x-request-id", request_id)]
    return call(method, body, metadata=metadata, stream=stream)


def read_head(data: bytes) -> Head:
    """Return what the first `HEAD_SIZE` bytes of a frame say."""
    return Head(
        data[3], data[4], int.from_bytes(data[5:9], "big") & 0x7FFF_FFFF, int.from_bytes(data[:3], "big")
    )


def answer_to(head: Head, payload: bytes) -> bytes:
    """Return what a client has to say to a frame about its connection; b"" if it is nothing."""
    if head.kind not in {SETTINGS, PING} or head.flags & ACK:
        return b""
    return frame(head.kind, ACK, 0, payload if head.kind == PING else b"")


def literal(name: bytes, value: bytes) -> bytes:
    """Return one header in HPACK's plainest form: nothing compressed, nothing remembered."""
    return b"\0" + _string(name) + _string(value)


def _ascii(value: str | bytes) -> bytes:
    return b64encode(value) if isinstance(value, bytes) else value.encode("ascii")


def _string(text: bytes) -> bytes:
    return _integer(len(text)) + text


def _integer(number: int) -> bytes:
    """Return a number in HPACK's form with seven bits in the first byte, and nothing in the eighth."""
    if number < 127:
        return bytes((number,))
    number -= 127
    rest = bytearray((127,))
    while number >= 128:
        rest.append(number % 128 + 128)
        number //= 128
    rest.append(number)
    return bytes(rest)
