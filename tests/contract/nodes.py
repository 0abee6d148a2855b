"""Real SuperNodes of one Flower release, and what becomes of them when answers are wrong."""

from __future__ import annotations

import asyncio
import enum
import json
import os
import signal
from typing import TYPE_CHECKING, NamedTuple, Protocol

from relay.fleet import Kind, Method
from tests.contract.superlink import RUNS, relay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

    from tests.contract.superlink import SuperLink

#: Seconds until the driver has imported Flower, on a machine with other things to do.
START_PATIENCE = 60.0
#: Seconds for all that one node does; a healthy one takes well under one.
PATIENCE = 30.0
#: So many heartbeats and nothing else: the node will never ask for a message again. (At least three minutes
#: of its time; a healthy one polls six times between two heartbeats.)
ONLY_HEARTBEATS = 10
#: Polls after which a node is taken to go on in spite of something.
GOES_ON = 3
#: Polls without a message (five minutes of a node's time) after which a reply is late that was due.
OVERDUE = 100


class Outcome(enum.Enum):
    """What became of a node. The value is what the documentation calls it."""

    CONTINUES = "continues"  # every message was answered
    LATE = "answers late"  # the last reply waits until there is another message
    DROPS = "drops the message"  # not every message was answered, but the last one was
    LEAVES = "leaves"  # it was told to go, and went
    EXITS = "exits"  # its process or its main loop ended
    SILENT = "goes silent"  # it lives, but sends no heartbeats, or never polls again


class Observation(NamedTuple):
    """An outcome, how it was seen, and the end of what the node wrote."""

    outcome: Outcome
    detail: str
    log: str


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a Flower process that keeps to itself."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **quiet, "no_proxy": "*", "NO_PROXY": "*", "FLWR_HOME": str(home)}


class Starter(Protocol):
    """Starts nodes by name."""

    def start(self, name: str, address: str, listener: Callable[[dict[str, Any]], None]) -> None:
        """Start a node that connects to `address`; tell `listener` what happens to it."""

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send the node a signal, if its process lives."""

    def log(self, name: str) -> str:
        """Return the end of what the node wrote."""


class Nodes:
    """The driver process of one Flower release.

    Attributes:
        version: the release, as it calls itself.
    """

    def __init__(self, python: Path, probe: Path, directory: Path, transport: str) -> None:
        """Drive nodes with this Python and `node_probe.py`. Their logs go to `directory`."""
        self.version = ""
        self._command_line = (str(python), str(probe), str(directory), transport)
        self._directory = directory
        self._listeners: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        log = self._directory / "driver.log"
        with log.open("wb") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *self._command_line,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=environment(self._directory / "home"),
            )
        async with asyncio.timeout(START_PATIENCE):
            event = await self._event()
        assert event is not None, log.read_text()
        self.version = event["ready"]
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()  # it kills its nodes and ends
        await self._process.wait()
        if self._reading is not None:
            await self._reading

    def start(self, name: str, address: str, listener: Callable[[dict[str, Any]], None]) -> None:
        """See Starter; `listener` gets the events of `node_probe.py`."""
        self._listeners[name] = listener
        self._command(start=name, superlink=address)

    def signal(self, name: str, number: signal.Signals) -> None:
        """See Starter."""
        self._command(signal=number.value, node=name)

    def log(self, name: str) -> str:
        """See Starter."""
        path = self._directory / f"{name}.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""

    def _command(self, **command: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def _event(self) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        return json.loads(line) if line else None

    async def _read(self) -> None:
        while (event := await self._event()) is not None:
            self._listeners[event["node"]](event)


async def observe(nodes: Starter, name: str, superlink: SuperLink, patience: float = PATIENCE) -> Observation:
    """Run a node against the SuperLink until it is clear what becomes of it. It is gone afterwards.

    Args:
        nodes: what starts the node.
        name: what to call it.
        superlink: new, for this node alone.
        patience: seconds after which a node that did not come to anything is taken for silent.
    """
    watch = _Watch(nodes, name, superlink)
    async with relay(superlink) as address:
        nodes.start(name, address, watch.note)
        outcome, detail = await watch.outcome(patience)
        nodes.signal(name, signal.SIGKILL)
        await watch.ended.wait()
    return Observation(outcome, detail, nodes.log(name))


class _Watch:
    """One node, from its start to the end of its process."""

    def __init__(self, nodes: Starter, name: str, superlink: SuperLink) -> None:
        self.ended = asyncio.Event()
        self._nodes = nodes
        self._name = name
        self._superlink = superlink
        self._moved = asyncio.Event()
        self._returned = False
        self._exit = 0
        self._death = ""
        self._polls_at_death = 0
        self._polls_at_end = 0
        self._told_to_leave = False
        superlink.on_call = self._moved.set

    def note(self, event: dict[str, Any]) -> None:
        """Take what the driver says of the node."""
        if "exit" in event:
            self._exit = event["exit"]
            self.ended.set()
        if "returned" in event:
            self._returned = True
        if "thread_died" in event and not self._death:
            self._death = event["thread_died"]
            self._polls_at_death = self._superlink.asked[Method.PULL_MESSAGES]
        self._moved.set()

    async def outcome(self, patience: float) -> tuple[Outcome, str]:
        """Return what became of the node as soon as that is clear."""
        try:
            async with asyncio.timeout(patience):
                while (verdict := self._verdict()) is None:
                    await self._moved.wait()
                    self._moved.clear()
                return verdict
        except TimeoutError:
            return Outcome.SILENT, f"nothing new within {patience:g} s"

    def _verdict(self) -> tuple[Outcome, str] | None:
        superlink = self._superlink
        polls = superlink.asked[Method.PULL_MESSAGES]
        if self.ended.is_set():
            how = "its main loop returned" if self._returned else f"exit code {self._exit}"
            return Outcome.LEAVES if self._told_to_leave else Outcome.EXITS, how
        if superlink.heartbeats_in_a_row >= ONLY_HEARTBEATS:
            return Outcome.SILENT, "it never polls again"
        if self._death and polls >= self._polls_at_death + GOES_ON:
            return Outcome.SILENT, f"it sends no more heartbeats: {self._death}"
        if superlink.method.kind is Kind.LEAVE:
            if polls >= GOES_ON and not self._told_to_leave:
                self._told_to_leave = True
                self._nodes.signal(self._name, signal.SIGTERM)
            return None
        if RUNS[-1] not in superlink.answered:
            self._polls_at_end = polls
            if superlink.empty_polls >= OVERDUE:
                return Outcome.LATE, f"messages answered: {sorted(superlink.answered)} of {RUNS}"
            return None
        waiting = superlink.method.kind is Kind.HEARTBEAT and not superlink.served[superlink.method]
        if polls < self._polls_at_end + GOES_ON or waiting:
            return None
        if superlink.answered.issuperset(RUNS):
            return Outcome.CONTINUES, "every message was answered"
        return Outcome.DROPS, f"messages answered: {len(superlink.answered)} of {len(RUNS)}"
