"""The connections of one worker to one upstream address, kept alive between calls.

An idle connection is dropped before the upstream's own keep-alive ends (uvicorn, which every SuperLink
with HTTP is, closes after 5 s): a request that meets a closing connection is lost without anybody
knowing whether it was carried out, and pull-messages cannot be asked twice.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from relay.refusal import Reason, Refusal
from relay.upstreams.connection import Connection
from relay.upstreams.local_fault import NO_NAME, LocalFaults, local_fault

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from relay.upstreams.resolve import Resolver

_P = TypeVar("_P", bound=asyncio.BaseProtocol)
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2}) ")
_LONGEST_STATUS, _LONGEST_HEAD = 64, 16 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Where an upstream is.

    Attributes:
        host, port: where to connect to.
        authority: what goes into the Host header.
        tls: context for https, None for http.
    """

    host: str
    port: int
    authority: str
    tls: ssl.SSLContext | None


class Pool:
    """Opens, lends and retires connections. One per worker; must be made inside the running loop.

    Attributes:
        target: where to.
        name: host and port, for people.
        resolver: knows the addresses of a host that is a name; without one, each connection asks anew.
    """

    def __init__(
        self,
        target: Target,
        *,
        connect_timeout: float,
        idle_timeout: float,
        keepalive: float,
        max_connections: int,
        queue_timeout: float,
    ) -> None:
        """Prepare an empty pool. All times in seconds; see `upstream` in docs/configuration.md."""
        self.resolver: Resolver | None = None
        self.target = target
        self.name = f"{target.host}:{target.port}"
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._keepalive = keepalive
        self._max = max_connections
        self._queue_timeout = queue_timeout
        self._loop = asyncio.get_running_loop()
        self._idle: deque[Connection] = deque()  # the most recently used one is at the right
        self._connections: set[Connection] = set()  # lent and idle
        self._old: set[Connection] = set()  # those that are not to be lent again
        self._open = 0  # those, and the ones being opened
        # in the order of arrival
        self._queue: OrderedDict[asyncio.Future[Connection | None], None] = OrderedDict()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._failure: str | None = None
        self._local_faults = LocalFaults(self.name)

    def state(self) -> dict[str, object]:
        """Return what an operator wants to see; `last_failure` is None once a connection was opened again."""
        return {"address": self.name, "connections": self._open, "last_failure": self._failure}

    def acquire_idle(self) -> Connection | None:
        """Return a connection for one exchange if one is idle; it comes back by itself, see `acquire`."""
        oldest = self._loop.time() - self._keepalive
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            connection.retire()
        return None

    async def acquire(self) -> Connection:
        """Return a connection for one exchange; it comes back by itself when the response was taken.

        Raises:
            Refusal: UPSTREAM_DOWN if none can be opened, OVERLOADED if `max_connections` are busy
                for `queue_timeout` seconds.
        """
        if (idle := self.acquire_idle()) is not None:
            return idle
        while self._open >= self._max:
            given = await self._wait()
            if given is None:
                return await self._connect()
            if given.usable:
                return given
        self._open += 1
        return await self._connect()

    def renew(self) -> None:
        """Lend no connection any more that is open now; those that are lent end when they come back."""
        while self._idle:
            self._idle.pop().retire()
        self._old |= self._connections

    async def get(self, path: str) -> int:
        """Ask for a path on a connection of its own; return the status of the answer.

        Raises:
            Refusal: UPSTREAM_DOWN if there is no answer that is HTTP.
        """
        transport, answer = await self._dial_with(_Status)
        try:
            head = f"GET {path} HTTP/1.1\r\nhost: {self.target.authority}\r\nconnection: close\r\n\r\n"
            transport.write(head.encode("ascii"))
            status = await answer.status
        except ConnectionError as error:
            raise self._down(f"no answer to GET {path}: {error}") from error
        else:
            transport.close()
            return status
        finally:
            answer.status.cancel()
            if not transport.is_closing():
                transport.abort()

    async def close(self) -> None:
        """Close idle connections now and lent ones when they come back."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        while self._idle:
            self._idle.pop().retire()

    async def _wait(self) -> Connection | None:
        """Wait for a connection, or for a place to open one in (None); it is counted in `_open` already."""
        turn: asyncio.Future[Connection | None] = self._loop.create_future()
        self._queue[turn] = None
        try:
            async with asyncio.timeout(self._queue_timeout):
                return await turn
        except BaseException as error:
            self._queue.pop(turn, None)
            if turn.done() and not turn.cancelled():
                # It was given in the very moment that the wait ended: pass it on.
                given = turn.result()
                if given is None:
                    self._gone()
                elif given.usable:
                    self.give_back(given)
            if isinstance(error, TimeoutError):
                raise Refusal(
                    Reason.OVERLOADED,
                    f"all {self._max} connections were busy for {self._queue_timeout:g} s",
                    by=self.name,
                    sent=False,
                ) from None
            raise

    async def _connect(self) -> Connection:
        """Open a connection in a place that is counted already."""
        try:
            connection = await self._dial()
        except Refusal as refusal:
            self._failure = refusal.detail
            self._gone()
            raise
        except BaseException:
            self._gone()
            raise
        self._failure = None
        self._connections.add(connection)
        return connection

    async def _dial(self) -> Connection:
        _, connection = await self._dial_with(self._make)
        if not connection.usable:
            raise self._down("a new connection was closed at once")
        return connection

    async def _dial_with(self, make: Callable[[], _P]) -> tuple[asyncio.Transport, _P]:
        """Open a connection to the first address that takes one."""
        resolver, tried = self.resolver, list[str]()
        try:
            async with asyncio.timeout(self._connect_timeout):
                if resolver is None:
                    return await self._open_to(self.target.host, make)
                return await self._try_all(resolver, tried, make)
        except TimeoutError:
            if resolver is not None and not tried:
                detail = f"no address of {self.target.host} within {self._connect_timeout:g} s"
                raise self._local_faults.refusal(NO_NAME, detail) from None
            if resolver is not None:
                resolver.failed(tried[-1])
            raise self._down(f"no connection within {self._connect_timeout:g} s") from None
        except (OSError, UnicodeError) as error:  # ssl.SSLError and socket.gaierror are the first
            if cause := local_fault(error):
                raise self._local_faults.refusal(cause, f"no connection: {error}") from error
            raise self._down(f"no connection: {error}") from error

    async def _try_all(
        self, resolver: Resolver, tried: list[str], make: Callable[[], _P]
    ) -> tuple[asyncio.Transport, _P]:
        """Try the addresses of a name, one after the other, and note in `tried` which those were."""
        addresses = await resolver.addresses()
        while addresses:
            for address in addresses:
                tried.append(address)
                try:
                    opened = await self._open_to(address, make)
                except OSError as error:
                    if local_fault(error):
                        raise
                    failure = error
                    resolver.failed(address)
                else:
                    resolver.connected(address)
                    return opened
            addresses = await resolver.other(tried)
        raise failure

    async def _open_to(self, address: str, make: Callable[[], _P]) -> tuple[asyncio.Transport, _P]:
        target = self.target
        return await self._loop.create_connection(
            make,
            address,
            target.port,
            ssl=target.tls,
            server_hostname=target.host if target.tls else None,
        )

    def _down(self, detail: str) -> Refusal:
        return Refusal(Reason.UPSTREAM_DOWN, detail, by=self.name, sent=False)

    def _make(self) -> Connection:
        return Connection(self.name, self._idle_timeout, on_free=self.give_back, on_lost=self._lost)

    def give_back(self, connection: Connection) -> None:
        """Take back a connection on which nothing is under way."""
        if self._closed or connection in self._old:
            connection.retire()
            return
        if self._hand_over(connection):
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._keepalive / 4, self._sweep)

    def _lost(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # lost while it was being opened; `_connect` counts that
        self._connections.remove(connection)
        self._old.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._gone()

    def _gone(self) -> None:
        """Give up the place of a connection that has ended."""
        if not self._hand_over(None):
            self._open -= 1

    def _hand_over(self, what: Connection | None) -> bool:
        """Give a connection, or a place to open one in, to the call that waits longest, if one does."""
        while self._queue:
            turn, _ = self._queue.popitem(last=False)
            if not turn.done():
                turn.set_result(what)
                return True
        return False

    def _sweep(self) -> None:
        """Retire what was idle for long; the oldest are at the left."""
        oldest = self._loop.time() - self._keepalive
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.popleft().retire()
        self._sweeper = self._loop.call_later(self._keepalive / 4, self._sweep) if self._idle else None


class _Status(asyncio.Protocol):
    """Reads the head of an answer.

    Attributes:
        status: what it says; ConnectionError if it is none.
    """

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        found = _STATUS.match(self._data)
        if self.status.done():
            return
        if found and b"\r\n\r\n" in self._data:
            self.status.set_result(int(found[1]))
        elif len(self._data) > (_LONGEST_HEAD if found else _LONGEST_STATUS):
            self.status.set_exception(ConnectionError(f"no HTTP: {self._data[:20]!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.status.done():
            self.status.set_exception(ConnectionError(str(exc or "the connection was closed")))
