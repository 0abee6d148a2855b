"""The circuit breaker of one address: while the SuperLink is out, calls are refused at once.

It is pybreaker's, with its state in memory that the workers of a host share: one worker's failures open it
for all, and one call at a time on the host, the probe, finds out whether it can be closed. Each worker counts
failures for itself.

How pybreaker is used from asyncio. `calling()` stands around the awaited exchange: a decorated coroutine
would count as a success when it is made, before it has run. Half open, pybreaker lets any number of calls
through; the claim before it admits one. It knows successes and failures alone, and a node that leaves is
neither: what says nothing is withheld from its counters (`_Storage.withhold`). And while it is closed and
nothing has failed, a success changes nothing, so `calling()`, which costs 5 us, is left out: there it records
what failed. A call that began before the breaker turned is not counted: it tells how things were.

A probe that hangs has failed after PROBE_SECONDS, and the next call may be one. It is not cut off: it may be
a pull that the SuperLink is about to hand a message to. If it is answered after all, that closes the breaker.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import Counter, Gauge
from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitBreakerStorage,
)

from relay.refusal import Reason, Refusal
from relay.stores.upstreams import CLOSED, HALF_OPEN, OPEN
from relay.upstreams.health import Verdict, verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Call, Reply
    from relay.pipeline import Handler
    from relay.stores.upstreams import State, UpstreamTable

log = structlog.get_logger("relay.upstreams.breaker")

_NAMES = {CLOSED: STATE_CLOSED, HALF_OPEN: STATE_HALF_OPEN, OPEN: STATE_OPEN}
_NUMBERS = {name: number for number, name in _NAMES.items()}

STATE = Gauge(
    "relay_breaker_state",
    "Circuit breaker of an address of the SuperLink: 0 closed, 1 half open, 2 open",
    ["address"],
    multiprocess_mode="livemostrecent",
)
TRANSITIONS = Counter(
    "relay_breaker_transitions", "Times that a circuit breaker changed to this state", ["address", "to"]
)


#: Seconds for a probe: a SuperLink that takes longer has missed the heartbeats of its nodes.
PROBE_SECONDS = 4.0


class Breaker:
    """Stands before the handler of one address; a handler itself."""

    def __init__(
        self,
        address: str,
        handler: Handler,
        table: UpstreamTable,
        *,
        failures: int,
        open_seconds: float,
        on_open: Callable[[], None],
    ) -> None:
        """Open after `failures` in a row for `open_seconds`; `on_open` is told each time it opens."""
        self.address = address
        self._handler = handler
        self._table = table
        self._open_seconds = open_seconds
        self._claim = f"probe {address}"
        self._storage = _Storage(address, table)
        self._listener = _Listener(address, self._storage, on_open)
        self._breaker = CircuitBreaker(
            fail_max=failures,
            reset_timeout=open_seconds,
            exclude=[self._says_no_failure],
            listeners=[self._listener],
            state_storage=self._storage,
            name=address,
            throw_new_error_on_trip=False,
        )
        STATE.labels(address).set(self._storage.seen.breaker)

    @property
    def is_open(self) -> bool:
        """Whether a call would be refused now, or be the probe."""
        self._look()
        return self._storage.seen.breaker != CLOSED

    @property
    def probe_is_due(self) -> bool:
        """Whether the next call may be the probe, if nobody else's is."""
        seen = self._storage.seen
        return seen.breaker == HALF_OPEN or time.monotonic() >= seen.turned + self._open_seconds

    async def __call__(self, call: Call) -> Reply:
        """Pass the call on, or refuse it.

        Raises:
            Refusal: BREAKER_OPEN, or what the handler raises.
        """
        if self._storage.version != self._table.version:
            self._look()
        if self._storage.seen.breaker != CLOSED:
            return await self._probe(call)
        turns = self._listener.turns
        try:
            reply = await self._handler(call)
        except Refusal as refusal:
            if turns == self._listener.turns:
                self._note(refusal)
            raise
        if self._storage.counter and turns == self._listener.turns:
            self._note(None)
        return reply

    def reset(self) -> None:
        """Close it, for all workers."""
        self._look()
        if self._storage.seen.breaker != CLOSED:
            self._breaker.close()
        self._storage.reset_counter()

    def look(self) -> None:
        """Take over what other workers made of it; to be called once a second."""
        self._storage.version = -1
        self._look()

    def state(self) -> dict[str, object]:
        """Return what an operator wants to see."""
        self._look()
        seen = self._storage.seen
        return {
            "address": self.address,
            "state": _NAMES[seen.breaker],
            "failures_in_a_row": self._storage.counter,
            "seconds": round(time.monotonic() - seen.turned, 3) if seen.turned else None,
        }

    # -- inside -------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._storage.look()
        # Has pybreaker notice, and tell the listener, what another worker did.
        _ = self._breaker.state

    def _note(self, refusal: Refusal | None) -> None:
        """Count an exchange that began when the breaker was closed, as it still is."""
        self._look()
        if self._storage.seen.breaker != CLOSED:
            return
        try:
            with self._breaker.calling():
                if refusal is not None:
                    raise refusal
        except Refusal:
            pass  # the caller raises it

    async def _probe(self, call: Call) -> Reply:
        # A body that is still arriving may take hours, in which all other calls would be refused.
        if call.payload.data is None or not self.probe_is_due or not self._table.claim(self._claim):
            raise self._refusal()
        try:
            # While the claim was another's, its probe may have closed the breaker, or opened it anew.
            self._look()
            with self._breaker.calling():
                return await self._ask(call)
        except CircuitBreakerError:
            raise self._refusal() from None
        except _HangsError as hangs:
            asking = hangs.asking
        finally:
            self._table.release(self._claim)
        return await self._late(asking)

    async def _ask(self, call: Call) -> Reply:
        """Pass a probe on. Raises _HangsError if there is no answer in time, or what the handler raises."""
        asking = asyncio.ensure_future(self._handler(call))
        try:
            await asyncio.wait({asking}, timeout=PROBE_SECONDS)
        except asyncio.CancelledError:
            asking.cancel()  # too late if it is done
            asking.add_done_callback(_give_up)
            raise
        if not asking.done():
            raise _HangsError(asking)
        return asking.result()

    async def _late(self, asking: asyncio.Future[Reply]) -> Reply:
        """Wait for the answer to a probe that has failed for want of one; it closes the breaker."""
        try:
            reply = await asking
        except asyncio.CancelledError:
            asking.add_done_callback(_give_up)
            raise
        except Refusal as refusal:
            if verdict(refusal) is Verdict.WORKS:
                self.reset()
            raise
        self.reset()
        return reply

    def _refusal(self) -> Refusal:
        return Refusal(Reason.BREAKER_OPEN, "the circuit breaker is open", by=self.address, sent=False)

    def _says_no_failure(self, error: BaseException) -> bool:
        """For pybreaker: whether what was raised is no failure; it takes that for a success."""
        found = verdict(error)
        self._storage.withhold = found is Verdict.SAYS_NOTHING
        return found is not Verdict.FAILS


