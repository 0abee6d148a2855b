"""Let in who proves to be somebody, and nobody else.

A listener's `accept` lists alternatives; an alternative is a set of credentials that are all needed. The
first alternative that is whole lets the call in, whatever is wrong with the credentials of another one. If
none is:

- a credential that could not be checked, because whoever knows is down, defers the call (UPSTREAM_DOWN): an
  outage must shut no node down;
- else one that is wrong refuses it with its own cause, and if there is none at all the cause is `missing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import structlog
from prometheus_client import Counter

from relay.call import Call, Identity, Metadata, Reply, View
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from relay.credentials import Credential
    from relay.fleet import Method
    from relay.pipeline import Handler

log = structlog.get_logger("relay.policies.auth")

CALLS = Counter(
    "relay_auth_calls", "Calls that were let in, by the credentials that proved them", ["credential"]
)
REFUSALS = Counter(
    "relay_auth_refusals",
    "Calls whose credentials did not do, by what was wrong and what became of the call:"
    " refused, dropped, deferred (an outage) or passed (enforce: false)",
    ["cause", "action"],
)

#: What carries a credential that is meant for the relay alone.
CREDENTIAL_HEADERS = frozenset({b"authorization", b"x-api-key"})
_LENGTHS = frozenset(map(len, CREDENTIAL_HEADERS))


class Auth:
    """Finds out who calls, and refuses strangers."""

    name: ClassVar[str] = "auth"
    sees: ClassVar[View] = View.HEAD

    def __init__(
        self,
        alternatives: tuple[tuple[Credential, ...], ...] = (),
        *,
        drop: bool = False,
        forward: bool = False,
        enforce: bool = True,
    ) -> None:
        """Ask for credentials.

        Args:
            alternatives: sets of credentials, any of which is enough; with none, everybody is let in.
            drop: close a stranger's connection without an answer, in place of a 401.
            forward: send the headers with credentials on.
            enforce: refuse; else count only.
        """
        self._alternatives = tuple((_label(alternative), alternative) for alternative in alternatives)
        self._drop = drop
        self._forward = forward
        self._enforce = enforce
        self._let_in = dict.fromkeys((label for label, _ in self._alternatives), 0)
        self._wanted = " or ".join(self._let_in)

    def applies(self, method: Method) -> bool:
        """Every call, if anything is asked for."""
        return bool(self._alternatives)

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass a known caller's call on with its identity, without what proved it; or raise a Refusal."""
        if call.identity is None:  # else its wire had to know
            await self._find_out(call)
        if not self._forward:
            call.metadata = without_credentials(call.metadata)
        return await next(call)

    async def admit(self, call: Call) -> None:
        """Find out who calls, or raise a Refusal; of the call only the head is looked at.

        Where nobody is refused nothing is done: the chain finds out, and counts it, once.
        """
        if self._enforce:
            await self._find_out(call)

    async def _find_out(self, call: Call) -> None:
        try:
            call.identity = await self._identify(call)
        except Refusal as refusal:
            self._refuse(call, refusal)

    def sample(self) -> None:
        """Write what was gathered; to be called once a second, and when the worker ends."""
        for label, calls in self._let_in.items():
            if calls:
                CALLS.labels(label).inc(calls)
                self._let_in[label] = 0

    async def _identify(self, call: Call) -> Identity:
        found: dict[Credential, Identity | Refusal | None] = {}
        for label, alternative in self._alternatives:
            identity: Identity | None = None
            for credential in alternative:
                if credential not in found:
                    try:
                        found[credential] = await credential.check(call)
                    except Refusal as refusal:
                        found[credential] = refusal
                proved = found[credential]
                if not isinstance(proved, Identity):
                    identity = None
                    break
                identity = proved if identity is None else _joined(identity, proved)
            if identity is not None:
                self._let_in[label] += 1
                return identity
        raise self._verdict([refusal for refusal in found.values() if isinstance(refusal, Refusal)])

    def _verdict(self, refusals: list[Refusal]) -> Refusal:
        for refusal in refusals:
            if refusal.reason is not Reason.UNAUTHENTICATED:
                return refusal
        if refusals:
            return refusals[0]
        detail = f"{self._wanted} is needed, and not all of it is there"
        return Refusal(Reason.UNAUTHENTICATED, detail, by=self.name, sent=False, cause="missing")

    def _refuse(self, call: Call, refusal: Refusal) -> None:
        """Count a refusal, and raise it as this listener does, if it does."""
        cause = refusal.cause or refusal.reason.value
        if not self._enforce:
            REFUSALS.labels(cause, "passed").inc()
            log.info(
                "call would be refused",
                method=call.method.rpc,
                wire=call.wire.value,
                peer=call.peer,
                cause=cause,
                detail=refusal.detail,
                by=refusal.by,
                request_id=call.request_id,
            )
            return
        if refusal.reason is not Reason.UNAUTHENTICATED:
            REFUSALS.labels(cause, "deferred").inc()
            raise refusal
        if self._drop:
            REFUSALS.labels(cause, "dropped").inc()
            raise Refusal(
                Reason.STRANGER, refusal.detail, by=refusal.by, sent=False, cause=cause
            ) from refusal
        REFUSALS.labels(cause, "refused").inc()
        raise refusal


def without_credentials(metadata: Metadata) -> Metadata:
    """Return the headers but for those that carry a credential for the relay."""
    return [
        pair for pair in metadata if len(pair[0]) not in _LENGTHS or pair[0].lower() not in CREDENTIAL_HEADERS
    ]


def _label(alternative: tuple[Credential, ...]) -> str:
    return "+".join(credential.name for credential in alternative)


def _joined(first: Identity, second: Identity) -> Identity:
    """Return who both are: the name of the first, and what the second adds."""
    return Identity(
        first.name,
        first.tenant or second.tenant,
        tuple((dict(second.labels) | dict(first.labels)).items()),
        (*first.by, *second.by),
    )
