"""Which broken TLS handshakes end which nodes: a real SuperNode for each fault, twice.

First the fault meets a node that has polled for a while, then one that has just been started. After the fault
the node may go on for a while; then it is looked at what has become of it.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from rich import box
from rich.markup import escape
from rich.table import Table

from drills import releases
from drills.certificates import Authority
from drills.door import Broken, Door, Impostors
from drills.evidence import RelayLog
from drills.field import node_ids
from relay.call import Wire
from relay.demo.federation import Federation, Generation
from relay.demo.processes import LOOPBACK, POLL, FederationError, Process, stop_all, wait_ready
from relay.fleet import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType

#: Seconds that a fault lasts: longer than gRPC tries to connect (20 s), and than HTTP v1 waits (30 s).
FAULT_SECONDS: Final = 40.0
#: Seconds in which a node must come back: it backs off for up to 20 s, and waits for up to 30 s before.
BACK_SECONDS: Final = 75.0
START_SECONDS: Final = 300.0  # all nodes start at once
#: Started that far apart, nodes do not stand in each other's way.
APART_SECONDS: Final = 1.0
FAULTS: Final = tuple(broken for broken in Broken if broken is not Broken.NONE)
_COMMAND_SECONDS: Final = 10.0
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")


class Kind(NamedTuple):
    """A release of Flower, as it is installed, and what its SuperNodes speak."""

    requirement: str
    wire: Wire

    def __str__(self) -> str:
        return f"{self.wire.value} {self.requirement.rpartition('==')[2]}"


#: What is measured, by wire.
KINDS: Final = (
    Kind(releases.RELEASES[Wire.HTTP_V1], Wire.HTTP_V1),
    Kind(releases.RELEASES[Wire.REST_V0], Wire.REST_V0),
    Kind(releases.RELEASES[Wire.GRPC], Wire.GRPC),
    Kind(releases.RELEASES[Wire.REST_V0], Wire.GRPC),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a node.

    Attributes:
        exit: its exit code; None if it lived.
        back: seconds from the end of the fault to its first poll that went well; None if there was none.
        beats: whether a heartbeat went well after the fault.
        met: connections that met the fault.
        said: its last line of complaint.
    """

    exit: int | None
    back: float | None
    beats: bool
    met: int
    said: str

    def __str__(self) -> str:
        if self.exit is not None:
            return f"exits ({self.exit})"
        if not self.met:
            return "did not meet it"
        if self.back is None:
            return "silent"
        return f"back after {self.back:.0f} s" if self.beats else "polls without heartbeats"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of the two nodes of one kind that met a fault."""

    kind: Kind
    broken: Broken
    running: Outcome
    starting: Outcome


class _Doors:
    """A door for each fault, in a thread of their own."""

    def __init__(self, faults: Sequence[Broken], target: int, directory: Path, authority: Authority) -> None:
        self._impostors = Impostors(directory, authority)
        self.doors = {broken: Door(target, self._impostors) for broken in faults}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="doors", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._impostors.listen())
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for door in self.doors.values():
            self._do(door.close())
        self._impostors.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_COMMAND_SECONDS)
        self._loop.close()

    def open(self) -> None:
        """Let all handshakes pass."""
        for door in self.doors.values():
            self._do(door.set(Broken.NONE))

    def break_all(self) -> None:
        """Break them, each in its way."""
        for broken, door in self.doors.items():
            self._do(door.set(broken))

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(_COMMAND_SECONDS)


def measure(
    kind: Kind, say: Callable[[str], None], faults: Sequence[Broken] = FAULTS, *, keep: bool = False
) -> list[Finding]:
    """Measure faults on nodes of one kind. Takes about six minutes.

    Raises:
        FederationError: without a fault it did not work either.
        ReleaseError: the release cannot be had.
    """
    with ExitStack() as resources:
        directory = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="flwr-handshakes-")))
        authority = Authority(directory / "ca.pem")
        made = authority.issue(directory)
        upstream = Wire.HTTP_V1 if kind.wire.grpc else kind.wire
        federation = resources.enter_context(
            Federation(
                releases.commands(releases.RELEASES[upstream]),
                wire=upstream,
                nodes=[Generation(releases.commands(kind.requirement), kind.wire)] * len(faults),
                relay_config={"log": {"level": "debug"}},
                listener_config={"tls": {"certificate": str(made.certificate), "key": str(made.key)}},
                root_certificates=made.authority,
                keep=keep,
            )
        )
        doors = resources.enter_context(_Doors(faults, federation.relay_port, directory, authority))
        own, nodes = f"{LOOPBACK}:{federation.relay_port}", federation.supernodes
        for node, door in zip(nodes, doors.doors.values(), strict=True):
            node.argv = [word.replace(own, f"{LOOPBACK}:{door.port}") for word in node.argv]
        relay = federation.relay
        assert relay is not None
        watch = _Watch(nodes, doors, RelayLog(relay.log))
        servers = [federation.superlink, relay]
        for server in servers:
            server.start()
        wait_ready(servers)
        watch.start()
        _until(watch.all_polled, "the nodes' first polls")
        say(f"{kind}: {len(nodes)} nodes poll")
        running = watch.outcomes(started=False)
        say(f"{kind}: on running nodes: {_summed(running)}")
        stop_all(nodes)
        starting = watch.outcomes(started=True)
        say(f"{kind}: on starting nodes: {_summed(starting)}")
        return [Finding(kind, broken, *both) for broken, *both in zip(faults, running, starting, strict=True)]


class _Watch:
    """The nodes, what is between them and the relay, and what the relay says of them."""

    def __init__(self, nodes: Sequence[Process], doors: _Doors, log: RelayLog) -> None:
        self._nodes, self._doors, self._log = nodes, doors, log

    def start(self) -> None:
        for node in self._nodes:
            node.start(may_end=True)
            time.sleep(APART_SECONDS)

    def all_polled(self) -> bool:
        return all(self._did(Method.PULL_MESSAGES, node, 0.0) is not None for node in self._nodes)

    def outcomes(self, *, started: bool) -> list[Outcome]:
        """Let the faults come and go; return what has become of each node.

        Args:
            started: start the nodes when the faults are there.
        """
        self._doors.break_all()
        if started:
            self.start()
            _until(self._all_met, "the first connections of nodes")
        logs = [0 if started else len(node.output()) for node in self._nodes]
        time.sleep(FAULT_SECONDS)
        met = [door.met for door in self._doors.doors.values()]
        self._doors.open()
        over = time.time()
        end = time.monotonic() + BACK_SECONDS
        while time.monotonic() < end and not all(
            self._is_well(node, over) or not node.running for node in self._nodes
        ):
            time.sleep(10 * POLL)
        return [
            Outcome(
                node.returncode,
                self._did(Method.PULL_MESSAGES, node, over),
                self._did(Method.SEND_NODE_HEARTBEAT, node, over) is not None,
                count,
                _complaint(node.output()[start:]),
            )
            for node, count, start in zip(self._nodes, met, logs, strict=True)
        ]

    def _all_met(self) -> bool:
        doors = self._doors.doors.values()
        return all(door.met or not node.running for node, door in zip(self._nodes, doors, strict=True))

    def _is_well(self, node: Process, since: float) -> bool:
        return all(
            self._did(method, node, since) is not None
            for method in (Method.PULL_MESSAGES, Method.SEND_NODE_HEARTBEAT)
        )

    def _did(self, method: Method, node: Process, since: float) -> float | None:
        """Return the seconds from `since` to the node's first such call that went well."""
        number = node_ids([node]).get(node.name)
        if number is None:
            return None
        lines = (line for line in self._log.read() if line.at > since)
        return next((line.at - since for line in lines if line.is_ok(method, number)), None)


