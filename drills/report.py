"""The table and the JSON of what came of the drills."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drills.catalogue import DRILLS
from drills.matrix import Left
from drills.runner import Result

_COLUMNS = (
    "drill",
    "wire",
    "tls",
    "edge",
    "survived",
    "run",
    "lost",
    "unclaimed",
    "abandoned",
    "extra s",
    "refused",
)
_LEGEND = (
    "survived: every SuperNode lives, polled and sent heartbeats after the fault, and the run ended with the",
    "  arrays of an undisturbed run; where it may fail, the run after it did.",
    "lost: calls whose answer the relay had from the SuperLink and no node got, by the relay's log.",
    "unclaimed: answers of the SuperLink that no node got, by its own access log; more than lost where the",
    "  fault took the answer before the relay had it, or the relay repeated a call or asked by itself.",
    "abandoned: calls that the relay left before it had the SuperLink's whole answer: its time was up, or it",
    "  was killed. The SuperLink may have carried them out.",
    "extra s: against one undisturbed run of the same federation; on a busy machine it may be negative.",
)


def table_of(results: Sequence[Result]) -> Table:
    """All results, a row each, in Markdown."""
    table = Table(box=box.MARKDOWN)
    for column in _COLUMNS:
        table.add_column(
            column, no_wrap=column == "drill", justify="right" if column == "extra s" else "left"
        )
    for result in results:
        configuration = result.configuration
        table.add_row(
            result.drill,
            configuration.wire.value,
            "on" if configuration.tls else "off",
            configuration.edge.value,
            "yes" if result.survived else "NO",
            escape(result.run),
            _counted(result.lost) or "0",
            _counted(result.unclaimed) or "0",
            _counted(result.abandoned) or "0",
            "-" if result.extra_seconds is None else f"{result.extra_seconds:+.1f}",
            _counted(result.refused),
        )
    return table


def show(
    console: Console, results: Sequence[Result], left: Sequence[Left], failures: Mapping[str, str]
) -> None:
    """Print everything that people want to know."""
    console.print(table_of(results))
    for line in _LEGEND:
        console.print(line, highlight=False)
    for result in results:
        for text in result.problems:
            console.print(
                f"[bold red]NOT SURVIVED[/] {result.drill} ({result.configuration}): {escape(text)}"
            )
        for text in result.complaints:
            console.print(f"[yellow]relay's log[/] {result.drill} ({result.configuration}): {escape(text)}")
        if result.note:
            console.print(f"{result.drill} ({result.configuration}): {escape(result.note)}", highlight=False)
    for result in results:
        if result.run != "complete" and result.survived:
            console.print(
                f"the run of {result.drill} may fail: {DRILLS[result.drill].may_fail}", highlight=False
            )
    for cell in left:
        console.print(f"[yellow]left out[/] {cell.drill} ({cell.configuration}): {cell.why}", highlight=False)
    for configuration, reason in failures.items():
        console.print(f"[bold red]FAILED[/] {configuration}: {escape(reason)}", highlight=False)


def write_json(
    path: Path, results: Sequence[Result], left: Sequence[Left], failures: Mapping[str, str]
) -> None:
    """Write everything that is known. Times in seconds."""
    report: dict[str, Any] = {
        "results": [as_dict(result) for result in results],
        "left_out": [{"drill": cell.drill, **_columns(cell), "why": cell.why} for cell in left],
        "failures": dict(failures),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def as_dict(result: Result) -> dict[str, Any]:
    """A result as JSON has it."""
    return {
        "drill": result.drill,
        **_columns(result),
        "survived": result.survived,
        "problems": result.problems,
        "run": result.run,
        "lost": dict(result.lost),
        "unclaimed": dict(result.unclaimed),
        "abandoned": dict(result.abandoned),
        "refused": dict(result.refused),
        "complaints": result.complaints,
        "extra_seconds": result.extra_seconds,
        "seconds": result.seconds,
        "note": result.note,
    }


def _columns(cell: Result | Left) -> dict[str, Any]:
    configuration = cell.configuration
    return {
        "wire": configuration.wire.value,
        "tls": configuration.tls,
        "edge": configuration.edge.value,
        "keys": configuration.keys,
        "superlink": configuration.upstream.value,
    }


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
