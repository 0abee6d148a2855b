import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.facts import Facts, parse_cpu_model
from bench.report import NARROW, WIDE, cost, judge, load_busy, rows, show, warnings, write_json
from bench.runner import Failure, Options, Outcome, Run
from bench.scenarios import GB, SCENARIOS
from bench.stats import Spread

SMALL, BIG = SCENARIOS["small-call"], SCENARIOS["big-upload"]
FACTS = Facts("A CPU", 2, 1 << 30, "6.1", "3.11", 0.1, {"nginx": "1.22.1"})


def run(proxy: str, cpu: float, turn: int = 0, scenario: str = "small-call", **changes: object) -> Run:
    base = Run(
        scenario=scenario,
        proxy=proxy,
        round=turn,
        calls=1_000,
        payload=GB,
        seconds=2.0,
        proxy_cpu=cpu,
        load_cpu=0.5,
        upstream_cpu=0.5,
        other_cpu=0.0,
        steal=0.0,
        proxy_cores=0 if proxy == "direct" else 1,
        apart=True,
        load_shares_core=True,
        peak_rss=10_000_000,
        processes=1,
        p50=0.001,
        p99=0.002,
        hashed=0,
        reconnects=0,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


RUNS = [
    run("direct", 0.0),
    run("nginx", 1.0),
    run("envoy", 2.0, turn=0),
    run("relay", 1.0, turn=0, peak_rss=70),
    run("envoy", 2.2, turn=1),
    run("relay", 3.3, turn=1, peak_rss=80),
    run("envoy", 2.4, turn=2),
    run("relay", 3.0, turn=2, peak_rss=60),
]


def test_cost_is_per_call_or_per_gigabyte() -> None:
    assert cost(run("relay", 2.0), "cpu_per_call") == 0.002
    assert cost(run("relay", 2.0, payload=GB // 2), "cpu_per_gb") == 4.0


def test_busy_load_side_depends_on_its_cores() -> None:
    assert load_busy(run("relay", 1.0, load_cpu=0.6, upstream_cpu=1.0)) == pytest.approx(0.8)
    apart = run("relay", 1.0, load_cpu=0.6, upstream_cpu=1.0, load_shares_core=False)
    assert load_busy(apart) == pytest.approx(0.5)


def test_rows_hold_medians_and_ratios() -> None:
    direct, nginx, envoy, relay = rows(SMALL, RUNS)
    assert direct.cpu is None
    assert direct.beside == {}
    assert nginx.beside["envoy"].high == 0.5
    assert envoy.cpu == Spread(0.0022, 0.002, 0.0024)
    assert relay.rate == Spread(500.0, 500.0, 500.0)
    assert dataclasses.astuple(relay.beside["envoy"]) == pytest.approx((1.25, 0.5, 1.5))
    assert relay.peak_rss == 80
    assert rows(BIG, RUNS) == []


@pytest.mark.parametrize(
    ("proxy_cpu", "load_cpu", "limit"), [(1.9, 1.0, "proxy"), (1.0, 1.4, "load"), (1.0, 0.2, "neither")]
)
def test_limit_says_who_was_busy(proxy_cpu: float, load_cpu: float, limit: str) -> None:
    (row,) = rows(SMALL, [run("relay", proxy_cpu, load_cpu=load_cpu)])
    assert row.limit == limit


def test_targets_are_judged() -> None:
    (met,) = judge([SMALL, SCENARIOS["small-object"]], rows(SMALL, RUNS))
    assert met.met
    assert met.ratio == pytest.approx(1.25)
    (missed,) = judge([SMALL], rows(SMALL, [run("envoy", 1.0), run("relay", 1.6)]))
    assert not missed.met
    (unknown,) = judge([SMALL], rows(SMALL, [run("relay", 1.6)]))
    assert unknown.ratio is None
    assert not unknown.met


def test_warnings_name_what_spoils_the_numbers() -> None:
    assert warnings([run("relay", 1.0)]) == []
    (strangers,) = warnings([run("relay", 1.0, other_cpu=1.0)])
    assert "other processes used 0.50 cores" in strangers
    (stolen,) = warnings([run("relay", 1.0, steal=1.0)])
    assert "hypervisor" in stolen
    (shared,) = warnings([run("relay-2-workers", 1.0, apart=False, proxy_cores=2)])
    assert "relay-2-workers" in shared
    (closed,) = warnings([run("relay", 1.0, reconnects=3)])
    assert "closed connections" in closed


def test_a_failure_forgets_what_the_proxy_had_done() -> None:
    outcome = Outcome(list(RUNS))
    outcome.fail("small-call", "relay", ValueError("lost a call"))
    assert outcome.failures == [Failure("small-call", "relay", "lost a call")]
    assert {run.proxy for run in outcome.runs} == {"direct", "nginx", "envoy"}


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_text_shows_numbers_targets_failures_and_what_was_left_out(width: int) -> None:
    text = io.StringIO()
    outcome = Outcome(list(RUNS), [Failure("big-upload", "relay", "answer [502]")])
    verdicts = show(
        Console(file=text, width=width),
        facts=FACTS,
        scenarios=[SMALL, BIG],
        outcome=outcome,
        left_out={"envoy": "no envoy"},
    )
    shown = text.getvalue()
    for part in (
        "3,000",
        "1.25",
        "0.50..1.50",
        "A CPU",
        "left out: envoy: no envoy",
        "answer [502]",
        "met",
        "…",
    ):
        assert (part in shown) == (part != "…"), part
    assert "not measured" in shown
    assert [verdict.scenario for verdict in verdicts] == ["small-call", "big-upload"]


def test_json_holds_every_run(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(
        path,
        facts=FACTS,
        options=Options(3, 2.0, 0.5),
        scenarios=[SMALL],
        outcome=Outcome(list(RUNS)),
        left_out={},
        verdicts=judge([SMALL], rows(SMALL, RUNS)),
    )
    report = json.loads(path.read_text())
    assert [run["proxy"] for run in report["runs"]] == [run.proxy for run in RUNS]
    assert report["machine"]["versions"] == {"nginx": "1.22.1"}
    assert report["targets"][0]["met"] is True
    assert report["rows"][0]["limit"] == "neither"


def test_cpu_model_where_there_is_one() -> None:
    assert parse_cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 3GHz\n") == "Some CPU @ 3GHz"
    assert parse_cpu_model("processor\t: 0\n")
