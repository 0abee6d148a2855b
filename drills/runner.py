"""Carry out drills on a federation, one after the other, and judge each."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from drills import evidence
from drills.field import Field
from drills.matrix import Configuration, Setup
from relay.demo.processes import POLL, FederationError
from relay.fleet import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from drills.catalogue import Drill
    from relay.call import Wire

ROUNDS: Final = 2
RUN_CONFIG: Final = {"seed": 7, "array-size": 6_000_000}  # 6 MB: Flower cuts it into two objects
START_SECONDS: Final = 90.0
SLACK_SECONDS: Final = 40.0
FOLLOW_UP_PATIENCE: Final = 60.0
#: A node polls every 3 s, and backs off to 20 s.
POLL_SECONDS: Final = 45.0
#: A heartbeat comes every 17.5 to 22.5 s; a node backs off for up to 20 s after one that failed.
HEARTBEAT_SECONDS: Final = 60.0
#: In this time calls in flight end, so that the smallest difference of two counts is the true one.
SETTLE_SECONDS: Final = 1.5


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: its arrays, or why there are none."""

    seconds: float
    arrays: bytes | None
    why: str = ""


@dataclass(slots=True)
class Result:
    """What came of one drill in one configuration.

    Attributes:
        problems: why it was not survived; empty if it was.
        run: how the run ended in which it was done.
        lost: calls by method whose answer the relay had from the SuperLink and no node got: the lines
            `answer lost` of its log.
        unclaimed: answers 200 in the SuperLink's access log less those that the relay's log says nodes
            got. More than `lost` where a worker was killed, a fault took the answer before the relay had it,
            or the relay repeated a call; less where the SuperLink saw that nobody would take its answer.
        abandoned: calls by method that the relay left before it had the SuperLink's whole answer: its time
            was up, or it was killed. The SuperLink may have carried them out.
        refused: calls that the relay refused, by reason.
        complaints: lines of the relay's log that should not be there whatever happens.
        extra_seconds: by how much the run took longer than an undisturbed one; None if it failed.
        seconds: that the drill took in all.
        note: what the drill itself has to say.
    """

    drill: str
    configuration: Configuration
    problems: list[str] = field(default_factory=list)
    run: str = "complete"
    lost: Counter[str] = field(default_factory=Counter)
    unclaimed: Counter[str] = field(default_factory=Counter)
    abandoned: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    extra_seconds: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def survived(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


class Runner:
    """Carries out drills. One federation serves drills in turn, until one of them breaks it.

    Attributes:
        results: of the drills so far.
        references: the arrays of an undisturbed run by wire; every run must end with the same.
    """

    def __init__(
        self, commands: Callable[[Wire], Path], say: Callable[[str], None], *, keep: bool = False
    ) -> None:
        """Prepare for any configuration.

        Args:
            commands: where the commands are of the release of Flower for a wire.
            say: tells people what goes on.
            keep: leave the directories of the federations, which hold the logs of all processes.
        """
        self.results: list[Result] = []
        self.references: dict[Wire, bytes] = {}
        self._commands = commands
        self._say = say
        self._keep = keep

    def run(self, configuration: Configuration, drills: Iterable[Drill]) -> None:
        """Carry out the drills that make sense in this configuration."""
        chosen = [drill for drill in drills if drill.needs.missing(configuration) is None]
        for setup in Setup:
            waiting = [drill for drill in chosen if drill.needs.setup is setup]
            while waiting:
                waiting = self._on_one_federation(configuration, setup, waiting)

    def _on_one_federation(
        self, configuration: Configuration, setup: Setup, drills: list[Drill]
    ) -> list[Drill]:
        """Carry out drills until one breaks the federation; return those that are left."""
        with Field(configuration, setup, self._commands, keep=self._keep) as ground:
            self._say(f"{configuration}: a federation in {ground.federation.directory}")
            normal = self._undisturbed(ground)
            for number, drill in enumerate(drills, start=1):
                result, usable = self._drill(ground, drill, normal)
                self.results.append(result)
                self._say(f"{configuration}: {drill.name}: {'; '.join(result.problems) or 'survived'}")
                if not usable:
                    return drills[number:]
        return []

    def _undisturbed(self, ground: Field) -> float:
        """Make a run that nobody disturbs; return its seconds.

        Raises FederationError when it fails or ends with other arrays than one before.
        """
        trial = _Trial(ground, FOLLOW_UP_PATIENCE)
        ended = trial.finish(START_SECONDS + FOLLOW_UP_PATIENCE)
        if ended.arrays is None:
            raise trial.error(f"ended undisturbed without a result: {ended.why}")
        wire = ground.configuration.wire
        if self.references.setdefault(wire, ended.arrays) != ended.arrays:
            raise trial.error("ended undisturbed with other arrays than another run")
        self._say(f"{ground.configuration}: an undisturbed run took {ended.seconds:.1f} s")
        return ended.seconds

    def _drill(self, ground: Field, drill: Drill, normal: float) -> tuple[Result, bool]:
        """Carry out one drill; return what came of it, and whether the federation can be used for another."""
        result = Result(drill.name, ground.configuration)
        start = time.monotonic()
        before, lines = _unclaimed(ground), len(ground.relay_log.lines)
        left = ground.abandoned()
        usable = False
        try:
            usable = self._on_a_run(ground, drill, normal, result)
        except (FederationError, OSError) as error:
            result.problems.append(f"the drill came to no end: {error}")
        new = ground.relay_log.read()[lines:]
        result.lost = evidence.lost(new, but=frozenset(ground.not_nodes))
        result.refused = evidence.refused(new)
        result.complaints = evidence.complaints(new, but=drill.noise)
        result.unclaimed = _unclaimed(ground) - before - (evidence.lost(new) - result.lost)
        result.abandoned = evidence.by_method(ground.abandoned() - left)
        result.problems += [
            f"a fault proxy broke: {error!r}" for proxy in ground.proxies() for error in proxy.broken
        ]
        result.seconds = time.monotonic() - start
        return result, usable

    def _on_a_run(self, ground: Field, drill: Drill, normal: float, result: Result) -> bool:
        trial = _Trial(ground, drill.patience)
        trial.wait_for_objects()
        result.note = drill.act(ground)
        since = time.time()
        ended = trial.finish(drill.patience + SLACK_SECONDS)
        if ended.arrays is None:
            result.run = f"failed: {ended.why}"
            if not drill.may_fail:
                result.problems.append(f"the run {result.run}")
        else:
            result.extra_seconds = ended.seconds - normal
            if ended.arrays != self.references[ground.configuration.wire]:
                result.run = "complete, with other arrays"
                result.problems.append("the run ended with other arrays")
        silent = silent_nodes(ground, since)
        result.problems += silent
        if ended.arrays is not None or silent:
            return not silent
        after = _Trial(ground, FOLLOW_UP_PATIENCE, rounds=1).finish(START_SECONDS + FOLLOW_UP_PATIENCE)
        if after.arrays is None:
            result.problems.append(f"the run after it failed: {after.why}")
        return after.arrays is not None


class _Trial:
    """One run of the app."""

    def __init__(self, ground: Field, patience: float, rounds: int = ROUNDS) -> None:
        """Start it; its ServerApp waits `patience` seconds for replies."""
        self._ground = ground
        self._start = time.time()
        self._run = ground.federation.start_run(
            {**RUN_CONFIG, "num-server-rounds": rounds, "round-timeout": patience}
        )

    def error(self, problem: str) -> FederationError:
        """Return a FederationError about it."""
        return self._run.process.error(problem)

    def wait_for_objects(self) -> None:
        """Wait until a node fetches an object of it. Raises FederationError when that takes too long."""
        if not self._ground.wait_for_objects(START_SECONDS, since=self._start):
            raise self.error(f"made no node fetch an object within {START_SECONDS:.0f} s")

    def finish(self, timeout: float) -> Ended:
        """Wait `timeout` seconds for its end, then end it."""
        try:
            return self._ended(time.monotonic() + timeout)
        finally:
            self._run.process.stop()

    def _ended(self, end: float) -> Ended:
        saved = self._run.output / "arrays.npz"
        while True:
            running = self._run.process.running
            if saved.exists():
                return Ended(saved.stat().st_mtime - self._start, saved.read_bytes())
            seconds = time.time() - self._start
            if not running and self._run.process.returncode == 0:
                return Ended(seconds, None, self._reason())
            # With another code than 0 only `flwr run` has ended: it lost the stream of the log.
            if time.monotonic() > end:
                self._ground.end_apps()
                return Ended(seconds, None, f"no end within {seconds:.0f} s")
            time.sleep(POLL)

    def _reason(self) -> str:
        raised = [line for line in self._run.process.tail(60).splitlines() if "Error" in line]
        return raised[-1].strip() if raised else "the ServerApp left no result"


def silent_nodes(ground: Field, since: float) -> list[str]:
    """Say which nodes have ended, or do not poll or send heartbeats any more."""
    found = []
    ids = ground.node_ids()
    for node in ground.federation.supernodes:
        node_id = ids.get(node.name)
        if not node.running:
            found.append(f"{node.name} ended with exit code {node.returncode}")
        elif node_id is None:
            found.append(f"{node.name} was never activated")
        else:
            found += [
                f"{node.name} made no {method.rpc} that went well in {seconds:.0f} s after the fault"
                for method, seconds in (
                    (Method.PULL_MESSAGES, POLL_SECONDS),
                    (Method.SEND_NODE_HEARTBEAT, HEARTBEAT_SECONDS),
                )
                if not _came(ground, method, node_id, since, seconds)
            ]
    return found


def _came(ground: Field, method: Method, node_id: int, since: float, seconds: float) -> bool:
    left = since + seconds - time.time()
    return ground.wait_for(lambda line: line.is_ok(method, node_id), max(left, 0.0), since=since)


def _unclaimed(ground: Field) -> Counter[str]:
    """Count the answers of the SuperLink that no node got, since the federation started."""
    if ground.configuration.upstream.grpc:
        return Counter()  # it writes no access log
    least: Counter[str] | None = None
    end = time.monotonic() + SETTLE_SECONDS
    while least is None or time.monotonic() < end:
        served = Counter(ground.access_log.read())
        served.subtract(evidence.delivered(ground.relay_log.read()))
        least = served if least is None else Counter({key: min(served[key], least[key]) for key in served})
        time.sleep(2 * POLL)
    return least
