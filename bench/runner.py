"""Runs the scenarios: starts what takes part, measures in turns, stops it all."""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import messages, proc
from bench.load import NO_PROGRESS, LoadResult
from bench.processes import BenchError, Cores, Process, layout, wait_for
from bench.proxies import Proxy, unready
from bench.scenarios import Scenario
from bench.upstream import Stats

_READY_LIMIT: Final = 30.0
_SETTLE: Final = 0.03  # after the last answer, so that what a proxy does behind it is counted too
_QUIET: Final = 0.3  # a started proxy must be idle for so long before the first run
_LOADS: Final = {"http": "bench.load", "grpc": "bench.grpc_load"}
_STUBS: Final = {"http": "bench.upstream", "grpc": "bench.grpc_upstream"}
_MOST_CONNECTIONS: Final = 1_000  # so many node ids belong to one run: the stub hashes the first body of each


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    rounds: int  # runs of each proxy in each scenario
    seconds: float  # of each run
    warm: float  # before each run


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one proxy: only of the measured part, unless said otherwise."""

    scenario: str
    proxy: str
    round: int
    calls: int
    payload: int  # bytes that the calls moved, heads not counted
    seconds: float
    proxy_cpu: float
    load_cpu: float
    upstream_cpu: float
    other_cpu: float  # of everything else on the machine
    steal: float
    proxy_cores: int
    apart: bool  # the proxy had cores of its own
    load_shares_core: bool  # load generator and stub were on one core
    peak_rss: int  # bytes, since the proxy was started
    processes: int
    p50: float
    p99: float
    hashed: int  # bodies compared with their SHA-256, warm-up included
    reconnects: int  # warm-up included


@dataclass(frozen=True, slots=True)
class Failure:
    """A proxy that was not measured to the end; what it had done until then does not count."""

    scenario: str
    proxy: str
    reason: str


@dataclass(slots=True)
class Outcome:
    """What came of the scenarios."""

    runs: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, scenario: str, proxy: str, error: Exception) -> None:
        """Note the failure and forget the runs before it: a proxy that lost a call has no result."""
        self.failures.append(Failure(scenario, proxy, str(error)))
        self.runs = [run for run in self.runs if (run.scenario, run.proxy) != (scenario, proxy)]


@dataclass(frozen=True, slots=True)
class _Stub:
    process: Process
    port: int

    def stats(self) -> Stats:
        self.process.tell("stats")
        return Stats(**json.loads(self.process.hear(_READY_LIMIT)))


@dataclass(frozen=True, slots=True)
class _Contestant:
    proxy: Proxy
    port: int
    process: Process | None  # None: direct
    cores: Cores

    def usage(self) -> proc.Usage:
        return self.process.usage() if self.process else proc.Usage(0.0, 0, 0)

    def stop(self) -> bool:
        return self.process is None or self.process.stop()

    def explain(self, error: BenchError) -> BenchError:
        words = self.process.last_words() if self.process else ""
        return BenchError(f"{error}\nIts log ends with:\n{words}") if words else error


class Runner:
    """Runs one scenario after another and gathers the outcome."""

    def __init__(self, options: Options, progress: Callable[[str], None]) -> None:
        """`progress` is told what happens next."""
        self.outcome = Outcome()
        self._options = options
        self._progress = progress
        self._available = sorted(os.sched_getaffinity(0))
        self._cores = layout(self._available)
        self._runs = itertools.count(1)

    def run(self, scenario: Scenario, proxies: list[Proxy]) -> None:
        """Measure each proxy `Options.rounds` times, in turns.

        Raises:
            BenchError: the stub SuperLink does not work, so nothing can be measured.
        """
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flwr-relay-bench-")))
            stub = stack.enter_context(self._stub(scenario, folder))
            contestants: list[_Contestant] = []
            for proxy in proxies:
                self._progress(f"{scenario.name}: starting {proxy.name}")
                try:
                    contestants.append(self._start(proxy, scenario, folder, stub, stack))
                except BenchError as error:
                    self.outcome.fail(scenario.name, proxy.name, error)
            for turn in range(self._options.rounds):
                for contestant in rotated(contestants, turn):
                    proxy = contestant.proxy
                    self._progress(
                        f"{scenario.name}: round {turn + 1} of {self._options.rounds}, {proxy.name}"
                    )
                    try:
                        run = self._measure(scenario, contestant, stub, turn, folder)
                    except BenchError as error:
                        self.outcome.fail(scenario.name, proxy.name, contestant.explain(error))
                        contestants.remove(contestant)
                        contestant.stop()  # before the others are measured beside it
                    else:
                        self.outcome.runs.append(run)
            for contestant in contestants:
                if not contestant.stop():
                    stubborn = contestant.explain(BenchError("did not stop on SIGTERM and was killed"))
                    self.outcome.fail(scenario.name, contestant.proxy.name, stubborn)

    @contextlib.contextmanager
    def _stub(self, scenario: Scenario, folder: Path) -> Iterator[_Stub]:
        command = [sys.executable, "-m", _STUBS[scenario.back], scenario.name]
        log = folder / "upstream.log"
        with Process(command, cores=self._cores.upstream, log=log, piped=True) as process:
            yield _Stub(process, json.loads(process.hear(_READY_LIMIT))["port"])

    def _start(
        self, proxy: Proxy, scenario: Scenario, folder: Path, stub: _Stub, stack: contextlib.ExitStack
    ) -> _Contestant:
        cores = layout(self._available, proxy.cores)
        if proxy.setup is None:
            return _Contestant(proxy, stub.port, None, cores)
        own = folder / proxy.name
        own.mkdir()
        setup = proxy.setup(own, stub.port, scenario)
        process = stack.enter_context(Process(setup.command, cores=cores.proxy, log=own / "log"))

        def serving() -> str | None:
            return unready(setup)

        def idle() -> str | None:
            before = process.usage().cpu
            time.sleep(_QUIET)
            used = process.usage().cpu - before
            return None if used <= 1 / proc.TICKS else f"it used {used / _QUIET:.0%} of a core"

        try:
            wait_for("not ready", serving, limit=_READY_LIMIT, process=process)
            wait_for("not idle after its start", idle, limit=_READY_LIMIT, process=process)
        except BenchError:
            process.stop()  # before the others are measured beside it
            raise
        return _Contestant(proxy, setup.port, process, cores)

    def _measure(
        self, scenario: Scenario, contestant: _Contestant, stub: _Stub, turn: int, folder: Path
    ) -> Run:
        first_node = messages.FIRST_NODE_ID + _MOST_CONNECTIONS * next(self._runs)
        command = [sys.executable, "-m", _LOADS[scenario.front], scenario.name, str(contestant.port)]
        command += [str(self._options.warm), str(self._options.seconds), str(first_node)]
        stub_at_first = stub.stats()
        with Process(command, cores=self._cores.load, log=folder / "load.log", piped=True) as load:
            load_answer(load.hear(self._options.warm + 2 * NO_PROGRESS))
            stub_before, stub_usage = stub.stats(), stub.process.usage()
            before, (busy_before, steal_before) = contestant.usage(), proc.machine_busy()
            load.tell("go")
            result = LoadResult(**load_answer(load.hear(self._options.seconds + 2 * NO_PROGRESS)))
            time.sleep(_SETTLE)
            after, (busy_after, steal_after) = contestant.usage(), proc.machine_busy()
        upstream_cpu = stub.process.usage().cpu - stub_usage.cpu
        stub_after = stub.stats()
        proxy_cpu = after.cpu - before.cpu
        hashed = result.hashed + stub_after.hashed - stub_at_first.hashed
        check(scenario, calls=result.calls, arrived=stub_after.calls - stub_before.calls, hashed=hashed)
        return Run(
            scenario=scenario.name,
            proxy=contestant.proxy.name,
            round=turn,
            calls=result.calls,
            payload=result.calls * scenario.payload,
            seconds=result.seconds,
            proxy_cpu=proxy_cpu,
            load_cpu=result.cpu,
            upstream_cpu=upstream_cpu,
            other_cpu=max(0.0, busy_after - busy_before - proxy_cpu - result.cpu - upstream_cpu),
            steal=steal_after - steal_before,
            proxy_cores=len(contestant.cores.proxy) if contestant.process else 0,
            apart=contestant.cores.apart,
            load_shares_core=self._cores.load == self._cores.upstream,
            peak_rss=after.peak_rss,
            processes=after.processes,
            p50=result.p50,
            p99=result.p99,
            hashed=hashed,
            reconnects=result.reconnects,
        )


def rotated(contestants: list[_Contestant], turn: int) -> list[_Contestant]:
    """Each round begins with another proxy, so that no proxy always follows the same one."""
    first = turn % max(1, len(contestants))
    return contestants[first:] + contestants[:first]


def load_answer(line: str) -> dict[str, Any]:
    """What the load generator says: nothing (ready), or its result.

    Raises:
        BenchError: a call failed.
    """
    if line == "ready":
        return {}
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise BenchError(answer["error"])
    return answer


def check(scenario: Scenario, *, calls: int, arrived: int, hashed: int) -> None:
    """Whether a run may count.

    Raises:
        BenchError: the proxy did not forward each call exactly once, or bodies went unchecked.
    """
    if arrived != calls:
        raise BenchError(f"{calls} calls were answered, but {arrived} reached the SuperLink")
    if not calls:
        raise BenchError("no call was made")
    if scenario.payload and hashed < scenario.connections:
        raise BenchError(f"only {hashed} bodies of {scenario.connections} connections were hashed")
