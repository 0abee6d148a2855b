"""Refuse a call that is broken: what the wire found, and bytes that no SuperNode sends.

A request is sound if it is protobuf and carries the ids that its method needs: a node id that is not 0, where
the method belongs to a run a run id that is not 0, and for objects an id of 64 lower-case hexadecimal digits.
Every flwr release from 1.23 to 1.42 sends that (`flwr/supernode/fleet_http_connection.py`,
`flwr/client/rest_client/connection.py`): SuperLinks never hand out node id 0, and a run id of 0 with a chance
of 2**-64 (`generate_rand_int_from_bytes`); an object id is the SHA-256 of the object.

Their serializers write the fields in one way, so one regular expression tells nearly every sound call. What
it does not know is read field by field, and any order, repetition or further field is as good.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from prometheus_client import Counter

from relay.call import Call, Reply, View
from relay.fleet import PEEK_BYTES, Kind, Method, peek
from relay.refusal import Reason, Refusal
from relay.wireformat import TruncatedError, fields, well_formed

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from relay.pipeline import Handler

FAULTS = Counter(
    "relay_validate_faults", "Calls whose bytes no SuperNode sends, refused or let pass", ["method", "fault"]
)

_OBJECT_ID = re.compile(r"[0-9a-f]{64}")


def _varint(size: int) -> bytes:
    """Return the expression of a varint of `size` bytes that is above zero."""
    return rb"[\x80-\xff]{9}\x01" if size == 10 else rb"[\x80-\xff]{%d}[\x01-\x7f]" % (size - 1)


# The longest come first: ids are random numbers of 64 bits.
_ID = b"(?:%b)" % b"|".join(_varint(size) for size in range(10, 0, -1))
_NODE = rb"\x0a(?:%b)" % b"|".join(rb"\x%02x\x08%b" % (size + 1, _varint(size)) for size in range(10, 0, -1))
_SHA256 = rb"\x40[0-9a-f]{64}"
_OBJECT = rb"%b\x10%b\x1a%b" % (_NODE, _ID, _SHA256)

#: What the serializers of all flwr releases write, for the methods that carry nothing but ids.
_PLAIN = {
    method: re.compile(expression, re.DOTALL).fullmatch
    for method, expression in {
        Method.DEACTIVATE_NODE: rb"\x08%b" % _ID,
        Method.UNREGISTER_NODE: rb"\x08%b" % _ID,
        Method.SEND_NODE_HEARTBEAT: rb"%b(?:\x11.{8})?" % _NODE,
        Method.PULL_MESSAGES: _NODE,
        Method.GET_RUN: rb"%b\x10%b" % (_NODE, _ID),
        Method.GET_FAB: rb"%b\x12%b\x18%b" % (_NODE, _SHA256, _ID),
        Method.PULL_OBJECT: _OBJECT,
        Method.CONFIRM_MESSAGE_RECEIVED: _OBJECT,
    }.items()
}

#: How requests begin that carry more.
_BEGINS = {Method.PUSH_OBJECT: re.compile(_OBJECT).match, Method.PUSH_MESSAGES: re.compile(_NODE).match}


class Validate:
    """Raises the fault of a call, if it has one, and looks at the bytes of what has none."""

    name: ClassVar[str] = "validate"
    sees: ClassVar[View] = View.PEEK

    def __init__(self, *, check_calls: bool = True) -> None:
        """Refuse unsound bytes, or only count them. What the wire found is refused in any case."""
        self._check_calls = check_calls

    def applies(self, method: Method) -> bool:
        """Every call may be broken."""
        return True

    def handle(self, call: Call, next: Handler) -> Awaitable[Reply]:  # noqa: A002
        """Pass the call on, or raise its fault, or a Refusal MALFORMED for its bytes."""
        if call.fault is not None:
            raise call.fault
        if _is_plain(call):
            return next(call)
        return self._look(call, next)

    async def _look(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Look at more than whether the call is written as nearly all are."""
        head = b""
        if call.payload.data is None:
            head = await call.payload.peek(PEEK_BYTES)
            if _is_plain(call):  # of gRPC it is all there
                return await next(call)
        data = call.payload.data
        if data is not None:
            wrong = fault(call.method, data, whole=True)
        else:
            wrong = fault(call.method, head, whole=len(head) < PEEK_BYTES)
        if wrong is not None:
            FAULTS.labels(call.method.rpc, wrong).inc()
            if self._check_calls:
                detail = f"no {call.method.request} of a node: {wrong}"
                raise Refusal(Reason.MALFORMED, detail, by=self.name, sent=False, cause=wrong)
        return await next(call)


def _is_plain(call: Call) -> bool:
    """Return whether the call is all at hand, and written as the serializers do it."""
    data = call.payload.data
    plain = _PLAIN.get(call.method)
    return data is not None and plain is not None and plain(data) is not None


def fault(method: Method, data: bytes, *, whole: bool) -> str | None:
    """Say what is wrong with a request, None if nothing is.

    Args:
        method: whose request it is.
        data: its first PEEK_BYTES, or all of it.
        whole: whether it is all of it.

    Returns:
        `protobuf`, `node_id`, `run_id` or `object_id`: what is absent, zero or of the wrong form; `repeated`:
        an id stands there twice, and who reads it next may take the other one.
    """
    begins = _BEGINS.get(method)
    if begins is not None and (known := begins(data)) is not None:
        return _behind(method, data, known.end(), whole=whole)
    if whole and not well_formed(data):
        return "protobuf"
    if method.kind is Kind.JOIN:
        return None
    found, at = peek(method, data), method.ids
    if not found.node_id:
        return "node_id"
    if at.run and not found.run_id:
        return "run_id"
    # An app is named by a hash, too, but what its form is nobody relies on.
    if at.object and method is not Method.GET_FAB and not _OBJECT_ID.fullmatch(found.object_id or ""):
        return "object_id"
    return None


def _behind(method: Method, data: bytes, at: int, *, whole: bool) -> str | None:
    """Say what is wrong with what stands behind the ids of a request, from `at` on; None if nothing is."""
    ids, repeated = method.ids, False
    try:
        for _ in fields(data, (ids.node, ids.run, ids.object), at):
            repeated = True
    except TruncatedError:
        if whole:
            return "protobuf"
    return "repeated" if repeated else None
