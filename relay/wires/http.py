"""HTTP/1.1 as nodes speak it: what HTTP v1 and legacy REST have in common.

A `Front` serves one listener. It works on aiohttp's low-level server: no application, no router, no
response objects; one dictionary look-up finds the chain, and the answer is written as bytes.
"""

from __future__ import annotations

import asyncio
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple, assert_never

import structlog
from aiohttp import HttpVersion11

from relay import dialect
from relay.call import Ending, Reply, Source, Wire
from relay.fleet import BY_PATH
from relay.limits import Peers
from relay.refusal import NodeGone, Reason, Refusal
from relay.wires.http_request import CONTENT_TYPE, WHOLE, Receiver, Spec
from relay.wires.http_sockets import untaken

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from relay.call import Call, Payload
    from relay.fleet import Method
    from relay.pipeline import Handler
    from relay.wires.http_connection import NodeConnection, NodeRequest

log = structlog.get_logger("relay.wires.http")

_CRLF = b"\r\n"
_STATUS_LINE = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}
_OUR_TYPE = b"content-type: " + CONTENT_TYPE + b"\r\n"
_PLAIN = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
_FLEET = re.compile(r"/(api/)?v\d+/fleet/([^/]*)/?")


class Route(NamedTuple):
    """Where a path leads."""

    spec: Spec
    method: Method
    handler: Handler


class _CutError(Exception):
    """The answer broke off after its head was written."""


