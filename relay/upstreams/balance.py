"""Chooses among the addresses of a SuperLink.

Addresses that share their state (`shared_state`) are one SuperLink: each call goes to the one with the
fewest calls in flight, of those that are neither ejected nor down; if none is left, to any. A call that never
left is tried on the next one at once.

Without shared state a second address is another SuperLink, which knows none of the nodes and answers each
with 401, which ends it. Such a standby takes over only after the first has been down for long, by active
checks and calls alike, and itself answers. It then stays, since the database of the first is old by then:
the first is taken again only if the standby is down for as long or is no longer among the addresses, or
after a restart of the relay, which a reload is not. All workers of the host change together.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter, Gauge

from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.call import Call, Reply
    from relay.pipeline import Handler
    from relay.stores.upstreams import UpstreamTable
    from relay.upstreams.breaker import Breaker
    from relay.upstreams.channels import Channels
    from relay.upstreams.check import Check
    from relay.upstreams.health import Health
    from relay.upstreams.pool import Pool
    from relay.upstreams.resolve import Resolver

log = structlog.get_logger("relay.upstreams.balance")

UP = Gauge(
    "relay_upstream_up",
    "Whether an address of the SuperLink may be chosen: neither down, nor ejected, nor its breaker open",
    ["address"],
    multiprocess_mode="livemostrecent",
)
ACTIVE = Gauge(
    "relay_upstream_active",
    "Whether calls may go to an address of the SuperLink: 0 for a standby that stands by",
    ["address"],
    multiprocess_mode="livemostrecent",
)
FAILOVERS = Counter("relay_upstream_failovers", "Times that a standby took over", ["address"])

#: Refusals that another address may not make.
_ELSEWHERE = frozenset({Reason.UPSTREAM_DOWN, Reason.BREAKER_OPEN, Reason.OVERLOADED})


#: What the workers of a host call the address that is in use. It outlives a reload.
_CHOICE = "active address"


class Address:
    """One address of the SuperLink with all that belongs to it, in one worker.

    Attributes:
        name: `host:port`.
        in_flight: calls that have no answer yet.
    """

    def __init__(
        self,
        pool: Pool | Channels,
        handler: Handler,
        health: Health,
        *,
        breaker: Breaker | None = None,
        resolver: Resolver | None = None,
        check: Check | None = None,
    ) -> None:
        self.name = pool.name
        self.pool = pool
        self.handler = handler
        self.health = health
        self.breaker = breaker
        self.resolver = resolver
        self.check = check
        self.in_flight = 0

    def probe_only(self) -> bool:
        """Return whether its breaker lets nothing through but a probe."""
        return self.breaker is not None and self.breaker.is_open

    def look(self) -> None:
        """Take over what other workers found out; to be called once a second."""
        self.health.look()
        for part in (self.breaker, self.resolver):
            if part is not None:
                part.look()
        if self.check is not None:
            self.check.tick()
        up = self.health.available(time.monotonic()) and not self.probe_only()
        UP.labels(self.name).set(int(up))

    async def close(self) -> None:
        """Let go of everything."""
        if self.check is not None:
            self.check.close()
        if self.resolver is not None:
            self.resolver.close()
        await self.pool.close()


class Balance:
    """All addresses of the SuperLink, in one worker.

    Attributes:
        addresses: in the order of the settings.
    """

    def __init__(
        self, addresses: Sequence[Address], table: UpstreamTable, *, shared_state: bool, standby_after: float
    ) -> None:
        """Choose among them: any if they have `shared_state`, else the first for as long as it is not down
        for `standby_after` seconds.
        """
        self.addresses = tuple(addresses)
        self._table = table
        self._spread = shared_state
        self._standby_after = standby_after
        self._by_name = {address.name: address for address in self.addresses}
        self._active = self.addresses[0]
        self._version = -1
        self._turn = 0
        if not self._spread:
            self._begin()
        self._look()

    @property
    def handler(self) -> Handler:
        """What calls go to: the only address itself, if there is one only."""
        return self if len(self.addresses) > 1 else self.addresses[0].handler

    async def __call__(self, call: Call) -> Reply:
        """Pass the call on to an address. Raises what its handler raises."""
        if self._version != self._table.version:
            self._look()
        if not self._spread:
            return await self._ask(self._active, call)
        left = list(self.addresses)
        while True:
            address = self._choose(left, may_probe=call.method.repeatable)
            left.remove(address)
            try:
                return await self._ask(address, call)
            except Refusal as refusal:
                whole = call.payload.replayable or not call.payload.passed
                if refusal.sent or not left or not whole or refusal.reason not in _ELSEWHERE:
                    raise

    async def _ask(self, address: Address, call: Call) -> Reply:
        address.in_flight += 1
        try:
            reply = await address.handler(call)
        except Refusal as refusal:
            address.health.judge(refusal, lambda: self._others(address))
            raise
        finally:
            address.in_flight -= 1
        address.health.worked()
        return reply

    def _choose(self, among: list[Address], *, may_probe: bool) -> Address:
        """Return the address for the next call, which may be a breaker's probe only if that is no risk."""
        if len(among) == 1:
            return among[0]
        now = time.monotonic()
        usable = [address for address in among if address.health.available(now)]
        usable = usable or sorted(among, key=lambda address: address.health.state.ejected_until)[:1]
        for address in usable if may_probe else ():
            if address.breaker is not None and address.breaker.is_open and address.breaker.probe_is_due:
                return address  # if another is the probe, this one is refused there, and goes elsewhere
        usable = [address for address in usable if not address.probe_only()] or usable
        self._turn += 1
        turn = self._turn % len(usable)
        return min(usable[turn:] + usable[:turn], key=lambda address: address.in_flight)

    def _others(self, address: Address) -> bool:
        """Return whether calls have somewhere else to go."""
        now = time.monotonic()
        return self._spread and any(
            other.health.available(now) and not other.probe_only()
            for other in self.addresses
            if other is not address
        )

    def _begin(self) -> None:
        """Stay with the SuperLink that the host has chosen, if it is one of these; else choose the first."""
        first, chosen = self.addresses[0], self._table.choice(_CHOICE)
        if chosen is None or chosen not in self._by_name:
            self._table.choose(_CHOICE, first.name, instead_of=chosen)
            if chosen is not None:
                log.warning("the SuperLink in use is none of the addresses", was=chosen, address=first.name)
        else:
            self._active = self._by_name[chosen]
        if self._active is not first:
            log.warning("calls go to a SuperLink that stood by", address=self._active.name, first=first.name)
        elif len(self.addresses) > 1:
            log.info("calls go to the first SuperLink", address=first.name)

    # -- once a second ------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look after the addresses; to be called once a second."""
        self._look()
        for address in self.addresses:
            address.look()
            ACTIVE.labels(address.name).set(int(self._spread or address is self._active))

    def _look(self) -> None:
        self._version = self._table.version
        for address in self.addresses:
            address.health.look()
        if self._spread:
            return
        # What is none of these was chosen by workers with other settings, before or after a reload.
        active = self._by_name.get(self._table.choice(_CHOICE) or "", self._active)
        if active is not self._active:
            self._active = active
            log.warning("calls go to another SuperLink", address=active.name)

    def reconsider(self) -> None:
        """Have a standby take over, if it is time."""
        if self._spread or len(self.addresses) == 1:
            return
        self._look()
        active = self._active
        state = active.health.state
        if not state.down or time.monotonic() - state.down_since < self._standby_after:
            return
        for standby in self.addresses:
            if standby is active or standby.health.state.down or not standby.health.state.checked:
                continue
            if self._table.choose(_CHOICE, standby.name, instead_of=active.name):
                FAILOVERS.labels(standby.name).inc()
                log.error("a standby takes over", address=standby.name, instead_of=active.name)
            self._look()
            return

    # -- for operators ------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Return what an operator wants to see of the address in use, and of all if there are several."""
        state = self._active.pool.state()
        if len(self.addresses) > 1:
            now = time.monotonic()
            state["addresses"] = [
                {
                    **address.pool.state(),
                    "active": self._spread or address is self._active,
                    "available": address.health.available(now) and not address.probe_only(),
                    "in_flight": address.in_flight,
                }
                for address in self.addresses
            ]
        return state

    def breakers(self) -> dict[str, Breaker]:
        """Return the breakers by address."""
        return {address.name: address.breaker for address in self.addresses if address.breaker is not None}

    async def close(self) -> None:
        """Let go of everything."""
        for address in self.addresses:
            await address.close()
