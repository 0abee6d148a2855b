from __future__ import annotations

import struct

import pytest

from relay.wires.http2 import Code, Http2Error, Setting
from relay.wires.http2_wants import Wants


def said(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack(">HL", *pair) for pair in pairs)


def test_a_client_that_says_nothing_has_what_the_rfc_gives_it() -> None:
    wants = Wants()
    assert (wants.window, wants.frame) == (65_535, 16_384)
    assert wants.take(b"") == 0


@pytest.mark.parametrize(("window", "more"), [(65_535, 0), (0, -65_535), (2**31 - 1, 2**31 - 1 - 65_535)])
def test_a_window_is_told_by_how_much_it_has_grown(window: int, more: int) -> None:
    wants = Wants()
    assert wants.take(said((Setting.INITIAL_WINDOW_SIZE, window))) == more
    assert wants.window == window


def test_of_what_is_said_twice_the_last_counts() -> None:
    wants = Wants()
    sizes = [(Setting.INITIAL_WINDOW_SIZE, 1), (Setting.INITIAL_WINDOW_SIZE, 65_537)]
    assert wants.take(said(*sizes, (Setting.MAX_FRAME_SIZE, 2**24 - 1))) == 2
    assert (wants.window, wants.frame) == (65_537, 2**24 - 1)


def test_what_is_unknown_or_nothing_to_us_is_passed_over() -> None:
    wants = Wants()
    assert wants.take(said((0x99, 7), (Setting.ENABLE_PUSH, 1), (Setting.MAX_CONCURRENT_STREAMS, 0))) == 0


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (said((Setting.INITIAL_WINDOW_SIZE, 2**31)), Code.FLOW_CONTROL_ERROR),
        (said((Setting.MAX_FRAME_SIZE, 16_383)), Code.PROTOCOL_ERROR),
        (said((Setting.MAX_FRAME_SIZE, 2**24)), Code.PROTOCOL_ERROR),
        (said((Setting.ENABLE_PUSH, 2)), Code.PROTOCOL_ERROR),
        (said((Setting.ENABLE_PUSH, 1))[:-1], Code.FRAME_SIZE_ERROR),
    ],
)
def test_what_the_rfc_forbids_ends_the_connection(payload: bytes, code: Code) -> None:
    with pytest.raises(Http2Error) as caught:
        Wants().take(payload)
    assert caught.value.code is code
