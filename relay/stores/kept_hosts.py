"""Pull answers that their nodes may not have got, kept by this host and, in Redis, for the relays of others.

An answer stays in the memory of the host that got it (`stores/kept`). Redis gets a copy in the background,
when the answer is on its way to the node, and tells all hosts that something is kept for that node
(`stores/kept_redis`). Each worker listens, and notes such nodes in the table of its host. A poll of a node
that is not noted, and for which nothing is kept here, asks nobody.

Who counts. While Redis answers, it alone grants deliveries, those of what a host keeps itself, too: one at a
time, and so many in all. A poll waits for it for PATIENCE seconds at most. If it has not answered by then, or
was found out a moment ago (`stores/redis_link`), what this host keeps is handed out by its own count: in an
outage each host that got the answer from the SuperLink may reach the limit by itself. What Redis did not
learn in an outage, or has lost, it learns with the next delivery: a host tells its own count when it asks.

A grant that comes too late is given back as soon as Redis answers again; that of a delivery which was made
without it counts.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from relay.stores.kept import Claim, KeptAnswers, Outcome, digest
from relay.stores.redis_link import OFF, OutageError, RedisLink, end

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from relay.stores.host import HostTable

#: Seconds that a poll waits for Redis, all in all.
PATIENCE = 0.05
#: Changes are taken up in batches, so often at most: a batch costs little more than one of them.
_PAUSE = 0.05
_NOBODY = bytes(8)
#: A number of deliveries that is never reached: it is not the memory of the host that sets the limit.
_ANY = 255


@dataclass(slots=True)
class Keeping:
    """An answer that is kept; times in seconds from now.

    Attributes:
        node: who pulled it.
        message: the digest of its message.
        holder: 8 bytes that say who pulled it.
        token: 8 bytes: the name of this handing out by the SuperLink.
        body: the bytes of the answer.
        expires, online: until the TTL of the message is over, or the node is not available any more.
        deliveries: how often it was delivered.
        busy: whether its first delivery is under way.
    """

    node: int
    message: bytes
    holder: bytes
    token: bytes
    body: bytes
    expires: float
    online: float
    deliveries: int
    busy: bool = False


class Verdict(NamedTuple):
    """Whether a host may deliver what it has.

    Attributes:
        state: `granted`, `busy` (somebody else does, or is another holder) or `exhausted`.
        delivery: which delivery it is.
        there: whether the bytes of the answer are in Redis.
    """

    state: str
    delivery: int
    there: bool


class Granted(NamedTuple):
    """An answer that a host may deliver: the digest of its message, which delivery it is, its bytes."""

    message: bytes
    delivery: int
    body: bytes


class Found(NamedTuple):
    """What was found for a node: a grant; whether there may be one later; how many were used up."""

    granted: Granted | None
    later: bool
    exhausted: int


class Change(NamedTuple):
    """A change of what is kept in Redis: when (ms, as Redis counts), what, of which node, which message."""

    at: int
    what: bytes
    node: int
    message: bytes


class Redis(Protocol):
    """What is asked of `kept_redis.KeptRedis`; see there."""

    name: str

    async def keep(self, keeping: Keeping) -> None: ...
    async def acquire(self, keeping: Keeping, claim: bytes, most: int) -> Verdict: ...
    async def claim(self, node: int, holder: bytes, claim: bytes, most: int) -> Found: ...
    async def settle(self, node: int, claim: bytes, *, delivered: bool) -> None: ...
    async def end(self, node: int, holder: bytes | None, messages: Iterable[bytes] | None) -> int: ...
    async def available(self, node: int, online: float) -> None: ...
    async def changes(self, after: str) -> tuple[str, list[Change]]: ...
    async def close(self) -> None: ...


class _Token(NamedTuple):
    """What a token is made of: the name in the memory of this host, the message, the claim in Redis."""

    here: bytes
    message: bytes
    claim: bytes

    @classmethod
    def of(cls, token: bytes) -> _Token:
        return cls(token[:8], token[8:24], token[24:])

    def pack(self) -> bytes:
        return self.here + self.message + self.claim


class KeptOnHosts:
    """The answers that are kept on all hosts, as one worker sees them. Only `claim` and `close` wait."""

    def __init__(
        self,
        here: KeptAnswers,
        redis: Redis,
        table: HostTable,
        tell: Callable[[Outcome], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep in `here` and in `redis`, and note in `table` for which nodes others keep something.

        Args:
            here: what this host keeps.
            redis: what all hosts keep.
            table: what the workers of this host share.
            tell: called with what becomes of answers that this host does not keep.
            now: the clock of `here`.
        """
        self._here = here
        self._redis = redis
        self._table = table
        self._tell = tell
        self._now = now
        self._link = RedisLink(redis.name)
        self._unsent: dict[bytes, Keeping] = {}
        self._listening: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Listen for what other hosts keep; to be called in the event loop."""
        self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def close(self) -> None:
        """Write what is still to be written, if that is possible soon, and end everything."""
        await self._link.close()
        if self._listening is not None:
            self._closing = True
            await end(self._listening)
        await self._redis.close()

    # -- what KeptAnswers does ----------------------------------------------------------------------

    def has(self, node: int) -> bool:
        """Return whether anything may be kept for the node, here or elsewhere."""
        return self._here.has(node) or self._noted(node) != 0

    def keep(
        self, node: int, body: bytes, *, message: str, holder: bytes, expires: float, online: float
    ) -> bytes:
        """See `KeptAnswers.keep`; Redis is told later."""
        here = self._here.keep(node, body, message=message, holder=holder, expires=expires, online=online)
        now = self._now()
        keeping = Keeping(
            node, digest(message), holder, here, body, expires - now, online - now, deliveries=1, busy=True
        )
        self._unsent[here] = keeping
        self._write_later(keeping)
        return _Token(here, keeping.message, here).pack()

    async def claim(self, node: int, holder: bytes, most: int) -> Claim | None:
        """See `KeptAnswers.claim`: what is kept here first, then what is kept elsewhere."""
        by = asyncio.get_running_loop().time() + PATIENCE
        while (claim := self._here.claim(node, holder, _ANY)) is not None:
            try:
                verdict, mine = await self._acquire(node, holder, claim, most, by)
            except OutageError:
                if claim.delivery <= most:
                    return claim._replace(token=_Token(claim.token, claim.message, _NOBODY).pack())
                self._here.take(node, claim.token, Outcome.EXHAUSTED)
                continue
            except BaseException:
                self._here.settle(node, claim.token, delivered=False)
                raise
            if verdict.state == "granted":
                token = _Token(claim.token, claim.message, mine).pack()
                return claim._replace(token=token, delivery=verdict.delivery)
            if verdict.state == "exhausted":
                # Once its bytes are gone from Redis, somebody has counted that.
                self._here.take(node, claim.token, Outcome.EXHAUSTED if verdict.there else Outcome.KEPT)
                continue
            self._here.settle(node, claim.token, delivered=False)
            return None
        return await self._elsewhere(node, holder, most, by)

    def settle(self, node: int, token: bytes, *, delivered: bool) -> None:
        """See `KeptAnswers.settle`."""
        here, _, claim = _Token.of(token)
        if here != _NOBODY:
            self._here.settle(node, here, delivered=delivered)
        keeping = self._unsent.pop(here, None) if here == claim else None
        if keeping is not None:  # Redis learns both at once
            keeping.busy = False
            keeping.deliveries -= not delivered
        elif claim != _NOBODY:
            self._link.later(lambda: self._redis.settle(node, claim, delivered=delivered))

    def take(self, node: int, token: bytes, why: Outcome) -> None:
        """See `KeptAnswers.take`."""
        here, message, _ = _Token.of(token)
        if here != _NOBODY:
            self._here.take(node, here, why)
        else:
            self._here.end(node, message)
            self._tell(why)
        self._link.later(lambda: self._end(node, None, [message], None))

    def drop(self, node: int, holder: bytes, messages: Collection[str] | None, why: Outcome) -> None:
        """See `KeptAnswers.drop`."""
        counted = self._here.drop(node, holder, messages, why)
        ended = None if messages is None else [digest(message) for message in messages]
        self._link.later(lambda: self._end(node, holder, ended, None if counted else why))

    def available(self, node: int, online: float) -> None:
        """See `KeptAnswers.available`."""
        if self._here.has(node):
            self._here.available(node, online)
        left = online - self._now()
        self._link.later(lambda: self._redis.available(node, left))

    # -- asking -------------------------------------------------------------------------------------

    async def _acquire(
        self, node: int, holder: bytes, claim: Claim, most: int, by: float
    ) -> tuple[Verdict, bytes]:
        now, mine = self._now(), os.urandom(8)
        keeping = Keeping(
            node,
            claim.message,
            holder,
            claim.token,
            claim.body,
            claim.expires - now,
            claim.online - now,
            deliveries=claim.delivery - 1,
        )

        delivered = True  # without the grant; it counts nevertheless

        def late() -> None:
            self._link.owe(partial(self._redis.settle, node, mine, delivered=delivered))

        try:
            verdict = await self._link.ask(self._redis.acquire(keeping, mine, most), by, late)
        except OutageError:
            raise
        except BaseException:
            delivered = False
            raise
        if verdict.state == "granted" and not verdict.there:
            self._write_later(keeping)
        return verdict, mine

    async def _elsewhere(self, node: int, holder: bytes, most: int, by: float) -> Claim | None:
        noted = self._noted(node)
        if not noted:
            return None
        mine = os.urandom(8)

        def late() -> None:
            self._link.owe(partial(self._redis.settle, node, mine, delivered=False))

        try:
            found = await self._link.ask(self._redis.claim(node, holder, mine, most), by, late)
        except OutageError:
            return None
        for _ in range(found.exhausted):
            self._tell(Outcome.EXHAUSTED)
        if found.granted is not None:
            message, delivery, body = found.granted
            return Claim(_Token(_NOBODY, message, mine).pack(), body, delivery, message, 0.0, 0.0)
        if not found.later and self._noted(node) == noted:
            self._note(node, 0)
        return None

    # -- writing ------------------------------------------------------------------------------------

    def _write_later(self, keeping: Keeping) -> None:
        async def write() -> None:
            self._unsent.pop(keeping.token, None)
            await self._redis.keep(keeping)

        self._link.later(write, len(keeping.body))

    async def _end(
        self, node: int, holder: bytes | None, messages: list[bytes] | None, why: Outcome | None
    ) -> None:
        for _ in range(await self._redis.end(node, holder, messages)):
            if why is not None:
                self._tell(why)

    # -- listening ----------------------------------------------------------------------------------

    async def _listen(self) -> None:
        after = "0"
        while not self._closing:  # a library may lose a cancellation
            try:
                after, changes = await self._redis.changes(after)
            except OutageError as error:
                # What was missed, and what a server that lost everything counts anew, is read from the start.
                self._link.failed(str(error))
                after = "0"
                await asyncio.sleep(OFF)
                continue
            for change in changes:
                self._learn(change)
            await asyncio.sleep(_PAUSE if changes else 0)

    def _learn(self, change: Change) -> None:
        if change.what == b"kept":
            self._note(change.node, max(change.at, 1))
            return
        if self._here.has(change.node):
            self._here.end(change.node, change.message)
        if change.what == b"over":
            self._note(change.node, 0)

    def _noted(self, node: int) -> int:
        return self._table.get(_key(node)) or 0

    def _note(self, node: int, at: int) -> None:
        # An unknown node need not be forgotten: the table has no room to give away.
        if at or self._noted(node):
            self._table.put(_key(node), at)


def _key(node: int) -> bytes:
    return b"kept:" + node.to_bytes(8, "big")
