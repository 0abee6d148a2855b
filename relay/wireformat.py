"""As much of protobuf's wire format as a relay needs to read ids and to write an id.

Encoding: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_DOUBLE = struct.Struct("<d")


class TruncatedError(Exception):
    """The bytes end, or stop being protobuf, in the middle of a field."""


def fields(data: bytes, only: Container[int] | None = None, at: int = 0) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of the varint and length-delimited fields, in their order.

    Args:
        data: a serialized message.
        only: numbers of those that are wanted; what others hold, which may be a model, is not copied.
        at: where the first of them begins.

    Raises:
        TruncatedError: in the middle of a field; what was yielded before stands.
    """
    end = len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if not number:
            raise TruncatedError
        if wire_type == _VARINT:
            value, at = _varint(data, at)
            if only is None or number in only:
                yield number, value
        elif wire_type == _LENGTH:
            size, at = _varint(data, at)
            if at + size > end:
                raise TruncatedError
            if only is None or number in only:
                yield number, data[at : at + size]
            at += size
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
            if at > end:
                raise TruncatedError
        else:
            raise TruncatedError  # groups: no Flower message has one


def replace_bytes(data: bytes, number: int, value: bytes) -> bytes:
    """Return `data` with `value` in each length-delimited field `number`, and all else byte for byte.

    Raises:
        TruncatedError: `data` breaks off in the middle of a field.
    """
    parts = []
    at = done = 0
    while at < len(data):
        tag, inside = _varint(data, at)
        end = _skip(data, tag, inside)
        if tag == number << 3 | _LENGTH:
            parts += [data[done:at], encode_bytes(number, value)]
            done = end
        at = end
    return b"".join((*parts, data[done:]))


def well_formed(data: bytes) -> bool:
    """Return whether `data` has the structure of a message, whatever its type; b"" has."""
    try:
        for _ in fields(data, only=()):
            pass
    except TruncatedError:
        return False
    return True


def uint(data: bytes, number: int) -> int | None:
    """Return the varint field `number`, None if it is absent or the bytes break off before it."""
    try:
        return next((v for n, v in fields(data) if n == number and isinstance(v, int)), None)
    except TruncatedError:
        return None


def double(data: bytes, number: int) -> float | None:
    """Return the double field `number`, None if it is absent or the bytes break off before it."""
    at, end = 0, len(data)
    try:
        while at < end:
            tag, at = _varint(data, at)
            wire_type = tag & 7
            if wire_type == _VARINT:
                _, at = _varint(data, at)
            elif wire_type == _LENGTH:
                size, at = _varint(data, at)
                at += size
            elif wire_type == _FIXED32:
                at += 4
            elif wire_type != _FIXED64 or at + 8 > end:
                return None
            elif tag >> 3 == number:
                value: float = _DOUBLE.unpack_from(data, at)[0]
                return value
            else:
                at += 8
    except TruncatedError:
        pass
    return None


def encode_uint(number: int, value: int) -> bytes:
    """Return the varint field `number` with `value`, 0 <= value < 2**64."""
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def encode_bytes(number: int, value: bytes) -> bytes:
    """Return the length-delimited field `number` with `value`: a string, bytes or a message."""
    return bytes_head(number, len(value)) + value


def bytes_head(number: int, size: int) -> bytes:
    """Return what stands before the `size` bytes of the length-delimited field `number`."""
    return _encode_varint(number << 3 | _LENGTH) + _encode_varint(size)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _skip(data: bytes, tag: int, at: int) -> int:
    """Return where the field ends whose content begins at `at`."""
    match tag & 7:
        case 0:
            _, end = _varint(data, at)
        case 1:
            end = at + 8
        case 2:
            size, start = _varint(data, at)
            end = start + size
        case 5:
            end = at + 4
        case _:
            raise TruncatedError  # groups: no Flower message has one
    if end > len(data) or not tag >> 3:
        raise TruncatedError
    return end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if at >= len(data):
            raise TruncatedError
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise TruncatedError
