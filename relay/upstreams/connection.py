"""One HTTP/1.1 connection to an upstream: an asyncio protocol that carries one exchange at a time.

Rules:
    1. A connection returns to its pool only after a whole request was written, a whole response came in,
       and the response was taken: what was not read yet lies in the connection itself.
    2. Bytes that nobody asked for, a response before its request was complete, or anything that is not
       HTTP end the connection, never the worker.
    3. Reading pauses when the node is slower than the upstream, writing waits when the upstream is
       slower than the node; neither holds more than HIGH_WATER bytes, but for what is awaited whole.
    4. Whoever waits here is woken by data, by the loss of the connection, or by its timer.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, cast

import httptools

from relay.refusal import Reason, Refusal
from relay.upstreams.request_body import AT_ONCE, pieces
from relay.upstreams.response import Response
from relay.upstreams.timer import Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Payload

HIGH_WATER = 1024 * 1024
LOW_WATER = 256 * 1024
#: The most that an upstream may send before the head of its answer is complete.
MAX_HEAD = 64 * 1024
_LAST_CHUNK = b"0\r\n\r\n"


class Connection(Response):
    """One connection: `exchange` sends a request; what `Response` holds, and `read`, is the answer.

    Attributes:
        name: the upstream's address.
        idle_since: event-loop time at which its pool took it back.
    """

    __slots__ = (
        "_answer_by",
        "_drained",
        "_error",
        "_head",
        "_high_water",
        "_idle_timeout",
        "_loop",
        "_on_free",
        "_on_lost",
        "_paused_reading",
        "_paused_writing",
        "_reader",
        "_released",
        "_request_done",
        "_timed",
        "_timer",
        "_transport",
        "idle_since",
        "name",
    )

    def __init__(
        self,
        name: str,
        idle_timeout: float,
        *,
        on_free: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        """Prepare a connection; `loop.create_connection` opens it.

        Args:
            name: the upstream's address, for messages.
            idle_timeout: seconds that either side may let pass between two pieces of a body.
            on_free: called when an exchange is over and the connection can carry the next.
            on_lost: called once, when the connection has ended, from whatever side.
        """
        super().__init__()
        self.name = name
        self._idle_timeout = idle_timeout
        self._on_free = on_free
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._timer = Timer(self._loop, self._expire)
        self._timed: tuple[asyncio.Future[None], str, float]
        self._transport: asyncio.Transport | None = None
        self._head: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._error: Refusal | None = None
        self._paused_reading = False
        self._paused_writing = False
        self._high_water = HIGH_WATER
        self._answer_by = math.inf
        self.idle_since = 0.0
        self._request_done = self._released = True

    @property
    def usable(self) -> bool:
        """Whether a new exchange may start on this connection."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and self._error is None

    def take(self) -> bytes | None:
        """Return the whole response body and free the connection if all of it is here, else None."""
        if not self._response_done:
            return None
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._release()
        return body

    # -- one exchange -------------------------------------------------------------------------------

    async def exchange(self, head: bytes, payload: Payload, timeout: float) -> None:
        """Send a request and wait for the head of its response.

        Args:
            head: request line and headers with the framing that fits `payload`, up to the empty line.
            payload: the body, sent while it comes in. Chunked if it does not know its size.
            timeout: seconds from the last byte of the request to the head of the response, and to the end
                of one that is awaited whole.

        Raises:
            Refusal: UPSTREAM_DOWN if the connection broke, UPSTREAM_TIMEOUT, UPSTREAM_BAD_ANSWER if
                the response is not HTTP, or what reading `payload` raises.
            NodeGone: from reading `payload`.
        """
        transport = self._transport
        if transport is None:
            raise Refusal(Reason.UPSTREAM_DOWN, "was closed", by=self.name, sent=False)
        self._expect()
        self._request_done = self._released = False
        self._head = self._loop.create_future()
        self._answer_by = math.inf
        sender: asyncio.Task[None] | None = None
        try:
            data = payload.data
            if data is not None and len(data) <= AT_ONCE:
                transport.write(head + data if data else head)
                self._request_done = True
                self._answer_by = self._loop.time() + timeout
                self._time(self._head, "no answer", timeout)
            else:
                transport.write(head)
                sender = self._loop.create_task(self._send(payload, self._head, timeout))
            await self._head
            if self._answer_by == math.inf:  # it is here before the request was
                self._answer_by = self._loop.time() + timeout
        except BaseException:
            self.abort()
            raise
        finally:
            self._timer.clear()
            self._head = None
            if sender is not None and not sender.done():
                # The answer is here before the request was: it stands, the connection does not.
                sender.cancel()

    async def _send(self, payload: Payload, head: asyncio.Future[None], timeout: float) -> None:
        """Send the body; then give the upstream `timeout` seconds to answer."""
        try:
            chunked = payload.size is None
            sent = 0
            async for piece in pieces(payload):
                if self._transport is None or head.done():
                    return
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), bytes(piece)) if chunked else piece)
                sent += len(piece)
                if self._paused_writing:
                    await self._drain()
            if not chunked and sent != payload.size:
                # The upstream would take the next request for the rest of this one.
                raise Refusal(Reason.INTERNAL, f"{sent} of {payload.size} bytes to send", by=self.name)
            if chunked and self._transport is not None:
                self._transport.write(_LAST_CHUNK)
            self._request_done = True
        except Exception as error:  # noqa: BLE001 - handed to the waiter of the head
            if not head.done():
                head.set_exception(error)
            return
        if not head.done():
            self._answer_by = self._loop.time() + timeout
            self._time(head, "no answer", timeout)

    async def whole(self, most: int, *, patient: bool = False) -> bool:
        """Wait for the end of the response; return whether it came before `most` bytes or the time were over.

        What has come stays here. Each piece has `idle_timeout`.

        Args:
            most: bytes of the body that are waited for.
            patient: wait for as long as pieces come, and not only for the rest of the exchange's `timeout`.

        Raises: what `read` raises, but for UPSTREAM_TIMEOUT.
        """
        self._high_water = max(most, HIGH_WATER)
        until, seen = 0.0, -1
        try:
            while not self._response_done and self.received <= most:
                if self._error is not None:
                    raise self._error
                now = self._loop.time()
                if self.received > seen:
                    until, seen = now + self._idle_timeout, self.received
                    until = until if patient else min(until, self._answer_by)
                if now >= until:
                    break
                self._resume_reading()
                self._reader = self._loop.create_future()
                self._time(self._reader, "", until - now)
                await self._reader
        except BaseException:
            self.abort()
            raise
        finally:
            self._timer.clear()
            self._reader = None
            self._high_water = HIGH_WATER
        return self._response_done and self.received <= most

    async def read(self) -> bytes:
        """Return the next piece of the response body; b"" at its end.

        Raises:
            Refusal: UPSTREAM_DOWN if the connection broke within the body, UPSTREAM_TIMEOUT if
                nothing came for `idle_timeout` seconds, UPSTREAM_BAD_ANSWER if it is no HTTP.
        """
        while True:
            if self._pieces:
                piece = self._pieces.popleft()
                self._buffered -= len(piece)
                if self._buffered <= LOW_WATER:
                    self._resume_reading()
                return piece
            if self._response_done:
                self._release()
                return b""
            if self._error is not None:
                raise self._error
            self._reader = self._loop.create_future()
            self._time(self._reader, "no further data", self._idle_timeout)
            try:
                await self._reader
            except BaseException:
                self.abort()
                raise
            finally:
                self._timer.clear()
                self._reader = None

    def close(self) -> None:
        """Give up what is left of the response; harmless when it was read to its end."""
        if not self._released:
            self._released = True
            self.abort()

    def retire(self) -> None:
        """Close an idle connection in good order."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once; an exchange on it fails."""
        if self._error is None:
            self._error = self._down("was given up")
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER, low=LOW_WATER)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._timer.close()
        if not self._response_done and self._until_close and exc is None and self._error is None:
            self._response_done = True
        if not self._response_done:
            self._fail(self._down(f"broke the connection: {exc}" if exc else "closed the connection"))
        self._wake(self._drained)
        self._wake(self._reader)
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        if self._response_done:
            self.abort()
            return
        if self._raw_left:
            self._take_raw(data)
            self._body_came()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._bad(f"no HTTP response: {error!r}")
        if not self.status:
            self._head_size += len(data)
            if self._head_size > MAX_HEAD:
                self._bad(f"no end of the head within {MAX_HEAD} bytes")
            return
        self._wake(self._head)
        if self.size is not None and not self._response_done:
            self._raw_left = self.size - self.received
        self._body_came()

    def _body_came(self) -> None:
        self._wake(self._reader)
        if self._buffered > self._high_water and not self._paused_reading and self._transport is not None:
            self._paused_reading = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._paused_writing = True

    def resume_writing(self) -> None:
        self._paused_writing = False
        self._wake(self._drained)

    # -- inside -------------------------------------------------------------------------------------

    def _message_ended(self, *, keep: bool) -> None:
        self._response_done = True
        transport = self._transport
        if not self._request_done or (transport is not None and transport.get_write_buffer_size()):
            # An upstream that has answered may never take the rest, so nobody waits for that.
            self.abort()
        elif not keep:
            self.retire()

    def _release(self) -> None:
        if not self._released:
            self._released = True
            self._resume_reading()
            if self.usable:
                self._on_free(self)

    def _resume_reading(self) -> None:
        if self._paused_reading and self._transport is not None:
            self._paused_reading = False
            self._transport.resume_reading()

    def _bad(self, what: str) -> None:
        self._fail(Refusal(Reason.UPSTREAM_BAD_ANSWER, what, by=self.name))
        self.abort()

    def _fail(self, refusal: Refusal) -> None:
        if self._response_done:
            return  # what came is whole; only the connection is of no further use
        if self._error is None:
            self._error = refusal
        for waiter in (self._head, self._reader):
            if waiter is not None and not waiter.done():
                waiter.set_exception(self._error)

    def _time(self, waiter: asyncio.Future[None], what: str, seconds: float) -> None:
        """Give `waiter` so many seconds; one at a time is timed. Without `what` their end is no error."""
        self._timed = (waiter, what, seconds)
        self._timer.set(seconds)

    def _expire(self) -> None:
        waiter, what, seconds = self._timed
        if not what:
            self._wake(waiter)
        elif not waiter.done():
            self._error = Refusal(Reason.UPSTREAM_TIMEOUT, f"{what} for {seconds:g} s", by=self.name)
            waiter.set_exception(self._error)

    async def _drain(self) -> None:
        """Wait until the upstream has taken enough; a slow one may, one that takes nothing is given up."""
        waiting = 0
        while (transport := self._transport) is not None and self._paused_writing:
            if transport.get_write_buffer_size() == waiting:
                raise Refusal(
                    Reason.UPSTREAM_TIMEOUT, f"took no data for {self._idle_timeout:g} s", by=self.name
                )
            waiting = transport.get_write_buffer_size()
            self._drained = self._loop.create_future()
            timer = self._loop.call_later(self._idle_timeout, self._wake, self._drained)
            try:
                await self._drained
            finally:
                timer.cancel()
                self._drained = None

    def _down(self, what: str) -> Refusal:
        return Refusal(Reason.UPSTREAM_DOWN, what, by=self.name)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
