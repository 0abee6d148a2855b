"""Turns runs into medians, ratios, judged targets, tables and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.facts import Facts
from bench.runner import Options, Outcome, Run
from bench.scenarios import GB, MB, Metric, Scenario
from bench.stats import Spread, ratios

BESIDE: Final = ("bare", "nginx", "envoy")
_SHOWN: Final = {"envoy": "Envoy"}
BUSY: Final = 0.9  # a side that uses so much of its cores is what limits the rate
NARROW: Final = 130  # columns that a table takes with each spread under its median
WIDE: Final = 220  # columns that a table takes with each spread beside its median
NOISE: Final = 0.1  # of a core used by strangers: from here on the report warns


@dataclass(frozen=True, slots=True)
class Row:
    """One proxy in one scenario, over all its runs."""

    scenario: str
    proxy: str
    rate: Spread  # calls a second
    cpu: Spread | None  # of the proxy, seconds per call or per GB; None: no proxy
    beside: dict[str, Spread]  # this proxy's CPU as a multiple of another's
    peak_rss: int
    p50: float
    p99: float
    proxy_busy: float  # 0..1 of its cores
    load_busy: float  # 0..1 of the busiest core of load generator and stub

    @property
    def limit(self) -> str:
        """What kept the rate from being higher."""
        if self.proxy_busy >= BUSY:
            return "proxy"
        return "load" if self.load_busy >= BUSY else "neither"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, and whether the relay met it; `ratio` None: it could not be measured."""

    scenario: str
    beside: str
    at_most: float
    ratio: float | None

    @property
    def met(self) -> bool:
        """True when it was measured and kept."""
        return self.ratio is not None and self.ratio <= self.at_most


def cost(run: Run, metric: Metric) -> float:
    """CPU seconds of the proxy per call or per GB."""
    return run.proxy_cpu / run.calls if metric == "cpu_per_call" else run.proxy_cpu / run.payload * GB


def load_busy(run: Run) -> float:
    """How busy the load side's busiest core was, 0..1."""
    both = (run.load_cpu, run.upstream_cpu)
    return (sum(both) if run.load_shares_core else max(both)) / run.seconds


def rows(scenario: Scenario, runs: Sequence[Run]) -> list[Row]:
    """The proxies of one scenario, in the order of their first runs."""
    by_proxy: dict[str, list[Run]] = {}
    for run in runs:
        if run.scenario == scenario.name:
            by_proxy.setdefault(run.proxy, []).append(run)
    costs = {
        proxy: {run.round: cost(run, scenario.metric) for run in own if run.proxy_cores}
        for proxy, own in by_proxy.items()
    }
    return [
        Row(
            scenario=scenario.name,
            proxy=proxy,
            rate=Spread.of([run.calls / run.seconds for run in own]),
            cpu=Spread.of(list(costs[proxy].values())) if costs[proxy] else None,
            beside={
                other: ratio
                for other in BESIDE
                if other != proxy and (ratio := ratios(costs[proxy], costs.get(other, {})))
            },
            peak_rss=max(run.peak_rss for run in own),
            p50=Spread.of([run.p50 for run in own]).median,
            p99=Spread.of([run.p99 for run in own]).median,
            proxy_busy=Spread.of(
                [run.proxy_cpu / run.seconds / max(1, run.proxy_cores) for run in own]
            ).median,
            load_busy=Spread.of([load_busy(run) for run in own]).median,
        )
        for proxy, own in by_proxy.items()
    ]


def judge(scenarios: Sequence[Scenario], table: Sequence[Row]) -> list[Verdict]:
    """The targets of the scenarios that were run."""
    verdicts = []
    for scenario in scenarios:
        if target := scenario.target:
            found = [row for row in table if (row.scenario, row.proxy) == (scenario.name, "relay")]
            ratio = found[0].beside.get(target.beside) if found else None
            verdicts.append(
                Verdict(scenario.name, target.beside, target.at_most, ratio.median if ratio else None)
            )
    return verdicts