def _until(what: Callable[[], bool], of: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not what():
        if time.monotonic() > end:
            raise FederationError(of, f"did not come within {START_SECONDS:.0f} s")
        time.sleep(10 * POLL)


def _complaint(text: str) -> str:
    lines = [_ANSI.sub("", line).strip() for line in text.splitlines()]
    loud = [line for line in lines if "Error" in line or "ERROR" in line or "details = " in line]
    return (loud or [""])[-1][:300]


def _summed(outcomes: Sequence[Outcome]) -> str:
    ended = sum(outcome.exit is not None for outcome in outcomes)
    silent = sum(outcome.exit is None and outcome.back is None for outcome in outcomes)
    return f"{ended} exited, {silent} fell silent, {len(outcomes) - ended - silent} came back"


def table_of(findings: Sequence[Finding]) -> Table:
    """A row for each fault, in Markdown; of each kind what became of a running and of a starting node."""
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    cells = {(finding.kind, finding.broken): finding for finding in findings}
    table = Table(box=box.MARKDOWN)
    table.add_column("handshake")
    for kind in kinds:
        table.add_column(f"{kind}, running")
        table.add_column(f"{kind}, starting")
    for broken in dict.fromkeys(finding.broken for finding in findings):
        row = [broken.value]
        for kind in kinds:
            finding = cells[kind, broken]
            row += [str(finding.running), str(finding.starting)]
        table.add_row(*map(escape, row))
    return table


def write_json(path: Path, findings: Sequence[Finding]) -> None:
    """Write everything that is known. Times in seconds."""
    rows = [
        {
            "kind": str(finding.kind),
            "handshake": finding.broken.value,
            "running": asdict(finding.running),
            "starting": asdict(finding.starting),
        }
        for finding in findings
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")
