"""One HTTP/2 connection, frame by frame."""

from __future__ import annotations

import asyncio
import struct
import time

import pytest

from drills.http2 import frame
from relay.limits import Pace
from relay.refusal import NodeGone
from relay.wires import http2
from relay.wires.http2 import Code
from relay.wires.http2_stream import AHEAD, UNASKED
from relay.wires.http2_wants import STREAMS, WINDOW
from tests.http2_ends import (
    ASKS,
    GREETING,
    HEAD,
    KNOWN,
    PREFACE,
    TRAILERS,
    Client,
    Server,
    asks,
    block,
    data_of,
    reset,
    settings,
    window,
)

NO_PACE = Pace(0, 1.0)


def data(number: int, body: bytes = b"", *, ended: bool = False) -> bytes:
    return frame(http2.DATA, http2.END_STREAM if ended else 0, number, body)


async def test_the_server_says_what_is_welcome_before_it_is_asked() -> None:
    client = Client(greets=False)
    first, second = client.got()
    said = dict(http2.read_settings(first.payload))
    assert first.kind == http2.SETTINGS
    assert said[http2.Setting.MAX_CONCURRENT_STREAMS] == STREAMS
    assert said[http2.Setting.INITIAL_WINDOW_SIZE] == UNASKED
    assert (second.kind, second.stream) == (http2.WINDOW_UPDATE, 0)
    assert int.from_bytes(second.payload) == WINDOW - 65_535


async def test_a_call_comes_and_is_answered() -> None:
    client = Client()
    stream = client.ask(body=b"question")
    assert (stream.asked.method, stream.asked.path) == (b"POST", b"/flwr.proto.Fleet/PullMessages")
    assert await stream.read() == b"question"
    assert await stream.read() == b""
    assert stream.answer(HEAD, b"answer", TRAILERS)
    head, body, trailers = client.got()
    assert (head.kind, head.flags, head.stream, head.payload) == (http2.HEADERS, http2.END_HEADERS, 1, HEAD)
    assert (body.kind, body.flags, body.payload) == (http2.DATA, 0, b"answer")
    assert (trailers.kind, trailers.flags) == (http2.HEADERS, http2.END_HEADERS | http2.END_STREAM)
    assert client.is_done()


async def test_every_split_of_a_conversation_comes_to_the_same() -> None:
    padded = frame(http2.DATA, http2.PADDED | http2.END_STREAM, 1, b"\x03" + b"body" + bytes(3))
    first = frame(http2.HEADERS, 0, 1, block(ASKS[:2]))
    rest = frame(http2.CONTINUATION, http2.END_HEADERS, 1, block(ASKS[2:]))
    whole = GREETING + first + rest + data(1, b"some") + padded + frame(http2.PING, 0, 0, b"12345678")
    for at in range(1, len(whole)):
        client = Client(greets=False)
        client.got()
        client.send(whole[:at])
        client.send(whole[at:])
        assert client.last.at_hand() == b"somebody", at
        assert client.last.ended
        assert client.kinds() == [http2.SETTINGS, http2.PING], at
    client = Client(greets=False)
    client.got()
    for at in range(len(whole)):
        client.send(whole[at : at + 1])
    assert client.last.at_hand() == b"somebody"
    assert client.kinds() == [http2.SETTINGS, http2.PING]


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"P" * 30, b"\x16\x03\x01", PREFACE[:-1] + b"x"])
async def test_what_is_no_http2_is_reset_without_a_word(start: bytes) -> None:
    client = Client(greets=False)
    client.got()
    client.send(start)
    assert client.is_cut()
    assert client.got() == []
    assert client.server.strays == ["dropped"]


