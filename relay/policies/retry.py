"""Repeat a call that failed on its way to the SuperLink, when that cannot do harm.

What may be repeated is the method's own (`Method.repeatable`): pull-messages hands a message out once, so a
second pull would find nothing; push-object says `stored=false` the second time, and the node then drops
its reply. Such a call is repeated only if no byte of it can have left the relay.

Repeats wait with exponential backoff and full jitter, end before the node gives up, and share a budget per
worker and address, so that an outage is not answered with a multiple of the normal load, and one address that
fails uses nothing up of the others.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, ClassVar

from prometheus_client import Counter

from relay import dialect
from relay.call import Call, Reply, View
from relay.fleet import Kind
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from relay.fleet import Method
    from relay.pipeline import Handler

RETRIES = Counter("relay_retries", "Calls sent to the SuperLink once more, by why", ["method", "reason"])
DENIED = Counter("relay_retries_denied", "Repeats that the retry budget did not allow", ["method"])

#: Reasons that may pass by themselves. A timeout is none: the SuperLink works on the call already, most of
#: the node's patience is gone, and the node asks again by itself.
_PASSING = frozenset(
    {Reason.UPSTREAM_DOWN, Reason.UPSTREAM_BAD_ANSWER, Reason.OVERLOADED, Reason.BREAKER_OPEN}
)
#: Of those, the ones for which a pull waits only if it is held anyway: they say that there is enough to do,
#: or nobody to ask, and a node that is told "nothing now" comes back by itself.
_NOT_FOR_PULLS = frozenset({Reason.OVERLOADED, Reason.BREAKER_OPEN})


class Budget:
    """How many repeats are allowed: a share of the calls, and a few per second in any case.

    The idea of a retry budget: Finagle, https://finagle.github.io/blog/2016/02/08/retry-budgets/
    """

    def __init__(self, share: float, floor: float, now: Callable[[], float] = time.monotonic) -> None:
        """Allow `share` repeats per call, and `floor` per second; ten seconds of either may be saved up."""
        self._share = share
        self._floor = floor
        self._now = now
        self._most = max(10 * floor, 1.0)
        self._saved = self._most
        self._then = now()

    def deposit(self) -> None:
        """Count a call."""
        self._saved = min(self._saved + self._share, self._most)

    def withdraw(self) -> bool:
        """Take leave to repeat once; return whether it was given."""
        now = self._now()
        self._saved = min(self._saved + (now - self._then) * self._floor, self._most)
        self._then = now
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True


class Retry:
    """Repeats what may be repeated."""

    name: ClassVar[str] = "retry"
    sees: ClassVar[View] = View.HEAD

    def __init__(
        self,
        *,
        enabled: bool,
        base: float,
        cap: float,
        budget: Budget,
        budgets: Mapping[str, Budget] | None = None,
    ) -> None:
        """Wait up to `base` seconds before the first repeat, twice that before the next, at most `cap`.

        Args:
            enabled: whether anything is repeated.
            base, cap: see above.
            budget: what repeats are taken from, but for those after refusals by who has one in `budgets`.
            budgets: by address.
        """
        self._enabled = enabled
        self._base = base
        self._cap = cap
        self._budget = budget
        self._budgets = dict(budgets or {})
        self._all = (budget, *self._budgets.values())

    def applies(self, method: Method) -> bool:
        """Every method may be repeated at least when it never left."""
        return self._enabled

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on, and again. Raises the last Refusal if it must not be repeated (any more)."""
        for budget in self._all:
            budget.deposit()
        repeats = 0
        while True:
            try:
                return await next(call)
            except Refusal as refusal:
                wait = random.uniform(0.0, min(self._cap, self._base * 2**repeats))  # noqa: S311 - jitter
                in_time = time.monotonic() + wait < call.deadline
                if not in_time or not may_repeat(call, refusal):
                    raise
                # What the breaker refused was not sent, so the next attempt is no load that comes on top.
                if refusal.reason is not Reason.BREAKER_OPEN and not self._withdraw(refusal):
                    DENIED.labels(call.method.rpc).inc()
                    raise
                RETRIES.labels(call.method.rpc, refusal.reason.value).inc()
            repeats += 1
            await asyncio.sleep(wait)

    def _withdraw(self, refusal: Refusal) -> bool:
        return self._budgets.get(refusal.by, self._budget).withdraw()


def may_repeat(call: Call, refusal: Refusal) -> bool:
    """Return whether the call may be sent once more after this refusal.

    Args:
        call: the call, as it is after the attempt.
        refusal: how the attempt ended.
    """
    if call.method.kind is Kind.PULL and refusal.reason in _NOT_FOR_PULLS:
        held = dialect.answer(call.wire, refusal.reason, call.method)
        if not isinstance(held, dialect.Hold):
            return False
    whole = call.payload.replayable or not call.payload.passed
    if not refusal.sent:
        return whole and refusal.reason in _PASSING
    if not call.method.repeatable or not call.payload.replayable:
        return False
    if refusal.reason is Reason.UPSTREAM_REJECTED:
        # A 5xx may be a locked database as well as a run that is gone: the node waits, then gives it up.
        return (refusal.status or 0) >= 500
    return refusal.reason in _PASSING