class Front:
    """The node-facing side of one listener.

    Attributes:
        draining: set it, and each answer tells its node to connect anew.
        busy: connections on which a request is being answered.
        stray: counts what was no call.
        idle_timeout: seconds after which a node that takes nothing of its answer is given up.
        limits: what nodes may cost; the receiver's.
        peers: counts what each peer has here, if that is limited.
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        receiver: Receiver,
        *,
        idle_timeout: float,
        on_stray: Callable[[str], None],
    ) -> None:
        """Serve `routes`.

        Args:
            routes: by path.
            receiver: makes the calls.
            idle_timeout: seconds after which a node that takes nothing of its answer is given up.
            on_stray: told about each request that is no call, with what it got (`404`, `405`, `dropped`...).
        """
        self._routes = routes
        self._receiver = receiver
        self.limits = receiver.limits
        per_peer = self.limits.connections_per_peer
        self.peers = Peers(per_peer) if per_peer else None
        self.idle_timeout = idle_timeout
        self.stray = on_stray
        self.draining = False
        self.busy: set[NodeConnection] = set()

    def trusts(self, peer: str) -> bool:
        """Return whether a peer is a proxy that is believed."""
        return self._receiver.forwarding.trusts(peer)

    # -- one request --------------------------------------------------------------------------------

    async def handle(self, request: NodeRequest) -> bool:
        """Answer one request; return whether its connection may carry another.

        Never raises but when its task is cancelled.
        """
        if request.connection.writing_paused and not await self._caught_up(request):
            return False
        path = request.message.path
        route = self._routes.get(path)
        if route is None:
            # A query, or the absolute form that clients send to a proxy; a bare CONNECT has neither.
            path = request.message.url.raw_path if request.message.url is not None else ""
            route = self._routes.get(path)
        if route is None or request.message.method != "POST":
            return self._no_call(request, path)
        call = request.call = self._receiver.call(request, route.spec, route.method)
        if self.peers is not None and self.trusts(request.connection.peer):
            self.peers.enter_call(call)
        reply: Reply | None = None
        try:
            if call.payload.data is None and call.fault is None:
                await self._receive(request, call)
            reply = await route.handler(call)
            if (data := reply.payload.data) is not None:
                sent = len(data)
                _open_transport(request).write(self._head(request, call, reply, data))
            else:
                sent = await self._write(request, call, reply)
        except asyncio.CancelledError:
            self._end(call, "cancelled", reply, lost=reply is not None)
            raise
        except Exception as error:  # noqa: BLE001 - a bug of ours must not reach a node as a 500
            return self._failed(request, call, reply, error)
        finally:
            call.payload.close()
            if reply is not None:
                reply.payload.close()
        self._end(call, "ok" if reply.status == 200 else f"upstream_{reply.status}", reply, sent=sent)
        return self._keeps(request, reply)

    def _failed(self, request: NodeRequest, call: Call, reply: Reply | None, error: Exception) -> bool:
        """Answer a call that came to nothing, if it can be; return whether its connection may go on."""
        match error:
            case Refusal():
                return self._refused(request, call, error)
            case _CutError():
                self._end(call, "cut", reply, lost=True)
                log.warning(
                    "answer broke off", method=call.method.rpc, request_id=call.request_id, error=str(error)
                )
            case NodeGone():
                lost = reply is not None and reply.source is Source.UPSTREAM
                self._end(call, "node_gone", reply, lost=lost)
            case _:
                log.error("call failed", method=call.method.rpc, request_id=call.request_id, exc_info=error)
                return self._refused(request, call, Refusal(Reason.INTERNAL, repr(error)))
        return self._drop(request)

    async def _receive(self, request: NodeRequest, call: Call) -> None:
        """Read a small body whole that is not here yet; let a node that asks first send its body."""
        # HTTP/1.0 knows no 1xx and would take it for the answer.
        if "Expect" in request.message.headers and request.message.version >= HttpVersion11:
            _open_transport(request).write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if call.payload.size is not None and call.payload.size <= WHOLE:
            try:
                await call.payload.read(WHOLE)
            except Refusal as refusal:
                call.fault = refusal
            except NodeGone:
                self.stray("node_gone")  # no chain has run that would count it
                raise
            # A node's patience begins when it has sent its call.
            call.deadline += time.monotonic() - call.started

    # -- answers ------------------------------------------------------------------------------------

    def _head(self, request: NodeRequest, call: Call, reply: Reply, data: bytes = b"") -> bytes:
        """Return the head of an answer, with `data` behind it."""
        parts = [_STATUS_LINE.get(reply.status) or b"HTTP/1.1 %d \r\n" % reply.status]
        parts += [b": ".join(pair) + _CRLF for pair in reply.metadata]
        if reply.source is not Source.UPSTREAM:
            parts.append(_OUR_TYPE)
        parts += (
            b"x-request-id: %b\r\n" % call.request_id.encode("ascii"),
            _framing(request, reply.payload.size),
            self._connection(request, keep=self._keeps(request, reply)),
            data,
        )
        return b"".join(parts)

    async def _write(self, request: NodeRequest, call: Call, reply: Reply) -> int:
        """Write a reply whose body is still arriving; return the bytes of body written.

        Raises:
            NodeGone: the node closed, or took nothing for `idle_timeout` seconds.
            _CutError: the body broke off.
        """
        transport = _open_transport(request)
        payload = reply.payload
        transport.write(self._head(request, call, reply))
        try:
            return await self._pass_on(request, payload, chunked=_is_chunked(request, payload.size))
        except (NodeGone, _CutError):
            raise
        except Refusal as refusal:
            raise _CutError(str(refusal)) from refusal
        except Exception as error:
            # Whatever it was: the head is written, so nothing else may follow it.
            log.exception("call failed", method=call.method.rpc, request_id=call.request_id)
            raise _CutError(repr(error)) from error

    async def _pass_on(self, request: NodeRequest, payload: Payload, *, chunked: bool) -> int:
        sent = 0
        async for piece in payload.stream():
            _open_transport(request).write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            sent += len(piece)
            if request.connection.writing_paused:
                await self._drain(request)
        if chunked:
            _open_transport(request).write(b"0\r\n\r\n")
        elif payload.size not in (None, sent):
            raise _CutError(f"{sent} bytes of {payload.size} came")
        return sent

    async def _caught_up(self, request: NodeRequest) -> bool:
        """Wait until a node has taken its earlier answers: one that only asks on would fill the memory."""
        try:
            await self._drain(request)
        except NodeGone:
            return self._drop(request)
        return True

    async def _drain(self, request: NodeRequest) -> None:
        """Wait until the node has taken enough; a slow node may, one that takes next to nothing is gone."""
        pace = request.connection.pace()
        left = untaken(_open_transport(request))
        while True:
            try:
                async with asyncio.timeout(self.idle_timeout):
                    await request.connection.drain()
                    return
            except TimeoutError:
                before, left = left, untaken(_open_transport(request))
                if left >= before or not pace.holds(self.idle_timeout, before - left):
                    raise NodeGone from None
            except ConnectionError as error:
                raise NodeGone from error

    def _refused(self, request: NodeRequest, call: Call, refusal: Refusal) -> bool:
        self._end(call, refusal.reason.value, None, refusal=refusal)
        return self._render(request, call.wire, refusal.reason, call.method, call.request_id)

    def _render(
        self, request: NodeRequest, wire: Wire, reason: Reason, method: Method | None, request_id: str
    ) -> bool:
        """Tell the node what the dialect says."""
        transport = request.transport
        if transport is None or transport.is_closing():
            return False
        # A body that was not read stands in the way of the next request.
        keep = self._keeps(request) and request.content.is_eof()
        tail = b"x-request-id: %b\r\n" % request_id.encode("ascii") + self._connection(request, keep=keep)
        match dialect.answer(wire, reason, method):
            case dialect.Empty() | dialect.Hold():
                transport.write(_STATUS_LINE[200] + _OUR_TYPE + b"content-length: 0\r\n" + tail)
            case dialect.Status(code):
                text = reason.value.encode()
                transport.write(_STATUS_LINE[code] + _PLAIN % len(text) + tail + text)
            case dialect.Drop() | dialect.Abort():  # no HTTP wire is told the latter
                return self._drop(request)
            case never:
                assert_never(never)
        return keep

    def _no_call(self, request: NodeRequest, path: str) -> bool:
        """Answer what is no call of an enabled wire: a stray client, or a node of an unknown version."""
        fleet = _FLEET.fullmatch(path)
        if fleet is not None and request.message.method == "POST":
            self.stray(Reason.UNSUPPORTED.value)
            wire = Wire.REST_V0 if fleet[1] else Wire.HTTP_V1
            log.info("no such Fleet method on this listener", path=path, peer=request.connection.peer)
            return self._render(
                request, wire, Reason.UNSUPPORTED, BY_PATH.get(fleet[2]), self._receiver.request_id()
            )
        status, more = (405, b"allow: POST\r\n") if fleet is not None else (404, b"")
        self.stray(str(status))
        if request.transport is not None:
            text = HTTPStatus(status).phrase.encode()
            head = _STATUS_LINE[status] + _PLAIN % len(text) + more + b"connection: close\r\n\r\n"
            request.transport.write(head if request.message.method == "HEAD" else head + text)
        return False

    def _drop(self, request: NodeRequest) -> bool:
        """Close without an answer, and with a reset: a FIN could pass for the end of one."""
        request.connection.reset()
        return False

    # -- small things -------------------------------------------------------------------------------

    def _keeps(self, request: NodeRequest, reply: Reply | None = None) -> bool:
        """Return whether the connection lives on; an answer without framing ends with it."""
        framed = reply is None or reply.payload.size is not None or request.message.version >= HttpVersion11
        message = request.message
        # What follows a wish to upgrade, which is always refused, is not to be taken for a request.
        if message.should_close or message.upgrade or self.draining:
            return False
        # Whoever sent a broken call may see its end elsewhere.
        fault = request.connection.excess if request.call is None else request.call.fault
        return framed and fault is None

    def _connection(self, request: NodeRequest, *, keep: bool) -> bytes:
        """Return the Connection header, if the default would mislead, and the end of the head."""
        if not keep:
            return b"connection: close\r\n\r\n"
        return _CRLF if request.message.version >= HttpVersion11 else b"connection: keep-alive\r\n\r\n"

    def _end(
        self,
        call: Call,
        outcome: str,
        reply: Reply | None,
        *,
        sent: int = 0,
        refusal: Refusal | None = None,
        lost: bool = False,
    ) -> None:
        seconds = time.monotonic() - call.started
        source = reply.source if reply is not None else None
        call.end(Ending(outcome, seconds=seconds, source=source, sent=sent, refusal=refusal, lost=lost))


def _is_chunked(request: NodeRequest, size: int | None) -> bool:
    """Return whether an answer is chunked; HTTP/1.0 may have to read to the end instead."""
    return size is None and request.message.version >= HttpVersion11


def _framing(request: NodeRequest, size: int | None) -> bytes:
    """Return the framing header of an answer."""
    if size is not None:
        return b"content-length: %d\r\n" % size
    return b"transfer-encoding: chunked\r\n" if _is_chunked(request, size) else b""


def _open_transport(request: NodeRequest) -> asyncio.WriteTransport:
    transport = request.transport
    if transport is None or transport.is_closing():
        raise NodeGone
    return transport