MALFORMED = {
    "no settings first": (Code.PROTOCOL_ERROR, PREFACE + frame(http2.PING, 0, 0, bytes(8))),
    "an acknowledgement first": (Code.PROTOCOL_ERROR, PREFACE + frame(http2.SETTINGS, http2.ACK, 0)),
}
FAULTS = {
    "data of no stream": (Code.PROTOCOL_ERROR, data(0, b"x")),
    "data of a stream to come": (Code.PROTOCOL_ERROR, data(9, b"x")),
    "data, more padding than payload": (Code.PROTOCOL_ERROR, frame(http2.DATA, http2.PADDED, 1, b"\x05x")),
    "data of more than a frame": (Code.FRAME_SIZE_ERROR, struct.pack(">BHBBL", 0x10, 1, 0, 0, 1)),
    "a head with an even number": (Code.PROTOCOL_ERROR, asks(2)),
    "a head of no stream": (Code.PROTOCOL_ERROR, asks(0)),
    "a head without its priority": (
        Code.FRAME_SIZE_ERROR,
        frame(http2.HEADERS, http2.PRIORITIZED | http2.END_HEADERS, 3, b"123"),
    ),
    "a head that depends on itself": (
        Code.PROTOCOL_ERROR,
        frame(http2.HEADERS, http2.PRIORITIZED | http2.END_HEADERS, 3, b"\0\0\0\x03\0"),
    ),
    "a head, more padding than payload": (
        Code.PROTOCOL_ERROR,
        frame(http2.HEADERS, http2.PADDED | http2.END_HEADERS, 3, b"\x09x"),
    ),
    "a broken block": (Code.COMPRESSION_ERROR, frame(http2.HEADERS, http2.END_HEADERS, 3, b"\xff\xff")),
    "a continuation of nothing": (Code.PROTOCOL_ERROR, frame(http2.CONTINUATION, 0, 1, b"x")),
    "a frame within a head": (
        Code.PROTOCOL_ERROR,
        frame(http2.HEADERS, 0, 3, b"\x82") + frame(http2.PING, 0, 0, bytes(8)),
    ),
    "data within a head": (Code.PROTOCOL_ERROR, frame(http2.HEADERS, 0, 3, b"\x82") + data(1, b"x")),
    "a continuation of another head": (
        Code.PROTOCOL_ERROR,
        frame(http2.HEADERS, 0, 3, b"\x82") + frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"\x84"),
    ),
    "a priority of no stream": (Code.PROTOCOL_ERROR, frame(http2.PRIORITY, 0, 0, bytes(5))),
    "a short priority": (Code.FRAME_SIZE_ERROR, frame(http2.PRIORITY, 0, 1, bytes(4))),
    "a reset of no stream": (Code.PROTOCOL_ERROR, reset(0)),
    "a reset of a stream to come": (Code.PROTOCOL_ERROR, reset(9)),
    "a short reset": (Code.FRAME_SIZE_ERROR, frame(http2.RST_STREAM, 0, 1, b"123")),
    "settings of a stream": (Code.PROTOCOL_ERROR, frame(http2.SETTINGS, 0, 1)),
    "cut settings": (Code.FRAME_SIZE_ERROR, frame(http2.SETTINGS, 0, 0, b"12345")),
    "an acknowledgement with settings": (
        Code.FRAME_SIZE_ERROR,
        frame(http2.SETTINGS, http2.ACK, 0, bytes(6)),
    ),
    "a push setting of 2": (Code.PROTOCOL_ERROR, settings(enable_push=2)),
    "a window setting too large": (Code.FLOW_CONTROL_ERROR, settings(initial_window_size=2**31)),
    "a frame setting too small": (Code.PROTOCOL_ERROR, settings(max_frame_size=16_383)),
    "a frame setting too large": (Code.PROTOCOL_ERROR, settings(max_frame_size=2**24)),
    "a push": (Code.PROTOCOL_ERROR, frame(http2.PUSH_PROMISE, http2.END_HEADERS, 1, b"\0\0\0\x02\x82")),
    "a ping of a stream": (Code.PROTOCOL_ERROR, frame(http2.PING, 0, 1, bytes(8))),
    "a short ping": (Code.FRAME_SIZE_ERROR, frame(http2.PING, 0, 0, bytes(7))),
    "a goaway of a stream": (Code.PROTOCOL_ERROR, frame(http2.GOAWAY, 0, 1, bytes(8))),
    "a window that opens by 0": (Code.PROTOCOL_ERROR, window(0, 0)),
    "a window beyond all bounds": (Code.FLOW_CONTROL_ERROR, window(0, 2**31 - 1)),
    "a window of a stream to come": (Code.PROTOCOL_ERROR, window(9, 1)),
    "a short window": (Code.FRAME_SIZE_ERROR, frame(http2.WINDOW_UPDATE, 0, 0, b"123")),
    "a frame that is too long": (
        Code.FRAME_SIZE_ERROR,
        struct.pack(">HBBBL", 64, 1, http2.SETTINGS, 0, 0),
    ),
    "a head that is too long for a frame": (
        Code.FRAME_SIZE_ERROR,
        struct.pack(">BHBBL", 0x10, 1, http2.HEADERS, 0, 3),
    ),
}


