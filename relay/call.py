"""The vocabulary that every wire, policy and upstream shares: Call, Reply, Payload, View."""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from relay.fleet import NO_IDS, PEEK_BYTES, Ids, Method, peek
from relay.payload import Body, Payload, View, ViewError
from relay.proof import NodeProof

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.refusal import Refusal

__all__ = [
    "Body",
    "Call",
    "Certificate",
    "Ending",
    "Identity",
    "Metadata",
    "Payload",
    "Reply",
    "Source",
    "View",
    "ViewError",
    "Wire",
]

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


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a caller has proved to be; what logs, the inventory, quarantine and signing go by.

    Attributes:
        name: of the key, certificate or node; unique in its tenant.
        tenant: the group that it is of; "" if there is one only.
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
        "_ids",
        "_ids_within",
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
        self._ids = NO_IDS
        self._ids_within = 0

    @property
    def proof(self) -> NodeProof | None:
        """What the node shows to prove which key it holds, as it came; None if there is nothing.

        Raises:
            ProofError: it cannot be read.
        """
        if self._proof is None and self.wire is not Wire.REST_V0:  # nobody would verify what it sends
            self._proof = NodeProof.of_http(self.metadata)
        return self._proof

    async def ids(self) -> Ids:
        """Return the ids in the request, once its first bytes are here; these stay unread.

        Raises: what `Body.read` raises.
        """
        if self._ids_within < PEEK_BYTES:
            await self.payload.peek(PEEK_BYTES)
        return self.ids_at_hand()

    def ids_at_hand(self) -> Ids:
        """Return the ids in the request as far as it is at hand, or was when they were asked for before.

        They are read once, and once more when more of the body has come: one that stands there twice is
        none. A policy that puts another body in place of the request's leaves the ids as they are.
        """
        head = self.payload.head
        if len(head) > self._ids_within:
            self._ids = peek(self.method, head)
            self._ids_within = len(head)
        return self._ids

    def beside(self, method: Method, request: bytes) -> Call:
        """Return another call of the same node, with all that is known of it. It ends when this one does."""
        other = copy.copy(self)
        other._origin, other._endings = self, []  # noqa: SLF001 - they are of this class
        other.method = method
        other.payload = Payload(request)
        other._ids, other._ids_within = NO_IDS, 0  # noqa: SLF001
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
        if ending.refusal is not None:
            ending.refusal.forget()


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
