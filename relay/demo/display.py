"""How a run of the demo looks: live on a terminal, a line per event elsewhere, and a summary at its end.

A `Snapshot` is all that is shown. It is taken by `observe`; everything else here is a function of snapshots.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from relay.demo import metrics
from relay.demo.federation import Federation, Round, Run
from relay.demo.metrics import Calls
from relay.demo.processes import State

REFRESH_SECONDS = 0.25
_MOST_ROUNDS = 8  # the latest; a terminal of 24 lines holds them
_MOST_PROCESSES = 8
_STYLES = {
    State.NEW: "dim",
    State.STARTING: "yellow",
    State.READY: "green",
    State.ENDED: "dim",
    State.FAILED: "bold red",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of a federation at one moment; `seconds` since the demo started."""

    seconds: float = 0.0
    rounds_wanted: int = 0
    processes: tuple[tuple[str, State], ...] = ()
    rounds: tuple[Round, ...] = ()
    calls: Mapping[str, Calls] = field(default_factory=dict)


def observe(federation: Federation, run: Run | None, start: float, last: Snapshot) -> Snapshot:
    """Look at the federation now. What it does not tell any more stays as it is in `last`."""
    processes = [*federation.processes, *([run.process] if run else [])]
    text = federation.relay_metrics()
    return Snapshot(
        time.monotonic() - start,
        last.rounds_wanted,
        tuple((process.name, process.state) for process in processes),
        (run.rounds() if run else ()) or last.rounds,
        metrics.parse(text) if text else last.calls,
    )


def changes(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """One line for each thing that happened between two snapshots."""
    known = dict(before.processes)
    for name, state in after.processes:
        if state is not known.get(name, State.NEW):
            yield f"{name} {state.value}"
    total = sum(after.calls.values(), Calls())
    for done in after.rounds[len(before.rounds) :]:
        yield (
            f"round {done.number} of {after.rounds_wanted}: train loss {done.train_loss:.4f}, "
            f"evaluate loss {done.evaluate_loss:.4f}, {done.seconds:.1f} s; "
            f"{total.total} calls so far, mean {_milliseconds(total)}"
        )


def render(snapshot: Snapshot) -> RenderableType:
    """The live view."""
    left = Group(_processes(snapshot), "", _rounds(snapshot, _MOST_ROUNDS))
    columns = Table.grid(padding=(0, 2))  # together 80 wide
    columns.add_row(left, _calls(snapshot.calls))
    return Group(_headline(snapshot), "", columns)


def summary(snapshot: Snapshot, title: str) -> RenderableType:
    """What is shown at the end: the rounds, and the calls of each method with their sum."""
    table = _table("method", "calls", "failed", "mean", "from nodes", "to nodes")
    total = sum(snapshot.calls.values(), Calls())
    for method, row in [*snapshot.calls.items(), ("all", total)]:
        failed = Text(str(row.failed), style="bold red" if row.failed else "")
        sizes = (_bytes(row.bytes_in), _bytes(row.bytes_out))
        table.add_row(method, str(row.total), failed, _milliseconds(row), *sizes)
    what = Text(f"{title}: done in {snapshot.seconds:.0f} s", style="bold")
    return Group(what, "", _rounds(snapshot, len(snapshot.rounds)), "", table)


def _headline(snapshot: Snapshot) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(max(1, snapshot.rounds_wanted), len(snapshot.rounds), width=30)
    line.add_row(
        Text("Federated averaging", style="bold"),
        bar,
        f"{len(snapshot.rounds)}/{snapshot.rounds_wanted} rounds",
        f"{snapshot.seconds:.0f} s",
    )
    return line


def _processes(snapshot: Snapshot) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shown = snapshot.processes
    if len(shown) > _MOST_PROCESSES:
        nodes = [state for name, state in shown if name.startswith("supernode-")]
        shown = tuple(row for row in shown if not row[0].startswith("supernode-"))
        table.add_row("supernodes", f"{nodes.count(State.READY)} of {len(nodes)} {State.READY.value}")
    for name, state in shown:
        table.add_row(name, Text(f"● {state.value}", style=_STYLES[state]))
    return table


def _rounds(snapshot: Snapshot, most: int) -> RenderableType:
    table = _table("round", "train", "evaluate", "time")
    for done in snapshot.rounds[-most:]:
        table.add_row(
            str(done.number), f"{done.train_loss:.4f}", f"{done.evaluate_loss:.4f}", f"{done.seconds:.1f} s"
        )
    return table


def _calls(calls: Mapping[str, Calls]) -> RenderableType:
    table = _table("method", "calls", "mean", "bytes")
    for method, row in calls.items():
        style = "bold red" if row.failed else ""
        table.add_row(
            method, str(row.total), _milliseconds(row), _bytes(row.bytes_in + row.bytes_out), style=style
        )
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _milliseconds(calls: Calls) -> str:
    mean = calls.mean_seconds * 1000
    return f"{mean:.1f} ms" if mean < 100 else f"{mean:.0f} ms"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


class Display:
    """Shows a federation while it runs, from a thread of its own. A context manager.

    Attributes:
        federation, run: what to look at; set as soon as they exist.
        last: the latest snapshot.
    """

    def __init__(self, console: Console, rounds_wanted: int, *, live: bool) -> None:
        self.federation: Federation | None = None
        self.run: Run | None = None
        self.last = Snapshot(rounds_wanted=rounds_wanted)
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        self._start = time.monotonic()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._show, name="display", daemon=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end.set()
            self._thread.join()
            self.look()
        finally:
            if self._live:
                self._live.stop()  # it gives the cursor back

    def look(self) -> Snapshot:
        """Take and show a snapshot now, and return it."""
        with self._lock:
            if self.federation is not None:
                before = self.last
                self.last = observe(self.federation, self.run, self._start, before)
                if self._live:
                    self._live.update(render(self.last), refresh=True)
                else:
                    for what in changes(before, self.last):
                        line = f"{self.last.seconds:6.1f} s  {what}"
                        self._console.print(line, highlight=False, soft_wrap=True)
            return self.last

    def _show(self) -> None:
        while not self._end.wait(REFRESH_SECONDS):
            self.look()
