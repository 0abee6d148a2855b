"""What is measured: the calls of each scenario, and the ratio that the relay has to keep there."""

from dataclasses import dataclass
from typing import Final, Literal

from bench import messages

Metric = Literal["cpu_per_call", "cpu_per_gb"]


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
    path: str
    connections: int
    metric: Metric
    target: Target | None
    max_calls: int  # of one run, so that a run is bounded in number as well as in time
    downloads: int = 0  # bytes of the object that the call pulls
    uploads: int = 0  # bytes of the object that the call pushes

    @property
    def payload(self) -> int:
        """Bytes that one call moves, heads not counted."""
        return self.downloads + self.uploads


MB: Final = 1_000_000
GB: Final = 1_000_000_000

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
    )
}
