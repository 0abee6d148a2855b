"""gRPC: SuperNodes of flwr 1.23 to 1.39, `flwr.proto.Fleet`.

Messages pass as bytes; nothing is parsed. gRPC hands them over whole, so a call that may carry an object
takes its share of the worker's quota first, once `auth` has let it in: a pushed one before it is received,
which holds its sender up.
"""

from __future__ import annotations

import os
import re
import time
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any, assert_never

import grpc
import structlog

from relay import bridge, dialect, quota
from relay.call import Call, Payload, Reply, Wire
from relay.fleet import BY_GRPC, GRPC_SERVICE, Kind, Method
from relay.refusal import Reason, Refusal
from relay.wires import client_certificate, grpc_adapter
from relay.wires.forwarded import NO_CLAIMS, Claims
from relay.wires.grpc_message import Incoming, Message, Messages
from relay.wires.grpc_rpc import Rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from grpc import aio

    from relay.call import Metadata
    from relay.pipeline import Handler
    from relay.quota import Quota
    from relay.wires.forwarded import Forwarding
    from relay.wires.grpc_tasks import RpcTask

log = structlog.get_logger("relay.wires.grpc")

#: What gRPC can count: Flower sets the same (`GRPC_MAX_MESSAGE_LENGTH`).
MOST_BYTES = 2**31 - 1
#: Seconds that nodes wait: 5 for a heartbeat (flwr `HEARTBEAT_CALL_TIMEOUT`), for ever else. A push session
#: lives for 180 s, and longer than that nobody needs an object.
_HEARTBEAT_SECONDS = 5.0
_OBJECT_SECONDS = 180.0
#: We give up a little before the node does, so that it gets our answer and not its own timeout.
_SHARE = 0.95
#: Most bytes of an answer's headers that are passed on: with the status they come to less than 8 KiB.
_MOST_TRAILING = 4096