@pytest.mark.parametrize(("code", "sent"), FAULTS.values(), ids=FAULTS)
async def test_a_fault_of_the_connection_ends_it_and_says_why(code: Code, sent: bytes) -> None:
    client = Client()
    stream = client.ask(ended=False)
    gone = []
    stream.on_gone = lambda: gone.append(True)
    client.send(sent)
    assert client.goaway() == (1, code) or client.connection.highest == 3
    assert client.is_closed()
    assert not client.is_cut()
    assert gone == [True]
    assert stream.gone
    assert client.is_done()
    client.send(asks(5))
    assert len(client.begun) == 1
    assert client.server.strays == ["dropped"]


@pytest.mark.parametrize(("code", "sent"), MALFORMED.values(), ids=MALFORMED)
async def test_a_client_begins_with_its_settings(code: Code, sent: bytes) -> None:
    client = Client(greets=False)
    client.send(sent)
    assert client.goaway() == (0, code)


async def test_a_fault_takes_the_calls_with_it_that_came_in_the_same_breath() -> None:
    client = Client()
    client.send(asks(1), frame(http2.PING, 0, 1, bytes(8)))
    assert client.begun == []
    assert client.is_done()


# -- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        ((b"Upper", b"x"),),
        ((b":late", b"x"),),
        ((b"connection", b"close"),),
        ((b"te", b"gzip"),),
        ((b"x", b"a\nb"),),
        ((b"content-length", b"x"),),
        ((b"content-length", b"1"), (b"content-length", b"1")),
    ],
)
async def test_a_head_that_is_not_sound_ends_its_stream_alone(
    fields: tuple[tuple[bytes, bytes], ...],
) -> None:
    client = Client()
    client.send(asks(1, *fields, ended=False))
    assert client.resets() == [(1, Code.PROTOCOL_ERROR)]
    client.ask(3)
    assert [stream.number for stream in client.begun] == [3]


async def test_a_body_must_be_as_long_as_its_head_says() -> None:
    for body, said, sound in ((b"1234", b"4", True), (b"123", b"4", False), (b"12345", b"4", False)):
        client = Client()
        stream = client.ask(1, (b"content-length", said), body=body)
        assert client.resets() == ([] if sound else [(1, Code.PROTOCOL_ERROR)])
        assert stream.gone is not sound
    client = Client()
    client.send(asks(1, (b"content-length", b"4")))
    assert client.resets() == [(1, Code.PROTOCOL_ERROR)]
    assert client.begun == []


async def test_trailers_end_a_body() -> None:
    client = Client()
    stream = client.ask(body=b"body", ended=False)
    client.send(frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, block([(b"x-end", b"1")])))
    assert stream.ended
    assert client.got() == []
    assert (await stream.read(), await stream.read()) == (b"body", b"")


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        (http2.END_HEADERS, [(b"x-end", b"1")]),
        (http2.END_HEADERS | http2.END_STREAM, [(b":path", b"1")]),
    ],
)
async def test_trailers_that_are_none_end_the_stream(flags: int, fields: list[tuple[bytes, bytes]]) -> None:
    client = Client()
    stream = client.ask(ended=False)
    client.send(frame(http2.HEADERS, flags, 1, block(fields)))
    assert client.resets() == [(1, Code.PROTOCOL_ERROR)]
    assert stream.gone
    assert client.is_done()


async def test_nothing_follows_the_end_of_a_request() -> None:
    for more in (data(1, b"x"), asks(1)):
        client = Client()
        stream = client.ask()
        client.send(more)
        assert client.resets() == [(1, Code.STREAM_CLOSED)]
        assert stream.gone
        assert client.is_done()


async def test_what_is_still_on_its_way_to_an_answered_call_harms_nobody() -> None:
    client = Client()
    stream = client.ask(ended=False)
    assert stream.answer(HEAD, b"", TRAILERS)
    assert client.resets() == [(1, Code.NO_ERROR)]
    client.send(data(1, b"x" * 1000), window(1, 5), reset(1), data(1, ended=True))
    assert client.got() == []
    client.ask(3)
    assert client.last.number == 3


