"""Give the SuperLink no more calls at a time than it can work on, and refuse what would wait for too long.

A slot is held from the moment a call is sent to the head of its answer: nobody holds one who waits for a
repeat, for a node's upload or for a node to take its answer. An upload asks for its slot when its last piece
goes out, because only then the SuperLink begins to work on it; until then it counts by its bytes, and so does
an answer that is still being passed on. A call that is larger than `max_bytes` alone passes alone.

Who finds no slot waits in a short queue: heartbeats first, then messages, objects and confirmations, then
nodes that come and go, then pulls; within a class in the order of arrival. A full queue loses the last of the
lowest class. A heartbeat so is refused only if there is nothing else to refuse, and some slots are for
heartbeats alone, so that they do not stand behind pulls with which a SuperLink is stuck.

A refusal is OVERLOADED: a pull is told "nothing now", and is not repeated here; the others come back. It is
raised, so nobody further out can take it for an answer of the SuperLink's.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from prometheus_client import Counter, Gauge, Histogram

from relay.call import Call, Ending, Payload, Reply, View
from relay.concurrency import FullError, Turnstile
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from relay.pipeline import Handler

SHED = Counter("relay_shed", "Calls refused because the SuperLink had enough to do", ["method"])
LIMIT = Gauge(
    "relay_concurrency_limit", "Calls that the SuperLink is given at a time", multiprocess_mode="livesum"
)
IN_FLIGHT = Gauge("relay_in_flight", "Calls that the SuperLink works on", multiprocess_mode="livesum")
IN_FLIGHT_BYTES = Gauge(
    "relay_in_flight_bytes", "Bytes of long bodies on their way", multiprocess_mode="livesum"
)
QUEUED = Gauge("relay_queued", "Calls that wait for a slot", multiprocess_mode="livesum")
QUEUE_SECONDS = Histogram(
    "relay_queue_seconds",
    "How long calls that found no slot waited for one, also in vain",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

#: Slots beyond the limit that only heartbeats take.
RESERVE = 4
#: What a body counts for that does not say its size.
_UNKNOWN_SIZE = 1024 * 1024

_CLASSES = {
    Kind.HEARTBEAT: 0,
    Kind.PUSH: 1,
    Kind.FETCH: 1,
    Kind.CONFIRM: 1,
    Kind.JOIN: 2,
    Kind.LEAVE: 2,
    Kind.PULL: 3,
}
_RANK = {method: _CLASSES[method.kind] for method in Method}
#: Methods whose answer may be long.
_LONG_ANSWERS = frozenset({Method.PULL_OBJECT, Method.GET_FAB, Method.PULL_MESSAGES})


class Limit(Protocol):
    """How many calls may be in flight, and what learns from their answers."""

    value: int

    def answered(self, what: Hashable, seconds: float, in_flight: int) -> None:
        """Learn from one answer."""


class Shed:
    """Limits the calls of one worker to one address of the SuperLink.

    Attributes:
        slots: calls in flight, and who waits to be one.
        bytes: long bodies on their way.
    """

    name: ClassVar[str] = "shed"
    sees: ClassVar[View] = View.HEAD

    def __init__(self, *, limit: Limit | None, queue: int, queue_timeout: float, max_bytes: int) -> None:
        """Limit by `limit`; None leaves no trace in the chain.

        Args:
            limit: calls in flight.
            queue: most calls that wait.
            queue_timeout: seconds that one waits.
            max_bytes: most bytes of long bodies on their way.
        """
        self._limit = limit
        classes = len(set(_CLASSES.values()))

        def may_be_sent(inside: int, rank: int, _: int) -> bool:
            return limit is None or inside < (limit.value if rank else limit.value + RESERVE)

        def may_be_carried(inside: int, _: int, size: int) -> bool:
            return inside <= 0 or inside + size <= max_bytes

        self.slots = Turnstile(may_be_sent, classes=classes, length=queue, timeout=queue_timeout)
        self.bytes = Turnstile(may_be_carried, classes=classes, length=queue, timeout=queue_timeout)
        self._max_bytes = max_bytes

    def applies(self, method: Method) -> bool:
        """Every call, unless it is off."""
        return self._limit is not None

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on when it has a slot.

        Raises:
            Refusal: OVERLOADED, or what comes from further in.
        """
        if call.payload.data is None:
            return await self._upload(call, next)
        method, slots = call.method, self.slots
        if method in _LONG_ANSWERS and self.bytes.inside > self._max_bytes:
            await self._wait(self.bytes, call, 0, patience=call.deadline - time.monotonic())
        if not slots.enter_at_once(_RANK[method]):
            await self._wait(slots, call, 1, patience=call.deadline - time.monotonic())
        started = time.monotonic()
        try:
            reply = await next(call)
            if reply.payload.data is not None and self._limit is not None:
                self._limit.answered(method, time.monotonic() - started, slots.inside)
        finally:
            slots.leave()
        if reply.payload.data is None:
            self._carry(call, reply)
        return reply

    @staticmethod
    def sample(sheds: Iterable[Shed]) -> None:
        """Write the gauges of all of a worker; to be called once a second, and when it ends."""
        limits = [(shed, shed._limit) for shed in sheds if shed._limit is not None]  # noqa: SLF001
        if limits:
            LIMIT.set(sum(limit.value for _, limit in limits))
            IN_FLIGHT.set(sum(shed.slots.inside for shed, _ in limits))
            IN_FLIGHT_BYTES.set(sum(shed.bytes.inside for shed, _ in limits))
            QUEUED.set(sum(shed.slots.waiting + shed.bytes.waiting for shed, _ in limits))

    # -- long bodies --------------------------------------------------------------------------------

    async def _upload(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass a call on whose body is still arriving."""
        whole = call.payload
        size = _UNKNOWN_SIZE if whole.size is None else whole.size
        await self._wait(self.bytes, call, size, patience=call.deadline - time.monotonic())
        body = _Upload(self, call, whole)
        call.payload = Payload(body=body, size=whole.size)
        try:
            reply = await next(call)
        except BaseException:
            if not call.payload.passed:
                call.payload = whole  # nothing of it is gone: it may be sent again
            raise
        finally:
            self.bytes.leave(size)
            if body.has_slot:
                self.slots.leave()
        if reply.payload.data is None:
            self._carry(call, reply)
        return reply

    def _carry(self, call: Call, reply: Reply) -> None:
        """Count an answer that is still arriving until its node has it."""
        size = _UNKNOWN_SIZE if reply.payload.size is None else reply.payload.size
        self.bytes.force(size)
        call.on_end(partial(self._carried, size))

    def _carried(self, size: int, _: Call, __: Ending) -> None:
        self.bytes.leave(size)

    # -- waiting ------------------------------------------------------------------------------------

    async def _wait(
        self, where: Turnstile, call: Call, size: int, *, patience: float, sent: bool = False
    ) -> None:
        rank = _RANK[call.method]
        if where.enter_at_once(rank, size):
            return
        started = time.monotonic()
        try:
            await where.enter(rank, size, patience=patience)
        except (FullError, TimeoutError) as error:
            SHED.labels(call.method.rpc).inc()
            why = str(error) or f"no place for {time.monotonic() - started:.1f} s"
            raise Refusal(Reason.OVERLOADED, why, by=self.name, sent=sent) from None
        finally:
            QUEUE_SECONDS.observe(time.monotonic() - started)

    async def wait_with_last_piece(self, call: Call) -> None:
        """Return with a slot for an upload whose last piece is next. Raises Refusal OVERLOADED."""
        # Its node's patience begins anew when it has sent the body, whose end is not passed on yet.
        await self._wait(self.slots, call, 1, patience=math.inf, sent=True)


class _Upload:
    """A body that asks for a slot before it gives its last piece; see `relay.call.Body`.

    Attributes:
        has_slot: whether it got one.
    """

    __slots__ = ("_call", "_given", "_payload", "_pieces", "_shed", "has_slot")

    def __init__(self, shed: Shed, call: Call, payload: Payload) -> None:
        self._shed = shed
        self._call = call
        self._payload = payload
        self._pieces = payload.stream()
        self._given = 0
        self.has_slot = False

    async def read(self) -> bytes:
        """Return the next piece."""
        piece = await anext(self._pieces, b"")
        self._given += len(piece)
        size = self._payload.size
        if not self.has_slot and (not piece or (size is not None and self._given >= size)):
            await self._shed.wait_with_last_piece(self._call)
            self.has_slot = True
        return piece

    def close(self) -> None:
        """Give up what has not been read."""
        self._payload.close()
