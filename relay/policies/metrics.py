"""Count and time every call. Names and labels are listed in docs/metrics.md.

With PROMETHEUS_MULTIPROC_DIR set before this module is imported (`flwr-relay serve` does), the
numbers live in files that all workers share, and any worker can answer a scrape for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prometheus_client import Counter, Gauge, Histogram

from relay.call import Call, Ending, Reply, Source, View, Wire
from relay.log_metrics import LogMetrics

if TYPE_CHECKING:
    from relay.fleet import Method
    from relay.pipeline import Handler

CALLS = Counter(
    "relay_calls",
    "Fleet calls that ended, by outcome and by who made the answer",
    ["method", "wire", "outcome", "source"],
)
SECONDS = Histogram(
    "relay_call_duration_seconds",
    "From the head of a call to the last byte of its answer",
    ["method", "wire"],
    # A worker's own share is below 1 ms; a SuperLink takes 7 to 800 ms; a node waits for 30 s.
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
)
IN_FLIGHT = Gauge(
    "relay_calls_in_flight", "Calls that have come and not ended", ["wire"], multiprocess_mode="livesum"
)
BYTES = Counter(
    "relay_bytes", "Bytes of message bodies: in from nodes, out to nodes", ["method", "wire", "direction"]
)
STRAYS = Counter("relay_strays", "Requests on a node-facing port that were no Fleet call", ["answer"])


class _Children:
    """The metrics of one (method, wire) with their labels bound: binding costs more than counting."""

    __slots__ = ("calls", "inward", "method", "outward", "received", "seconds", "sent", "wire")

    def __init__(self, method: Method, wire: Wire) -> None:
        self.method = method.rpc
        self.wire = wire.value
        self.seconds = SECONDS.labels(method.rpc, wire.value)
        self.inward = BYTES.labels(method.rpc, wire.value, "in")
        self.outward = BYTES.labels(method.rpc, wire.value, "out")
        self.received = 0
        self.sent = 0
        self.calls: dict[tuple[str, Source | None], Counter] = {}


class Metrics:
    """Counts a call when it comes and when it has ended.

    Calls and their durations are counted at once, so that a worker that is killed takes none with it. Bytes
    and calls in flight are gathered, and written by `sample`: that halves the cost.
    """

    name: ClassVar[str] = "metrics"
    sees: ClassVar[View] = View.HEAD

    def __init__(self) -> None:
        """Prepare the bound labels, which are filled at the first call of each kind."""
        self._children: dict[tuple[Method, Wire], _Children] = {}
        self._in_flight = dict.fromkeys(Wire, 0)
        self._log = LogMetrics()

    def applies(self, method: Method) -> bool:
        """Every call is counted."""
        return True

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on; the rest happens when it has ended."""
        self._in_flight[call.wire] += 1
        call.on_end(self._ended)
        return await next(call)

    def sample(self) -> None:
        """Write what was gathered; to be called once a second, and when the worker ends."""
        self._log.sample()
        for wire, calls in self._in_flight.items():
            IN_FLIGHT.labels(wire.value).set(calls)
        for children in self._children.values():
            if children.received:
                children.inward.inc(children.received)
                children.received = 0
            if children.sent:
                children.outward.inc(children.sent)
                children.sent = 0

    def _of(self, call: Call) -> _Children:
        key = (call.method, call.wire)
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = _Children(*key)
        return children

    def _ended(self, call: Call, ending: Ending) -> None:
        children = self._of(call)
        self._in_flight[call.wire] -= 1
        children.seconds.observe(ending.seconds)
        children.received += call.payload.passed
        children.sent += ending.sent
        key = (ending.outcome, ending.source)
        counter = children.calls.get(key)
        if counter is None:
            source = ending.source or Source.LOCAL
            counter = CALLS.labels(children.method, children.wire, ending.outcome, source.value)
            children.calls[key] = counter
        counter.inc()


def stray(answer: str) -> None:
    """Count a request that was no Fleet call, by what it got."""
    STRAYS.labels(answer).inc()
