"""One connection of a node: aiohttp's protocol, with the loop over its requests written for a relay.

aiohttp's own loop makes a task, a writer, a request and a response object for each request; measured, that
is a third of what a small call costs here. Its parser, flow control, keep-alive and shutdown stay in use.
This module is the only one that reaches into aiohttp's internals; pyproject.toml pins the versions that
have them, and tests/wires/test_http_connection.py would notice a change.
"""

from __future__ import annotations

import asyncio
import math
import re
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from aiohttp.web_protocol import _ErrInfo

from relay.limits import Pace
from relay.tls import handshake_done
from relay.wires.http_sockets import reset, untaken

if TYPE_CHECKING:
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader

    from relay.call import Call
    from relay.certificates import Shown
    from relay.refusal import Refusal
    from relay.wires.http_server import NodeServer

log = structlog.get_logger("relay.wires.http")

#: The most that aiohttp holds of a body that is not read as fast as it comes; twice that at the peak.
READ_BUFFER = 256 * 1024
#: How long an answered node may go on sending a body that nobody wants, before its connection is closed.
LINGER = 10.0

# What a parser says by itself; a colon, a quote or an escape may begin what it was given.
_OWN_WORDS = re.compile(r"[A-Za-z0-9 '`./-]{1,80}")


class NodeRequest:
    """One request as it stands on its connection.

    Attributes:
        message: its head: `method`, `path`, `version`, `raw_headers`, `should_close`.
        content: its body.
        connection: where its answer goes.
        call: what became of it, if it is one.
    """

    __slots__ = ("call", "connection", "content", "message")

    def __init__(self, message: RawRequestMessage, content: StreamReader, connection: NodeConnection) -> None:
        """Hold the parts; nothing is copied."""
        self.message = message
        self.content = content
        self.connection = connection
        self.call: Call | None = None

    @property
    def transport(self) -> asyncio.Transport | None:
        """Where the answer is written; None once the node is gone."""
        return self.connection.transport

    def _cancel(self, error: BaseException) -> None:
        """Called by aiohttp when the connection is lost: whoever reads the body must learn of it.

        And nobody waits for the answer any more: a call that still stands in a queue, or before its repeat,
        must not be sent. A pull would take a message from the SuperLink for nobody.
        """
        self.content.set_exception(error)
        if self.call is not None:
            self.call.deadline = -math.inf


