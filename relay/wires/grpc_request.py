"""How a node's gRPC request becomes a Call."""

from __future__ import annotations

import os
import re
import time
from itertools import count
from typing import TYPE_CHECKING

from relay import bridge, dialect
from relay.call import Call, Payload, Wire
from relay.fleet import Kind, Method
from relay.limits import Pace
from relay.refusal import Reason, Refusal
from relay.wires import client_certificate
from relay.wires.forwarded import NO_CLAIMS, Claims
from relay.wires.grpc_message import Message, NodeMessage, at_hand, length, too_large

if TYPE_CHECKING:
    from relay.call import Metadata
    from relay.limits import Limits
    from relay.wires.forwarded import Forwarding
    from relay.wires.http2_stream import Stream

#: Seconds that nodes wait: 5 for a heartbeat (flwr `HEARTBEAT_CALL_TIMEOUT`), for ever else. A push session
#: lives for 180 s, and longer than that nobody needs an object.
_HEARTBEAT_SECONDS = 5.0
_OBJECT_SECONDS = 180.0
#: We give up a little before the node does, so that it gets our answer and not its own timeout.
_SHARE = 0.95

OBJECTS = frozenset({Method.PULL_OBJECT, Method.PUSH_OBJECT})
_VIA = (b"via", b"2 flwr-relay")
_OURS: Metadata = [bridge.CONTENT_TYPE, (b"accept", bridge.CONTENT_TYPE[1]), _VIA]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TAKEN = client_certificate.NAMES | frozenset(
    {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-request-id"}
)
#: `grpc-timeout`: digits and a unit.
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


class Receiver:
    """Makes the calls of one listener.

    Attributes:
        limits: what a call may cost.
        forwarding: what is believed of proxies.
    """

    def __init__(
        self,
        forwarding: Forwarding,
        limits: Limits,
        idle_timeout: float,
        withheld: frozenset[bytes] = frozenset(),
    ) -> None:
        """Receive with these rules.

        Args:
            forwarding: what to believe of proxies.
            limits: what a call may cost.
            idle_timeout: seconds that a node may let pass between two pieces of a message.
            withheld: names in lower case of metadata that no call shall have.
        """
        self.forwarding = forwarding
        self.limits = limits
        self._idle_timeout = idle_timeout
        self._not_passed = _TAKEN | withheld
        self._id_start = os.urandom(6).hex()
        self._ids = count(1)

    def call(self, stream: Stream, wire: Wire, method: Method) -> Call:
        """Make the Call; what is wrong with it is kept in `fault` for the chain to say."""
        started = time.monotonic()
        metadata: Metadata = []
        taken: dict[bytes, bytes] = {}
        not_passed = self._not_passed
        for pair in bridge.from_fields(stream.asked.fields):
            name = pair[0]
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
        connection = stream.connection
        peer, way = self.forwarding.resolve(connection.peer, b"", claims, tls=connection.tls)
        certificate = connection.shown.certificate if connection.shown is not None else None
        if (header := self.forwarding.certificate_header) != b"":
            certificate = self.forwarding.certificate(connection.peer, taken.get(header, b""), certificate)
        request_id = given.decode("ascii") if given and _REQUEST_ID.fullmatch(given) else self.request_id()
        metadata += [pair for pair in way if pair[1]]
        metadata.append((b"x-request-id", request_id.encode("ascii")))
        metadata += _OURS
        payload, fault = self._payload(stream, self.limits.bodies[method])
        patience = _patience(wire, method, timeout(stream.asked.fields))
        return Call(
            method,
            wire,
            metadata,
            payload,
            peer=peer,
            request_id=request_id,
            started=started,
            deadline=started + _SHARE * patience,
            fault=connection.excess or self._too_much(stream) or fault,
            certificate=certificate,
        )

    def turns_out(self, call: Call, stream: Stream, method: Method, request: bytes) -> None:
        """Make of the call that brought a container the one that was in it."""
        call.method, call.payload = method, Payload(request)
        said = timeout(stream.asked.fields)
        call.deadline = time.monotonic() + _SHARE * _patience(call.wire, method, said)

    def _payload(self, stream: Stream, limit: int) -> tuple[Payload, Refusal | None]:
        size = fault = None
        try:
            data = at_hand(stream)
            if data is not None and len(data) <= limit:
                return Payload(data), None
            size = length(stream.at_hand())
            if size is not None and size > limit:
                fault = too_large(size, limit)
        except Refusal as refusal:
            fault = refusal
        pace = Pace(self.limits.min_rate, self.limits.rate_window)
        return Message(NodeMessage(stream, limit, self._idle_timeout, pace), size), fault

    def _too_much(self, stream: Stream) -> Refusal | None:
        fields, size, limits = stream.asked.fields, stream.asked.size, self.limits
        if len(fields) <= limits.header_count and size <= limits.header_size:
            return None
        longest = max(len(name) + len(value) for name, value in fields)
        if len(fields) <= limits.header_count and longest <= limits.header_size and size <= limits.head_size:
            return None
        detail = f"{len(fields)} headers of {size} bytes, the longest of {longest}: see limits.header_count"
        return Refusal(Reason.TOO_LARGE, detail, by="wire", sent=False)

    def request_id(self) -> str:
        """Return a new id for a request."""
        return f"{self._id_start}-{next(self._ids):x}"


def timeout(fields: Metadata) -> float | None:
    """Return the seconds that a node waits for its answer, None if it does not say."""
    for name, value in fields:
        if name == b"grpc-timeout" and (said := _TIMEOUT.fullmatch(value)) is not None:
            return int(said[1]) * _UNITS[said[2]]
    return None


def _patience(wire: Wire, method: Method, said: float | None) -> float:
    """Return the seconds that a node may be kept waiting, at most what it says itself."""
    if method.kind is Kind.HEARTBEAT:
        own = _HEARTBEAT_SECONDS
    elif method in OBJECTS or (wire is Wire.GRPC_ADAPTER and method.kind is not Kind.PULL):
        own = _OBJECT_SECONDS  # the adapter's nodes survive no better answer than a late one
    else:
        own = dialect.HOLD_SECONDS
    return own if said is None else min(own, said)