async def test_a_reset_ends_a_call_in_any_state() -> None:
    client = Client()
    client.send(asks(1), reset(1))  # before it has begun
    assert client.begun == []
    stream = client.ask(3, ended=False)  # while its body comes
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0)
    client.send(reset(3))
    with pytest.raises(NodeGone):
        await reading
    stream = client.ask(5)  # while its answer goes
    sending = asyncio.ensure_future(stream.send(bytes(100_000), pace=NO_PACE, idle_timeout=20))
    await asyncio.sleep(0)
    client.send(reset(5))
    with pytest.raises(NodeGone):
        await sending
    client.send(reset(5))  # after it
    assert client.resets() == []
    assert client.is_done()


async def test_a_stream_that_was_reset_within_a_data_frame_takes_no_harm_from_its_rest() -> None:
    client = Client()
    client.ask(1, ended=False)
    whole = data(1, b"0123456789", ended=True)
    client.send(whole[:12])
    client.last.reset(Code.REFUSED_STREAM)
    client.send(whole[12:], asks(3))
    assert client.resets() == [(1, Code.REFUSED_STREAM)]
    assert [stream.number for stream in client.begun] == [1, 3]


async def test_more_calls_than_were_agreed_are_refused() -> None:
    client = Client()
    client.send(*(asks(2 * at + 1) for at in range(STREAMS + 2)))
    assert len(client.begun) == STREAMS
    assert client.resets() == [(2 * STREAMS + at, Code.REFUSED_STREAM) for at in (1, 3)]
    client.begun[0].answer(HEAD, b"", TRAILERS)
    client.ask(2 * STREAMS + 5)
    assert len(client.begun) == STREAMS + 1
    assert not client.is_closed()


async def test_a_lost_connection_ends_all_its_calls() -> None:
    client = Client()
    reading = asyncio.ensure_future(client.ask(1, ended=False).read())
    sending = asyncio.ensure_future(client.ask(3).send(bytes(100_000), pace=NO_PACE, idle_timeout=20))
    gone = []
    client.ask(5).on_gone = lambda: gone.append(5)
    await asyncio.sleep(0)
    assert client.server.connections == {client.connection}
    client.lose()
    for task in (reading, sending):
        with pytest.raises(NodeGone):
            await task
    assert gone == [5]
    assert client.is_done()
    assert client.server.connections == set()


# -- windows ----------------------------------------------------------------------------------------


async def test_a_stream_that_nobody_reads_takes_little() -> None:
    client = Client()
    stream = client.ask(1, ended=False)
    client.send(data(1, bytes(UNASKED)))
    assert client.got() == []
    client.send(data(1, b"x"))
    assert client.resets() == [(1, Code.FLOW_CONTROL_ERROR)]
    assert stream.gone


async def test_who_does_not_know_our_settings_yet_may_send_what_holds_without_any() -> None:
    client = Client(greets=False)
    client.send(GREETING)
    stream = client.ask(1, body=bytes(65_535), ended=False)
    assert client.resets() == []
    client.send(KNOWN, data(1))  # 49151 below zero, where nothing is still something
    assert client.resets() == []
    client.send(KNOWN)  # it knows already
    reading = asyncio.ensure_future(stream.read())
    assert len(await reading) == 65_535
    more = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0)
    opened = [int.from_bytes(one.payload) for one in client.got() if one.kind == http2.WINDOW_UPDATE]
    assert sum(opened) == 65_535 + AHEAD - UNASKED
    client.send(data(1, bytes(AHEAD)))
    assert client.resets() == []
    assert len(await more) == AHEAD
    client.ask(3, body=bytes(UNASKED + 1), ended=False)
    assert client.resets() == [(3, Code.FLOW_CONTROL_ERROR)]
    early = Client(greets=False)
    early.send(GREETING)
    early.ask(1, body=bytes(65_536), ended=False)
    assert early.resets() == [(1, Code.FLOW_CONTROL_ERROR)]


