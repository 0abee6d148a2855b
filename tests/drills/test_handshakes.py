"""What is made of what nodes did; the measurement itself takes minutes and real nodes: `scripts/drills`."""

from __future__ import annotations

import datetime as dt
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from drills import handshakes
from drills.evidence import RelayLog
from drills.handshakes import Outcome
from relay.fleet import Method

if TYPE_CHECKING:
    from pathlib import Path


class Doors:
    """Faults of which each met one connection; when they end, it is told."""

    def __init__(self, log: Path, calls: list[tuple[Method, int]]) -> None:
        self.doors = {name: SimpleNamespace(met=1) for name in "abcd"}
        self.broken = 0
        self._log, self._calls = log, calls

    def break_all(self) -> None:
        self.broken += 1

    def open(self) -> None:
        for door in self.doors.values():
            door.met = 0
        with self._log.open("a") as log:
            for method, node_id in self._calls:
                log.write(line(method, node_id, time.time() + 1.0))


def line(method: Method, node_id: int, at: float, outcome: str = "ok") -> str:
    fields = {
        "timestamp": dt.datetime.fromtimestamp(at, dt.UTC).isoformat(),
        "level": "debug",
        "event": "call",
    }
    return json.dumps({**fields, "outcome": outcome, "method": method.rpc, "node_id": node_id}) + "\n"


def node(number: int, exit_code: int | None = None) -> Any:
    """A process of a SuperNode."""
    said = f"SuperNode ID: {number}\n\x1b[91mERROR\x1b[0m: a handshake failed\n"
    return SimpleNamespace(
        name=f"node-{number}",
        running=exit_code is None,
        returncode=exit_code,
        output=lambda: said,
        start=lambda **_: None,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAULT_SECONDS", "BACK_SECONDS", "APART_SECONDS"):
        monkeypatch.setattr(handshakes, name, 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("started", [True, False])
def test_what_has_become_of_each(tmp_path: Path, started: bool) -> None:
    log = tmp_path / "relay.log"
    pull, beat = Method.PULL_MESSAGES, Method.SEND_NODE_HEARTBEAT
    # What they did before the fault says nothing.
    log.write_text("".join(line(method, 3, time.time() - 1) for method in (pull, beat)))
    doors = Doors(log, [(pull, 1), (beat, 1), (pull, 2)])
    nodes = [node(1), node(2), node(3), node(4, exit_code=1)]
    watch = handshakes._Watch(nodes, doors, RelayLog(log))  # type: ignore[arg-type]
    came = watch.outcomes(started=started)
    assert doors.broken == 1
    assert [outcome.back is not None for outcome in came] == [True, True, False, False]
    assert [outcome.beats for outcome in came] == [True, False, False, False]
    assert [outcome.exit for outcome in came] == [None, None, None, 1]
    assert [outcome.met for outcome in came] == [1] * 4
    assert {outcome.said for outcome in came} == {"ERROR: a handshake failed" if started else ""}
    assert came[0].back == pytest.approx(1.0, abs=0.5)


def test_they_are_summed_up() -> None:
    came = [
        Outcome(1, None, False, 1, ""),
        Outcome(None, None, False, 1, ""),
        Outcome(None, 2.0, True, 1, ""),
    ]
    assert handshakes._summed(came) == "1 exited, 1 fell silent, 1 came back"
