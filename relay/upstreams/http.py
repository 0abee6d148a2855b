"""A SuperLink reached over HTTP/1.1: what HTTP v1 and legacy REST have in common.

An answer is awaited whole before a byte of it is passed on, whatever its framing: so a break in it is a clean
refusal, and what would end a node is seen. Only what may honestly be long is passed on while it comes, and
nodes of HTTP v1 survive a break in that.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
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

#: Longest answer to most methods: they are a few bytes. So much of any other is awaited without a count.
WHOLE = 64 * 1024
#: Longest answer that is awaited whole at all: one that lists objects takes 70 bytes for each of them.
LONGEST = 8 * 1024 * 1024
#: Most bytes of answers above WHOLE that a worker awaits at a time.
AWAITED = 64 * 1024 * 1024

#: Longer than LONGEST, they are passed on as they come. Others are no answers then.
_LONG = frozenset({Method.PULL_MESSAGES, Method.PULL_OBJECT, Method.GET_FAB})
#: Awaited up to LONGEST, and not only up to WHOLE, for all nodes; objects are for those that need it.
_AWAITED_LONG = frozenset({Method.PULL_MESSAGES, Method.PUSH_MESSAGES, Method.GET_RUN, Method.GET_FAB})
#: Their answers are never empty.
_NEVER_EMPTY = frozenset({Method.ACTIVATE_NODE, Method.GET_RUN, Method.GET_FAB})

#: Seconds for the rest of an answer that is of no use: its call waits, and another connection costs less.
_SOON = 0.5

_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds from the last byte of a request to its answer: heartbeats, and all else.

    Within them comes the head of any answer, and the end of one that is awaited whole, unless it is long.
    """

    response: float
    heartbeat: float


class Nodes(NamedTuple):
    """What the nodes of one wire make of an answer.

    Attributes:
        passes: statuses besides 200 that mean something to them, with the kinds that they are passed for.
        survive_cuts: whether they ask again for an object whose answer broke off after its head. If not, one
            is awaited whole up to LONGEST, for as long as pieces come.
    """

    passes: Mapping[int, frozenset[Kind]]
    survive_cuts: bool = True


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
        connection = self.pool.acquire_idle() or await self.pool.acquire()
        timeout = self._timeout(call)
        if timeout <= 0:
            self.pool.give_back(connection)
            raise Refusal(Reason.UPSTREAM_TIMEOUT, "no time is left to ask", by=self.pool.name, sent=False)
        await connection.exchange(head, call.payload, timeout)
        # The connection may carry another exchange as soon as its body was taken.
        status, content_type, headers = connection.status, connection.content_type, connection.headers
        try:
            nodes = self._nodes[call.wire]
            if self._judging:
                reason = judge(call.method, status, content_type, nodes.passes)
                if reason is not None:
                    await self._let_go(connection)
                    what = f"{status} {content_type[:60].decode('latin-1')!r}"
                    raise self._no(reason, call.method, what, status)
            data = connection.take()
            if data is None:
                payload = await self._payload(connection, call.method, nodes)
                data = payload.data
            else:
                payload = Payload(data)
            if self._judging and status == 200 and data is not None and not makes_sense(call.method, data):
                what = f"{len(data)} bytes that are no {call.method.response}"
                raise self._no(Reason.UPSTREAM_BAD_ANSWER, call.method, what, status)
        except BaseException:
            connection.close()
            raise
        return Reply(payload, Source.UPSTREAM, status=status, metadata=headers)

    async def _let_go(self, connection: Connection) -> None:
        """Read an answer that is of no use, if it is short and soon here: its connection is."""
        if connection.take() is None and (connection.size or AWAITED) <= WHOLE:
            with suppress(Refusal, TimeoutError):
                async with asyncio.timeout(_SOON):
                    if await connection.whole(WHOLE):
                        connection.take()

    async def _payload(self, connection: Connection, method: Method, nodes: Nodes) -> Payload:
        """Wrap a response body that is still arriving, whole if it shall not be passed on before."""
        size, most = connection.size, _most(method, nodes, connection.size)
        passed_on = method in _LONG or not self._judging
        if most and (size is None or size <= most):
            if size is None or size <= WHOLE:
                if await connection.whole(WHOLE):
                    return Payload(connection.take() or b"")
                if connection.received <= WHOLE:
                    raise self._late()
            if most > WHOLE and await self._await_long(connection, most, nodes, passed_on=passed_on):
                return Payload(connection.take() or b"")
        if passed_on:
            return Payload(body=ResponseBody(connection), size=size)
        what = f"more than {most} bytes"
        raise self._no(Reason.UPSTREAM_BAD_ANSWER, method, what, connection.status)

    async def _await_long(self, connection: Connection, most: int, nodes: Nodes, *, passed_on: bool) -> bool:
        """Await an answer of up to `most` bytes; return whether it is here, or else is to be passed on."""
        size = connection.size or most
        if self._awaited + size > AWAITED:
            if passed_on:
                return False
            raise Refusal(Reason.OVERLOADED, "too many long answers at a time", by=self.pool.name)
        self._awaited += size
        try:
            if await connection.whole(most, patient=not nodes.survive_cuts):
                return True
        finally:
            self._awaited -= size
        if connection.received <= most and not (passed_on and nodes.survive_cuts):
            raise self._late()
        return False

    def _late(self) -> Refusal:
        return Refusal(Reason.UPSTREAM_TIMEOUT, "no end of the answer in time", by=self.pool.name)

    def _head(self, call: Call) -> bytes:
        size = call.payload.size
        framing = _CHUNKED if size is None else b"content-length: %d\r\n\r\n" % size
        return b"\r\n".join((self._start[call.method], *map(b": ".join, call.metadata), framing))

    def _timeout(self, call: Call) -> float:
        own = self._timeouts.heartbeat if call.method.kind is Kind.HEARTBEAT else self._timeouts.response
        if call.payload.data is None:
            return own  # a node's patience begins anew when it has sent a long body
        return min(own, call.deadline - time.monotonic())

    def _no(self, reason: Reason, method: Method, what: str, status: int) -> Refusal:
        return Refusal(reason, f"{method.rpc} was answered {what}", by=self.pool.name, status=status)


def _most(method: Method, nodes: Nodes, size: int | None) -> int:
    """Return the bytes up to which an answer is awaited whole; 0 if it is passed on at once."""
    if method in _AWAITED_LONG:
        return LONGEST
    if method is not Method.PULL_OBJECT:
        return WHOLE
    if not nodes.survive_cuts:
        return LONGEST
    return 0 if size is None else WHOLE  # without a size it is likely to be long


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
    if not data:
        return method not in _NEVER_EMPTY
    if method is Method.ACTIVATE_NODE:
        return bool(uint(data, 1)) and well_formed(data)
    return method.kind in (Kind.PUSH, Kind.LEAVE) or well_formed(data)
