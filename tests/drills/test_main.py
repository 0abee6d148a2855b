import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from drills import __main__ as command_line
from drills import handshakes, nginx
from drills.__main__ import chosen_configurations, chosen_drills, main
from drills.catalogue import DRILLS, QUICK
from drills.door import Broken
from drills.handshakes import Finding, Kind, Outcome
from drills.matrix import WIRES, Configuration
from drills.runner import Result


def test_all_drills_or_some() -> None:
    assert chosen_drills([], quick=False) == list(DRILLS.values())
    assert {drill.name for drill in chosen_drills([], quick=True)} == set(QUICK)
    assert [drill.name for drill in chosen_drills(["slow-reader"], quick=True)] == ["slow-reader"]
    with pytest.raises(SystemExit, match="unknown drill nonsense"):
        main(["nonsense"])


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ([], 12),
        (["--quick"], 3),
        (["--quick", "--tls", "on"], 3),
        (["--wire", "rest_v0"], 4),
        (["--wire", "http_v1", "--tls", "off", "--edge", "nginx"], 1),
        (["--edge", "direct", "--edge", "nginx"], 12),
        (["--keys"], 8),
        (["--grpc-superlink"], 4),
        (["--grpc-superlink", "--wire", "http_v1"], 0),
    ],
)
def test_configurations(arguments: list[str], count: int) -> None:
    assert len(chosen_configurations(command_line._parser().parse_args(arguments))) == count


def test_without_nginx_its_columns_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nginx, "missing", lambda: "nginx is not installed")
    monkeypatch.setattr(command_line, "carry_out", lambda columns, *_, **__: [([], "") for _ in columns])
    report = tmp_path / "report.json"
    assert main(["slow-reader", "--wire", "http_v1", "--tls", "on", "--json", str(report)]) == 0
    left = json.loads(report.read_text())["left_out"]
    assert left == [
        {
            "drill": "slow-reader",
            "wire": "http_v1",
            "tls": True,
            "edge": "nginx",
            "keys": False,
            "superlink": "http_v1",
            "why": "nginx is not installed",
        }
    ]


def test_list_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in DRILLS)
    assert "rest_v0, TLS, nginx" in shown


@pytest.mark.parametrize(
    ("problems", "why", "code"), [([], "", 0), (["a node ended"], "", 1), ([], "no federation", 2)]
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    problems: list[str],
    why: str,
    code: int,
) -> None:
    def carried_out(
        columns: Sequence[Configuration], names: Sequence[str], jobs: int, *, keep: bool
    ) -> Iterator[tuple[list[Result], str]]:
        assert (list(names), jobs, keep) == (["slow-reader"], 2, False)
        yield from (([Result("slow-reader", column, problems=problems)], why) for column in columns)

    monkeypatch.setattr(command_line, "carry_out", carried_out)
    monkeypatch.setattr(nginx, "missing", lambda: None)
    report = tmp_path / "report.json"
    arguments = ["slow-reader", "--tls", "off", "--edge", "direct", "--json", str(report)]
    assert main(arguments) == code
    results = json.loads(report.read_text())["results"]
    assert [result["wire"] for result in results] == [wire.value for wire in WIRES]


def test_handshake_faults_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lives, dies = Outcome(None, 3.2, True, 4, ""), Outcome(1, None, False, 1, "a handshake failed")
    measured = []

    def measure(kind: Kind, _: object, *, keep: bool) -> list[Finding]:
        measured.append((kind, keep))
        return [Finding(kind, Broken.FIN, lives, dies)]

    monkeypatch.setattr(handshakes, "measure", measure)
    report = tmp_path / "report.json"
    assert main(["handshake-faults", "--wire", "grpc", "--keep", "--json", str(report)]) == 0
    assert [str(kind) for kind, _ in measured] == ["grpc 1.39.0", "grpc 1.32.1"]
    assert all(keep for _, keep in measured)
    rows = [line for line in capsys.readouterr().out.splitlines() if "before a byte" in line]
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == [
        Broken.FIN.value,
        *["back after 3 s", "exits (1)"] * 2,
    ]
    assert [row["starting"]["exit"] for row in json.loads(report.read_text())] == [1, 1]


def test_handshake_faults_are_no_drill_of_the_matrix() -> None:
    with pytest.raises(SystemExit, match="unknown drill handshake-faults"):
        main(["handshake-faults", "slow-reader"])


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(None, None, True, 2, ""), "silent"),
        (Outcome(0, 1.0, True, 2, ""), "exits (0)"),
        (Outcome(None, 1.0, True, 0, ""), "did not meet it"),
        (Outcome(None, 1.0, False, 1, ""), "polls without heartbeats"),
    ],
)
def test_what_is_said_of_an_outcome(outcome: Outcome, said: str) -> None:
    assert str(outcome) == said
