"""The vocabulary that every wire, policy and upstream shares: Call, Reply, Payload, View."""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from google.protobuf.message import DecodeError

from relay.proof import NodeProof
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from relay.fleet import Method

    M = TypeVar("M", bound=Message)

#: Header pairs as they came: order, case and repetition kept, hop-by-hop ones removed. gRPC metadata stands
#: here as the headers that mean the same (`relay.bridge`), so that policies know one form.
Metadata = list[tuple[bytes, bytes]]


class Wire(enum.Enum):
    """A wire that SuperNodes or SuperLinks speak. The value is its name in settings and metrics."""

    HTTP_V1 = "http_v1"
    REST_V0 = "rest_v0"
    GRPC = "grpc"
    GRPC_ADAPTER = "grpc_adapter"

    __hash__ = object.__hash__

    @property
    def grpc(self) -> bool:
        """Whether it is carried by gRPC, and not by HTTP/1.1."""
        return self in (Wire.GRPC, Wire.GRPC_ADAPTER)


class Source(enum.Enum):
    """Who made a reply."""

    UPSTREAM = "upstream"
    LOCAL = "local"


class View(enum.IntEnum):
    """How much of a payload a policy looks at; decides where the chain buffers."""

    HEAD = 0
    PEEK = 1
    BYTES = 2
    MESSAGE = 3


class ViewError(AssertionError):
    """A policy looked at more of a payload than its `sees` declares."""


