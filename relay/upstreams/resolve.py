"""The IP addresses behind the name of one SuperLink address, asked for again now and then.

And at once when no connection can be opened: a SuperLink that is started elsewhere has another address. A
worker that has never been answered uses the address that the others of the host use.

Of several addresses one is used, by all workers of the host, for as long as connections to it can be opened:
behind one name may stand two SuperLinks, and those that do not share their state answer each other's nodes
with 401, which ends them. Where they do share it, connections go to all of them in turn.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.stores.upstreams import UpstreamTable

log = structlog.get_logger("relay.upstreams.resolve")

#: Seconds between two questions, whatever happens.
_PAUSE = 1.0
#: Seconds that a call waits for the answer if what was known is of no use: name servers answer in a few ms.
_PATIENCE = 0.5


class Resolver:
    """Knows where to connect to. One per worker and name."""

    def __init__(
        self,
        host: str,
        port: int,
        table: UpstreamTable,
        *,
        interval: float,
        spread: bool,
        on_change: Callable[[], None],
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            host, port: what is resolved.
            table: where the workers of the host agree on one of several addresses.
            interval: seconds after which the name is asked for again.
            spread: use all addresses in turn.
            on_change: called when connections that are open should not be used any more.
        """
        self._host, self._port = host, port
        self._table = table
        self._interval = interval
        self._spread = spread
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._choice = f"ip of {host}"
        self._chosen: str | None = table.choice(self._choice)
        self._known: list[str] = []
        self._asked = 0.0
        self._error: BaseException | None = None
        self._quiet_until = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._turn = 0
        self._last: str | None = None  # the one to which no connection could be opened

    async def addresses(self) -> list[str]:
        """Return the addresses in the order in which to try them. Raises OSError if there are none."""
        if not self._known:
            await self._first_answer()
        known = list(self._known)
        if not known and self._chosen is not None:
            return [self._chosen]
        if self._chosen is None and not self._spread:
            # Before any connects, so that all workers begin with the same.
            self._table.choose(self._choice, known[0], instead_of=None)
            self.look()
        if self._spread:
            self._turn = (self._turn + 1) % len(known)
            known = known[self._turn :] + known[: self._turn]
        elif self._chosen in known:
            known.remove(self._chosen)
            known.insert(0, self._chosen)
        if self._last in known:
            known.remove(self._last)
            known.append(self._last)
        return known

    async def _first_answer(self) -> None:
        """Wait for it, or for a while if there is something else to go by."""
        chosen = None if self._spread else self._chosen
        if self._error is None or self._loop.time() - self._asked >= _PAUSE:
            await asyncio.wait({self._ask()}, timeout=None if chosen is None else _PATIENCE)
        if not self._known and chosen is None:
            error = self._error or OSError(f"{self._host} was not resolved")
            raise type(error)(*error.args)

    def connected(self, address: str) -> None:
        """Stay with this address, in all workers."""
        if address == self._last:
            self._last = None
        if self._spread or address == self._chosen:
            return
        log.warning("upstream name: another address is used", host=self._host, address=address)
        self._table.choose(self._choice, address, instead_of=self._chosen)
        self.look()

    def failed(self, address: str) -> None:
        """Try this address last from now on, and ask whether there is another."""
        self._last = address
        if self._loop.time() - self._asked >= _PAUSE:
            self._ask()

    async def other(self, than: list[str]) -> list[str]:
        """Return the addresses other than those, once the question that is under way was answered."""
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=_PATIENCE)
        return [address for address in await self.addresses() if address not in than]

    def look(self) -> None:
        """Follow the other workers, and ask again if it is time; to be called once a second."""
        if not self._spread:
            chosen = self._table.choice(self._choice)
            if chosen != self._chosen:
                had_one, self._chosen = self._chosen is not None, chosen
                if had_one:
                    self._on_change()
                    if chosen not in self._known:
                        self._ask()
        if self._known and self._loop.time() - self._asked >= self._interval:
            self._last = None
            self._ask()

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    def _ask(self) -> asyncio.Task[None]:
        if self._asking is None:
            self._asking = self._loop.create_task(self._resolve())
            self._asking.add_done_callback(self._answered)
        return self._asking

    def _answered(self, asking: asyncio.Task[None]) -> None:
        self._asking = None
        if asking.cancelled():
            return
        error = asking.exception()
        self._error = error
        if error is not None and self._known and self._loop.time() >= self._quiet_until:
            # What is known may still be right, and there is nothing better.
            self._quiet_until = self._loop.time() + self._interval
            log.warning("upstream name cannot be resolved", host=self._host, error=str(error))

    async def _resolve(self) -> None:
        self._asked = self._loop.time()
        found = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        known = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        gone = set(self._known) - set(known)
        added = set(known) - set(self._known)
        had, self._known = bool(self._known), known
        if had and ((self._spread and (gone or added)) or self._chosen in gone):
            log.info("upstream name has other addresses", host=self._host, addresses=known)
            self._on_change()


def is_name(host: str) -> bool:
    """Return whether `host` has to be resolved."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False
