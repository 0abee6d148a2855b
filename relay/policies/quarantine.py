"""Keep nodes out without ending them: whoever is in quarantine is told what lets it live and wait.

A pull gets "nothing for you now", a heartbeat and a join 503 (or a closed connection, where that is what the
node survives), a message at hand is given up (`Reason.FORBIDDEN` in relay/dialect.py). When it is released it
goes on by itself. The SuperLink hears nothing of it meanwhile, and takes it to be offline after 60 s.

A node is known by its node id, by the public key that it shows, or by the identity that `auth` gave it. A
node that may register itself gets a new id, and may make itself a new key, by a restart: only an identity
holds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import structlog
from prometheus_client import Counter

from relay.call import Call, Reply, View
from relay.credentials.node_keys import KeyFormatError, node_key
from relay.fleet import PEEK_BYTES, Kind, Method, peek
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

#: The head of a register or activate request holds the public key, about 215 bytes of PEM.
_KEY_BYTES = 1024


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
        if listed is not None and listed.entries and (entry := await _entry(call, listed)) is not None:
            QUARANTINED.labels(call.method.rpc, "true" if self._enforce else "false").inc()
            detail = f"{entry.kind} in quarantine{f': {entry.reason}' if entry.reason else ''}"
            if self._enforce:
                raise Refusal(Reason.FORBIDDEN, detail, by=self.name, sent=False)
            log.info("would be refused", detail=detail, method=call.method.rpc, request_id=call.request_id)
        return await next(call)


async def _entry(call: Call, listed: QuarantineList) -> Entry | None:
    if call.identity is not None and (entry := listed.find(identity=call.identity)) is not None:
        return entry
    if listed.nodes and call.method.kind is not Kind.JOIN:
        ids = peek(call.method, await call.payload.peek(PEEK_BYTES))
        if (entry := listed.find(node_id=ids.node_id)) is not None:
            return entry
    if listed.keys:
        for key in await _keys(call):
            if (entry := listed.find(fingerprint=key)) is not None:
                return entry
    return None


async def _keys(call: Call) -> list[str]:
    """Return the fingerprints of the keys that a call shows: in its headers, and to join in its body."""
    shown = []
    try:
        if (proof := call.proof) is not None:
            shown.append(proof.public_key)
    except ProofError:
        pass
    if call.method.kind is Kind.JOIN:
        shown.append(_key_field(await call.payload.peek(_KEY_BYTES)))
    found = []
    for pem in shown:
        try:
            found.append(node_key(pem).fingerprint)
        except KeyFormatError:
            continue
    return found


def _key_field(head: bytes) -> bytes:
    try:
        return next(
            (value for number, value in fields(head) if number == 1 and isinstance(value, bytes)), b""
        )
    except TruncatedError:
        return b""
