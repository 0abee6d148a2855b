"""The command line: `python -m drills [NAME...]`, or rather scripts/drills.

Exit codes: 0 every drill was survived; 1 one was not; 2 something failed, or was wrong on the command line.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from drills import handshakes, nginx
from drills.catalogue import DRILLS, QUICK, Drill
from drills.columns import carry_out, end_in_order, say
from drills.matrix import WIRES, Configuration, Edge, Left, configurations, left_out
from drills.releases import ReleaseError
from drills.report import show, write_json
from relay.call import Wire
from relay.demo.processes import FederationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drills.handshakes import Finding
    from drills.runner import Result

_WIDE, _VERY_WIDE = 200, 320  # columns that the tables take
_SIDE_BY_SIDE = 2
#: No drill of the matrix: it asks what nodes live through, and not whether the relay lets them.
HANDSHAKES = "handshake-faults"
_START = time.monotonic()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/drills", description="Disturb real federations in mid-run."
    )
    parser.add_argument(
        "drills", nargs="*", metavar="NAME", help=f"see --list (default: all); or {HANDSHAKES} alone"
    )
    parser.add_argument(
        "--wire", action="append", choices=[wire.value for wire in WIRES], help="only this one"
    )
    parser.add_argument("--tls", choices=["on", "off"], help="only with, or only without")
    parser.add_argument(
        "--edge", action="append", choices=[edge.value for edge in Edge], help="only this one"
    )
    parser.add_argument("--keys", action="store_true", help="the relay lets nobody in without an API key")
    parser.add_argument(
        "--grpc-superlink", action="store_true", help="gRPC nodes before a SuperLink that speaks gRPC, too"
    )
    parser.add_argument("--quick", action="store_true", help="a few drills on all wires, plain and direct")
    parser.add_argument(
        "--jobs", type=int, default=_SIDE_BY_SIDE, metavar="N", help="federations side by side"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--keep", action="store_true", help="leave the logs of all processes in /tmp")
    parser.add_argument("--list", action="store_true", help="print drills and matrix, do nothing")
    return parser


def chosen_drills(names: Sequence[str], *, quick: bool) -> list[Drill]:
    """The drills of these names, or all, or the quick ones.

    Raises:
        SystemExit: one of them is unknown.
    """
    unknown = [name for name in names if name not in DRILLS]
    if unknown:
        raise SystemExit(f"unknown drill {', '.join(unknown)}; there are {', '.join(DRILLS)}")
    wanted = names or (QUICK if quick else DRILLS)
    return [drill for drill in DRILLS.values() if drill.name in wanted]


def chosen_configurations(arguments: argparse.Namespace) -> list[Configuration]:
    """The columns of the matrix that the command line asks for."""
    wires = [Wire(name) for name in arguments.wire or [wire.value for wire in WIRES]]
    plain, direct = [False], [Edge.DIRECT]
    tls = {"on": [True], "off": plain, None: plain if arguments.quick else [False, True]}[arguments.tls]
    edges = [Edge(name) for name in arguments.edge or ()] or (direct if arguments.quick else list(Edge))
    return configurations(wires, tls, edges, keys=arguments.keys, grpc_superlink=arguments.grpc_superlink)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    if options.drills == [HANDSHAKES]:
        return _handshakes(options)
    drills, columns = chosen_drills(options.drills, quick=options.quick), chosen_configurations(options)
    left = list(left_out(((drill.name, drill.needs) for drill in drills), columns))
    if without := nginx.missing():
        left += [
            Left(drill.name, column, without)
            for column in columns
            for drill in drills
            if column.edge is Edge.NGINX
        ]
        columns = [column for column in columns if column.edge is not Edge.NGINX]
    console = Console()
    console = Console(width=max(console.width, _WIDE))
    if options.list:
        _list(console)
        return 0
    names = [drill.name for drill in drills]
    results: list[Result] = []
    failures: dict[str, str] = {}
    for column, (came, why) in zip(
        columns, carry_out(columns, names, options.jobs, keep=options.keep), strict=True
    ):
        results += came
        if why:
            failures[str(column)] = why
        if options.json:  # now, too: what comes after it may take an hour, and be interrupted
            write_json(options.json, results, left, failures)
    show(console, results, left, failures)
    console.print(f"{time.monotonic() - _START:.0f} s in all", highlight=False)
    if failures:
        return 2
    return 0 if all(result.survived for result in results) else 1


def _handshakes(options: argparse.Namespace) -> int:
    console = Console(width=_VERY_WIDE)
    findings: list[Finding] = []
    for kind in handshakes.KINDS:
        if options.wire and kind.wire.value not in options.wire:
            continue
        try:
            findings += handshakes.measure(kind, say, keep=options.keep)
        except (FederationError, ReleaseError) as error:
            console.print(f"[bold red]FAILED[/] {kind}: {escape(str(error))}", highlight=False)
            return 2
        if options.json:
            handshakes.write_json(options.json, findings)
    console.print(handshakes.table_of(findings))
    return 0


def _list(console: Console) -> None:
    table = Table(title="Drills", title_justify="left")
    for column in ("name", "what is done", "quick", "where", "the run may fail"):
        table.add_column(column)
    for drill in DRILLS.values():
        where = [
            *(["TLS"] if drill.needs.tls else []),
            *([drill.needs.edge.value] if drill.needs.edge else []),
        ]
        quick = "yes" if drill.name in QUICK else ""
        table.add_row(drill.name, drill.about, quick, ", ".join(where) or "everywhere", drill.may_fail)
    console.print(table)
    console.print("Configurations:")
    for configuration in configurations():
        console.print(f"  {configuration}", highlight=False)


if __name__ == "__main__":
    end_in_order()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
