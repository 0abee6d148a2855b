"""Sign for nodes whose wire has no signatures (legacy REST), before a SuperLink that demands them.

The relay holds a key pair for each of these nodes (`stores/node_signers.py`). It puts the public key of
that pair into register-node and activate-node instead of the node's own, and signs every call. All other
messages pass as they are.

It signs for a node id only if the caller is the one who registered the node (`call.identity`): a legacy
node sends nothing that others could not send, too. For the same reason the proof headers that came with a
call are taken off.

The SuperLink checks a signature over the time of signing, and nothing else; it may be 300 s old, and 5 s
ahead of the SuperLink's clock. So one signature is used for a minute. It is made beside the event loop.

A 401 to a call that the relay has signed is the node's only if it cannot come from the relay's own clock.
What is known of the clock: the Date of the answer says what time it was at the SuperLink; and where there
is none (gRPC), a signature that was made after the 401 and accepted says that the clock is right. Else the
node is told to come back, and the clock is corrected by the Date from there on, unless it has just been
proved right.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import email.utils
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import structlog
from prometheus_client import Counter, Gauge

from relay.call import Call, Reply, View, Wire
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from relay.stores.node_signers import Node, NodeSigners, Owner, Signer, StoreError
from relay.wireformat import TruncatedError, fields, replace_bytes, uint

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Metadata
    from relay.pipeline import Handler

_T = TypeVar("_T")

log = structlog.get_logger("relay.policies.signing")

REFUSALS = Counter(
    "relay_signing_refusals", "Calls of nodes that cannot sign which came to nothing, by cause", ["cause"]
)
SKEW = Gauge(
    "relay_upstream_clock_skew_seconds",
    "The relay's clock minus the SuperLink's, by the Date of its answers",
    multiprocess_mode="livemostrecent",
)

#: Wires whose nodes send no signature.
UNSIGNED = frozenset({Wire.REST_V0})

_PROOF = frozenset({b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"})
_LENGTHS = frozenset(map(len, _PROOF))
#: register-node and activate-node hold a public key, about 215 bytes of PEM, and a number.
_JOIN_BYTES = 16 * 1024
_PUBLIC_KEY = 1
#: Seconds for which a signature is used. A SuperLink takes it for 300 s.
REUSE = 60.0
#: What a SuperLink takes, in seconds before and after its own time, less the second that a Date leaves open.
_TOO_OLD, _TOO_EARLY = 299.0, -4.0
#: A signature younger than this that is accepted proves that the clock is right.
_FRESH = 1.0
#: Seconds for which that counts: a node's signature is made anew each minute.
_PROOF_LASTS = 2 * REUSE
#: How far the clock may go astray between two looks before its signatures are made anew.
_STEP = 1.0
#: Seconds for which a call waits for the disk. A heartbeat is lost after 5 s.
_PATIENCE = 4.0
#: Seconds between two looks at a Date, and between two complaints in the log.
_SELDOM = 10.0
#: Nodes of which a worker keeps key and signature at hand; more of them cost a look at the disk.
_NODES = 1 << 15


class Proof(NamedTuple):
    """A signature, and when it was made.

    Attributes:
        headers: the three that Flower reads.
        signed: `time.monotonic()`.
        lead: the signed time minus `signed`, both in seconds: the same for all signatures of a steady clock.
    """

    headers: Metadata
    signed: float
    lead: float


class _Held:
    """What a worker has at hand of a node."""

    __slots__ = ("doubted", "node", "proof", "signer")

    def __init__(self, node: Node, signer: Signer, proof: Proof) -> None:
        self.node = node
        self.signer = signer
        self.proof = proof
        #: When it got a 401 that may have been the clock's; None since its last success.
        self.doubted: float | None = None


class Clock:
    """The time that the SuperLink goes by, as far as it is known here."""

    def __init__(
        self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with the host's own clock; `wall` and `steady` are for tests."""
        self._wall = wall
        self.steady = steady
        self._correction = 0.0
        self._proved_lead: float | None = None
        self._proved = 0.0
        self._next_date = 0.0

    @property
    def lead(self) -> float:
        """Seconds by which the time to sign is ahead of `steady`."""
        return self._wall() + self._correction - self.steady()

    def usable(self, proof: Proof) -> bool:
        """Return whether the signature may still be sent."""
        return self.steady() - proof.signed < REUSE and abs(self.lead - proof.lead) < _STEP

    def accepted(self, proof: Proof, metadata: Metadata) -> None:
        """Learn from an answer to a call that the SuperLink has let pass."""
        now = self.steady()
        if now - proof.signed < _FRESH:
            self._proved_lead = proof.lead
            self._proved = proof.signed
        if now >= self._next_date:
            self._next_date = now + _SELDOM
            date = _date(metadata)
            if date is not None:
                SKEW.set(self._wall() - date)

    def at_fault(self, proof: Proof, metadata: Metadata, doubted: float | None) -> bool:
        """Return whether a 401 may have come from the clock, and correct the clock if it has.

        Args:
            proof: the signature that was refused.
            metadata: headers of the answer.
            doubted: when the same node got such an answer before, if it did and has had no success since.
        """
        proved = (
            self._proved_lead is not None
            and abs(self._proved_lead - proof.lead) < _STEP
            and self.steady() - self._proved < _PROOF_LASTS
        )
        date = _date(metadata)
        if date is None:
            return not (proved and doubted is not None and self._proved > doubted)
        SKEW.set(self._wall() - date)
        age = date - (proof.lead + proof.signed)
        if _TOO_EARLY <= age <= _TOO_OLD:
            # A correction that never helped was by the Date of somebody else.
            if proved or not self._correction:
                return False
            self._correction = 0.0
            return True
        if not proved:
            self._correction = date - self._wall()
        return True