async def test_the_connections_window_opens_whoever_reads() -> None:
    client = Client()
    for number in range(1, 2 * WINDOW // UNASKED, 2):
        client.send(asks(number, ended=False), data(number, bytes(UNASKED)))
        client.last.reset(Code.REFUSED_STREAM)
    opened = [int.from_bytes(one.payload) for one in client.got() if one.kind == http2.WINDOW_UPDATE]
    assert opened == [WINDOW // 2] * 2


async def test_more_than_the_connections_window_ends_it() -> None:
    client = Client()
    client.connection._window = 10
    client.ask(1, ended=False)
    client.send(data(1, bytes(11)))
    assert client.goaway() == (1, Code.FLOW_CONTROL_ERROR)


async def test_padding_counts_and_its_window_is_given_back() -> None:
    client = Client()
    stream = client.ask(1, ended=False)
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0)
    client.got()
    padded = frame(http2.DATA, http2.PADDED, 1, b"\xff" + b"x" + bytes(255))
    for _ in range(2100):  # 524 KiB of padding: no data, and yet the window opens
        client.send(padded)
    assert await reading + stream.at_hand() == b"x" * 2100
    opened = [(one.stream, int.from_bytes(one.payload)) for one in client.got()]
    assert [number for number, _ in opened] == [1]
    assert opened[0][1] >= 512 * 1024


async def test_settings_change_the_windows_of_answers_that_are_under_way() -> None:
    client = Client()
    client.send(settings(initial_window_size=10))
    stream = client.ask()
    sending = asyncio.ensure_future(stream.send(b"0123456789abcdefghij", pace=NO_PACE, idle_timeout=20))
    await asyncio.sleep(0)
    assert data_of(client.got()) == b"0123456789"
    client.send(settings(initial_window_size=3))  # 7 below zero
    client.send(window(1, 7))
    await asyncio.sleep(0)
    assert data_of(client.got()) == b""
    client.send(window(1, 1))
    await asyncio.sleep(0.001)
    assert data_of(client.got()) == b"a"
    client.send(settings(initial_window_size=100))
    await sending
    assert data_of(client.got()) == b"bcdefghij"


async def test_settings_that_overflow_a_window_end_the_connection() -> None:
    client = Client()
    client.ask()
    client.send(window(1, 2**31 - 1 - 65_535), settings(initial_window_size=65_536))
    assert client.goaway() == (1, Code.FLOW_CONTROL_ERROR)


async def test_a_window_that_overflows_ends_its_stream() -> None:
    for more, code in ((2**31 - 1, Code.FLOW_CONTROL_ERROR), (0, Code.PROTOCOL_ERROR)):
        client = Client()
        client.ask()
        client.send(window(1, more))
        assert client.resets() == [(1, code)]
        assert not client.is_closed()


async def test_a_client_that_wants_a_smaller_table_is_told_so_once() -> None:
    for answered in ("whole", "head"):
        client = Client()
        client.send(settings(header_table_size=0))
        client.got()
        for number in (1, 3):
            stream = client.ask(number)
            if answered == "whole":
                stream.answer(HEAD, b"", TRAILERS)
            else:
                stream.head(HEAD, last=True)
        first, *_, later = (one for one in client.got() if one.kind == http2.HEADERS)
        assert first.payload == b"\x20" + HEAD
        assert later.payload in {HEAD, TRAILERS}


# -- control ----------------------------------------------------------------------------------------


async def test_settings_and_pings_are_answered_and_what_is_unknown_is_ignored() -> None:
    client = Client()
    client.send(settings(max_frame_size=20_000), frame(http2.PING, 0, 0, b"12345678"))
    client.send(frame(0x42, 0xFF, 77, b"?"), frame(http2.SETTINGS, 0, 0, b"\x00\x99" + bytes(4)))
    first, second, third = client.got()
    assert (first.kind, first.flags, first.payload) == (http2.SETTINGS, http2.ACK, b"")
    assert (second.kind, second.flags, second.payload) == (http2.PING, http2.ACK, b"12345678")
    assert third.kind == http2.SETTINGS
    client.send(frame(http2.GOAWAY, 0, 0, bytes(8)), frame(http2.SETTINGS, http2.ACK, 0))
    client.send(frame(http2.PING, http2.ACK, 0, b"whatever"), frame(http2.PRIORITY, 0, 1, bytes(5)))
    assert client.got() == []
    assert not client.is_closed()


async def test_a_head_may_be_as_long_as_announced_in_one_frame() -> None:
    client = Client()
    long = client.ask(1, (b"x-long", b"x" * 30_000))
    assert long.asked.size > 30_000


async def test_a_head_without_an_end_resets_the_connection() -> None:
    for parts in (
        [frame(http2.HEADERS, 0, 1, b"\0" * 16_000)] + [frame(http2.CONTINUATION, 0, 1, bytes(16_000))] * 4,
        [frame(http2.HEADERS, 0, 1, b"\x82"), frame(http2.CONTINUATION, 0, 1)],
        [struct.pack(">BHBBL", 1, 1, http2.HEADERS, 0, 1)],
    ):
        client = Client()
        client.send(*parts)
        assert client.is_cut()
        assert client.got() == []


async def test_a_client_that_asks_for_much_that_is_nothing_is_reset() -> None:
    floods = {
        "settings": frame(http2.SETTINGS, 0, 0),
        "pings": frame(http2.PING, 0, 0, bytes(8)),
        "priorities": frame(http2.PRIORITY, 0, 1, bytes(5)),
        "empty data": data(1),
        "padding": frame(http2.DATA, http2.PADDED, 1, b"\0"),
        "small windows": window(0, 1),
        "unknown": frame(0x42, 0, 0),
        "resets of what is over": reset(1),
        "windows of what is over": window(1, 1000),
        "trailers of what is over": asks(1),
        "little data of what is over": data(1, b"x"),
    }
    for name, one in floods.items():
        client = Client()
        stream = client.ask(1, ended=False)
        if "over" in name:
            stream.reset(Code.REFUSED_STREAM)
        written = 0
        for _ in range(3500):
            client.send(one)
            written += sum(map(len, client.pipe.written))
            client.pipe.written.clear()
            if client.is_cut():
                break
        assert client.is_cut(), name
        assert written < 64 * 1024, name
        assert client.is_done()


async def test_calls_that_are_begun_and_reset_end_the_connection_but_answered_ones_pay_for_some() -> None:
    client = Client()
    for at in range(4000):
        client.send(asks(2 * at + 1), reset(2 * at + 1))
        if client.is_cut():
            break
    assert client.is_cut()
    assert client.begun == []
    client = Client()
    client.connection._allowance = 20
    for at in range(0, 200, 2):
        client.ask(2 * at + 1)
        client.send(reset(2 * at + 1))
        client.ask(2 * at + 3).answer(HEAD, b"", TRAILERS)
    assert not client.is_closed()


async def test_the_allowance_comes_back_with_time() -> None:
    client = Client()
    now = time.monotonic()
    for second in range(20):
        for _ in range(100):
            client.send(frame(http2.PING, 0, 0, bytes(8)))
        client.connection.tick(now + second)
    assert not client.is_closed()


# -- its end ----------------------------------------------------------------------------------------


async def test_a_connection_leaves_when_it_is_old_or_idle() -> None:
    now = time.monotonic()
    old, idle = Client(age=30.0), Client(keepalive=30.0)
    old.ask(1)
    for client in (old, idle):
        client.connection.tick(now + 25)
        assert client.got() == []
        client.connection.tick(now + 35)
        assert client.kinds() == [http2.GOAWAY, http2.PING]
    busy = Client(keepalive=30.0)
    busy.ask(1)
    busy.connection.tick(now + 35)
    assert busy.got() == []


async def test_a_client_that_says_nothing_or_stops_within_a_head_is_cut() -> None:
    now = time.monotonic()
    for sent in (
        b"",
        PREFACE[:10],
        PREFACE,
        GREETING,
        GREETING + KNOWN + frame(http2.HEADERS, 0, 1, b"\x82"),
        GREETING + KNOWN + asks(1)[:-1],
        GREETING + KNOWN + frame(http2.PING, 0, 0, bytes(8))[:5],
    ):
        client = Client(greets=False)
        if sent:
            client.send(sent)
        client.connection.tick(now + 19)
        assert not client.is_closed()
        client.connection.tick(now + 21)
        assert client.is_cut(), sent
    client = Client()
    client.ask(1, body=b"x", ended=False)
    client.send(data(1, bytes(100))[:50])  # who is slow with data is none of the connection's business
    client.connection.tick(now + 25)
    assert not client.is_closed()


async def test_of_too_many_connections_the_calls_are_refused_and_far_too_many_are_reset() -> None:
    server = Server(connections=2)
    clients = [Client(server, greets=False) for _ in range(5)]
    assert [client.connection.excess is not None for client in clients] == [False, False, True, True, True]
    assert [client.is_cut() for client in clients] == [False, False, False, False, True]


async def test_over_tls_what_is_written_together_goes_out_as_one() -> None:
    for tls, writes in ((True, 1), (False, 2)):
        client = Client(tls=tls)
        stream = client.ask()
        await stream.send(b"abc", pace=NO_PACE, idle_timeout=20)
        assert len(client.pipe.written) == writes
        assert data_of(client.got()) == b"abc"
