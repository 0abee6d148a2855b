"""What is measured: the calls of each scenario, and the ratio that the relay has to keep there."""

from dataclasses import dataclass
from typing import Final, Literal

from bench import messages

Metric = Literal["cpu_per_call", "cpu_per_gb"]
Protocol = Literal["http", "grpc"]


@dataclass(frozen=True, slots=True)
class Target:
    """The relay's CPU must be at most `at_most` times that of `beside`."""

    beside: str
    at_most: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of call, made by `connections` keep-alive connections that each repeat it without a pause."""

    name: str
    about: str
    path: str  # over HTTP; `messages.GRPC` has the other one
    connections: int
    metric: Metric
    target: Target | None
    max_calls: int  # of one run, so that a run is bounded in number as well as in time
    downloads: int = 0  # bytes of the object that the call pulls
    uploads: int = 0  # bytes of the object that the call pushes
    front: Protocol = "http"  # what the load generator speaks
    back: Protocol = "http"  # what the stub SuperLink speaks

    @property
    def payload(self) -> int:
        """Bytes that one call moves, heads not counted."""
        return self.downloads + self.uploads

    @property
    def group(self) -> str:
        """What chooses it together with its like on the command line."""
        return "http" if self.front == self.back == "http" else "grpc"


MB: Final = 1_000_000
GB: Final = 1_000_000_000
#: The size of the pieces that Flower cuts arrays into.
PIECE: Final = 5 << 20
_BARE: Final = Target(beside="bare", at_most=1.2)

SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="small-call",
            about="idle pull-messages: 13 bytes up, an empty answer",
            path=messages.PULL_MESSAGES,
            connections=64,
            metric="cpu_per_call",
            target=Target(beside="envoy", at_most=1.5),
            max_calls=1_000_000,
        ),
        Scenario(
            name="small-object",
            about="pull-object of 1 kB",
            path=messages.PULL_OBJECT,
            connections=64,
            metric="cpu_per_call",
            target=None,
            max_calls=1_000_000,
            downloads=1_000,
        ),
        Scenario(
            name="big-download",
            about="pull-object of 20 MB, 8 at a time",
            path=messages.PULL_OBJECT,
            connections=8,
            metric="cpu_per_gb",
            target=Target(beside="nginx", at_most=2.0),
            max_calls=2_000,
            downloads=20 * MB,
        ),
        Scenario(
            name="big-upload",
            about="push-object of 20 MB, 8 at a time",
            path=messages.PUSH_OBJECT,
            connections=8,
            metric="cpu_per_gb",
            target=Target(beside="nginx", at_most=2.0),
            max_calls=2_000,
            uploads=20 * MB,
        ),
        Scenario(
            name="grpc-poll",
            about="idle PullMessages over gRPC: 13 bytes up, an empty answer",
            path=messages.PULL_MESSAGES,
            connections=64,
            metric="cpu_per_call",
            target=_BARE,
            max_calls=1_000_000,
            front="grpc",
            back="grpc",
        ),
        Scenario(
            name="grpc-heartbeat",
            about="SendNodeHeartbeat over gRPC: 22 bytes up, 2 down, a deadline of 5 s",
            path=messages.HEARTBEAT,
            connections=64,
            metric="cpu_per_call",
            target=_BARE,
            max_calls=1_000_000,
            front="grpc",
            back="grpc",
        ),
        Scenario(
            name="grpc-download",
            about="PullObject of 5 MiB over gRPC, 8 at a time",
            path=messages.PULL_OBJECT,
            connections=8,
            metric="cpu_per_call",
            target=_BARE,
            max_calls=20_000,
            downloads=PIECE,
            front="grpc",
            back="grpc",
        ),
        Scenario(
            name="grpc-upload",
            about="PushObject of 5 MiB over gRPC, 8 at a time",
            path=messages.PUSH_OBJECT,
            connections=8,
            metric="cpu_per_call",
            target=_BARE,
            max_calls=20_000,
            uploads=PIECE,
            front="grpc",
            back="grpc",
        ),
        Scenario(
            name="grpc-to-http",
            about="idle PullMessages of a gRPC node before an HTTP SuperLink",
            path=messages.PULL_MESSAGES,
            connections=64,
            metric="cpu_per_call",
            target=None,
            max_calls=1_000_000,
            front="grpc",
        ),
        Scenario(
            name="http-to-grpc",
            about="idle pull-messages of an HTTP node before a gRPC SuperLink",
            path=messages.PULL_MESSAGES,
            connections=64,
            metric="cpu_per_call",
            target=None,
            max_calls=1_000_000,
            back="grpc",
        ),
    )
}

#: What chooses several scenarios at once on the command line.
GROUPS: Final = tuple(dict.fromkeys(scenario.group for scenario in SCENARIOS.values()))
