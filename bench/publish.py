"""Results as a section of a Markdown file, between the two marks of their group."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from bench.facts import Facts
from bench.report import BESIDE, Row, idleness, judge, rows, warnings
from bench.runner import Options, Outcome
from bench.scenarios import MB, Scenario
from bench.stats import Spread

_TITLES: Final = {"bare": "/ bare", "nginx": "/ nginx", "envoy": "/ Envoy"}


class PublishError(Exception):
    """The file does not say where the results belong."""


def marks(group: str) -> tuple[str, str]:
    """What stands before and behind the results of `group`."""
    return f"<!-- results of scripts/bench {group} -->", f"<!-- end of results of {group} -->"


def placed(text: str, group: str, section: str) -> str:
    """`text` with `section` in place of what stood between the marks of `group`.

    Raises:
        PublishError: the marks are not there once each, in their order.
    """
    begin, end = marks(group)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise PublishError(f"expected {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"


def publish(path: Path, sections: dict[str, str], *, dry: bool = False) -> None:
    """Write the section of each group into the file; with `dry`, only see whether that would do.

    Raises:
        OSError: it cannot be read or written.
        PublishError: see `placed`.
    """
    text = path.read_text()
    for group, section in sections.items():
        text = placed(text, group, section)
    if not dry:
        path.write_text(text)


def section(
    group: str,
    *,
    facts: Facts,
    options: Options,
    scenarios: Sequence[Scenario],
    outcome: Outcome,
    left_out: dict[str, str],
) -> str:
    """What a reader needs of the scenarios of `group`: machine, amounts, table, targets, doubts."""
    scenarios = [scenario for scenario in scenarios if scenario.group == group]
    names = {scenario.name for scenario in scenarios}
    runs = [run for run in outcome.runs if run.scenario in names]
    tables = [(scenario, rows(scenario, runs)) for scenario in scenarios]
    every = [row for _, table in tables for row in table]
    beside = [other for other in BESIDE if any(other in row.beside for row in every)]
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    lines = [
        f"{facts.cpu}, {facts.cores} cores, Linux {facts.kernel}, Python {facts.python}, {versions}.",
        f"{options.rounds} rounds of {options.seconds:g} s for each proxy. {idleness(facts, runs)}",
        "",
        _cells(["scenario", "proxy", "rate", "CPU", *map(_TITLES.__getitem__, beside), "RSS MB", "limit"]),
        _cells(["---", "---", *["---:"] * (3 + len(beside)), "---"]),
    ]
    lines += [_cells(_row(scenario, row, beside)) for scenario, table in tables for row in table]
    doubts = [f"**Warning:** {text}." for text in warnings(runs)]
    doubts += [f"Left out: {name}: {reason}." for name, reason in left_out.items()]
    doubts += [
        f"**Failed:** {failure.scenario}, {failure.proxy}: {failure.reason.splitlines()[0]}"
        for failure in outcome.failures
        if failure.scenario in names
    ]
    targets = [
        f"{verdict.scenario}: at most {verdict.at_most:g} x {verdict.beside}: "
        + (
            "not measured"
            if verdict.ratio is None
            else f"{verdict.ratio:.2f}, {'met' if verdict.met else '**missed**'}"
        )
        for verdict in judge(scenarios, every)
    ]
    return "\n".join([*lines, "", *(f"- {text}" for text in targets + doubts)])


def _row(scenario: Scenario, row: Row, beside: Sequence[str]) -> list[str]:
    if scenario.payload >= MB:
        rate = f"{_spread(row.rate, 0, scenario.payload / MB)} MB/s"
    else:
        rate = f"{_spread(row.rate, 0)} /s"
    if row.cpu is None:
        return [scenario.name, row.proxy, rate, "", *("" for _ in beside), "", row.limit]
    if scenario.metric == "cpu_per_call":
        cpu = f"{_spread(row.cpu, 1 if row.cpu.median < 1e-4 else 0, 1e6)} us"
    else:
        cpu = f"{_spread(row.cpu, 2)} s/GB"
    ratios = ["1" if row.proxy == other else _spread(row.beside.get(other), 2) for other in beside]
    return [scenario.name, row.proxy, rate, cpu, *ratios, f"{row.peak_rss / MB:,.0f}", row.limit]


def _spread(spread: Spread | None, digits: int, scale: float = 1.0) -> str:
    if spread is None:
        return ""
    median, low, high = (f"{value * scale:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low}..{high})"


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