_OBJECTS = frozenset({Method.PULL_OBJECT, Method.PUSH_OBJECT})
#: Methods whose call takes a share of the quota before its message is received.
_LONG = _OBJECTS | {Method.PUSH_MESSAGES}
_VIA = (b"via", b"2 flwr-relay")
_OURS: Metadata = [bridge.CONTENT_TYPE, (b"accept", bridge.CONTENT_TYPE[1]), _VIA]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TAKEN = client_certificate.NAMES | frozenset(
    {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-request-id"}
)
#: Methods that ended with flwr 1.22: nodes of then are too old for every SuperLink that is served here.
_ANCIENT = frozenset({"CreateNode", "DeleteNode", "Ping", "PullTaskIns", "PushTaskRes", "Reconnect"})


class GrpcFront:
    """The node-facing side of one listener, as grpc.aio's generic handler.

    Attributes:
        stray: counts what was no call.
        held: what long messages take their share of.
        messages: those that are waited for.
        in_flight: calls that have come and not ended.
        left: those of them whose node is gone.
        cutting: set it when calls are about to be cut.
    """

    def __init__(
        self,
        handlers: Mapping[tuple[Wire, Method], Handler],
        forwarding: Forwarding,
        held: Quota,
        messages: Messages,
        *,
        tls: bool,
        on_stray: Callable[[str], None],
        admit: Callable[[Call], Awaitable[None]] | None = None,
        withheld: frozenset[bytes] = frozenset(),
    ) -> None:
        """Serve `handlers`.

        Args:
            handlers: the composed chains; of wires that are gRPC.
            forwarding: what to believe of proxies.
            held: what long messages take their share of.
            messages: what they must keep to.
            tls: whether the listener is encrypted.
            on_stray: told about each call that is none of ours, with what it got.
            admit: finds out who calls, or raises Refusal, where that cannot wait for the chain: the adapter's
                calls must be received before it is known which chain is theirs.
            withheld: names in lower case of metadata that no call shall have.
        """
        self._not_passed = _TAKEN | withheld
        self._forwarding = forwarding
        self.held = held
        self.messages = messages
        self._tls = tls
        self._admit = admit
        self.stray = on_stray
        self.in_flight = 0
        self.left: set[RpcTask] = set()
        self.cutting = False
        self._id_start = os.urandom(6).hex()
        self._ids = count(1)
        self._adapted = {
            method: handler for (wire, method), handler in handlers.items() if wire is not Wire.GRPC
        }
        # They are unary calls all the same: on the wire there is no difference, and here a message is
        # received when we want it.
        self._methods = {
            method.grpc: grpc.stream_unary_rpc_method_handler(partial(self._one, method, handler))
            for (wire, method), handler in handlers.items()
            if wire is Wire.GRPC
        }
        if self._adapted:
            self._methods[grpc_adapter.PATH] = grpc.stream_unary_rpc_method_handler(self._adapter)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return what serves this path; None if it is not Flower's, which gRPC answers with UNIMPLEMENTED."""
        known = self._methods.get(details.method)
        if known is not None:
            return known
        path: str = details.method
        if path.startswith(GRPC_SERVICE) or path == grpc_adapter.PATH:
            return grpc.stream_unary_rpc_method_handler(partial(self._unknown, path))
        self.stray("unimplemented")
        return None

    # -- one call -----------------------------------------------------------------------------------

    async def _one(
        self,
        method: Method,
        handler: Handler,
        _: AsyncIterator[bytes],
        context: aio.ServicerContext[bytes, bytes],
    ) -> bytes:
        rpc = Rpc(self, context)
        call = self._call(rpc, Wire.GRPC, method, context)
        rpc.begin(call)
        return await self._answer(rpc, call, handler, context)

    async def _adapter(self, _: AsyncIterator[bytes], context: aio.ServicerContext[bytes, bytes]) -> bytes:
        rpc = Rpc(self, context)
        # It may turn out to be any of them, and is not longer than this one.
        call = self._call(rpc, Wire.GRPC_ADAPTER, Method.PUSH_OBJECT, context)
        try:
            if self._admit is not None:
                await self._admit(call)
            container = await call.payload.read(MOST_BYTES)
        except Refusal as refusal:
            self.stray(refusal.reason.value)
            return await self._render(call.wire, refusal.reason, None, context)
        method, name, data = grpc_adapter.unpack(container)
        if method is None:
            return await self._unsupported(Wire.GRPC_ADAPTER, name, context)
        call.method, call.payload = method, Payload(data)
        call.deadline = time.monotonic() + _SHARE * _patience(call.wire, method, context.time_remaining())
        rpc.begin(call)
        limit = self.messages.limits.bodies[method]
        if len(data) > limit:
            detail = f"{len(data)} bytes, at most {limit}"
            call.fault = Refusal(Reason.TOO_LARGE, detail, by="wire", sent=False)
        try:
            # It is here already, but what is made of it must wait.
            await rpc.grow(max(quota.GUESS, len(data)) if method in _OBJECTS else len(data))
        except Refusal as refusal:
            call.fault = refusal
        return await self._answer(rpc, call, self._adapted[method], context)

    async def _answer(
        self, rpc: Rpc, call: Call, handler: Handler, context: aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        """Answer the call, or abort it as the dialect says."""
        try:
            if call.method.kind is Kind.PULL:
                rpc.outlast(call)
            data = await self._ask(rpc, call, handler)
        except Refusal as refusal:
            return await self._refused(rpc, call, refusal, context)
        except Exception as error:
            # A bug of ours must not reach a node as UNKNOWN.
            log.exception("call failed", method=call.method.rpc, request_id=call.request_id)
            return await self._refused(rpc, call, Refusal(Reason.INTERNAL, repr(error)), context)
        reply = rpc.reply
        assert reply is not None  # noqa: S101 - it has just been asked for its bytes
        if rpc.left:
            return b""  # gRPC knows that nobody waits for it
        rpc.sent = len(data)
        trailing = bridge.to_metadata(reply.metadata)
        if dropped := bridge.bounded(trailing, _MOST_TRAILING):
            log.info(
                "headers of an answer are too long for gRPC", dropped=dropped, request_id=call.request_id
            )
        if reply.status != 200:
            rpc.outcome = f"upstream_{reply.status}"
            trailing.append(("x-request-id", call.request_id))
            await context.abort(*_status(reply.status, data), tuple(trailing))
        rpc.outcome = "ok"
        if trailing:
            context.set_trailing_metadata(tuple(trailing))
        return data if call.wire is Wire.GRPC else grpc_adapter.pack(call.method, data)

    async def _ask(self, rpc: Rpc, call: Call, handler: Handler) -> bytes:
        """Return the answer's bytes. Raises what the chain raises."""
        try:
            reply = rpc.reply = await handler(call)
            return await self._whole(rpc, reply)
        finally:
            call.payload.close()
            if rpc.reply is not None:
                rpc.reply.payload.close()

    async def _whole(self, rpc: Rpc, reply: Reply) -> bytes:
        """Return the answer's bytes. Raises Refusal: nothing has been sent yet, so the node can be told."""
        payload, size = reply.payload, reply.payload.size
        data = payload.data
        if data is None:
            if size is None:
                payload = Payload(body=rpc.growing(payload))
            elif size <= rpc.share.size:
                rpc.settle(size)
            else:
                await rpc.grow(size)
            data = await payload.read(MOST_BYTES)
            if size not in (None, len(data)):
                raise Refusal(Reason.UPSTREAM_BAD_ANSWER, f"{len(data)} bytes of {size} came", by="wire")
        if len(data) > quota.GUESS:
            rpc.settle(len(data))
        return data

    async def _refused(
        self, rpc: Rpc, call: Call, refusal: Refusal, context: aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        rpc.outcome, rpc.refusal = refusal.reason.value, refusal
        if rpc.left:
            return b""
        rpc.reply = None
        trailing = (("x-request-id", call.request_id),)
        return await self._render(call.wire, refusal.reason, call.method, context, trailing)

    async def _render(
        self,
        wire: Wire,
        reason: Reason,
        method: Method | None,
        context: aio.ServicerContext[bytes, bytes],
        trailing: tuple[tuple[str, str], ...] = (),
    ) -> bytes:
        """Tell the node what the dialect says."""
        match dialect.answer(wire, reason, method):
            case dialect.Empty() | dialect.Hold():
                context.set_trailing_metadata(trailing)
                return grpc_adapter.pack(method, b"") if method and wire is Wire.GRPC_ADAPTER else b""
            case dialect.Abort(code):
                # Never the detail: flwr gives up on UNAVAILABLE that speaks of a failed handshake.
                await context.abort(grpc.StatusCode[code], reason.value, trailing)
            case dialect.Status() | dialect.Drop():  # no gRPC wire is told these
                await context.abort(grpc.StatusCode.UNAVAILABLE, reason.value, trailing)
            case never:
                assert_never(never)
        raise AssertionError

    async def _unknown(
        self, path: str, _: AsyncIterator[bytes], context: aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        wire = Wire.GRPC_ADAPTER if path == grpc_adapter.PATH else Wire.GRPC
        return await self._unsupported(wire, path, context, BY_GRPC.get(path))

    async def _unsupported(
        self,
        wire: Wire,
        name: str,
        context: aio.ServicerContext[bytes, bytes],
        method: Method | None = None,
    ) -> bytes:
        """Answer what is no call of an enabled wire: a node of an unknown version, or on the wrong port."""
        self.stray(Reason.UNSUPPORTED.value)
        ancient = name.rpartition("/")[2].removesuffix("Request") in _ANCIENT
        log.info(
            "a node of flwr before 1.23, which no SuperLink behind this relay understands"
            if ancient
            else "no such Fleet method on this listener",
            path=name[:100],
            peer=_address(context.peer()),
        )
        return await self._render(wire, Reason.UNSUPPORTED, method, context)

    # -- what a call is -----------------------------------------------------------------------------

    def _call(
        self,
        rpc: Rpc,
        wire: Wire,
        method: Method,
        context: aio.ServicerContext[bytes, bytes],
    ) -> Call:
        taken: dict[bytes, bytes] = {}
        metadata: Metadata = []
        not_passed = self._not_passed
        came = context.invocation_metadata() or ()
        size = longest = 0
        for pair in bridge.to_headers(came):
            name = pair[0]
            size += (length := len(name) + len(pair[1]))
            longest = max(longest, length)
            if name in not_passed:
                taken[name] = taken[name] + b"," + pair[1] if name in taken else pair[1]
            else:
                metadata.append(pair)
        given = taken.pop(b"x-request-id", b"")
        claims = NO_CLAIMS
        if taken:
            claims = Claims(
                taken.get(b"forwarded", b""),
                taken.get(b"x-forwarded-for", b""),
                taken.get(b"x-forwarded-proto", b""),
                taken.get(b"x-forwarded-host", b""),
            )
        sender = context.peer()
        self.messages.arrivals.head(sender, size)
        direct = _address(sender)
        peer, way = self._forwarding.resolve(direct, b"", claims, tls=self._tls)
        shown = taken.get(self._forwarding.certificate_header, b"")
        request_id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else self._new_id()
        metadata += [pair for pair in way if pair[1]]
        metadata.append((b"x-request-id", request_id.encode("ascii")))
        metadata += _OURS
        remaining = context.time_remaining()
        rpc.patient = remaining is None
        body = Incoming(self.messages, rpc, context, sender, self.messages.limits.bodies[method])
        body.waits = wire is Wire.GRPC and method in _LONG
        return Call(
            method,
            wire,
            metadata,
            Message(body),
            peer=peer,
            request_id=request_id,
            started=rpc.started,
            deadline=rpc.started + _SHARE * _patience(wire, method, remaining),
            fault=self._too_much(len(came), longest, size),
            certificate=self._forwarding.certificate(direct, shown, None) if shown else None,
        )

    def _too_much(self, count: int, longest: int, size: int) -> Refusal | None:
        limits = self.messages.limits
        if count <= limits.header_count and longest <= limits.header_size and size <= limits.head_size:
            return None
        detail = f"{count} headers of {size} bytes, the longest of {longest}: see limits.header_count"
        return Refusal(Reason.TOO_LARGE, detail, by="wire", sent=False)

    def _new_id(self) -> str:
        return f"{self._id_start}-{next(self._ids):x}"


def _patience(wire: Wire, method: Method, remaining: float | None) -> float:
    """Return the seconds that a node may be kept waiting, at most what it says itself."""
    if method.kind is Kind.HEARTBEAT:
        own = _HEARTBEAT_SECONDS
    elif method in _OBJECTS or (wire is Wire.GRPC_ADAPTER and method.kind is not Kind.PULL):
        own = _OBJECT_SECONDS  # the adapter's nodes survive no better answer than a late one
    else:
        own = dialect.HOLD_SECONDS
    return own if remaining is None else min(own, remaining)


def _status(status: int, data: bytes) -> tuple[Any, str]:
    """Return the status that means this to a gRPC node, and its details."""
    code = grpc.StatusCode[bridge.code_of(status)]
    if code is grpc.StatusCode.UNAVAILABLE:
        return code, f"upstream {status}"  # see `_render`
    return code, bridge.details(data)


@lru_cache(maxsize=4096)
def _address(peer: str) -> str:
    """Take scheme and port off a peer: `ipv4:192.0.2.7:4711`, `ipv6:%5B2001:db8::7%5D:4711`."""
    scheme, _, rest = peer.partition(":")
    if scheme == "ipv6":
        return rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0].strip("[]")
    return rest.rpartition(":")[0] if scheme == "ipv4" else ""
