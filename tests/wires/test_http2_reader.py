"""Frames out of bytes, however these are cut."""

from __future__ import annotations

import random
import struct
import time

import pytest

from drills.http2 import frame
from relay.wires import http2
from relay.wires.http2 import Code, Http2Error
from relay.wires.http2_reader import MOST_FRAME, Reader

MOST_HEAD = 50_000
PREFACE = http2.PREFACE
START = PREFACE + frame(http2.SETTINGS, 0, 0)


class Notes:
    """Notes what comes, data as one."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def data_begins(self, number: int, size: int, padding: int) -> None:
        self.events.append(("begins", number, size, padding, b""))

    def data(self, piece: bytes) -> None:
        assert len(piece)
        *begun, before = self.events[-1]
        self.events[-1] = (*begun, bytes(before) + bytes(piece))  # type: ignore[call-overload]

    def data_ends(self, *, last: bool) -> None:
        self.events.append(("ends", last))

    def head(self, number: int, block: bytes, *, ended: bool) -> None:
        self.events.append(("head", number, block, ended))

    def frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        self.events.append(("frame", kind, flags, number, payload))


def read(*pieces: bytes) -> list[tuple[object, ...]]:
    """Return what comes of these pieces, behind the start of a connection."""
    notes = Notes()
    reader = Reader(notes, MOST_HEAD)
    reader.take(START)
    notes.events.clear()
    for piece in pieces:
        reader.take(piece)
    return notes.events


def fails(*pieces: bytes) -> Code:
    """Return why these pieces are not read."""
    with pytest.raises(Http2Error) as caught:
        read(*pieces)
    return caught.value.code


def begun(reader: Reader) -> float | None:
    """Return since when a head, or a frame, is coming."""
    return reader.head_since


CONVERSATION = b"".join(
    (
        frame(http2.HEADERS, http2.PADDED | http2.PRIORITIZED, 1, b"\x02\0\0\0\x09\x10begin.."),
        frame(http2.CONTINUATION, 0, 1, b"middle"),
        frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"end"),
        frame(http2.DATA, 0, 1, b"plain"),
        frame(http2.DATA, http2.PADDED, 1, b"\x04dataPPPP"),
        frame(http2.DATA, http2.PADDED, 1, b"\x03PPP"),
        frame(http2.DATA, http2.PADDED, 1, b"\x00x"),
        frame(http2.DATA, 0, 1),
        frame(http2.WINDOW_UPDATE, 0, 0x80000001, b"1234"),
        frame(http2.DATA, http2.END_STREAM | http2.PADDED, 1, b"\0"),
        frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 3),
    )
)
EVENTS = [
    ("head", 1, b"beginmiddleend", False),
    ("begins", 1, 5, 0, b"plain"),
    ("ends", False),
    ("begins", 1, 9, 5, b"data"),
    ("ends", False),
    ("begins", 1, 4, 4, b""),
    ("ends", False),
    ("begins", 1, 2, 1, b"x"),
    ("ends", False),
    ("begins", 1, 0, 0, b""),
    ("ends", False),
    ("frame", http2.WINDOW_UPDATE, 0, 1, b"1234"),
    ("begins", 1, 1, 1, b""),
    ("ends", True),
    ("head", 3, b"", True),
]


def test_frames_come_as_they_were_sent() -> None:
    assert read(CONVERSATION) == EVENTS


def test_they_do_whatever_pieces_they_come_in() -> None:
    for at in range(len(CONVERSATION)):
        assert read(CONVERSATION[:at], CONVERSATION[at:]) == EVENTS, at
    assert read(*(CONVERSATION[at : at + 1] for at in range(len(CONVERSATION)))) == EVENTS
    order = random.Random(1)
    for _ in range(200):
        cuts = sorted(order.sample(range(len(CONVERSATION)), 8))
        pieces = [CONVERSATION[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert read(*pieces) == EVENTS, cuts


def test_data_is_passed_on_as_it_comes_also_long_data_between_others() -> None:
    long = bytes(range(256)) * 40
    padded = frame(http2.DATA, http2.PADDED, 1, b"\xff" + long + bytes(255))
    rest = frame(http2.DATA, http2.END_STREAM, 1, b"x")
    events = [
        ("begins", 1, len(long) + 256, 256, long),
        ("ends", False),
        ("begins", 1, 1, 0, b"x"),
        ("ends", True),
    ]
    for at in (1, 5000, 9 + 1 + len(long), 9 + 1 + len(long) + 100, len(padded), len(padded) + 4):
        assert read((padded + rest)[:at], (padded + rest)[at:]) == events
    notes = Notes()
    reader = Reader(notes, MOST_HEAD)
    reader.take(START + padded[:100])
    assert notes.events[-1] == ("begins", 1, len(long) + 256, 256, long[:90])


def test_a_client_must_begin_with_the_preface_and_its_settings() -> None:
    for wrong in (b"X", b"PRI * HTTP/1.1", PREFACE[:-1] + b"X"):
        with pytest.raises(Http2Error):
            Reader(Notes(), MOST_HEAD).take(wrong)
    for first in (
        frame(http2.SETTINGS, http2.ACK, 0),
        frame(http2.PING, 0, 0, bytes(8)),
        frame(http2.DATA, 0, 1),
        frame(http2.HEADERS, http2.END_HEADERS, 1),
    ):
        with pytest.raises(Http2Error):
            Reader(Notes(), MOST_HEAD).take(PREFACE + first)


def test_it_is_known_when_a_client_has_greeted() -> None:
    reader = Reader(Notes(), MOST_HEAD)
    found = []
    for piece in (*(bytes((byte,)) for byte in PREFACE), frame(http2.SETTINGS, 0, 0)):
        reader.take(piece)
        found.append((reader.is_http2, reader.greeted))
    assert found == [*[(False, False)] * (len(PREFACE) - 1), (True, False), (True, True)]


def test_it_is_known_since_when_a_head_or_a_frame_is_coming() -> None:
    reader = Reader(Notes(), MOST_HEAD)
    reader.take(START)
    assert begun(reader) is None
    before = time.monotonic()
    reader.take(frame(http2.HEADERS, 0, 1, b"\x82"))
    since = begun(reader)
    assert since is not None
    assert before <= since <= time.monotonic()
    reader.take(frame(http2.CONTINUATION, 0, 1, b"\x82"))
    assert begun(reader) == since
    reader.take(frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"\x82"))
    assert begun(reader) is None
    ping = frame(http2.PING, 0, 0, bytes(8))
    reader.take(ping[:4])
    since = begun(reader)
    assert since is not None
    reader.take(ping[4:10])
    assert begun(reader) == since
    reader.take(ping[10:] + frame(http2.DATA, 0, 1, b"data")[:10])
    assert begun(reader) is None  # data may take its time
    reader.take(b"ata" + ping[:4])
    assert (begun(reader) or 0.0) > since


def test_a_head_has_a_limit_in_one_frame_and_in_many() -> None:
    most = bytes(MOST_HEAD)
    assert read(frame(http2.HEADERS, http2.END_HEADERS, 1, most)) == [("head", 1, most, False)]
    begin = frame(http2.HEADERS, 0, 1, most[:-2])
    assert read(begin + frame(http2.CONTINUATION, http2.END_HEADERS, 1, bytes(2))) == [
        ("head", 1, most, False)
    ]
    too_long = struct.pack(">BHBBL", 0, MOST_HEAD + 1, http2.HEADERS, 0, 1)
    assert fails(too_long) is Code.ENHANCE_YOUR_CALM  # before it is here
    assert fails(begin + frame(http2.CONTINUATION, 0, 1, bytes(3))) is Code.ENHANCE_YOUR_CALM
    assert fails(begin + frame(http2.CONTINUATION, 0, 1)) is Code.ENHANCE_YOUR_CALM


def test_frames_have_limits() -> None:
    def begins(size: int, kind: int) -> bytes:
        return struct.pack(">BHBBL", size >> 16, size & 0xFFFF, kind, 0, 1)

    assert read(begins(MOST_FRAME, http2.DATA)) == [("begins", 1, MOST_FRAME, 0, b"")]
    for kind in (http2.DATA, http2.HEADERS):
        assert fails(begins(MOST_FRAME + 1, kind)) is Code.FRAME_SIZE_ERROR
    for kind in (http2.SETTINGS, http2.GOAWAY, 0x42):
        assert read(begins(http2.FIRST_FRAME, kind)) == []
        assert fails(begins(http2.FIRST_FRAME + 1, kind)) is Code.FRAME_SIZE_ERROR


def test_more_padding_than_payload_is_an_error() -> None:
    for payload in (b"\x01", b"\x05abcd"):
        assert fails(frame(http2.DATA, http2.PADDED, 1, payload)) is Code.PROTOCOL_ERROR
    assert fails(frame(http2.DATA, http2.PADDED, 1) + b"\0") is Code.PROTOCOL_ERROR
