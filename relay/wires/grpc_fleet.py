"""gRPC: SuperNodes of flwr 1.23 to 1.39, `flwr.proto.Fleet`.

Messages pass as bytes; nothing is parsed. gRPC hands them over whole, so a call that may carry an object
takes its share of the worker's quota first: a pushed one before a byte was read, which holds its sender up.
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
from relay.call import Call, Ending, Payload, Reply, Source, Wire
from relay.fleet import BY_GRPC, GRPC_SERVICE, Kind, Method
from relay.refusal import Reason, Refusal
from relay.wires import client_certificate, grpc_adapter
from relay.wires.forwarded import NO_CLAIMS, Claims

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from grpc import aio

    from relay.call import Metadata
    from relay.pipeline import Handler
    from relay.quota import Quota
    from relay.wires.forwarded import Forwarding

log = structlog.get_logger("relay.wires.grpc")

#: What gRPC can count: Flower sets the same (`GRPC_MAX_MESSAGE_LENGTH`).
MOST_BYTES = 2**31 - 1
#: Seconds that nodes wait: 5 for a heartbeat (flwr `HEARTBEAT_CALL_TIMEOUT`), for ever else. A push session
#: lives for 180 s, and longer than that nobody needs an object.
_HEARTBEAT_SECONDS = 5.0
_OBJECT_SECONDS = 180.0
#: We give up a little before the node does, so that it gets our answer and not its own timeout.
_SHARE = 0.95
#: Longest text of a status that is passed on: it travels in a header.
_MOST_DETAILS = 4096

_OBJECTS = frozenset({Method.PULL_OBJECT, Method.PUSH_OBJECT})
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
        in_flight: calls that have come and not ended.
        cutting: set it when calls are about to be cut.
    """

    def __init__(
        self,
        handlers: Mapping[tuple[Wire, Method], Handler],
        forwarding: Forwarding,
        held: Quota,
        *,
        bodies: Mapping[Method, int],
        tls: bool,
        on_stray: Callable[[str], None],
    ) -> None:
        """Serve `handlers`.

        Args:
            handlers: the composed chains; of wires that are gRPC.
            forwarding: what to believe of proxies.
            held: what long messages take their share of.
            bodies: longest request of each method, in bytes.
            tls: whether the listener is encrypted.
            on_stray: told about each call that is none of ours, with what it got.
        """
        self._forwarding = forwarding
        self.held = held
        self._bodies = bodies
        self._tls = tls
        self.stray = on_stray
        self.in_flight = 0
        self.cutting = False
        self._id_start = os.urandom(6).hex()
        self._ids = count(1)
        self._adapted = {
            method: handler for (wire, method), handler in handlers.items() if wire is not Wire.GRPC
        }
        self._methods = {
            method.grpc: self._route(method, handler)
            for (wire, method), handler in handlers.items()
            if wire is Wire.GRPC
        }
        if self._adapted:
            self._methods[grpc_adapter.PATH] = grpc.unary_unary_rpc_method_handler(self._adapter)

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

    def _route(self, method: Method, handler: Handler) -> grpc.RpcMethodHandler:
        if method.kind is Kind.PUSH:
            # It is a unary call all the same: on the wire there is no difference, and here its message is
            # read when we want it.
            return grpc.stream_unary_rpc_method_handler(partial(self._push, method, handler))
        return grpc.unary_unary_rpc_method_handler(partial(self._ask, method, handler))

    # -- one call -----------------------------------------------------------------------------------

    async def _ask(
        self, method: Method, handler: Handler, request: bytes, context: aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        rpc = _Rpc(self, context)
        call = self._call(rpc, Wire.GRPC, method, request, context)
        if method is Method.PULL_OBJECT:
            await rpc.take()
        return await self._answer(rpc, call, handler, context)

    async def _push(
        self,
        method: Method,
        handler: Handler,
        requests: AsyncIterator[bytes],
        context: aio.ServicerContext[bytes, bytes],
    ) -> bytes:
        rpc = _Rpc(self, context)
        await rpc.take()
        request = await anext(aiter(requests), None)
        rpc.settle(len(request or b""))
        call = self._call(rpc, Wire.GRPC, method, request or b"", context)
        if request is None:
            call.fault = Refusal(Reason.MALFORMED, "no message, or one that gRPC refused", by="wire")
        return await self._answer(rpc, call, handler, context)

    async def _adapter(self, request: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        method, name, data = grpc_adapter.unpack(request)
        if method is None:
            return await self._unsupported(Wire.GRPC_ADAPTER, name, context)
        rpc = _Rpc(self, context)
        call = self._call(rpc, Wire.GRPC_ADAPTER, method, data, context)
        if method in _OBJECTS:
            # It is here already, but what is made of it must wait.
            await rpc.take(max(quota.GUESS, len(data)))
        return await self._answer(rpc, call, self._adapted[method], context)

    async def _answer(
        self, rpc: _Rpc, call: Call, handler: Handler, context: aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        """Answer the call, or abort it as the dialect says."""
        try:
            reply = rpc.reply = await handler(call)
            data = await self._whole(rpc, reply)
        except Refusal as refusal:
            return await self._refused(rpc, call, refusal, context)
        except Exception as error:
            # A bug of ours must not reach a node as UNKNOWN.
            log.exception("call failed", method=call.method.rpc, request_id=call.request_id)
            return await self._refused(rpc, call, Refusal(Reason.INTERNAL, repr(error)), context)
        finally:
            call.payload.close()
            if rpc.reply is not None:
                rpc.reply.payload.close()
        rpc.sent = len(data)
        trailing = bridge.to_metadata(reply.metadata)
        if reply.status != 200:
            rpc.outcome = f"upstream_{reply.status}"
            trailing.append(("x-request-id", call.request_id))
            await context.abort(*_status(reply.status, data), tuple(trailing))
        rpc.outcome = "ok"
        if trailing:
            context.set_trailing_metadata(tuple(trailing))
        return data if call.wire is Wire.GRPC else grpc_adapter.pack(call.method, data)

    async def _whole(self, rpc: _Rpc, reply: Reply) -> bytes:
        """Return the answer's bytes. Raises Refusal: nothing has been sent yet, so the node can be told."""
        payload, size = reply.payload, reply.payload.size
        data = payload.data
        if data is None:
            if size is not None:
                rpc.settle(size)
            data = await payload.read(MOST_BYTES)
            if size not in (None, len(data)):
                raise Refusal(Reason.UPSTREAM_BAD_ANSWER, f"{len(data)} bytes of {size} came", by="wire")
        if len(data) > quota.GUESS:
            rpc.settle(len(data))
        return data

    async def _refused(
        self, rpc: _Rpc, call: Call, refusal: Refusal, context: aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        rpc.outcome, rpc.refusal, rpc.reply = refusal.reason.value, refusal, None
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
        rpc: _Rpc,
        wire: Wire,
        method: Method,
        request: bytes,
        context: aio.ServicerContext[bytes, bytes],
    ) -> Call:
        taken: dict[bytes, bytes] = {}
        metadata: Metadata = []
        for pair in bridge.to_headers(context.invocation_metadata() or ()):
            name = pair[0]
            if name in _TAKEN:
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
        direct = _address(context.peer())
        peer, way = self._forwarding.resolve(direct, b"", claims, tls=self._tls)
        shown = taken.get(self._forwarding.certificate_header, b"")
        request_id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else self._new_id()
        metadata += [pair for pair in way if pair[1]]
        metadata.append((b"x-request-id", request_id.encode("ascii")))
        metadata += _OURS
        call = rpc.call = Call(
            method,
            wire,
            metadata,
            Payload(request),
            peer=peer,
            request_id=request_id,
            started=rpc.started,
            deadline=rpc.started + _SHARE * _patience(wire, method, context.time_remaining()),
            fault=self._fault(method, request),
            certificate=self._forwarding.certificate(direct, shown, None) if shown else None,
        )
        self.in_flight += 1
        return call

    def _fault(self, method: Method, request: bytes) -> Refusal | None:
        if len(request) <= self._bodies[method]:
            return None
        detail = f"{len(request)} bytes, at most {self._bodies[method]}"
        return Refusal(Reason.TOO_LARGE, detail, by="wire", sent=False)

    def _new_id(self) -> str:
        return f"{self._id_start}-{next(self._ids):x}"


class _Rpc:
    """One call of gRPC's: what becomes of it, and what it holds until its last byte has been sent."""

    __slots__ = ("_front", "_taken", "call", "outcome", "refusal", "reply", "sent", "started")

    def __init__(self, front: GrpcFront, context: aio.ServicerContext[bytes, bytes]) -> None:
        """Stand for the call of `context`."""
        self._front = front
        self._taken = 0
        self.call: Call | None = None
        self.outcome = ""
        self.refusal: Refusal | None = None
        self.reply: Reply | None = None
        self.sent = 0
        self.started = time.monotonic()
        context.add_done_callback(self._done)

    async def take(self, size: int = quota.GUESS) -> None:
        """Take a share of the quota, until the call has ended. A gRPC node waits for as long as it takes."""
        if not self._front.held.take_at_once(size):
            await self._front.held.take(size)
        self._taken = size

    def settle(self, size: int) -> None:
        """Hold as much as there really is."""
        self._taken = self._front.held.settle(self._taken, size)

    def _done(self, context: aio.ServicerContext[bytes, bytes]) -> None:
        if self._taken:
            self._front.held.give(self._taken)
        call, reply = self.call, self.reply
        if call is None:
            self._front.stray("node_gone")  # no chain has run that would count it
            return
        self._front.in_flight -= 1
        outcome, lost = self.outcome or Reason.INTERNAL.value, False
        if not context.done():  # the status was not sent
            outcome = "cancelled" if self._front.cutting else "node_gone"
            lost = reply is not None and reply.source is Source.UPSTREAM
        call.end(
            Ending(
                outcome,
                seconds=time.monotonic() - self.started,
                source=reply.source if reply is not None else None,
                sent=0 if lost else self.sent,
                refusal=self.refusal,
                lost=lost,
            )
        )


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
    return code, data[:_MOST_DETAILS].decode("utf-8", "replace")


@lru_cache(maxsize=4096)
def _address(peer: str) -> str:
    """Take scheme and port off a peer: `ipv4:192.0.2.7:4711`, `ipv6:%5B2001:db8::7%5D:4711`."""
    scheme, _, rest = peer.partition(":")
    if scheme == "ipv6":
        return rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0].strip("[]")
    return rest.rpartition(":")[0] if scheme == "ipv4" else ""
