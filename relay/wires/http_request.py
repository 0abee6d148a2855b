"""How a node's HTTP request becomes a Call."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, HttpVersion11

from relay.call import Call, Payload
from relay.fleet import Kind, Method
from relay.limits import Limits, Pace
from relay.refusal import NodeGone, Reason, Refusal
from relay.wires import client_certificate
from relay.wires.forwarded import NO_CLAIMS, Claims, Forwarding

if TYPE_CHECKING:
    from aiohttp.http_parser import RawRequestMessage

    from relay.call import Metadata, Wire
    from relay.wires.http_connection import NodeRequest

CONTENT_TYPE = b"application/protobuf"

#: A body of up to this size is read whole before the chain starts, so that it can be sent twice.
WHOLE = 64 * 1024

_VIA = (b"via", b"1.1 flwr-relay")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

# RFC 9110 section 7.2: a host as in a URI, and a port. The upstream is told of it in X-Forwarded-Host.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]{0,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")

# We give up a little before the node does, so that it gets our answer and not its own timeout.
_SHARE = 0.95

# RFC 9110 section 7.6.1 and framing; `host` and the forwarding headers are written anew for the upstream.
_CLAIMS = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
_NOT_PASSED = (
    _CLAIMS
    | client_certificate.NAMES
    | frozenset(
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

    __slots__ = ("_idle_timeout", "_left", "_limit", "_pace", "_request")

    def __init__(self, request: NodeRequest, limit: int, idle_timeout: float, pace: Pace) -> None:
        """Read from `request`.

        Args:
            request: whose body it is.
            limit: most bytes that it may have.
            idle_timeout: most seconds between two pieces.
            pace: how fast it must come on the whole.
        """
        self._request = request
        self._left = self._limit = limit
        self._idle_timeout = idle_timeout
        self._pace = pace

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end. See `relay.call.Body`."""
        content = self._request.content
        started = time.monotonic()
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
            # Its text may hold the bytes in which it was found.
            raise Refusal(Reason.MALFORMED, f"broken body: {type(error).__name__}", by="wire") from error
        self._left -= len(piece)
        if self._left < 0:
            raise Refusal(Reason.TOO_LARGE, f"the body is longer than {self._limit} bytes", by="wire")
        if not self._pace.holds(time.monotonic() - started, len(piece)):
            raise Refusal(Reason.MALFORMED, "the body comes slower than limits.min_rate", by="wire")
        return piece

    def close(self) -> None:
        """Nothing to give up: the server discards what nobody read."""


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
            idle_timeout: seconds that a node may let pass between two pieces of a body.
            withheld: names in lower case of headers that no call shall have.
        """
        self.forwarding = forwarding
        self.limits = limits
        self._idle_timeout = idle_timeout
        self._noted = _NOT_PASSED | withheld | {b"content-type"}
        self._id_start = os.urandom(6).hex()
        self._ids = count(1)

    def call(self, request: NodeRequest, spec: Spec, method: Method) -> Call:
        """Make the Call; what is wrong with it is kept in `fault` for the chain to say."""
        connection, message = request.connection, request.message
        metadata: Metadata = []
        taken: dict[bytes, bytes] = {}
        content_type = b""
        noted = self._noted
        for pair in message.raw_headers:
            name = pair[0].lower()
            if name not in noted:
                metadata.append(pair)
            elif name == b"content-type":
                content_type = pair[1]
                metadata.append(pair)
            else:
                taken[name] = taken[name] + b"," + pair[1] if name in taken else pair[1]
        if taken.get(b"connection", b"keep-alive") != b"keep-alive":
            metadata = _without(metadata, taken[b"connection"])
        claims = NO_CLAIMS
        if not _CLAIMS.isdisjoint(taken):
            claims = Claims(
                taken.get(b"forwarded", b""),
                taken.get(b"x-forwarded-for", b""),
                taken.get(b"x-forwarded-proto", b""),
                taken.get(b"x-forwarded-host", b""),
            )
        host = taken.get(b"host", b"")
        peer, way = self.forwarding.resolve(connection.peer, host, claims, tls=connection.tls)
        certificate = connection.shown.certificate if connection.shown is not None else None
        if (header := self.forwarding.certificate_header) != b"":
            certificate = self.forwarding.certificate(connection.peer, taken.get(header, b""), certificate)
        request_id = self.request_id(taken.get(b"x-request-id", b""))
        metadata += way
        metadata.append((b"x-request-id", request_id.encode("ascii")))
        metadata.append(_VIA)
        started = time.monotonic()
        size = None if b"transfer-encoding" in taken else int(taken.get(b"content-length", 0))
        limit = self.limits.bodies[method]
        fault = connection.excess or _fault(message, content_type, taken, size, limit)
        if connection.heavy and fault is None:
            fault = _heavy(message, self.limits.head_size)
        deadline = started + _SHARE * spec.patience[method.kind is not Kind.HEARTBEAT]
        return Call(
            method,
            spec.wire,
            metadata,
            self._payload(request, size, limit),
            peer=peer,
            request_id=request_id,
            started=started,
            deadline=deadline,
            fault=fault,
            certificate=certificate,
        )

    def _payload(self, request: NodeRequest, size: int | None, limit: int) -> Payload:
        content = request.content
        if size is not None and size <= WHOLE and content.is_eof() and content.exception() is None:
            return Payload(content.read_nowait())  # nearly always: it came with the head
        pace = Pace(self.limits.min_rate, self.limits.rate_window)
        return Payload(body=NodeBody(request, limit, self._idle_timeout, pace), size=size)

    def request_id(self, given: bytes = b"") -> str:
        """Return the id that a request was given, if it is a sound one, else a new one."""
        if given and _REQUEST_ID.fullmatch(given):
            return given.decode("ascii")
        return f"{self._id_start}-{next(self._ids):x}"


def _fault(
    message: RawRequestMessage, content_type: bytes, taken: dict[bytes, bytes], size: int | None, limit: int
) -> Refusal | None:
    """Return what is wrong with the head of a call, if anything is."""
    if content_type != CONTENT_TYPE and content_type.partition(b";")[0].strip().lower() != CONTENT_TYPE:
        return Refusal(Reason.MALFORMED, f"content-type {_shown(content_type)}", by="wire")
    if message.version != HttpVersion11 and (size is None or message.version != HttpVersion10):
        # RFC 9112 section 6.1: a proxy of the age of HTTP/1.0 knows no chunks, and would read otherwise.
        what = "HTTP/{}.{}".format(*message.version)
        return Refusal(Reason.MALFORMED, f"chunks in {what}" if size is None else what, by="wire")
    if size is None and (coding := taken[b"transfer-encoding"].strip().lower()) != b"chunked":
        return Refusal(Reason.MALFORMED, f"coded as {_shown(coding)}", by="wire")
    if b"upgrade" in taken:
        return Refusal(Reason.MALFORMED, f"upgrade to {_shown(taken[b'upgrade'])}", by="wire")
    if not _is_host(taken.get(b"host", b"")):
        return Refusal(Reason.MALFORMED, "a Host header that is no host", by="wire")
    if size is not None and size > limit:
        return Refusal(Reason.TOO_LARGE, f"{size} bytes, at most {limit}", by="wire")
    return None


def _shown(value: bytes) -> str:
    """Return the beginning of a header's value, for the log."""
    return repr(value[:60].decode("latin-1"))


def _heavy(message: RawRequestMessage, limit: int) -> Refusal | None:
    """Return the refusal for a head that is longer than `limit` bytes, if it is."""
    size = len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    if size <= limit:
        return None
    return Refusal(Reason.TOO_LARGE, f"a head of {size} bytes, limits.head_size is {limit}", by="wire")


@lru_cache(maxsize=256)
def _is_host(host: bytes) -> bool:
    """Return whether this may stand in a Host header."""
    return _HOST.fullmatch(host) is not None


def _without(metadata: Metadata, connection: bytes) -> Metadata:
    """Take off the headers that a Connection header names (RFC 9110 section 7.6.1)."""
    named = {token.strip().lower() for token in connection.split(b",")} - {b"", b"close", b"keep-alive"}
    return [pair for pair in metadata if pair[0].lower() not in named] if named else metadata
