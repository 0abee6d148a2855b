"""Keep nodes out without ending them: whoever is in quarantine is told what lets it live and wait.

A pull gets "nothing for you now", a heartbeat and a join 503 (or a closed connection, where that is what the
node survives), a message at hand is given up (`Reason.FORBIDDEN` in relay/dialect.py). When it is released it
goes on by itself. The SuperLink hears nothing of it meanwhile, and takes it to be offline after 60 s.

A node is known by its node id, by the public key that it shows, or by the identity that `auth` gave it. A
node that may register itself gets a new id, and may make itself a new key, by a restart: only an identity
holds it.

What cannot be read is refused like what is listed: as long as a node id is in quarantine, a call whose node
id cannot be read, and as long as a key is, one whose proof or key cannot. A SuperLink may read it otherwise,
and no SuperNode sends such a thing. A call without any proof shows no key, and a SuperLink refuses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import structlog
from prometheus_client import Counter

from relay.call import Call, Reply, View
from relay.credentials.node_keys import KeyFormatError, node_key
from relay.fleet import MAX_REQUEST, Kind, Method
from relay.proof import ProofError
from relay.refusal import Reason, Refusal
from relay.wireformat import TruncatedError, fields

if TYPE_CHECKING:
    from relay.pipeline import Handler
    from relay.stores.quarantine_list import Entry, QuarantineList
    from relay.stores.watched import Watched

log = structlog.get_logger("relay.policies.quarantine")

QUARANTINED = Counter(
    "relay_quarantined", "Calls of nodes in quarantine, by whether they were refused", ["method", "enforced"]
)

#: A register or activate request holds a public key, about 215 bytes of PEM, and a number.
_JOIN_BYTES = MAX_REQUEST[Kind.JOIN]


class Quarantine:
    """Refuses the calls of those who are on the list."""

    name: ClassVar[str] = "quarantine"
    sees: ClassVar[View] = View.PEEK

    def __init__(self, listed: Watched[QuarantineList] | None, *, enforce: bool = True) -> None:
        """Refuse who is `listed`; count them only, if not `enforce`. None leaves no trace in the chain."""
        self._listed = listed
        self._enforce = enforce

    def applies(self, method: Method) -> bool:
        """Every call, if there is a list."""
        return self._listed is not None

    def tick(self) -> None:
        """Look whether the list has changed; to be called once a second."""
        if self._listed is not None:
            self._listed.tick()

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on, or raise FORBIDDEN."""
        listed = self._listed.value if self._listed else None
        if listed is None and self._listed is not None and self._enforce:
            raise Refusal(Reason.UPSTREAM_DOWN, "the list could not be read yet", by=self.name, sent=False)
        if listed is not None and listed.entries and (detail := await _why(call, listed)):
            QUARANTINED.labels(call.method.rpc, "true" if self._enforce else "false").inc()
            if self._enforce:
                raise Refusal(Reason.FORBIDDEN, detail, by=self.name, sent=False)
            log.info("would be refused", detail=detail, method=call.method.rpc, request_id=call.request_id)
        return await next(call)


async def _why(call: Call, listed: QuarantineList) -> str:
    """Return why a call is to be refused, "" if it is not."""
    if call.identity is not None and (entry := listed.find(identity=call.identity)) is not None:
        return _listed(entry)
    if listed.nodes and call.method.kind is not Kind.JOIN:
        node_id = (await call.ids()).node_id
        if node_id is None:
            return "a node id that cannot be read, while node ids are in quarantine"
        if (entry := listed.find(node_id=node_id)) is not None:
            return _listed(entry)
    if listed.keys:
        try:
            for key in await _keys(call):
                if (entry := listed.find(fingerprint=key)) is not None:
                    return _listed(entry)
        except (ProofError, KeyFormatError, TruncatedError):
            return "a key that cannot be read, while keys are in quarantine"
    return ""


def _listed(entry: Entry) -> str:
    return f"{entry.kind} in quarantine{f': {entry.reason}' if entry.reason else ''}"


async def _keys(call: Call) -> list[str]:
    """Return the fingerprints of the keys that a call shows: in its headers, and to join in its body.

    Raises:
        ProofError, KeyFormatError or TruncatedError: one of them cannot be read.
    """
    shown = []
    if (proof := call.proof) is not None:
        shown.append(proof.public_key)
    if call.method.kind is Kind.JOIN:
        shown.append(_key_field(await call.payload.peek(_JOIN_BYTES + 1)))
    return [node_key(pem).fingerprint for pem in shown]


def _key_field(request: bytes) -> bytes:
    """Return the key of a request to join: the last one, as protobuf has it. Raises TruncatedError."""
    if len(request) > _JOIN_BYTES:
        raise TruncatedError
    key = b""
    for number, value in fields(request):
        if number == 1 and isinstance(value, bytes):
            key = value
    return key
