import json
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench.__main__ import FULL, QUICK, chosen_options, chosen_proxies, chosen_scenarios, main
from bench.processes import ROOT
from bench.proxies import OPTIONAL, PROXIES, Proxy
from bench.scenarios import SCENARIOS

NOWHERE = Proxy("nowhere", "", lambda: "not on this machine", str, None)


def test_all_scenarios_and_the_usual_proxies_by_default() -> None:
    assert chosen_scenarios([]) == list(SCENARIOS.values())
    assert [scenario.name for scenario in chosen_scenarios(["small-call"])] == ["small-call"]
    usual = {proxy.name for proxy in chosen_proxies(None, everything=False)}
    assert usual == set(PROXIES) - set(OPTIONAL)
    assert chosen_proxies(None, everything=True) == list(PROXIES.values())
    assert [proxy.name for proxy in chosen_proxies(["envoy"], everything=False)] == ["envoy"]


def test_amounts() -> None:
    parser = command_line._parser()
    assert chosen_options(parser.parse_args([])) == FULL
    assert chosen_options(parser.parse_args(["--quick"])) == QUICK
    chosen = chosen_options(parser.parse_args(["--runs", "3", "--seconds", "1"]))
    assert (chosen.rounds, chosen.seconds, chosen.warm) == (3, 1.0, FULL.warm)
    with pytest.raises(SystemExit, match="--runs is 1 to 100"):
        chosen_options(parser.parse_args(["--runs", "0"]))


def test_unknown_scenario_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown scenario nonsense"):
        main(["nonsense"])


def test_a_group_stands_for_its_scenarios() -> None:
    grpc = chosen_scenarios(["grpc"])
    assert {scenario.name for scenario in grpc} == {name for name in SCENARIOS if "grpc" in name}
    assert not set(grpc) & set(chosen_scenarios(["http"]))
    both = chosen_scenarios(["grpc", "small-call", "grpc-poll"])
    assert both == [SCENARIOS["small-call"], *grpc]


def test_a_file_that_cannot_take_the_results_is_told_before_they_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "Runner", None)
    path = tmp_path / "file.md"
    assert main(["grpc", "--proxy", "direct", "--publish", str(path)]) == 2
    path.write_text("no marks")
    assert main(["grpc", "--proxy", "direct", "--publish", str(path)]) == 2
    assert "expected <!-- results of scripts/bench grpc -->" in capsys.readouterr().err


def test_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*SCENARIOS, *PROXIES))


def test_a_missing_proxy_is_left_out_but_not_in_ci(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(PROXIES, "nowhere", NOWHERE)
    arguments = ["small-call", "--proxy", "nowhere", "--proxy", "direct", "--runs", "1", "--seconds", "0.1"]
    monkeypatch.setenv("CI", "true")
    assert main(arguments) == 2
    assert "nowhere is missing: not on this machine" in capsys.readouterr().err
    monkeypatch.setenv("CI", "")
    report = tmp_path / "report.json"
    assert main([*arguments, "--json", str(report)]) == 0
    assert "left out: nowhere: not on this machine" in capsys.readouterr().out
    assert [run["proxy"] for run in json.loads(report.read_text())["runs"]] == ["direct"]
    assert main([*arguments, "--enforce"]) == 1  # without a relay there is no ratio


def test_files_are_short() -> None:
    for path in (ROOT / "bench").glob("*.py"):
        assert len(path.read_text().splitlines()) < 400, path