class Body(Protocol):
    """The sending end of a body that is still arriving."""

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end.

        Raises:
            Refusal: the sender broke the body off, or broke a rule.
            NodeGone: the sender was the node, and it is gone.
        """

    def close(self) -> None:
        """Give up what has not been read. Harmless after the end and when repeated."""


class Payload:
    """A body on its way: bytes at hand, or pieces that are read once. It only ever moves forward.

    Attributes:
        size: length in bytes, None if the sender did not say.
        passed: bytes that have been read from it so far.
        allowed: the most that may be looked at now; lowered only by a strict pipeline.
    """

    __slots__ = ("_body", "_data", "_message", "allowed", "passed", "size")

    def __init__(self, data: bytes = b"", *, body: Body | None = None, size: int | None = None) -> None:
        """Hold `data`, or, when `body` is given, the pieces that it will bring (`size` bytes in all)."""
        self._data = data
        self._body = body
        self._message: Message | None = None
        self.size = len(data) if body is None else size
        self.passed = len(data) if body is None else 0
        self.allowed = View.MESSAGE

    @property
    def data(self) -> bytes | None:
        """The whole body if it is at hand, else None. For wires and upstreams."""
        return self._data if self._body is None else None

    @property
    def replayable(self) -> bool:
        """Whether the body can be sent a second time: it is at hand, and was not streamed away."""
        return self._body is None and len(self._data) == self.size

    async def peek(self, size: int) -> bytes:
        """Return the first `size` bytes, fewer if the body is shorter; they stay unread.

        Raises: what `Body.read` raises.
        """
        self._look(View.PEEK)
        while self._body is not None and len(self._data) < size:
            piece = await self._pull(self._body)
            if not piece:
                break
            self._data += piece
        return self._data[:size]

    async def read(self, limit: int) -> bytes:
        """Return the whole body and keep it, so that it can be read again.

        Raises:
            Refusal: TOO_LARGE if it is longer than `limit` bytes; else what `Body.read` raises.
        """
        self._look(View.BYTES)
        if self._body is not None:
            pieces = [self._data]
            total = len(self._data)
            while piece := await self._pull(self._body):
                total += len(piece)
                if total > limit:
                    raise Refusal(Reason.TOO_LARGE, f"more than {limit} bytes to be held", by="payload")
                pieces.append(piece)
            self._data = b"".join(pieces)
            self._body = None
            self.size = total
        if len(self._data) > limit:
            raise Refusal(
                Reason.TOO_LARGE, f"{len(self._data)} bytes, at most {limit} to be held", by="payload"
            )
        return self._data

    async def message(self, of: type[M], limit: int) -> M:
        """Return the body parsed as `of`, a Fleet message class; parsed once.

        Raises:
            Refusal: MALFORMED if it does not parse, TOO_LARGE over `limit` bytes.
        """
        self._look(View.MESSAGE)
        if isinstance(self._message, of):
            return self._message
        message = of()
        try:
            message.ParseFromString(await self.read(limit))
        except DecodeError as error:
            raise Refusal(Reason.MALFORMED, f"no {of.__name__}: {error}", by="payload") from error
        self._message = message
        return message

    def stream(self) -> Payload:
        """Return an async iterator over the rest of the body, in pieces as they came."""
        return self

    def __aiter__(self) -> Payload:
        return self

    async def __anext__(self) -> bytes:
        if self._data:
            piece, self._data = self._data, b""
            return piece
        if self._body is None:
            raise StopAsyncIteration
        piece = await self._pull(self._body)
        if not piece:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Give up what has not been read, so that nobody waits for it. May be repeated."""
        if self._body is not None:
            self._body.close()

    async def _pull(self, body: Body) -> bytes:
        piece = await body.read()
        self.passed += len(piece)
        return piece

    def _look(self, view: View) -> None:
        if view > self.allowed:
            raise ViewError(f"a policy that sees {self.allowed.name} looked at {view.name}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a caller has proved to be; what limits, caches, audit and metrics go by.

    Attributes:
        name: of the key, certificate or node; unique in its tenant.
        tenant: the group that shares limits and caches; "" if there is one only.
        labels: what the operator wrote beside the credential.
        by: the credentials that proved it, for example ("api_key", "node_signature").
    """

    name: str
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    by: tuple[str, ...] = ()


class Certificate(NamedTuple):
    """A client certificate that was verified, by our TLS or by that of a proxy that we believe.

    Attributes:
        subject: RFC 4514 distinguished name.
        names: subject alternative names, as `DNS:...`, `URI:...`, `IP:...` or `email:...`.
        fingerprint: lower-case hex SHA-256 of its DER form; "" if a proxy did not say.
        serial: lower-case hex serial number without leading zeros; "" if a proxy did not say.
    """

    subject: str
    names: tuple[str, ...] = ()
    fingerprint: str = ""
    serial: str = ""


class Call:
    """One call of one node, from the wire that brought it to the upstream that answers it.

    Attributes:
        method, wire: what is asked, and in which language.
        metadata: end-to-end headers as they came, with the forwarding headers that the wire added.
        payload: the request body.
        peer: address of the node as far as it can be believed.
        request_id: the id that is returned to the node and sent upstream.
        started, deadline: `time.monotonic()` in seconds: when it came, and when its node gives up.
        fault: what the wire found wrong with it; the policy `validate` refuses it for that.
        certificate: the caller's, if it showed one.
        identity: who the caller is, once the policy `auth` has found out; None where it is not asked.
        proved: whether the signature of `proof` was verified here; for `credentials.node_keys` alone to set.
    """

    __slots__ = (
        "_ended",
        "_endings",
        "_origin",
        "_proof",
        "certificate",
        "deadline",
        "fault",
        "identity",
        "metadata",
        "method",
        "payload",
        "peer",
        "proved",
        "request_id",
        "started",
        "wire",
    )

    def __init__(
        self,
        method: Method,
        wire: Wire,
        metadata: Metadata,
        payload: Payload,
        *,
        peer: str,
        request_id: str,
        started: float,
        deadline: float,
        fault: Refusal | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        self.method = method
        self.wire = wire
        self.metadata = metadata
        self.payload = payload
        self.peer = peer
        self.request_id = request_id
        self.started = started
        self.deadline = deadline
        self.fault = fault
        self.certificate = certificate
        self.identity: Identity | None = None
        self.proved = False
        self._proof: NodeProof | None = None
        self._endings: list[Callable[[Call, Ending], None]] = []
        self._ended: Ending | None = None
        self._origin: Call | None = None

    @property
    def proof(self) -> NodeProof | None:
        """What the node shows to prove which key it holds, as it came; None if there is nothing.

        Raises:
            ProofError: it cannot be read.
        """
        if self._proof is None and self.wire is not Wire.REST_V0:  # nobody would verify what it sends
            self._proof = NodeProof.of_http(self.metadata)
        return self._proof

    def beside(self, method: Method, request: bytes) -> Call:
        """Return another call of the same node, with all that is known of it. It ends when this one does."""
        other = copy.copy(self)
        other._origin, other._endings = self, []  # noqa: SLF001 - they are of this class
        other.method = method
        other.payload = Payload(request)
        other.fault = None
        return other

    def on_end(self, tell: Callable[[Call, Ending], None]) -> None:
        """Have `tell` called once, when the last byte of the answer was written or the call was given up.

        At once, if that is over: what is done for a node that has left must still be undone.
        """
        if self._origin is not None:
            self._origin.on_end(tell)
        elif self._ended is not None:
            tell(self, self._ended)
        else:
            self._endings.append(tell)

    def end(self, ending: Ending) -> None:
        """For the wire: tell everybody who asked how the call ended. Only the first time counts."""
        if self._ended is not None:
            return
        self._ended = ending
        for tell in self._endings:
            tell(self, ending)


class Reply:
    """An answer to a Call.

    Attributes:
        payload: the response body.
        source: who made it.
        status: HTTP status, the neutral vocabulary of outcomes; a gRPC wire translates it.
        metadata: end-to-end response headers, without framing.
    """

    __slots__ = ("metadata", "payload", "source", "status")

    def __init__(
        self, payload: Payload, source: Source, *, status: int = 200, metadata: Metadata | None = None
    ) -> None:
        self.payload = payload
        self.source = source
        self.status = status
        self.metadata: Metadata = [] if metadata is None else metadata


class Ending:
    """How a call ended.

    Attributes:
        outcome: `ok`; `upstream_403` and the like for a status of the SuperLink's that was passed on;
            the value of a Reason; `cut` if the upstream broke off in the middle of the answer;
            `node_gone` if the node left first; `cancelled` if the worker had to end.
        source: who made the answer, None when there was none.
        sent: bytes of response body that were written to the node.
        refusal: the refusal, if that was it.
        lost: the upstream had answered, and the node did not get it whole.
        seconds: from the first byte of the head to now.
    """

    __slots__ = ("lost", "outcome", "refusal", "seconds", "sent", "source")

    def __init__(
        self,
        outcome: str,
        *,
        seconds: float,
        source: Source | None = None,
        sent: int = 0,
        refusal: Refusal | None = None,
        lost: bool = False,
    ) -> None:
        self.outcome = outcome
        self.source = source
        self.sent = sent
        self.refusal = refusal
        self.lost = lost
        self.seconds = seconds