class NodeConnection(web.RequestHandler):
    """One connection of a node.

    Attributes:
        peer: its address; "" for a Unix socket.
        tls: whether it is encrypted.
        excess: why each call on it is refused, if there are too many connections.
        heavy: whether one of its heads may be longer than allowed.
        shown: the certificate that its client has shown, if any.
    """

    __slots__ = (
        "_counted",
        "_front",
        "_head_bytes",
        "_head_timer",
        "_server",
        "excess",
        "heavy",
        "peer",
        "shown",
        "tls",
    )

    def __init__(self, server: NodeServer, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare the connection; the event loop calls `connection_made` when it is open."""
        limits = server.front.limits
        # Bodies pass as they are, so nothing may be decompressed.
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=server.keepalive,
            auto_decompress=False,
            read_bufsize=READ_BUFFER,
            access_log=None,  # type: ignore[arg-type]  # that is how aiohttp says "none"
            lingering_time=LINGER,
            max_line_size=limits.header_size,
            max_field_size=limits.header_size,
            max_headers=limits.header_count,
        )
        self._front = server.front
        self.peer = ""
        self.tls = False
        self.excess: Refusal | None = None
        self.heavy = False
        self.shown: Shown | None = None
        self._server = server
        self._counted = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note once who this is."""
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = peer[0].removeprefix("::ffff:")  # an IPv4 node on an IPv6 socket
        self.tls = transport.get_extra_info("sslcontext") is not None
        sound = self._take_certificate(transport)
        if self.tls and sound:
            handshake_done(transport)
        super().connection_made(transport)
        if not sound:
            transport.abort()  # type: ignore[attr-defined]  # a reset: its handshake is not told to be done
        if self._front.limits.connections or self._front.limits.connections_per_peer:
            self._count()

    def _take_certificate(self, transport: asyncio.BaseTransport) -> bool:
        """Note the certificate that the client has shown; return whether it may still be used."""
        files = self._server.tls
        if files is None or not files.asks:
            return True
        try:
            self.shown = files.shown(transport.get_extra_info("ssl_object"))
        except ValueError as error:
            log.info("client certificate refused", peer=self.peer, problem=str(error))
            return False
        return True

    def _count(self) -> None:
        """Have this connection counted; each call of one too many is refused, and its place is soon free."""
        self._counted = True
        self.excess = self._server.enter(self)
        if self.excess is not None:
            self._head_timer = self._loop.call_later(self._front.limits.head_timeout, self._head_is_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let go of the transport first: its descriptor may be another connection's soon."""
        self.transport = None
        if self._counted:
            self._counted = False
            self._server.leave(self)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether neither a request is here nor one is being answered."""
        return self._waiter is not None and not self._waiter.done()

    def data_received(self, data: bytes) -> None:
        """Parse the next bytes; should they be garbage, the body that they stand in ends with an error."""
        super().data_received(data)
        if not self._messages:
            if self._current_request is None:
                self._head_goes_on(len(data))
            return
        if self._head_bytes + len(data) > self._front.limits.head_size:
            self.heavy = True  # or its body was long: the receiver looks
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if isinstance(self._messages[-1][0], _ErrInfo):
            before = self._messages[-2][1] if len(self._messages) > 1 else None
            if before is None and self._current_request is not None:
                before = self._current_request.content
            if before is not None and not before.is_eof() and before.exception() is None:
                before.set_exception(web.RequestPayloadError("no HTTP within the body"))

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Go on reading if that was paused. aiohttp does so with each body that was read."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _head_goes_on(self, size: int) -> None:
        """Note bytes of a head that is not complete; give up one that is too long or takes too long."""
        limits = self._front.limits
        self._head_bytes += size
        if self._head_bytes > limits.head_size:
            self._give_head_up(f"no end of a head within {limits.head_size} bytes")
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(limits.head_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._current_request is None and not self._messages:
            self._give_head_up(f"no end of a head within {self._front.limits.head_timeout:g} s")

    def _give_head_up(self, why: str) -> None:
        """Close without an answer: whose head is not here cannot be told anything that it would survive."""
        if self._force_close:
            return
        log.info("not HTTP, or broken", peer=self.peer, error=why)
        self._front.stray("dropped")
        self.force_close()

    def force_close(self) -> None:
        """Close; within a call by a reset, since a FIN could pass for the end of its answer."""
        transport = self.transport
        if self._request_in_progress:
            self.reset()
        super().force_close()
        if transport is not None:
            self._watch_close(transport, None, self.pace())

    def _watch_close(self, transport: asyncio.Transport, before: int | None, pace: Pace) -> None:
        """Have a close come to its end, which waits for a node to take what is left of its answer."""
        if self._manager is None:
            return  # it has ended
        if not transport.get_write_buffer_size():
            return
        left, seconds = untaken(transport), self._front.idle_timeout
        if before is not None and not (left < before and pace.holds(seconds, before - left)):
            reset(transport)
        else:
            self._loop.call_later(seconds, self._watch_close, transport, left, pace)

    def pace(self) -> Pace:
        """Return a measure of how fast the node takes an answer."""
        return Pace(self._front.limits.min_rate, self._front.limits.rate_window)

    async def drain(self) -> None:
        """Wait until the node has taken enough of its answer. Raises ConnectionError when it is gone."""
        if self._drain_waiter is not None and self._drain_waiter.cancelled():
            self._drain_waiter = None  # of a wait that timed out; aiohttp would have it awaited again
        await self._drain_helper()

    def reset(self) -> None:
        """End the connection with RST, so that what was written cannot pass for the whole."""
        if self.transport is not None:
            reset(self.transport)

    async def start(self) -> None:
        """Answer one request after the other, until either side wants no more."""
        try:
            while not self._force_close:
                if not self._messages:
                    await self._next()
                if not await self._one() or self._close or self._force_close:
                    break
                self._arm_keepalive()
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception:
            log.exception("connection failed", peer=self.peer)
            self.force_close()
        if not self._force_close:
            self._task_handler = None
            self.force_close()

    async def _next(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def _one(self) -> bool:
        """Answer the next request; return whether the connection may go on."""
        message, content = self._messages.popleft()
        # aiohttp counts messages that are whole, and stops to parse at 32: each has to be taken off once.
        whole = content.is_eof()
        if whole and self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        if isinstance(message, _ErrInfo):
            # A 400 would end a node whose call was mangled on its way; a close makes it try again.
            log.info("not HTTP, or broken", peer=self.peer, error=_reason(message))
            self._front.stray("dropped")
            return False
        request = NodeRequest(message, content, self)
        self._current_request = request  # type: ignore[assignment]  # aiohttp only calls its `_cancel`
        self._request_in_progress = True
        self._front.busy.add(self)
        try:
            keep = await self._front.handle(request)
            if not content.is_eof():
                keep = await self._discard(content) and keep
            if not whole and self._parser is not None:
                self._parser.message_consumed()
                self.data_received(b"")  # as many as fitted beside it were parsed
        finally:
            self._front.busy.discard(self)
            self._current_request = None
            self._request_in_progress = False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        return keep

    async def _discard(self, content: StreamReader) -> bool:
        """Read the rest of a body that nobody wanted, so that the node gets to read its answer."""
        try:
            async with asyncio.timeout(LINGER):
                while not self._force_close and not content.is_eof():
                    await content.readany()
        except (OSError, web.RequestPayloadError):  # TimeoutError is one
            return False
        return content.is_eof()

    def _arm_keepalive(self) -> None:
        close_time = self._loop.time() + self._keepalive_timeout
        self._next_keepalive_close_time = close_time
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_time, self._process_keepalive)


def _reason(error: _ErrInfo) -> str:
    """Return what the parser found wrong, without the bytes in which it found it: those may be secret."""
    text = error.message.partition(":\n\n")[0]
    return text if _OWN_WORDS.fullmatch(text) else type(error.exc).__name__
