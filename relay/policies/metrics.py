"""Count and time every call. Names and labels are listed in docs/metrics.md.

With PROMETHEUS_MULTIPROC_DIR set before this module is imported (`flwr-relay serve` does), the
numbers live in files that all workers share, and any worker can answer a scrape for all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, ClassVar

from prometheus_client import Counter, Gauge, Histogram

from relay.call import Call, Ending, Reply, Source, View, Wire
from relay.log_metrics import LogMetrics

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from relay.fleet import Method
    from relay.pipeline import Handler

CALLS = Counter(
    "relay_calls",
    "Fleet calls that ended, by outcome and by who made the answer",
    ["method", "wire", "outcome", "source"],
)
# A worker's own share is below 1 ms; a SuperLink takes 7 to 800 ms; a node waits for 30 s.
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
SECONDS = Histogram(
    "relay_call_duration_seconds",
    "From the head of a call to the last byte of its answer",
    ["method", "wire"],
    buckets=_BOUNDS,
)
IN_FLIGHT = Gauge(
    "relay_calls_in_flight", "Calls that have come and not ended", ["wire"], multiprocess_mode="livesum"
)
BYTES = Counter(
    "relay_bytes", "Bytes of message bodies: in from nodes, out to nodes", ["method", "wire", "direction"]
)
STRAYS = Counter("relay_strays", "Requests on a node-facing port that were no Fleet call", ["answer"])


class _Counts:
    """What was counted of one (method, wire) and is not written yet."""

    __slots__ = ("_method", "_wire", "_written", "calls", "durations", "received", "seconds", "sent")

    def __init__(self, method: Method, wire: Wire) -> None:
        self._method = method.rpc
        self._wire = wire.value
        self._written = SECONDS.labels(method.rpc, wire.value)
        self.received = self.sent = 0
        self.seconds = 0.0
        #: How many calls fell into each bucket; the last one has no bound.
        self.durations = [0] * (len(_BOUNDS) + 1)
        self.calls: dict[tuple[str, Source | None], int] = {}

    def write(self) -> None:
        """Add it to the metrics."""
        method, wire = self._method, self._wire
        for (outcome, source), calls in self.calls.items():
            CALLS.labels(method, wire, outcome, (source or Source.LOCAL).value).inc(calls)
        if self.calls:
            # The library has no way to observe many values at once but for its own parts.
            self._written._sum.inc(self.seconds)  # noqa: SLF001
            for bucket, calls in zip(self._written._buckets, self.durations, strict=True):  # noqa: SLF001
                if calls:
                    bucket.inc(calls)
        if self.received:
            BYTES.labels(method, wire, "in").inc(self.received)
        if self.sent:
            BYTES.labels(method, wire, "out").inc(self.sent)
        self.calls = {}
        self.durations = [0] * len(self.durations)
        self.seconds = 0.0
        self.received = self.sent = 0


class Metrics:
    """Counts a call when it comes and when it has ended.

    What is counted is gathered, and written by `sample`: to write each number at once costs five times as
    much. A worker that is killed takes the counts of its last second with it.
    """

    name: ClassVar[str] = "metrics"
    sees: ClassVar[View] = View.HEAD

    def __init__(self) -> None:
        """Prepare to count; what is counted of one kind of call begins with the first of it."""
        self._counts: dict[tuple[Method, Wire], _Counts] = {}
        self._in_flight = dict.fromkeys(Wire, 0)
        self._log = LogMetrics()

    def applies(self, method: Method) -> bool:
        """Every call is counted."""
        return True

    def handle(self, call: Call, next: Handler) -> Awaitable[Reply]:  # noqa: A002
        """Pass the call on; the rest happens when it has ended."""
        self._in_flight[call.wire] += 1
        call.on_end(self._ended)
        return next(call)

    def sample(self) -> None:
        """Write what was gathered; to be called once a second, and when the worker ends."""
        self._log.sample()
        for wire, calls in self._in_flight.items():
            IN_FLIGHT.labels(wire.value).set(calls)
        for counts in self._counts.values():
            counts.write()

    def _ended(self, call: Call, ending: Ending) -> None:
        kind = (call.method, call.wire)
        counts = self._counts.get(kind)
        if counts is None:
            counts = self._counts[kind] = _Counts(*kind)
        self._in_flight[call.wire] -= 1
        seconds = ending.seconds
        counts.seconds += seconds
        counts.durations[bisect_left(_BOUNDS, seconds)] += 1
        counts.received += call.payload.passed
        counts.sent += ending.sent
        outcome = (ending.outcome, ending.source)
        counts.calls[outcome] = counts.calls.get(outcome, 0) + 1


def stray(answer: str) -> None:
    """Count a request that was no Fleet call, by what it got."""
    STRAYS.labels(answer).inc()
