"""What the relay's /metrics says about the calls of a federation."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from relay.fleet import Method

UPSTREAM = "upstream"
OK = "ok"


@dataclass(slots=True)
class Calls:
    """The calls of one method.

    Attributes:
        total: every call that was answered.
        ok: those of them whose outcome is "ok".
        upstream: those of `ok` that the SuperLink answered.
        seconds: the sum of their durations; `timed` is the number of calls in that sum.
        bytes_in, bytes_out: bodies that came from nodes, and that went to them.
    """

    total: int = 0
    ok: int = 0
    upstream: int = 0
    seconds: float = 0.0
    timed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def __add__(self, other: "Calls") -> "Calls":
        return Calls(
            self.total + other.total,
            self.ok + other.ok,
            self.upstream + other.upstream,
            self.seconds + other.seconds,
            self.timed + other.timed,
            self.bytes_in + other.bytes_in,
            self.bytes_out + other.bytes_out,
        )

    @property
    def failed(self) -> int:
        """The calls whose outcome is not "ok"."""
        return self.total - self.ok

    @property
    def mean_seconds(self) -> float:
        """The mean duration of a call; 0 when there was none."""
        return self.seconds / self.timed if self.timed else 0.0


def parse(text: str) -> Mapping[str, Calls]:
    """The calls by method, in the order of the catalogue, from metrics in Prometheus' text format.

    Methods without a call are left out.

    Raises ValueError when the text is not in that format.
    """
    methods: defaultdict[str, Calls] = defaultdict(Calls)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            method = sample.labels.get("method")
            if method is not None:
                _count(methods[method], sample.name, sample.labels, sample.value)
    return {method.rpc: methods[method.rpc] for method in Method if methods[method.rpc].total}


def _count(calls: Calls, name: str, labels: Mapping[str, str], value: float) -> None:
    match name, labels:
        case "relay_calls_total", _:
            calls.total += int(value)
            if labels.get("outcome") == OK:
                calls.ok += int(value)
                calls.upstream += int(value) if labels.get("source") == UPSTREAM else 0
        case "relay_call_duration_seconds_sum", _:
            calls.seconds += value
        case "relay_call_duration_seconds_count", _:
            calls.timed += int(value)
        case "relay_bytes_total", {"direction": "in"}:
            calls.bytes_in += int(value)
        case "relay_bytes_total", {"direction": "out"}:
            calls.bytes_out += int(value)
