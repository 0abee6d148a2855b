"""How a node's HTTP request becomes a Call."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from relay.call import Call, Payload
from relay.fleet import Kind, Method
from relay.refusal import NodeGone, Reason, Refusal
from relay.wires.forwarded import NO_CLAIMS, Claims, Forwarding

if TYPE_CHECKING:
    from relay.call import Metadata, Wire
    from relay.wires.http_server import NodeRequest

CONTENT_TYPE = b"application/protobuf"

#: A body of up to this size is read whole before the chain starts, so that it can be sent twice.
WHOLE = 64 * 1024

_VIA = (b"via", b"1.1 flwr-relay")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

# We give up a little before the node does, so that it gets our answer and not its own timeout.
_SHARE = 0.95

# RFC 9110 section 7.6.1 and framing; `host` and the forwarding headers are written anew for the upstream.
_CLAIMS = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
_NOT_PASSED = _CLAIMS | frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)


@dataclass(frozen=True, slots=True)
class Spec:
    """What distinguishes one HTTP wire from another.

    Attributes:
        wire: which one it is.
        prefix: path before the method's.
        patience: seconds after which a node gives a heartbeat up, and any other call.
    """

    wire: Wire
    prefix: str
    patience: tuple[float, float]


class NodeBody:
    """A request body that is still arriving from its node."""

    __slots__ = ("_idle_timeout", "_left", "_request")

    def __init__(self, request: NodeRequest, limit: int, idle_timeout: float) -> None:
        """Read from `request`, at most `limit` bytes, with at most `idle_timeout` seconds between pieces."""
        self._request = request
        self._left = limit
        self._idle_timeout = idle_timeout

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end. See `relay.call.Body`."""
        content = self._request.content
        try:
            async with asyncio.timeout(self._idle_timeout):
                # Not `readany`: that joins what has come in, a copy of every byte of an upload.
                piece, end_of_chunk = await content.readchunk()
                while end_of_chunk and not piece:
                    piece, end_of_chunk = await content.readchunk()
        except TimeoutError:
            raise Refusal(
                Reason.MALFORMED, f"the body stalled for {self._idle_timeout:g} s", by="wire"
            ) from None
        except Exception as error:
            if self._request.transport is None:
                raise NodeGone from error
            raise Refusal(Reason.MALFORMED, f"broken body: {error!r}", by="wire") from error
        self._left -= len(piece)
        if self._left < 0:
            raise Refusal(Reason.TOO_LARGE, "the body is longer than limits.max_body", by="wire")
        return piece

    def close(self) -> None:
        """Nothing to give up: the server discards what nobody read."""


class Receiver:
    """Makes the calls of one listener."""

    def __init__(self, forwarding: Forwarding, max_body: int, idle_timeout: float) -> None:
        """Receive with these rules.

        Args:
            forwarding: what to believe of proxies.
            max_body: longest request body, in bytes.
            idle_timeout: seconds that a node may let pass between two pieces of a body.
        """
        self._forwarding = forwarding
        self._max_body = max_body
        self._idle_timeout = idle_timeout
        self._id_start = os.urandom(6).hex()
        self._ids = count(1)

    def call(self, request: NodeRequest, spec: Spec, method: Method) -> Call:
        """Make the Call; what is wrong with it is kept in `fault` for the chain to say."""
        metadata: Metadata = []
        taken: dict[bytes, bytes] = {}
        content_type = b""
        for pair in request.message.raw_headers:
            name = pair[0].lower()
            if name in _NOT_PASSED:
                taken[name] = taken[name] + b"," + pair[1] if name in taken else pair[1]
                continue
            if name == b"content-type":
                content_type = pair[1]
            metadata.append(pair)
        if b"connection" in taken:
            metadata = _without(metadata, taken[b"connection"])
        claims = NO_CLAIMS
        if not _CLAIMS.isdisjoint(taken):
            claims = Claims(
                taken.get(b"forwarded", b""),
                taken.get(b"x-forwarded-for", b""),
                taken.get(b"x-forwarded-proto", b""),
                taken.get(b"x-forwarded-host", b""),
            )
        peer, way = self._forwarding.resolve(
            request.connection.peer, taken.get(b"host", b""), claims, tls=request.connection.tls
        )
        request_id = self.request_id(taken.get(b"x-request-id", b""))
        metadata += way
        metadata.append((b"x-request-id", request_id.encode("ascii")))
        metadata.append(_VIA)
        started = time.monotonic()
        size = None if b"transfer-encoding" in taken else int(taken.get(b"content-length", 0))
        small = size is not None and size <= WHOLE
        deadline = started + _SHARE * spec.patience[method.kind is not Kind.HEARTBEAT]
        return Call(
            method,
            spec.wire,
            metadata,
            self._payload(request, size, small=small),
            peer=peer,
            request_id=request_id,
            started=started,
            deadline=deadline,
            fault=_fault(content_type, taken, size, self._max_body),
        )

    def _payload(self, request: NodeRequest, size: int | None, *, small: bool) -> Payload:
        content = request.content
        if small and content.is_eof() and content.exception() is None:
            return Payload(content.read_nowait())  # nearly always: it came with the head
        return Payload(body=NodeBody(request, self._max_body, self._idle_timeout), size=size)

    def request_id(self, given: bytes = b"") -> str:
        """Return the id that a request was given, if it is a sound one, else a new one."""
        if given and _REQUEST_ID.fullmatch(given):
            return given.decode("ascii")
        return f"{self._id_start}-{next(self._ids):x}"


def _fault(content_type: bytes, taken: dict[bytes, bytes], size: int | None, limit: int) -> Refusal | None:
    """Return what is wrong with the head of a call, if anything is."""
    if content_type.partition(b";")[0].strip().lower() != CONTENT_TYPE:
        return Refusal(Reason.MALFORMED, f"content-type {content_type.decode('latin-1')!r}", by="wire")
    coding = taken.get(b"transfer-encoding", b"chunked")
    if coding.strip().lower() != b"chunked":
        return Refusal(Reason.MALFORMED, f"coded as {coding.decode('latin-1')!r}", by="wire")
    if b"upgrade" in taken:
        return Refusal(Reason.MALFORMED, f"upgrade to {taken[b'upgrade'].decode('latin-1')!r}", by="wire")
    if size is not None and size > limit:
        return Refusal(Reason.TOO_LARGE, f"{size} bytes, limits.max_body is {limit}", by="wire")
    return None


def _without(metadata: Metadata, connection: bytes) -> Metadata:
    """Take off the headers that a Connection header names (RFC 9110 section 7.6.1)."""
    named = {token.strip().lower() for token in connection.split(b",")} - {b"", b"close", b"keep-alive"}
    return [pair for pair in metadata if pair[0].lower() not in named] if named else metadata
