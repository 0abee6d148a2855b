"""The command line: `python -m bench [SCENARIO...] [--quick] [--json FILE]`, or rather scripts/bench.

Exit codes: 0 measured; 1 a target was missed or not measured, with --enforce; 2 something failed, was wrong
on the command line, or, with CI=true, could not be run.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.facts import gather
from bench.processes import BenchError
from bench.proxies import OPTIONAL, PROXIES, Proxy
from bench.publish import PublishError, publish, section
from bench.report import NARROW, WIDE, show, write_json
from bench.runner import Options, Runner
from bench.scenarios import GROUPS, SCENARIOS, Scenario

FULL = Options(rounds=5, seconds=2.5, warm=0.5)
QUICK = Options(rounds=2, seconds=1.0, warm=0.3)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="The relay beside nginx, Envoy and a bare gRPC relay in one run."
    )
    kinds = " and ".join(GROUPS)
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help=f"see --list; {kinds} are all of a kind (default: all)",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK.rounds} runs of {QUICK.seconds:g} s each"
    )
    parser.add_argument("--runs", type=int, metavar="N", help=f"runs of each proxy (default {FULL.rounds})")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of each run (default {FULL.seconds:g})")
    parser.add_argument("--proxy", action="append", choices=sorted(PROXIES), help="only this one; repeatable")
    parser.add_argument("--all", action="store_true", help=f"also {' and '.join(OPTIONAL)}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all runs, medians and verdicts there"
    )
    parser.add_argument(
        "--publish", type=Path, metavar="FILE", help="put the results where this Markdown file has the marks"
    )
    parser.add_argument("--enforce", action="store_true", help="exit with 1 when a target is not met")
    parser.add_argument("--list", action="store_true", help="print scenarios and proxies, measure nothing")
    return parser


def _list(console: Console) -> None:
    table = Table(title="Scenarios", title_justify="left")
    for column in ("name", "calls", "connections", "target"):
        table.add_column(column)
    for scenario in SCENARIOS.values():
        target = scenario.target
        text = f"relay CPU <= {target.at_most:g} x {target.beside}" if target else "-"
        table.add_row(scenario.name, scenario.about, str(scenario.connections), text)
    console.print(table)
    table = Table(title="Proxies", title_justify="left")
    for column in ("name", "how", "here"):
        table.add_column(column)
    for proxy in PROXIES.values():
        name = f"{proxy.name} (with --all)" if proxy.name in OPTIONAL else proxy.name
        table.add_row(name, proxy.about, proxy.missing() or proxy.version() or "yes")
    console.print(table)


def chosen_options(arguments: argparse.Namespace) -> Options:
    """How much to measure.

    Raises:
        SystemExit: a number makes no sense.
    """
    base = QUICK if arguments.quick else FULL
    rounds = base.rounds if arguments.runs is None else arguments.runs
    seconds = base.seconds if arguments.seconds is None else arguments.seconds
    if not 1 <= rounds <= 100 or not 0.1 <= seconds <= 60:
        raise SystemExit("--runs is 1 to 100, --seconds is 0.1 to 60")
    return Options(rounds=rounds, seconds=seconds, warm=base.warm)


def chosen_scenarios(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names and groups, or all.

    Raises:
        SystemExit: one of them is unknown.
    """
    known = (*GROUPS, *SCENARIOS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown scenario {', '.join(unknown)}; there are {', '.join(known)}")
    return [
        scenario
        for scenario in SCENARIOS.values()
        if not names or scenario.name in names or scenario.group in names
    ]


def chosen_proxies(names: Sequence[str] | None, *, everything: bool) -> list[Proxy]:
    """The proxies of these names, or the usual ones, or all."""
    if names:
        return [proxy for proxy in PROXIES.values() if proxy.name in names]
    return [proxy for proxy in PROXIES.values() if everything or proxy.name not in OPTIONAL]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    # A table is never cropped: a terminal that is too narrow wraps it.
    console = Console(width=max(console.width, NARROW) if console.is_terminal else WIDE)
    if options.list:
        _list(console)
        return 0
    amount, scenarios = chosen_options(options), chosen_scenarios(options.scenarios)
    wanted = chosen_proxies(options.proxy, everything=options.all)
    left_out = {proxy.name: reason for proxy in wanted if (reason := proxy.missing())}
    if left_out and os.environ.get("CI") == "true":
        for name, reason in left_out.items():
            print(f"{name} is missing: {reason}", file=sys.stderr)
        return 2
    groups = [group for group in GROUPS if any(scenario.group == group for scenario in scenarios)]
    if options.publish:
        try:
            publish(options.publish, dict.fromkeys(groups, ""), dry=True)
        except (OSError, PublishError) as error:
            print(f"--publish {options.publish}: {error}", file=sys.stderr)
            return 2
    present = [proxy for proxy in wanted if proxy.name not in left_out]
    facts = gather(present)
    runner = Runner(amount, _progress)
    try:
        for scenario in scenarios:
            runner.run(scenario, [proxy for proxy in present if proxy.fits(scenario)])
    except BenchError as error:
        print(f"the stub SuperLink failed: {error}", file=sys.stderr)
        return 2
    finally:
        _progress("")
    outcome = runner.outcome
    verdicts = show(console, facts=facts, scenarios=scenarios, outcome=outcome, left_out=left_out)
    if options.json:
        write_json(
            options.json,
            facts=facts,
            options=amount,
            scenarios=scenarios,
            outcome=outcome,
            left_out=left_out,
            verdicts=verdicts,
        )
    if options.publish:
        publish(
            options.publish,
            {
                group: section(
                    group,
                    facts=facts,
                    options=amount,
                    scenarios=scenarios,
                    outcome=outcome,
                    left_out=left_out,
                )
                for group in groups
            },
        )
    if outcome.failures:
        return 2
    return 1 if options.enforce and not all(verdict.met for verdict in verdicts) else 0


def _progress(text: str) -> None:
    """One line that is written over; no spinner, which would take CPU and a thread beside the load."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt  # the way out that stops every process and removes every directory


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