def _give_up(asking: asyncio.Future[Reply]) -> None:
    """Let go of an answer that nobody waits for any more, and of its connection."""
    if not asking.cancelled() and asking.exception() is None:
        asking.result().payload.close()


class _HangsError(Refusal):
    """For pybreaker: a probe has failed; `asking`, its call, goes on."""

    def __init__(self, asking: asyncio.Future[Reply]) -> None:
        super().__init__(Reason.UPSTREAM_TIMEOUT)
        self.asking = asking


class _Storage(CircuitBreakerStorage):
    """Where pybreaker keeps its state: the state in shared memory, the counters in this worker.

    Attributes:
        seen: the shared state, as of `version`.
        version: of the table when `seen` was read.
        withhold: set it, and the success that pybreaker is about to count is not counted.
        counter: failures in a row.
    """

    def __init__(self, address: str, table: UpstreamTable) -> None:
        super().__init__("host")
        self._address = address
        self._table = table
        self.version = -1
        self.withhold = False
        self._failures = 0
        self._successes = 0
        self.seen: State
        self.look()

    def look(self) -> None:
        """Read the shared state if it may have changed."""
        version = self._table.version
        if version != self.version:
            # The version first: a change in between is read once more.
            self.version = version
            self.seen = self._table.get(self._address)

    @property
    def state(self) -> str:
        return _NAMES[self.seen.breaker]

    @state.setter
    def state(self, name: str) -> None:
        number, now = _NUMBERS[name], time.monotonic()
        before, self.seen = self._table.change(
            self._address, lambda state: state._replace(breaker=number, turned=now)
        )
        if before.breaker == self.seen.breaker:
            return  # another worker was first
        TRANSITIONS.labels(self._address, name).inc()
        if number == OPEN:
            log.warning("circuit breaker opened", address=self._address)
        else:
            log.info("circuit breaker changed", address=self._address, to=name)

    @property
    def opened_at(self) -> datetime | None:
        # pybreaker reckons with the clock on the wall, which may be set; this makes up for it.
        return datetime.now(UTC) - timedelta(seconds=time.monotonic() - self.seen.turned)

    @opened_at.setter
    def opened_at(self, when: datetime) -> None:
        """Nothing: the state carries its time."""

    @property
    def counter(self) -> int:
        return self._failures

    def increment_counter(self) -> None:
        self._failures += 1

    def reset_counter(self) -> None:
        if not self.withhold:
            self._failures = 0

    @property
    def success_counter(self) -> int:
        return self._successes

    def increment_success_counter(self) -> None:
        if not self.withhold:
            self._successes += 1

    def reset_success_counter(self) -> None:
        self._successes = 0


class _Listener(CircuitBreakerListener):
    """Hears from pybreaker when the breaker turned, in this worker or in another.

    Attributes:
        turns: how often it did.
    """

    def __init__(self, address: str, storage: _Storage, on_open: Callable[[], None]) -> None:
        self._storage = storage
        self._gauge = STATE.labels(address)
        self._on_open = on_open
        self.turns = 0

    def state_change(self, cb: CircuitBreaker, old_state: Any, new_state: Any) -> None:
        self.turns += 1
        self._gauge.set(_NUMBERS[new_state.name])
        if new_state.name == STATE_OPEN:
            self._on_open()

    def success(self, cb: CircuitBreaker) -> None:
        """What was withheld was that of one exchange."""
        self._storage.withhold = False
