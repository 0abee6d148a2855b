"""A SuperLink of flwr 1.23 to 1.39, which speaks gRPC: `flwr.proto.Fleet`.

Requests and answers pass as bytes; nothing is parsed. gRPC takes and gives messages whole, so what comes from
or goes to an HTTP node is gathered first; the policy `held` has made room for it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import structlog
from grpc import aio

from relay import bridge
from relay.call import Call, Payload, Reply, Source
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from relay.upstreams.channels import MOST_BYTES, Channels, connected
from relay.upstreams.http import CONTENT_TYPE, WHOLE, Nodes, Timeouts, judge, makes_sense
from relay.upstreams.http_v1 import NODES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.call import Metadata, Wire

#: An object comes whole or not at all, so its time includes its way: 1 GiB takes 86 s at 100 Mbit/s.
OBJECT_SECONDS = 120.0
#: A long answer goes to its node in pieces of this size.
PIECE = 256 * 1024

_OBJECTS = frozenset({Method.PULL_OBJECT, Method.PUSH_OBJECT})
#: How gRPC tells of a call that found no connection: it was with no server. These are texts of its core, so
#: they count only while there is still no connection; a text that changed makes repeats fewer, not wrong.
_NOT_CONNECTED = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
_TOO_LARGE = "message larger than max"
#: Statuses whose details say what happened on the way; those of others are the SuperLink's, not for a log.
_OF_THE_WAY = frozenset({"UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"})
_SHOWN = 300
#: Most bytes of headers that go to the SuperLink; gRPC adds some of its own, and takes 8 KiB.
_MOST_METADATA = 6144

log = structlog.get_logger("relay.upstreams.grpc")


class GrpcUpstream:
    """A handler that sends a call to the SuperLink and returns its answer as it is.

    A status that means something to the node is a Reply with the HTTP status that means the same, and the
    details as its body. Any other becomes a Refusal, just as for HTTP upstreams.
    """

    def __init__(
        self,
        channels: Channels,
        timeouts: Timeouts,
        *,
        judging: bool = True,
        nodes: Mapping[Wire, Nodes] = NODES,
    ) -> None:
        """Send by `channels`.

        Args:
            channels: to the SuperLink.
            timeouts: how long to wait for an answer.
            judging: whether an answer that would end a node is refused; if not, any answer is passed on.
            nodes: what the nodes of each wire that is carried make of an answer.
        """
        self.pool = channels
        self._timeouts = timeouts
        self._judging = judging
        self._nodes = nodes

    async def __call__(self, call: Call) -> Reply:
        """Send the call and return the SuperLink's answer.

        Raises:
            Refusal: UPSTREAM_DOWN, UPSTREAM_TIMEOUT, OVERLOADED, TOO_LARGE, UPSTREAM_BAD_ANSWER or
                UPSTREAM_REJECTED (see `judge`), or what the node's body raises.
            NodeGone: the node left in the middle of its body.
        """
        data = call.payload.data
        streamed = data is None
        if data is None:
            data = await call.payload.read(MOST_BYTES)
        timeout = self._timeout(call, streamed=streamed)
        if timeout <= 0:
            raise Refusal(Reason.UPSTREAM_TIMEOUT, "no time is left to ask", by=self.pool.name, sent=False)
        channel, stub = self.pool.lend(call.method)
        metadata = bridge.to_metadata(call.metadata)
        if dropped := bridge.bounded(metadata, _MOST_METADATA):
            log.warning(
                "headers of a call are too long for gRPC", dropped=dropped, request_id=call.request_id
            )
        asked = stub(data, metadata=metadata, timeout=timeout)
        try:
            answer = await asked
        except aio.AioRpcError as error:
            return self._failed(call, channel, error)
        self.pool.failure = None
        if self._judging and len(answer) <= WHOLE and not makes_sense(call.method, answer):
            what = f"{len(answer)} bytes that are no {call.method.response}"
            raise Refusal(
                Reason.UPSTREAM_BAD_ANSWER,
                f"{call.method.rpc} was answered {what}",
                by=self.pool.name,
                status=200,
            )
        # Flower says nothing in the initial metadata, and each look costs as much as all policies together.
        headers = _headers(await asked.trailing_metadata())
        headers.append(bridge.CONTENT_TYPE)
        long = call.method is Method.PULL_OBJECT and len(answer) > WHOLE
        payload = Payload(body=_Pieces(answer), size=len(answer)) if long else Payload(answer)
        return Reply(payload, Source.UPSTREAM, metadata=headers)

    def _timeout(self, call: Call, *, streamed: bool) -> float:
        if call.method.kind is Kind.HEARTBEAT:
            own = self._timeouts.heartbeat
        elif call.method in _OBJECTS:
            own = max(self._timeouts.response, OBJECT_SECONDS)
        else:
            own = self._timeouts.response
        # A node's patience begins anew when it has sent a long body.
        return own if streamed else min(own, call.deadline - time.monotonic())

    def _failed(self, call: Call, channel: aio.Channel, error: aio.AioRpcError) -> Reply:
        """Return the status as a reply if the node understands it; raise the Refusal that it is otherwise."""
        code, details = error.code().name, error.details() or ""
        status = bridge.STATUS[code]
        what = f"{call.method.rpc} was answered {code}"
        if code in _OF_THE_WAY:
            what += f" {details[:_SHOWN]!r}"
        if code == "UNAVAILABLE" and details.startswith(_NOT_CONNECTED) and not connected(channel):
            self.pool.failure = details[:_SHOWN]
            raise Refusal(Reason.UPSTREAM_DOWN, details[:_SHOWN], by=self.pool.name, sent=False) from error
        if code == "DEADLINE_EXCEEDED":
            raise Refusal(Reason.UPSTREAM_TIMEOUT, what, by=self.pool.name) from error
        if code == "RESOURCE_EXHAUSTED" and _TOO_LARGE in details:
            raise Refusal(Reason.TOO_LARGE, what, by=self.pool.name, status=413) from error
        if self._judging:
            reason = judge(call.method, status, CONTENT_TYPE, self._nodes[call.wire].passes)
            if reason is not None:
                raise Refusal(reason, what, by=self.pool.name, status=status) from error
        metadata = _headers(error.initial_metadata(), error.trailing_metadata())
        # Flower's details are JSON, those of others are not.
        content_type = b"application/json" if details.startswith("{") else b"text/plain; charset=utf-8"
        metadata.append((b"content-type", content_type))
        return Reply(Payload(details.encode()), Source.UPSTREAM, status=status, metadata=metadata)


class _Pieces:
    """An answer that is at hand, given to a wire piece by piece; see `relay.call.Body`."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        """Give `data`."""
        self._data = memoryview(data)
        self._at = 0

    async def read(self) -> bytes:
        piece = self._data[self._at : self._at + PIECE]
        self._at += len(piece)
        return cast("bytes", piece)  # a view, as of what comes from nodes: one copy of the object less

    def close(self) -> None:
        self._data = memoryview(b"")


def _headers(*received: bridge.GrpcMetadata | None) -> Metadata:
    """Return the headers of an answer, but for its request id: the node gets the relay's own."""
    headers = [pair for metadata in received if metadata for pair in bridge.to_headers(metadata)]
    return [pair for pair in headers if pair[0] != b"x-request-id"]
