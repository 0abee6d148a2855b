"""A SuperLink reached over HTTP/1.1: what HTTP v1 and legacy REST have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from relay.upstreams.response_body import ResponseBody
from relay.wireformat import uint, well_formed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.call import Wire
    from relay.upstreams.connection import Connection
    from relay.upstreams.pool import Pool

CONTENT_TYPE = b"application/protobuf"

#: A declared answer of up to this size is awaited whole, so that a break in it is still a clean refusal.
WHOLE = 64 * 1024
#: Most bytes of longer answers that a worker awaits at a time; beyond that they are passed on as they come.
AWAITED = 64 * 1024 * 1024

_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds from the last byte of a request to the head of its answer: heartbeats, and all else."""

    response: float
    heartbeat: float


class Nodes(NamedTuple):
    """What the nodes of one wire make of an answer.

    Attributes:
        passes: statuses besides 200 that mean something to them, with the kinds that they are passed for.
        whole: longest answer, in bytes, that is awaited whole before a byte of it is passed on.
    """

    passes: Mapping[int, frozenset[Kind]]
    whole: int = WHOLE


class HttpUpstream:
    """A handler that sends a call to the SuperLink and returns its answer as it is.

    An answer that would end a node is no Reply: it becomes a Refusal that carries the original in its
    detail, and the dialect decides what the node is told.
    """

    def __init__(
        self,
        pool: Pool,
        prefix: str,
        timeouts: Timeouts,
        nodes: Mapping[Wire, Nodes],
        *,
        judging: bool = True,
    ) -> None:
        """Prepare the constant parts of each request.

        Args:
            pool: where connections come from.
            prefix: path before the method's, e.g. `/v1/fleet/`.
            timeouts: how long to wait for an answer.
            nodes: what the nodes of each wire that is carried make of an answer.
            judging: whether an answer that would end a node is refused; if not, any answer is passed on.
        """
        self.pool = pool
        self._timeouts = timeouts
        self._judging = judging
        self._nodes = nodes
        self._awaited = 0
        host = pool.target.authority.encode("ascii")
        self._start = {
            method: b"POST %b%b HTTP/1.1\r\nhost: %b" % (prefix.encode(), method.path.encode(), host)
            for method in Method
        }

    async def __call__(self, call: Call) -> Reply:
        """Send the call and return the SuperLink's answer; its body may still be arriving.

        Raises:
            Refusal: UPSTREAM_DOWN, UPSTREAM_TIMEOUT, OVERLOADED (no free connection),
                UPSTREAM_BAD_ANSWER or UPSTREAM_REJECTED (see `judge`), or what the node's body raises.
            NodeGone: the node left in the middle of its body.
        """
        head = self._head(call)
        connection = await self.pool.acquire()
        timeout = self._timeout(call)
        if timeout <= 0:
            self.pool.give_back(connection)
            raise Refusal(Reason.UPSTREAM_TIMEOUT, "no time is left to ask", by=self.pool.name, sent=False)
        await connection.exchange(head, call.payload, timeout)
        # The connection may carry another exchange as soon as its body was taken.
        status, content_type, headers = connection.status, connection.content_type, connection.headers
        try:
            nodes = self._nodes[call.wire]
            payload = await self._payload(connection, nodes.whole)
            if self._judging:
                self._check(call.method, status, content_type, payload.data, nodes.passes)
        except BaseException:
            connection.close()
            raise
        return Reply(payload, Source.UPSTREAM, status=status, metadata=headers)

    async def _payload(self, connection: Connection, whole: int) -> Payload:
        """Wrap the response body; a short one is awaited, so that a break in it becomes a refusal."""
        body = connection.take()
        if body is not None:
            return Payload(body)
        size = connection.size
        payload = Payload(body=ResponseBody(connection), size=size)
        if size is not None and size <= WHOLE:
            await payload.read(WHOLE)
        elif size is not None and size <= whole and self._awaited + size <= AWAITED:
            self._awaited += size
            try:
                await payload.read(size)
            finally:
                self._awaited -= size
        return payload

    def _head(self, call: Call) -> bytes:
        size = call.payload.size
        framing = _CHUNKED if size is None else b"content-length: %d\r\n\r\n" % size
        return b"\r\n".join((self._start[call.method], *map(b": ".join, call.metadata), framing))

    def _timeout(self, call: Call) -> float:
        own = self._timeouts.heartbeat if call.method.kind is Kind.HEARTBEAT else self._timeouts.response
        if call.payload.data is None:
            return own  # a node's patience begins anew when it has sent a long body
        return min(own, call.deadline - time.monotonic())

    def _check(
        self,
        method: Method,
        status: int,
        content_type: bytes,
        data: bytes | None,
        passes: Mapping[int, frozenset[Kind]],
    ) -> None:
        reason = judge(method, status, content_type, passes)
        if reason is not None:
            what = f"{status} {content_type[:60].decode('latin-1')!r}"
        elif status == 200 and data is not None and not makes_sense(method, data):
            reason = Reason.UPSTREAM_BAD_ANSWER
            what = f"{len(data)} bytes that are no {method.response}"
        else:
            return
        raise Refusal(reason, f"{method.rpc} was answered {what}", by=self.pool.name, status=status)


def judge(
    method: Method, status: int, content_type: bytes, passes: Mapping[int, frozenset[Kind]]
) -> Reason | None:
    """Say whether an upstream's answer may reach a node.

    Args:
        method: what was asked.
        status, content_type: of the answer.
        passes: statuses besides 200 that mean something to a node, with the kinds they are passed for.

    Returns:
        None if it may; else the reason by which the dialect answers:
        UPSTREAM_DOWN for 502, 503 and 504; OVERLOADED for 429; UPSTREAM_REJECTED if the SuperLink (or
        something before it) said no to a message of a run, which a node gives up and survives
        without a relay, too; UPSTREAM_BAD_ANSWER for the rest, error pages with status 200 included.
    """
    if status == 200:
        # To the letter: a legacy node does not take it with a parameter, and no SuperLink sends one.
        return None if content_type == CONTENT_TYPE else Reason.UPSTREAM_BAD_ANSWER
    if method.kind in passes.get(status, ()):
        return None
    if status in (502, 503, 504):
        return Reason.UPSTREAM_DOWN
    if status == 429:
        return Reason.OVERLOADED
    if status >= 400 and method.kind in (Kind.FETCH, Kind.PUSH, Kind.CONFIRM):
        return Reason.UPSTREAM_REJECTED
    return Reason.UPSTREAM_BAD_ANSWER


def makes_sense(method: Method, data: bytes) -> bool:
    """Return whether a body may reach a node, of those that would end it if it did not parse.

    Measured (docs/flower-compatibility.md): bytes that are no message end or silence a node on every method
    but the pushes and the ways out. An activation without a node id has it ask as node 0, which is
    answered with 401; a run or an app without content ends it, too.
    """
    if method is Method.ACTIVATE_NODE:
        return bool(uint(data, 1)) and well_formed(data)
    if not data:
        return method not in (Method.GET_RUN, Method.GET_FAB)
    return method.kind in (Kind.PUSH, Kind.LEAVE) or well_formed(data)
