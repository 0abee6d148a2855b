"""Frames as bytes."""

from __future__ import annotations

import pytest

from relay.wires import http2
from relay.wires.http2 import Code, Http2Error, Setting


def test_a_frame_is_its_length_type_flags_stream_and_payload() -> None:
    assert http2.frame(http2.PING, http2.ACK, 0, b"12345678") == b"\0\0\x08\x06\x01\0\0\0\x0012345678"
    assert http2.frame(http2.DATA, 0, 0x01020304, b"x" * 0x0102)[:9] == b"\0\x01\x02\0\0\x01\x02\x03\x04"


def test_the_head_of_a_long_frame_has_all_three_bytes_of_its_length() -> None:
    assert http2.head(0x010203, http2.DATA, http2.END_STREAM, 5) == b"\x01\x02\x03\0\x01\0\0\0\x05"


def test_frames_of_each_kind() -> None:
    assert http2.window_update(3, 0x7FFFFFFF) == b"\0\0\x04\x08\0\0\0\0\x03\x7f\xff\xff\xff"
    assert http2.rst_stream(3, Code.REFUSED_STREAM) == b"\0\0\x04\x03\0\0\0\0\x03\0\0\0\x07"
    assert http2.goaway(5, Code.NO_ERROR, b"why") == b"\0\0\x0b\x07\0\0\0\0\0\0\0\0\x05\0\0\0\0why"
    assert http2.settings({Setting.MAX_FRAME_SIZE: 16_384}) == b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0"


def test_settings_are_read_in_their_order_also_those_that_nobody_knows() -> None:
    payload = b"\0\x04\0\0\0\x01" + b"\x99\x99\xff\xff\xff\xff" + b"\0\x04\0\0\0\x02"
    assert http2.read_settings(payload) == [(4, 1), (0x9999, 0xFFFFFFFF), (4, 2)]
    assert http2.read_settings(b"") == []


def test_half_a_setting_is_an_error() -> None:
    with pytest.raises(Http2Error) as caught:
        http2.read_settings(bytes(7))
    assert caught.value.code is Code.FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    ("payload", "plain"), [(b"\0abc", b"abc"), (b"\x03abc\0\0\0", b"abc"), (b"\x02xx", b"")]
)
def test_padding_is_taken_off(payload: bytes, plain: bytes) -> None:
    assert http2.unpadded(http2.PADDED, payload) == plain
    assert http2.unpadded(0, payload) == payload


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x04abc"])
def test_padding_beyond_the_payload_is_an_error(payload: bytes) -> None:
    with pytest.raises(Http2Error) as caught:
        http2.unpadded(http2.PADDED, payload)
    assert caught.value.code is Code.PROTOCOL_ERROR
