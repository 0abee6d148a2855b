"""Frames of HTTP/2 (RFC 9113), and the errors that its two ends tell each other."""

from __future__ import annotations

import enum
import struct

#: What a client says first.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: Bytes of a frame before its payload: two and one of its length, type, flags, stream.
HEAD = struct.Struct(">HBBBL")
UINT32 = struct.Struct(">L")
_SETTING = struct.Struct(">HL")

DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

#: Length of a payload, window and table that hold before anybody has said otherwise.
FIRST_FRAME = 16_384
FIRST_WINDOW = 65_535
FIRST_TABLE = 4096
MOST_WINDOW = 2**31 - 1
LAST_STREAM = 2**31 - 1


class Setting(enum.IntEnum):
    """What each end may tell the other (6.5.2), and gRPC's own: binary metadata may come as they are."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6
    GRPC_ALLOW_TRUE_BINARY_METADATA = 0xFE03


class Code(enum.IntEnum):
    """Why a stream or a connection ends (7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class Http2Error(Exception):
    """The other end broke the rules, and the connection cannot go on.

    Attributes:
        code: what it is told.
    """

    def __init__(self, code: Code, what: str) -> None:
        super().__init__(what)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame, whole."""
    return HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def head(size: int, kind: int, flags: int, stream: int) -> bytes:
    """Return the head of a frame with a payload of `size` bytes."""
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream)


def settings(values: dict[Setting, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in values.items()))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Return what a SETTINGS frame says, in its order. Raises Http2Error."""
    if len(payload) % _SETTING.size:
        raise Http2Error(Code.FRAME_SIZE_ERROR, f"settings of {len(payload)} bytes")
    return list(_SETTING.iter_unpack(payload))


def window_update(stream: int, more: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, UINT32.pack(more))


def rst_stream(stream: int, code: Code) -> bytes:
    """Return an RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, UINT32.pack(code))


def goaway(last: int, code: Code, why: bytes = b"") -> bytes:
    """Return a GOAWAY frame; streams up to `last` are still answered."""
    return frame(GOAWAY, 0, 0, UINT32.pack(last) + UINT32.pack(code) + why)


def unpadded(flags: int, payload: bytes) -> bytes:
    """Return a payload without its padding. Raises Http2Error."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Http2Error(Code.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]


def sized(payload: bytes, size: int) -> None:
    """Check the length of a payload that has but one. Raises Http2Error."""
    if len(payload) != size:
        raise Http2Error(Code.FRAME_SIZE_ERROR, f"{len(payload)} bytes in place of {size}")
