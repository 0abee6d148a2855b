import dataclasses
import io

import pytest
from rich.console import Console, RenderableType

from relay.demo import display
from relay.demo.display import Snapshot
from relay.demo.federation import Round
from relay.demo.metrics import Calls
from relay.demo.processes import State
from relay.fleet import Method

BEFORE = Snapshot(
    seconds=2.0,
    rounds_wanted=3,
    processes=(("superlink", State.READY), ("relay", State.STARTING), ("supernode-0", State.NEW)),
)
AFTER = Snapshot(
    seconds=14.0,
    rounds_wanted=3,
    processes=(
        ("superlink", State.READY),
        ("relay", State.READY),
        ("supernode-0", State.STARTING),
        ("run-1", State.READY),
    ),
    rounds=(Round(1, 1.06624, 1.49032, 8.5),),
    calls={
        "PullMessages": Calls(total=3, ok=3, seconds=0.03, timed=3, bytes_in=36, bytes_out=2_500),
        "PushObject": Calls(total=1, ok=0, seconds=0.09, timed=1, bytes_in=1_500_000),
    },
)


def text(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_changes_are_lines() -> None:
    assert list(display.changes(BEFORE, AFTER)) == [
        "relay ready",
        "supernode-0 starting",
        "run-1 ready",
        "round 1 of 3: train loss 1.0662, evaluate loss 1.4903, 8.5 s; 4 calls so far, mean 30.0 ms",
    ]
    assert list(display.changes(AFTER, AFTER)) == []


def test_live_view_says_it_all() -> None:
    shown = text(display.render(AFTER))
    for word in (
        "1/3 rounds",
        "14 s",
        "supernode-0",
        "starting",
        "1.4903",
        "PullMessages",
        "2.5 kB",
        "10.0 ms",
    ):
        assert word in shown


@pytest.mark.parametrize("nodes", [2, 50])
def test_live_view_fits_a_small_terminal(nodes: int) -> None:
    many = 123_456
    busy = Calls(total=many, ok=many, seconds=many * 0.5, timed=many, bytes_in=10**9, bytes_out=10**9)
    names = ["superlink", "relay", *(f"supernode-{number}" for number in range(nodes)), "run-1"]
    full = Snapshot(
        3600.0,
        100,
        tuple((name, State.READY) for name in names),
        tuple(Round(number, 1.0, 1.0, 100.0) for number in range(1, 101)),
        {method.rpc: busy for method in Method},
    )
    lines = text(display.render(full)).splitlines()
    assert len(lines) < 24
    assert not any("…" in line for line in lines)
    assert sum("ConfirmMessageReceived" in line and "2.0 GB" in line for line in lines) == 1


def test_summary_counts_failures_and_everything_together() -> None:
    shown = text(display.summary(AFTER, "3 rounds, 2 SuperNodes"))
    assert "3 rounds, 2 SuperNodes: done in 14 s" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows["PushObject"] == ["1", "1", "90.0", "ms", "1.5", "MB", "0", "B"]
    assert rows["all"] == ["4", "1", "30.0", "ms", "1.5", "MB", "2.5", "kB"]


def test_nothing_has_happened_yet() -> None:
    assert "0/3 rounds" in text(display.render(dataclasses.replace(BEFORE, processes=())))