def _spread(spread: Spread | None, digits: int, *, gap: str, scale: float = 1.0) -> str:
    if spread is None:
        return "-"
    median, low, high = (f"{value * scale:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median}{gap}({low}..{high})"


def _digits(cpu: Spread | None, *, small: bool) -> int:
    if not small:
        return 2
    return 0 if cpu is None or cpu.median >= 1e-3 else 1


def _ratio(row: Row, other: str, gap: str) -> str:
    return "1" if row.proxy == other else _spread(row.beside.get(other), 2, gap=gap)


def table_of(scenario: Scenario, table: Sequence[Row], *, narrow: bool) -> Table:
    """One scenario: in Markdown, or with each spread under its median for a terminal that is too narrow."""
    small = scenario.metric == "cpu_per_call"
    gap = "\n" if narrow else " "
    view = Table(
        box=box.SIMPLE_HEAD if narrow else box.MARKDOWN, collapse_padding=narrow, pad_edge=not narrow
    )
    view.add_column("proxy", no_wrap=True)
    beside = [other for other in BESIDE if any(other in row.beside for row in table)]
    big = scenario.payload >= MB
    names = ["MB/s" if big else "calls/s", "CPU us/call" if small else "CPU s/GB"]
    names += [f"CPU/{_SHOWN.get(other, other)}" for other in beside]
    for name in (*names, "RSS MB", "p50 ms", "p99 ms", "proxy %", "load %", "limit"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in table:
        direct = row.cpu is None
        view.add_row(
            row.proxy,
            _spread(row.rate, 0, gap=gap, scale=scenario.payload / MB if big else 1.0),
            _spread(row.cpu, _digits(row.cpu, small=small), gap=gap, scale=1e6 if small else 1.0),
            *(_ratio(row, other, gap) for other in beside),
            "-" if direct else f"{row.peak_rss / MB:,.0f}",
            f"{row.p50 * 1e3:,.1f}",
            f"{row.p99 * 1e3:,.1f}",
            "-" if direct else f"{row.proxy_busy:.0%}",
            f"{row.load_busy:.0%}",
            row.limit,
        )
    return view


def idleness(facts: Facts, runs: Sequence[Run]) -> str:
    """How much else the machine did."""
    text = f"The load average before was {facts.load_average:g}"
    if not runs:
        return f"{text}."
    strangers = Spread.of([run.other_cpu / run.seconds for run in runs])
    most = f"at most {strangers.high:.2f}"
    return f"{text}; meanwhile other processes used {strangers.median:.2f} cores ({most})."


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = []
    if runs:
        strangers = Spread.of([run.other_cpu / run.seconds for run in runs])
        stolen = Spread.of([run.steal / run.seconds for run in runs])
        if strangers.median > NOISE:
            most = f"at most {strangers.high:.2f}"
            found.append(f"other processes used {strangers.median:.2f} cores ({most}) during the runs")
        if stolen.median > NOISE / 2:
            found.append(f"the hypervisor gave {stolen.median:.2f} cores to others during the runs")
    if shared := sorted({run.proxy for run in runs if run.proxy_cores and not run.apart}):
        found.append(
            f"not enough cores: {', '.join(shared)} shared cores with the load, so trust CPU, not rates"
        )
    limited = sorted({run.proxy for run in runs if run.reconnects})
    if limited:
        found.append(f"closed connections between calls: {', '.join(limited)}")
    return found


def show(
    console: Console,
    *,
    facts: Facts,
    scenarios: Sequence[Scenario],
    outcome: Outcome,
    left_out: dict[str, str],
) -> list[Verdict]:
    """Print everything and return the judged targets."""
    console.print(
        f"{facts.cpu}, {facts.cores} cores, Linux {facts.kernel}, Python {facts.python}", highlight=False
    )
    console.print(", ".join(f"{name} {version}" for name, version in facts.versions.items()), highlight=False)
    every: list[Row] = []
    for scenario in scenarios:
        table = rows(scenario, outcome.runs)
        every += table
        if table:
            console.print(f"\n[bold]{scenario.name}[/]: {scenario.about}\n", highlight=False)
            console.print(table_of(scenario, table, narrow=console.width < WIDE))
    console.print()
    console.print(idleness(facts, outcome.runs), highlight=False)
    console.print("Medians (least..most). CPU/nginx and the like: this proxy's CPU as a multiple of theirs.")
    console.print("RSS: the peaks of all processes of the proxy added up, shared pages included.")
    console.print("limit: what was busy, the proxy or the load side (load generator and stub SuperLink).")
    for text in warnings(outcome.runs):
        console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)
    for name, reason in left_out.items():
        console.print(f"[yellow]left out:[/] {name}: {escape(reason)}", highlight=False)
    verdicts = judge(scenarios, every)
    for verdict in verdicts:
        _show_verdict(console, verdict)
    for failure in outcome.failures:
        console.print(
            f"[bold red]FAILED[/] {failure.scenario}, {failure.proxy}: {escape(failure.reason)}",
            highlight=False,
        )
    return verdicts


def _show_verdict(console: Console, verdict: Verdict) -> None:
    what = f"{verdict.scenario}: relay CPU at most {verdict.at_most:g} x {verdict.beside}'s"
    if verdict.ratio is None:
        console.print(f"target [yellow]not measured[/]  {what}", highlight=False)
    elif verdict.met:
        console.print(f"target [green]met[/]     {what}: {verdict.ratio:.2f}", highlight=False)
    else:
        console.print(f"target [red]missed[/]  {what}: {verdict.ratio:.2f}", highlight=False)


def write_json(
    path: Path,
    *,
    facts: Facts,
    options: Options,
    scenarios: Sequence[Scenario],
    outcome: Outcome,
    left_out: dict[str, str],
    verdicts: Sequence[Verdict],
) -> None:
    """Everything that was measured, raw and judged. Seconds and bytes throughout."""
    report: dict[str, Any] = {
        "machine": facts.as_dict(),
        "options": asdict(options),
        "scenarios": {scenario.name: asdict(scenario) for scenario in scenarios},
        "rows": [
            asdict(row) | {"limit": row.limit} for item in scenarios for row in rows(item, outcome.runs)
        ],
        "targets": [asdict(verdict) | {"met": verdict.met} for verdict in verdicts],
        "failures": [asdict(failure) for failure in outcome.failures],
        "left_out": left_out,
        "warnings": warnings(outcome.runs),
        "runs": [asdict(run) for run in outcome.runs],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
