"""One stream: the request that comes, the answer that goes, as slowly as its node likes."""

from __future__ import annotations

import asyncio
import gc

import pytest

from drills.http2 import frame
from relay.limits import Pace
from relay.refusal import NodeGone
from relay.wires import http2
from relay.wires.http2 import Code
from relay.wires.http2_stream import AHEAD, UNASKED, Stream
from tests.http2_ends import HEAD, TRAILERS, Client, data_of, reset, settings, window

IDLE = 20.0


def no_pace() -> Pace:
    return Pace(0, 1.0)


def begin(stream: Stream, *pieces: bytes, idle: float = IDLE, pace: Pace | None = None) -> asyncio.Task[None]:
    return asyncio.ensure_future(stream.send(*pieces, pace=pace or no_pace(), idle_timeout=idle))


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# -- the request ------------------------------------------------------------------------------------


async def test_who_reads_gets_more_ahead_and_again_when_half_of_it_is_read() -> None:
    client = Client()
    stream = client.ask(1, ended=False)
    assert client.got() == []
    reading = asyncio.ensure_future(stream.read())
    await turn()
    (opened,) = client.got()
    assert (opened.kind, opened.stream) == (http2.WINDOW_UPDATE, 1)
    assert int.from_bytes(opened.payload) == AHEAD - UNASKED
    half = bytes(AHEAD // 2)
    client.send(frame(http2.DATA, 0, 1, half))
    assert await reading == half
    (opened,) = client.got()
    assert int.from_bytes(opened.payload) == AHEAD // 2
    client.send(frame(http2.DATA, http2.END_STREAM, 1, half))
    assert await stream.read() == half
    assert await stream.read() == b""
    assert client.got() == []  # nothing more may come


async def test_small_pieces_of_a_body_are_kept_together() -> None:
    client = Client()
    stream = client.ask(1, ended=False)
    for _ in range(5000):
        client.send(frame(http2.DATA, 0, 1, b"ab"))
    assert len(stream._pieces) <= 5
    assert stream.at_hand() == b"ab" * 5000
    assert b"".join([await stream.read()]) == b"ab" * 5000


async def test_large_pieces_of_a_body_are_kept_apart_and_what_is_at_hand_is_one() -> None:
    client = Client()
    stream = client.ask(1, ended=False)
    for byte in (b"a", b"b"):
        client.send(frame(http2.DATA, 0, 1, byte * 6000) + frame(http2.PING, http2.ACK, 0, bytes(8)))
    assert len(stream._pieces) == 2
    assert bytes(stream.at_hand()) == b"a" * 6000 + b"b" * 6000
    client.send(frame(http2.DATA, http2.END_STREAM | http2.PADDED, 1, b"\xf0" + b"c" * 10 + bytes(240)))
    pieces = []
    while piece := await stream.read():
        pieces.append(bytes(piece))
    assert b"".join(pieces) == b"a" * 6000 + b"b" * 6000 + b"c" * 10


async def test_what_came_before_a_node_left_can_be_read_and_no_more() -> None:
    client = Client()
    stream = client.ask(1, body=b"some", ended=False)
    client.send(reset(1))
    assert await stream.read() == b"some"
    with pytest.raises(NodeGone):
        await stream.read()


# -- the answer -------------------------------------------------------------------------------------


async def test_a_short_answer_goes_at_once_or_not_at_all() -> None:
    client = Client()
    client.send(settings(initial_window_size=10))
    client.got()
    assert not client.ask(1).answer(HEAD, bytes(11), TRAILERS)
    assert client.got() == []
    assert client.ask(3).answer(HEAD, bytes(10), TRAILERS)
    client.connection.room = 5
    assert not client.ask(5).answer(HEAD, bytes(6), TRAILERS)
    client.connection.room = 1 << 20
    client.send(settings(initial_window_size=1 << 20))
    assert not client.ask(7).answer(HEAD, bytes(http2.FIRST_FRAME + 1), TRAILERS)


@pytest.mark.parametrize("most", [16_384, 20_000, 2**24 - 1])
async def test_an_answer_larger_than_all_windows_comes_whole_in_frames_that_the_client_takes(
    most: int,
) -> None:
    client = Client()
    client.send(settings(max_frame_size=most))
    answer = bytes(range(256)) * 2000
    sending = begin(client.ask(1), answer[:7], answer[7:])
    got = b""
    while not sending.done():
        await turn()
        frames = [one for one in client.got() if one.kind == http2.DATA]
        assert all(0 < len(one.payload) <= min(most, 64 * 1024) for one in frames)
        more = data_of(frames)
        got += more
        assert len(more) <= 65_535
        if more:
            client.send(window(0, len(more)), window(1, len(more)))
    assert got == answer


async def test_an_answer_waits_for_the_stream_as_well_as_for_the_connection() -> None:
    client = Client()
    client.send(settings(initial_window_size=100_000))
    sending = begin(client.ask(1), bytes(150_000))
    await turn()
    assert len(data_of(client.got())) == 65_535  # of the connection
    client.send(window(0, 100_000))
    await turn()
    assert len(data_of(client.got())) == 100_000 - 65_535  # of the stream
    client.send(window(1, 1))
    await turn()
    assert len(data_of(client.got())) == 1
    client.send(window(1, 100_000))
    await sending


async def test_an_answer_waits_while_what_was_written_is_not_taken() -> None:
    client = Client()
    client.connection.pause_writing()
    sending = begin(client.ask(1), b"abc")
    await turn()
    assert data_of(client.got()) == b""
    client.connection.resume_writing()
    await sending
    assert data_of(client.got()) == b"abc"


async def test_those_that_wait_take_turns() -> None:
    client = Client()
    client.send(settings(initial_window_size=1 << 20), window(0, 1 << 20))
    client.connection.room = 0
    tasks = [begin(client.ask(2 * at + 1), bytes(30)) for at in range(10)]
    await turn()
    client.got()
    served = []
    for _ in range(30):
        client.send(window(0, 10))
        await turn()
        served += [one.stream for one in client.got() if one.kind == http2.DATA]
    assert served == [2 * at + 1 for at in range(10)] * 3
    await asyncio.gather(*tasks)
    assert client.is_done() or client.connection.streams  # none waits
    assert not client.connection.turns.waiting


async def test_room_that_one_does_not_need_goes_to_the_next() -> None:
    for way in ("done", "cancelled", "gone"):
        client = Client()
        client.connection.room = 0
        first, second = begin(client.ask(1), b"12345"), begin(client.ask(3), b"67890")
        await turn()
        client.got()
        client.send(window(0, 10))  # `first` may go on, and has not yet
        if way == "cancelled":
            first.cancel()
        elif way == "gone":
            client.send(reset(1))
        await asyncio.wait({first, second}, timeout=1)
        assert second.done(), way
        assert data_of(client.got(), 3) == b"67890"
        assert first.cancelled() or (first.exception() is not None) is (way == "gone")


async def test_a_stream_whose_own_window_is_shut_keeps_nobody_waiting() -> None:
    client = Client()
    client.connection.room = 0
    shut, opened = begin(client.ask(1), b"12345"), begin(client.ask(3), b"67890")
    await turn()  # both wait for the connection
    client.send(settings(initial_window_size=0), window(3, 5), window(0, 100))
    await asyncio.wait({shut, opened}, timeout=0.05)
    assert opened.done()
    assert not shut.done()
    client.send(window(1, 5))
    await asyncio.wait_for(shut, 1)


async def test_a_node_that_takes_nothing_is_given_up_and_its_connections_other_calls_live_on() -> None:
    client = Client()
    client.send(settings(initial_window_size=10))
    slow, quick = client.ask(1), client.ask(3)
    sending = begin(slow, bytes(100), idle=0.02)
    for _ in range(10):
        client.send(window(3, 1))
        await asyncio.sleep(0.004)
    with pytest.raises(NodeGone):
        await sending
    slow.reset(Code.REFUSED_STREAM)
    assert (1, Code.REFUSED_STREAM) in client.resets()
    assert quick.answer(HEAD, b"answer", TRAILERS)
    assert client.is_done()


async def test_who_waits_behind_others_is_not_given_up_while_these_get_on() -> None:
    client = Client()
    client.send(settings(initial_window_size=1 << 20))
    client.connection.room = 0
    first, second = begin(client.ask(1), bytes(40), idle=0.02), begin(client.ask(3), bytes(40), idle=0.02)
    for _ in range(16):
        client.send(window(0, 5))
        await asyncio.sleep(0.006)
    await asyncio.gather(first, second)
    third = begin(client.ask(5), bytes(40), idle=0.02)
    with pytest.raises(NodeGone):
        await third


async def test_a_node_that_takes_byte_after_byte_is_too_slow() -> None:
    client = Client()
    client.send(settings(initial_window_size=0))
    sending = begin(client.ask(1), bytes(1000), pace=Pace(10_000, 0.02))
    for _ in range(100):
        client.send(window(1, 1))
        await asyncio.sleep(0.001)
        if sending.done():
            break
    with pytest.raises(NodeGone):
        await sending


async def test_no_call_begins_before_earlier_answers_are_taken() -> None:
    client = Client()
    client.connection.pause_writing()
    asking = [asyncio.ensure_future(client.ask(number).caught_up(no_pace(), IDLE)) for number in (1, 3, 5)]
    await turn()
    assert not any(task.done() for task in asking)
    client.connection.resume_writing()
    await asyncio.wait_for(asyncio.gather(*asking), 1)
    client.connection.pause_writing()
    late = asyncio.ensure_future(client.ask(7).caught_up(no_pace(), 0.01))
    with pytest.raises(NodeGone):
        await late
    assert not client.connection.turns.asking


async def test_an_end_that_a_node_does_not_take_is_a_reset() -> None:
    client = Client()
    client.send(settings(initial_window_size=1))
    client.got()
    client.ask(1).tell(b"ab")
    assert client.resets() == [(1, Code.REFUSED_STREAM)]
    client.last.tell(b"ab")
    assert client.got() == []
    client.ask(3).tell(b"a")
    assert data_of(client.got(), 3) == b"a"


async def lose_some() -> None:
    client = Client()
    tasks = [
        begin(client.ask(1), bytes(100_000)),
        asyncio.ensure_future(client.ask(3, ended=False).read()),
        begin(client.ask(5), bytes(100_000)),
    ]
    client.connection.pause_writing()
    tasks.append(asyncio.ensure_future(client.ask(7).caught_up(no_pace(), IDLE)))
    await turn()
    client.lose()
    await asyncio.wait(tasks)
    gone = [isinstance(task.exception(), NodeGone) for task in tasks]
    assert gone == [True] * 4
    assert client.is_done()


async def test_lost_streams_leave_nothing_behind() -> None:
    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, Stream)}
    await lose_some()
    gc.collect()
    after = {id(one) for one in gc.get_objects() if isinstance(one, Stream)}
    assert after <= before
