"""One HTTP/2 connection of a gRPC client (RFC 9113), as a server sees it.

gRPC's own server costs several times what a small call may, takes messages whole and unbounded, and cannot be
told to close a connection in good order. Of HTTP/2 gRPC needs little: no push, no priorities, and of the
answers' heads nothing that would be worth a dynamic table.

A client can have much done here for little (streams that it resets, pings, settings, empty frames). Such
frames draw on an allowance that answered calls fill up; who has used it up is reset. So is whoever breaks a
head off or sends one without an end. Never by a GOAWAY that names a fault: what a node makes of those differs
by version, while a connection that breaks is tried again by all of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, cast

import structlog

from relay.tls import handshake_done
from relay.wires import http2, http2_leaving, http2_request
from relay.wires.hpack import NO_TABLE, Decoder, HpackError
from relay.wires.http2 import Code, Http2Error
from relay.wires.http2_leaving import TO_HEAR, Leaving
from relay.wires.http2_reader import Reader
from relay.wires.http2_stream import Stream
from relay.wires.http2_turns import Turns
from relay.wires.http2_wants import STREAMS, WINDOW, Wants, welcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay.certificates import Shown
    from relay.refusal import Refusal
    from relay.wires.grpc_server import GrpcServer

log = structlog.get_logger("relay.wires.grpc")

#: A head with more bytes than this multiple of what it may have is not even read to its end.
_FAR = 2
#: Frames that cost the client nothing: how many it may send at once, and what fills that up again.
_ALLOWANCE = 3000
_PER_SECOND = 100
_PER_ANSWER = 10
#: A window that opens by less counts as such a frame, and settings once more for so many streams.
_LITTLE = 256
_STREAMS_A_FRAME = 16


class Connection(asyncio.Protocol):
    """See the module.

    Attributes:
        peer: address of the other end.
        tls: whether it is encrypted.
        shown: the certificate that the client has shown.
        excess: why each call on it is refused, if there are too many connections.
        transport: what it writes to.
        room: bytes that the client takes of all answers together.
        wants: what the client has said of itself.
        full: whether what was written must first be taken.
        streams: calls that are not answered yet, by number.
        turns: which of them wait for the client to take more.
        told: whether the client has said that it knows what is welcome; it may send more before.
        highest: number of the last call that has come.
    """

    transport: asyncio.Transport

    def __init__(self, server: GrpcServer) -> None:
        """Serve a client for `server`."""
        self._server = server
        self.peer = ""
        self.tls = False
        self.shown: Shown | None = None
        self.excess: Refusal | None = None
        self.room = http2.FIRST_WINDOW
        self.wants = Wants()
        self.full = False
        self.streams: dict[int, Stream] = {}
        self.turns = Turns()
        self.told = False
        self._decoder = Decoder()
        self._reader = Reader(self, _FAR * server.front.limits.head_size)
        self._begun: list[Stream] = []
        self.highest = 0
        self._window = WINDOW
        self._used = 0
        self._into: Stream | None = None
        self._allowance = _ALLOWANCE
        self._age = server.age()
        self._born = self._idle_since = 0.0
        self._leaving = Leaving()

    # -- what the event loop tells ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note once who this is, and say first what is welcome."""
        self.transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = peer[0].removeprefix("::ffff:")  # an IPv4 node on an IPv6 socket
        self.tls = transport.get_extra_info("sslcontext") is not None
        self._born = self._idle_since = time.monotonic()
        self._server.enter(self)
        if self.excess is not None:
            self._age = TO_HEAR  # and its place is soon free
        if self.tls:
            if not self._server.admits(self):
                self.transport.abort()  # a reset: its handshake is not told to be done
                return
            handshake_done(transport)
        self.write(welcome(_FAR * self._server.front.limits.head_size))

    def connection_lost(self, exc: Exception | None) -> None:
        """Have all calls know that their node is gone."""
        self._server.leave(self)
        self._leaving.ended()
        self._reader.close()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.lose()

    def pause_writing(self) -> None:
        """The client takes less than we write."""
        self.full = True

    def resume_writing(self) -> None:
        """It has taken enough of it."""
        self.full = False
        self.next_turn()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._leaving.closed is not None:
            return
        try:
            self._reader.take(data)
            if self._allowance < 0:
                raise Http2Error(Code.ENHANCE_YOUR_CALM, "too many frames that ask for nothing")
        except Http2Error as error:
            self._fail(error)
            return
        if self._begun:
            begun, self._begun = self._begun, []
            for stream in begun:
                if not stream.gone:
                    self._server.start_stream(stream)

    # -- frames -------------------------------------------------------------------------------------

    def data_begins(self, number: int, size: int, padding: int) -> None:
        """See `Receiver`."""
        if not number or number > self.highest:
            raise Http2Error(Code.PROTOCOL_ERROR, "data of no call")
        self._window -= size
        if self._window < 0:
            raise Http2Error(Code.FLOW_CONTROL_ERROR, "more data than was let in")
        self._used += size
        if self._used * 2 >= WINDOW:
            self._window += self._used
            self.write(http2.window_update(0, self._used))
            self._used = 0
        stream = self.streams.get(number)
        if size <= padding or (stream is None and size < _LITTLE):
            self._allowance -= 1
        if stream is not None:
            if stream.ended or not stream.expects(size):
                self.reset_stream(stream, Code.STREAM_CLOSED if stream.ended else Code.FLOW_CONTROL_ERROR)
                stream = None
            elif padding:
                stream.used(padding)
        self._into = stream

    def data(self, piece: bytes) -> None:
        """See `Receiver`."""
        if self._into is not None:
            self._into.feed(piece)

    def data_ends(self, *, last: bool) -> None:
        """See `Receiver`."""
        stream, self._into = self._into, None
        if stream is not None and last and not stream.finish():
            self.reset_stream(stream, Code.PROTOCOL_ERROR)

    def head(self, number: int, block: bytes, *, ended: bool) -> None:
        """See `Receiver`."""
        try:
            fields, size = self._decoder.decode(block, _FAR * self._server.front.limits.head_size)
        except HpackError as error:
            raise Http2Error(Code.COMPRESSION_ERROR, str(error)) from error
        if number <= self.highest:
            self._trailers(number, fields, ended=ended)
            return
        self.highest = number
        refused_from = self._leaving.refused_from
        if refused_from is not None and number >= refused_from:
            self._allowance -= 1
            return  # it was told so, and asks elsewhere
        if len(self.streams) >= STREAMS:
            self._allowance -= 1
            self.write(http2.rst_stream(number, Code.REFUSED_STREAM))
            return
        head = http2_request.read(fields, size)
        if head is None or (ended and head.length):
            self._allowance -= 1
            self.write(http2.rst_stream(number, Code.PROTOCOL_ERROR))
            return
        stream = Stream(self, number, head, room=self.wants.window, ended=ended)
        self.streams[number] = stream
        self._begun.append(stream)

    def _trailers(self, number: int, fields: list[tuple[bytes, bytes]], *, ended: bool) -> None:
        """Take what follows a body; nobody wants it."""
        stream = self.streams.get(number)
        if stream is None:
            # Answered or reset in this moment, or a mistake that is told as one.
            self._allowance -= 1
            self.write(http2.rst_stream(number, Code.STREAM_CLOSED))
        elif stream.ended:
            self.reset_stream(stream, Code.STREAM_CLOSED)
        elif not ended or not http2_request.names_are_sound(fields) or not stream.finish():
            self.reset_stream(stream, Code.PROTOCOL_ERROR)

    def frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """See `Receiver`."""
        if kind == http2.WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == http2.RST_STREAM:
            self._rst_stream(number, payload)
        elif kind == http2.SETTINGS:
            self._settings(flags, number, payload)
        elif kind == http2.PING:
            self._ping(flags, number, payload)
        elif kind == http2.PRIORITY:
            self._allowance -= 1
            http2.sized(payload, 5)
            if not number:
                raise Http2Error(Code.PROTOCOL_ERROR, "a priority of no call")
        elif kind == http2.GOAWAY:
            if number:
                raise Http2Error(Code.PROTOCOL_ERROR, "a call that goes away")
        elif kind == http2.PUSH_PROMISE:
            raise Http2Error(Code.PROTOCOL_ERROR, "a client that pushes")
        else:
            self._allowance -= 1

    # -- control ------------------------------------------------------------------------------------

    def _window_update(self, number: int, payload: bytes) -> None:
        http2.sized(payload, 4)
        more = http2.UINT32.unpack(payload)[0] & http2.MOST_WINDOW
        self._allowance -= more < _LITTLE
        if not number:
            self.room += more
            if not more or self.room > http2.MOST_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR
                raise Http2Error(code, f"a window that opens by {more}")
            self.next_turn()
            return
        stream = self._call(number)
        if stream is None:
            return
        if not more or not stream.widen(more):
            self.reset_stream(stream, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)

    def _rst_stream(self, number: int, payload: bytes) -> None:
        http2.sized(payload, 4)
        stream = self._call(number)
        if stream is not None:
            self._allowance -= 1
            self._forget(stream)
            stream.lose()

    def _call(self, number: int) -> Stream | None:
        """Return the stream that a frame is for; None if it is over."""
        self._allowance -= number not in self.streams
        if not number or number > self.highest:
            raise Http2Error(Code.PROTOCOL_ERROR, "a frame of no call")
        return self.streams.get(number)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Http2Error(Code.PROTOCOL_ERROR, "settings of a call")
        if flags & http2.ACK:
            http2.sized(payload, 0)
            if not self.told:
                self.told = True
                for stream in self.streams.values():
                    stream.told()
            return
        self._allowance -= 1 + len(self.streams) // _STREAMS_A_FRAME
        more = self.wants.take(payload)
        if more:
            for stream in self.streams.values():
                if not stream.widen(more):
                    raise Http2Error(Code.FLOW_CONTROL_ERROR, "a window beyond all bounds")
        self.write(http2.frame(http2.SETTINGS, http2.ACK, 0))

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        http2.sized(payload, 8)
        if number:
            raise Http2Error(Code.PROTOCOL_ERROR, "a ping of a call")
        if not flags & http2.ACK:
            self._allowance -= 1
            self.write(http2.frame(http2.PING, http2.ACK, 0, payload))
        elif payload == http2_leaving.PING:
            self._leaving.heard(self)
        elif payload == http2_leaving.LAST:
            self._leaving.taken()

    # -- its end ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Tell the client to leave: calls that are under way, or on their way, are still answered."""
        self._leaving.begin(self)

    def cut(self) -> None:
        """End it with a reset."""
        self._leaving.cut(self)

    def _fail(self, error: Http2Error) -> None:
        log.info("not HTTP/2, or broken", peer=self.peer, error=str(error))
        self._server.front.stray("dropped")
        if error.code is Code.ENHANCE_YOUR_CALM or not self._reader.is_http2:
            self.cut()
        else:
            self.write(http2.goaway(self.highest, error.code))
            self._leaving.close(self)
        for stream in list(self.streams.values()):
            self._forget(stream)
            stream.lose()

    def tick(self, now: float) -> None:
        """See to what takes too long; to be called once a second."""
        self._allowance = min(self._allowance + _PER_SECOND, _ALLOWANCE)
        front, reader = self._server.front, self._reader
        late = now - front.limits.head_timeout
        if self._leaving.tick(self, now, front.idle_timeout):
            return
        if (not self.told and self._born < late) or (reader.head_since or math.inf) < late:
            self._fail(Http2Error(Code.ENHANCE_YOUR_CALM, "no end of a head in limits.head_timeout"))
        elif now - self._born > self._age or (
            not self.streams and now - self._idle_since > self._server.keepalive
        ):
            self.leave()

    # -- for streams --------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send these bytes; to nobody, if the client is gone."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def write_all(self, parts: Iterable[bytes | memoryview]) -> None:
        """Send these one after the other."""
        if self.transport.is_closing():
            return
        if self.tls:
            self.transport.write(b"".join(parts))  # or each would be a record of its own
        else:
            self.transport.writelines(parts)

    def close_stream(self, stream: Stream) -> None:
        """Let go of a stream whose answer is out."""
        self._allowance = min(self._allowance + _PER_ANSWER, _ALLOWANCE)
        if not stream.ended:
            self.write(http2.rst_stream(stream.number, Code.NO_ERROR))  # the rest is not wanted (8.1)
        self._forget(stream)

    def reset_stream(self, stream: Stream, code: Code) -> None:
        """End a stream without an answer."""
        if stream.number in self.streams:
            self._allowance -= 1
            self.write(http2.rst_stream(stream.number, code))
            self._forget(stream)
            stream.lose()

    def _forget(self, stream: Stream) -> None:
        self.streams.pop(stream.number, None)
        if not self.streams:
            self._idle_since = time.monotonic()
            self._leaving.settle(self)

    def next_turn(self) -> None:
        """Have another stream write, if the client takes more."""
        if not self.full:
            self.turns.give(self.room)

    def resize(self, block: bytes) -> bytes:
        """Return a header block that tells first that no table is used (RFC 7541, 4.2)."""
        self.wants.smaller_table = False
        return NO_TABLE + block
