"""What an exchange says about the address that it was with, and which addresses are out because of it.

An address is ejected after some failures in a row, for a time that doubles with each ejection in a row, up to
a bound. A failure is: no connection, no answer in time, 502, 503 or 504. A 4xx is an answer like any other:
the SuperLink is there. What says nothing about the SuperLink (the node left, a worker has no connection to
spare or cannot open one, an answer that makes no sense) neither counts nor ends a row.
"""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter

from relay.refusal import Reason, Refusal
from relay.upstreams.local_fault import is_local

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.stores.upstreams import State, UpstreamTable

log = structlog.get_logger("relay.upstreams.health")

EJECTIONS = Counter(
    "relay_upstream_ejections", "Addresses of the SuperLink that were left out for a while", ["address"]
)


class Verdict(enum.Enum):
    """What an exchange says about its address."""

    WORKS = "works"
    FAILS = "fails"
    SAYS_NOTHING = "says nothing"

    __hash__ = object.__hash__


def verdict(error: BaseException) -> Verdict:
    """Return what an exchange that ended in `error` says about its address."""
    if not isinstance(error, Refusal) or is_local(error):
        return Verdict.SAYS_NOTHING
    if error.status is not None:
        if error.status in (502, 503, 504):
            return Verdict.FAILS
        return Verdict.WORKS if error.status < 500 else Verdict.SAYS_NOTHING
    if error.reason is Reason.UPSTREAM_DOWN:
        return Verdict.FAILS
    # Unsent, it was the call's own time that was up.
    if error.reason is Reason.UPSTREAM_TIMEOUT and error.sent:
        return Verdict.FAILS
    return Verdict.SAYS_NOTHING


class Health:
    """Whether one address may be chosen, for one worker; what it decides holds for all workers of the host.

    Attributes:
        state: what is known of the address; `look` brings it up to date.
    """

    def __init__(
        self, address: str, table: UpstreamTable, *, failures: int, ejection: float, max_ejection: float
    ) -> None:
        """Eject after so many failures in a row, for `ejection` seconds at first, `max_ejection` at most."""
        self.address = address
        self._table = table
        self._failures = failures
        self._ejection = ejection
        self._max = max_ejection
        self._row = 0
        self.state = table.get(address)

    def look(self) -> None:
        """Read what is known of the address."""
        self.state = self._table.get(self.address)

    def available(self, now: float) -> bool:
        """Return whether it may be chosen at `now` (`time.monotonic()`)."""
        return self.state.ejected_until <= now and not self.state.down

    def worked(self) -> None:
        """Note that an exchange went well."""
        self._row = 0
        state = self.state
        if state.down or (state.ejections and state.ejected_until <= time.monotonic()):
            _, self.state = self._table.change(self.address, _recovered)

    def judge(self, refusal: Refusal, others: Callable[[], bool]) -> None:
        """Note how an exchange failed; `others` says whether another address could be chosen instead."""
        match verdict(refusal):
            case Verdict.WORKS:
                self.worked()
            case Verdict.FAILS:
                self._row += 1
                if self._row >= self._failures:
                    self.eject(others)
            case Verdict.SAYS_NOTHING:
                pass

    def eject(self, others: Callable[[], bool]) -> None:
        """Leave the address out for a while, unless it is the last one, or is left out already."""
        now = time.monotonic()
        self.look()
        if self.state.ejected_until > now or not others():
            return

        def ejected(state: State) -> State:
            if state.ejected_until > now:
                return state
            seconds = min(self._ejection * 2 ** min(state.ejections, 20), self._max)
            return state._replace(ejected_until=now + seconds, ejections=state.ejections + 1)

        before, self.state = self._table.change(self.address, ejected)
        self._row = 0
        if before != self.state:
            EJECTIONS.labels(self.address).inc()
            log.warning(
                "upstream address ejected",
                address=self.address,
                seconds=round(self.state.ejected_until - now, 3),
                times_in_a_row=self.state.ejections,
            )


def _recovered(state: State) -> State:
    return state._replace(ejected_until=0.0, ejections=0, misses=0, down=False, down_since=0.0)