class Signing:
    """Signs for nodes that cannot."""

    name: ClassVar[str] = "signing"
    sees: ClassVar[View] = View.PEEK

    def __init__(
        self, signers: NodeSigners | None, *, unauthenticated: bool = False, clock: Clock | None = None
    ) -> None:
        """Sign with the keys of `signers`; None: no node needs it.

        Args:
            signers: the key pairs.
            unauthenticated: also for callers who were not asked who they are.
            clock: for tests.
        """
        self._signers = signers
        self._unauthenticated = unauthenticated
        self._clock = clock or Clock()
        self._held: dict[int, _Held] = {}
        self._next_complaint = 0.0
        # Its own threads: a file system that hangs must not hold up the look-up of a name.
        self._threads = ThreadPoolExecutor(2, "signing")

    def applies(self, method: Method) -> bool:
        """Every call is signed."""
        return self._signers is not None

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on with a signature.

        Raises:
            Refusal: UNAUTHENTICATED if the node id is not known, or not the caller's, or the SuperLink says
                so; FORBIDDEN if the caller was not asked who it is; UPSTREAM_DOWN if the keys cannot be
                read or written; UPSTREAM_BAD_ANSWER if a 401 may be the fault of our clock; MALFORMED.
        """
        if call.wire not in UNSIGNED:
            return await next(call)
        owner = self._owner(call)
        if call.method.kind is Kind.JOIN:
            return await self._join(call, next, owner)
        node_id = (await call.ids()).node_id
        if not node_id:
            raise Refusal(Reason.MALFORMED, "no node id", by=self.name, sent=False)
        held = self._held.get(node_id)
        if held is None or not self._clock.usable(held.proof):
            held = await self._renewed(node_id, held)
        if held is None:
            raise self._refusal("unknown_node", Reason.UNAUTHENTICATED, f"no key for node {node_id}")
        if held.node.owner != owner:
            raise self._refusal("not_its_node", Reason.UNAUTHENTICATED, f"node {node_id} is another caller's")
        proof = held.proof
        call.metadata = _signed(call.metadata, proof)
        reply = await next(call)
        if reply.status == 401:
            raise self._not_known(reply, held, proof)
        if reply.status == 200:
            held.doubted = None
            self._clock.accepted(proof, reply.metadata)
            if call.method is Method.UNREGISTER_NODE:
                await self._forget(node_id)
        return reply

    # -- register-node and activate-node ------------------------------------------------------------

    async def _join(self, call: Call, next: Handler, owner: Owner | None) -> Reply:  # noqa: A002
        request = await call.payload.peek(_JOIN_BYTES + 1)
        key = _public_key(request)
        if key is None or len(request) > _JOIN_BYTES:
            raise Refusal(Reason.MALFORMED, "no public key", by=self.name, sent=False)
        node = Node.of(owner, key)
        held = await self._beside(lambda: self._make(node))
        # The call itself stays as it came: it may be sent again, and others outside of here go by its key.
        signed = call.beside(call.method, replace_bytes(request, _PUBLIC_KEY, held.signer.public_key))
        signed.metadata = _signed(call.metadata, held.proof)
        reply = await next(signed)
        if reply.status == 401:
            raise self._not_known(reply, held, held.proof)
        if reply.status == 200:
            self._clock.accepted(held.proof, reply.metadata)
            node_id = uint(reply.payload.data or b"", 1) if call.method is Method.ACTIVATE_NODE else None
            if node_id:
                await self._beside(lambda: self._store.put(node_id, node))
                self._hold(node_id, held)
        return reply

    # -- keys ---------------------------------------------------------------------------------------

    @property
    def _store(self) -> NodeSigners:
        assert self._signers is not None  # noqa: S101 - or `applies` would have left it out
        return self._signers

    def _owner(self, call: Call) -> Owner | None:
        identity = call.identity
        if identity is not None:
            return Owner(identity.tenant, identity.name)
        if not self._unauthenticated:
            raise self._refusal("no_identity", Reason.FORBIDDEN, "the caller was not asked who it is")
        return None

    async def _renewed(self, node_id: int, held: _Held | None) -> _Held | None:
        """Return the node with a new signature, if it is still known."""

        def renew() -> _Held | None:
            node = self._store.find(node_id)
            if node is None:
                return None
            if held is None or held.node != node:
                return self._make(node)
            held.proof = self._proof(held.signer)
            return held

        fresh = await self._beside(renew)
        if fresh is None:
            self._held.pop(node_id, None)
        else:
            self._hold(node_id, fresh)
        return fresh

    def _make(self, node: Node) -> _Held:
        signer = self._store.derive(node)
        return _Held(node, signer, self._proof(signer))

    def _proof(self, signer: Signer) -> Proof:
        lead, signed = self._clock.lead, self._clock.steady()
        timestamp = dt.datetime.fromtimestamp(lead + signed, dt.UTC).isoformat().encode()
        headers = [
            (b"flwr-public-key", base64.b64encode(signer.public_key)),
            (b"flwr-timestamp", timestamp),
            (b"flwr-signature", base64.b64encode(signer.sign(timestamp))),
        ]
        return Proof(headers, signed, lead)

    def _hold(self, node_id: int, held: _Held) -> None:
        if len(self._held) >= _NODES and node_id not in self._held:
            del self._held[next(iter(self._held))]
        self._held[node_id] = held

    async def _forget(self, node_id: int) -> None:
        self._held.pop(node_id, None)
        try:
            await self._beside(lambda: self._store.remove(node_id))
        except Refusal:
            log.warning("the key of an unregistered node stays", node_id=node_id)

    async def _beside(self, work: Callable[[], _T]) -> _T:
        """Do it beside the event loop. Raises Refusal."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.wait_for(running, _PATIENCE)
        except (StoreError, TimeoutError) as error:
            what = str(error) or f"the directory did not answer within {_PATIENCE:g} s"
            self._complain("keys of nodes cannot be used; their nodes are told to come back", problem=what)
            raise self._refusal("store", Reason.UPSTREAM_DOWN, what) from error

    # -- refusals -----------------------------------------------------------------------------------

    def _refusal(self, cause: str, reason: Reason, detail: str, status: int | None = None) -> Refusal:
        REFUSALS.labels(cause).inc()
        return Refusal(reason, detail, by=self.name, sent=False, status=status)

    def _not_known(self, reply: Reply, held: _Held, proof: Proof) -> Refusal:
        """Return what a 401 of the SuperLink's means."""
        reply.payload.close()
        if not self._clock.at_fault(proof, reply.metadata, held.doubted):
            return self._refusal("superlink", Reason.UNAUTHENTICATED, "the SuperLink does not know it", 401)
        if held.doubted is None:
            held.doubted = self._clock.steady()
        if held.proof is proof:
            held.proof = proof._replace(signed=float("-inf"))  # the next attempt gets another one
        self._complain(
            "the SuperLink refused a signature of this relay, perhaps for its time: compare the clocks",
            superlink=_text(reply.metadata),
            signed=proof.headers[1][1].decode(),
        )
        # Not carried out, so it may be sent again, whatever it was.
        return self._refusal("clock", Reason.UPSTREAM_BAD_ANSWER, "401, perhaps because of our clock", 401)

    def _complain(self, event: str, **facts: str) -> None:
        now = self._clock.steady()
        if now >= self._next_complaint:
            self._next_complaint = now + _SELDOM
            log.error(event, **facts)


def _signed(metadata: Metadata, proof: Proof) -> Metadata:
    # By length first: the lower case of each name of each call would cost more than all the rest.
    kept = [pair for pair in metadata if len(pair[0]) not in _LENGTHS or pair[0].lower() not in _PROOF]
    return kept + proof.headers


def _public_key(request: bytes) -> bytes | None:
    """Return the node's own public key: the last one, as protobuf has it; None if there is none."""
    key = None
    try:
        for number, value in fields(request):
            if number == _PUBLIC_KEY and isinstance(value, bytes):
                key = value
    except TruncatedError:
        return None
    return key or None


def _text(metadata: Metadata) -> str:
    return next((value.decode("latin-1") for name, value in metadata if name.lower() == b"date"), "")


def _date(metadata: Metadata) -> float | None:
    """Return the Date of an answer in seconds since 1970, the middle of its second; None if there is none."""
    text = _text(metadata)
    if not text:
        return None
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() + 0.5
    except (ValueError, OverflowError):
        return None
