"""gRPC: SuperNodes of flwr 1.23 to 1.39, `flwr.proto.Fleet`, and its adapter.

Messages pass as bytes, piece by piece as they come; nothing is parsed. gRPC writes the length of a message
before it, so an answer of which nobody knows the length is gathered first, and takes its share of the
worker's quota for that. So does what comes in the adapter's containers, in which the call stands at the end.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, assert_never

import structlog

from relay import bridge, dialect, quota
from relay.call import Payload, Wire
from relay.fleet import BY_GRPC, GRPC_SERVICE, Method
from relay.limits import Pace, Peers
from relay.refusal import NodeGone, Reason, Refusal
from relay.wires import grpc_adapter
from relay.wires.grpc_message import PREFIX, WHOLE, too_large
from relay.wires.grpc_request import OBJECTS, Receiver
from relay.wires.grpc_rpc import Rpc
from relay.wires.grpc_status import HEAD, NO_GRPC, NO_POST, UNIMPLEMENTED, broken, end, is_grpc, status
from relay.wires.http2 import Code

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from relay.call import Call, Metadata, Reply
    from relay.pipeline import Handler
    from relay.quota import Quota
    from relay.wires.http2_stream import Stream

log = structlog.get_logger("relay.wires.grpc")

#: What gRPC can count: Flower sets the same (`GRPC_MAX_MESSAGE_LENGTH`).
MOST_BYTES = 2**31 - 1
#: Most bytes of an answer's headers that are passed on: with the status they come to less than 8 KiB.
_MOST_TRAILING = 4096
#: Methods that ended with flwr 1.22: nodes of then are too old for every SuperLink that is served here.
_ANCIENT = frozenset({"CreateNode", "DeleteNode", "Ping", "PullTaskIns", "PushTaskRes", "Reconnect"})

_ADAPTER = grpc_adapter.PATH.encode()


class _CutError(Exception):
    """The answer broke off after its head was written."""


class GrpcFront:
    """The node-facing side of one listener.

    Attributes:
        limits: what nodes may cost.
        peers: counts what each peer has here, if that is limited.
        held: what long messages take their share of.
        stray: counts what was no call.
        in_flight: calls that have come and not ended.
        left: tasks of those whose node is gone.
        cutting: set it when calls are about to be cut.
        idle_timeout: seconds after which a node that takes nothing of its answer is given up.
    """

    def __init__(
        self,
        handlers: Mapping[tuple[Wire, Method], Handler],
        receiver: Receiver,
        held: Quota,
        *,
        idle_timeout: float,
        on_stray: Callable[[str], None],
        admit: Callable[[Call], Awaitable[None]] | None = None,
    ) -> None:
        """Serve `handlers`.

        Args:
            handlers: the composed chains; of wires that are gRPC.
            receiver: makes the calls.
            held: what long messages take their share of.
            idle_timeout: seconds after which a node that takes nothing of its answer is given up.
            on_stray: told about each call that is none of ours, with what it got.
            admit: finds out who calls, or raises Refusal, where that cannot wait for the chain: the adapter's
                calls must be received before it is known which chain is theirs.
        """
        self._receiver = receiver
        self._admit = admit
        self.limits = receiver.limits
        per_peer = self.limits.connections_per_peer
        self.peers = Peers(per_peer) if per_peer else None
        self.held = held
        self.idle_timeout = idle_timeout
        self.stray = on_stray
        self.in_flight = 0
        self.left: set[asyncio.Task[None]] = set()
        self.cutting = False
        self._adapted = {
            method: handler for (wire, method), handler in handlers.items() if wire is not Wire.GRPC
        }
        self._routes = {
            method.grpc.encode(): (method, handler)
            for (wire, method), handler in handlers.items()
            if wire is Wire.GRPC
        }

    def trusts(self, peer: str) -> bool:
        """Return whether a peer is a proxy that is believed."""
        return self._receiver.forwarding.trusts(peer)

    # -- one stream ---------------------------------------------------------------------------------

    async def serve(self, stream: Stream) -> None:
        """Answer one request. Never raises but when its task is cancelled."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is a coroutine
        rpc = Rpc(self, stream, task)
        stream.on_gone = rpc.gone
        try:
            if stream.gone:
                raise NodeGone
            if stream.connection.full:
                # One that only asks on would fill the memory.
                await stream.caught_up(self._pace(), self.idle_timeout)
            await self._serve(rpc, stream)
        except NodeGone:
            self._lost(rpc)
        except asyncio.CancelledError:
            self._lost(rpc)
            raise
        finally:
            stream.on_gone = None
            rpc.close()

    def _lost(self, rpc: Rpc) -> None:
        """Take note that the node is gone, or the call cut."""
        if rpc.call is None:
            self.stray("node_gone")  # no chain has run that would count it
        rpc.end("node_gone", lost=rpc.reply is not None)
        rpc.stream.reset(Code.REFUSED_STREAM)  # one that is slow is UNAVAILABLE to itself, as over HTTP

    async def _serve(self, rpc: Rpc, stream: Stream) -> None:
        asked = stream.asked
        if asked.method != b"POST" or not is_grpc(asked.fields):
            posted = asked.method == b"POST"
            self.stray("415" if posted else "405")
            stream.head(NO_GRPC if posted else NO_POST, last=True)
            return
        route = self._routes.get(asked.path)
        if route is not None:
            method, handler = route
            call = self._receiver.call(stream, Wire.GRPC, method)
            rpc.begin(call)
            await self._answer(rpc, call, handler)
        elif asked.path == _ADAPTER and self._adapted:
            await self._adapter(rpc, stream)
        else:
            self._no_call(stream, asked.path.decode("utf-8", "replace"))

    async def _adapter(self, rpc: Rpc, stream: Stream) -> None:
        # It may turn out to be any of them, and is not longer than this one.
        call = self._receiver.call(stream, Wire.GRPC_ADAPTER, Method.PUSH_OBJECT)
        try:
            if call.fault is not None:
                raise call.fault
            if self._admit is not None:
                await self._admit(call)
            if call.payload.data is None:
                call.payload = Payload(body=rpc.growing(call, call.payload))
            container = await call.payload.read(MOST_BYTES)
        except Refusal as refusal:
            self.stray(refusal.reason.value)
            self._render(stream, call.wire, refusal.reason, None)
            return
        method, name, data = grpc_adapter.unpack(container)
        del container  # it may be long, and the call takes its time
        if method is None:
            self._unsupported(stream, Wire.GRPC_ADAPTER, name)
            return
        self._receiver.turns_out(call, stream, method, data)
        rpc.begin(call)
        limit = self.limits.bodies[method]
        if len(data) > limit:
            call.fault = too_large(len(data), limit)
        elif method in OBJECTS:
            try:
                # It is here already, but what is made of it must wait.
                await rpc.grow(call, max(quota.GUESS, len(data)))
            except Refusal as refusal:
                call.fault = refusal
        await self._answer(rpc, call, self._adapted[method])

    async def _answer(self, rpc: Rpc, call: Call, handler: Handler) -> None:
        """Answer the call, by the chain or by what the dialect says. Raises NodeGone."""
        if self.peers is not None and self.trusts(rpc.stream.connection.peer):
            self.peers.enter_call(call)
        try:
            await self._receive(rpc, call)
            reply = rpc.reply = await handler(call)
            outcome, sent = await self._write(rpc, call, reply)
        except Refusal as refusal:
            rpc.end(refusal.reason.value, refusal=refusal)
            self._refused(rpc, call, refusal.reason)
        except NodeGone:
            if rpc.answering or rpc.stream.gone:
                raise
            # Who is taken for gone, and is not, shall live on.
            rpc.end("node_gone", lost=rpc.reply is not None)
            self._refused(rpc, call, Reason.INTERNAL)
        except _CutError as error:
            rpc.end("cut", lost=True)
            log.warning(
                "answer broke off", method=call.method.rpc, request_id=call.request_id, error=str(error)
            )
            # No reset: of one in mid-answer nginx makes INTERNAL, for which a node gives its message up.
            if not rpc.stream.gone:
                rpc.stream.head(broken(call.request_id), last=True)
        except Exception as error:
            # A bug of ours must not reach a node as UNKNOWN.
            log.exception("call failed", method=call.method.rpc, request_id=call.request_id)
            rpc.end(Reason.INTERNAL.value, refusal=Refusal(Reason.INTERNAL, repr(error)))
            self._refused(rpc, call, Reason.INTERNAL)
        else:
            rpc.end(outcome, sent=sent)

    async def _receive(self, rpc: Rpc, call: Call) -> None:
        """Read a small message whole."""
        payload = call.payload
        if call.fault is not None or payload.data is not None:
            return
        most = self.limits.bodies[call.method] if payload.size is None else payload.size
        if most > WHOLE:
            return
        before = asyncio.get_running_loop().time()
        try:
            await payload.read(WHOLE)
        except Refusal as refusal:
            call.fault = refusal
        except (NodeGone, asyncio.CancelledError):
            self.stray("node_gone")  # no chain has run that would count it
            raise
        # A node's patience begins when it has sent its call.
        call.deadline += asyncio.get_running_loop().time() - before

    # -- answers ------------------------------------------------------------------------------------

    async def _write(self, rpc: Rpc, call: Call, reply: Reply) -> tuple[str, int]:
        """Write the reply; return its outcome, and the bytes of its body.

        Raises:
            Refusal: the answer is of no use, and nothing of it was written.
            NodeGone: the node left, or took next to nothing.
            _CutError: the body broke off.
        """
        stream, payload = rpc.stream, reply.payload
        trailing = bridge.to_fields(reply.metadata) if reply.metadata else []
        if trailing and (dropped := bridge.bounded_fields(trailing, _MOST_TRAILING)):
            log.info(
                "headers of an answer are too long for gRPC", dropped=dropped, request_id=call.request_id
            )
        if reply.status != 200 or payload.data is not None or payload.size is None or rpc.left:
            data = await self._whole(rpc, call, payload)
            if rpc.left:
                return "node_gone", 0
            rpc.answering = True
            if reply.status != 200:
                trailing.append((b"x-request-id", call.request_id.encode("ascii")))
                code, details = _status(reply.status, data)
                stream.head(status(code, details, trailing), last=True)
                return f"upstream_{reply.status}", 0
            start = self._start(call, len(data))
            trailers = end(trailing)
            if len(data) <= WHOLE and stream.answer(HEAD, start + data, trailers):
                return "ok", len(data)
            stream.head(HEAD)
            await stream.send(start, data, pace=self._pace(), idle_timeout=self.idle_timeout)
            stream.head(trailers, last=True)
            return "ok", len(data)
        if payload.size > MOST_BYTES:
            raise too_large(payload.size, MOST_BYTES)
        rpc.answering = True
        stream.head(HEAD)
        sent = await self._pass_on(rpc, call, payload, payload.size)
        stream.head(end(trailing), last=True)
        return "ok", sent

    async def _pass_on(self, rpc: Rpc, call: Call, payload: Payload, size: int) -> int:
        """Write a body of known length as it comes."""
        sent, pace = 0, self._pace()
        start = self._start(call, size)
        try:
            async for piece in payload.stream():
                sent += len(piece)
                if sent > size:
                    break
                if start:
                    await rpc.stream.send(start, piece, pace=pace, idle_timeout=self.idle_timeout)
                    start = b""
                else:
                    await rpc.stream.send(piece, pace=pace, idle_timeout=self.idle_timeout)
        except NodeGone:
            raise
        except Refusal as refusal:
            raise _CutError(str(refusal)) from refusal
        except Exception as error:
            # Whatever it was: the head is written, so nothing else may follow it.
            log.exception("call failed", method=call.method.rpc, request_id=call.request_id)
            raise _CutError(repr(error)) from error
        if sent != size:
            raise _CutError(f"{sent} bytes of {size} came")
        if start:
            await rpc.stream.send(start, pace=pace, idle_timeout=self.idle_timeout)
        return sent

    async def _whole(self, rpc: Rpc, call: Call, payload: Payload) -> bytes:
        """Return the answer's bytes. Raises Refusal."""
        data, size = payload.data, payload.size
        if data is None:
            if size is None:
                payload = Payload(body=rpc.growing(call, payload))
            else:
                await rpc.grow(call, size)
            data = await payload.read(MOST_BYTES)
            if size not in (None, len(data)):
                raise Refusal(Reason.UPSTREAM_BAD_ANSWER, f"{len(data)} bytes of {size} came", by="wire")
        return data

    def _start(self, call: Call, size: int) -> bytes:
        """Return what stands before an answer of so many bytes."""
        if call.wire is Wire.GRPC:
            return PREFIX.pack(0, size)
        before = grpc_adapter.head(call.method, size)
        return PREFIX.pack(0, len(before) + size) + before

    def _refused(self, rpc: Rpc, call: Call, reason: Reason) -> None:
        if not rpc.left:
            trailing = [(b"x-request-id", call.request_id.encode("ascii"))]
            self._render(rpc.stream, call.wire, reason, call.method, trailing)

    def _render(
        self,
        stream: Stream,
        wire: Wire,
        reason: Reason,
        method: Method | None,
        trailing: Metadata | None = None,
    ) -> None:
        """Tell the node what the dialect says."""
        if stream.gone:
            return
        trailing = trailing or []
        match dialect.answer(wire, reason, method):
            case dialect.Empty() | dialect.Hold():
                data = grpc_adapter.head(method, 0) if method and wire is Wire.GRPC_ADAPTER else b""
                message = PREFIX.pack(0, len(data)) + data
                if not stream.answer(HEAD, message, end(trailing)):
                    stream.reset(Code.REFUSED_STREAM)  # it takes not even that
            case dialect.Abort(code):
                # Never the detail: flwr gives up on UNAVAILABLE that speaks of a failed handshake.
                stream.head(status(code, reason.value, trailing), last=True)
            case dialect.Status() | dialect.Drop():  # no gRPC wire is told these
                stream.head(status("UNAVAILABLE", reason.value, trailing), last=True)
            case never:
                assert_never(never)

    def _no_call(self, stream: Stream, path: str) -> None:
        """Answer what is no call of an enabled wire: a stray client, or a node of an unknown version."""
        if path == grpc_adapter.PATH:
            self._unsupported(stream, Wire.GRPC_ADAPTER, path)
        elif path.startswith(GRPC_SERVICE):
            self._unsupported(stream, Wire.GRPC, path, BY_GRPC.get(path))
        else:
            self.stray("unimplemented")
            stream.head(UNIMPLEMENTED, last=True)

    def _unsupported(self, stream: Stream, wire: Wire, name: str, method: Method | None = None) -> None:
        """Answer a node of an unknown version, or on the wrong port."""
        self.stray(Reason.UNSUPPORTED.value)
        ancient = name.rpartition("/")[2].removesuffix("Request") in _ANCIENT
        log.info(
            "a node of flwr before 1.23, which no SuperLink behind this relay understands"
            if ancient
            else "no such Fleet method on this listener",
            path=name[:100],
            peer=stream.connection.peer,
        )
        self._render(stream, wire, Reason.UNSUPPORTED, method)

    def _pace(self) -> Pace:
        return Pace(self.limits.min_rate, self.limits.rate_window)


def _status(status: int, data: bytes) -> tuple[str, str]:
    """Return the status that means this to a gRPC node, and its details."""
    code = bridge.code_of(status)
    if code == "UNAVAILABLE":
        return code, f"upstream {status}"  # see `_render`
    return code, bridge.details(data)
