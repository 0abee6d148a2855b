from pathlib import Path

import pytest

from bench.publish import PublishError, marks, placed, publish, section
from bench.report import warnings
from bench.runner import Failure, Options, Outcome
from bench.scenarios import SCENARIOS
from tests.bench.test_report import FACTS, RUNS, run

BEGIN, END = marks("grpc")
POLL, UPLOAD = SCENARIOS["grpc-poll"], SCENARIOS["grpc-upload"]
GRPC_RUNS = [
    run("direct", 0.0, scenario="grpc-poll"),
    run("bare", 1.0, scenario="grpc-poll"),
    run("bare", 2.0, turn=1, scenario="grpc-poll"),
    run("relay", 1.1, scenario="grpc-poll"),
    run("relay", 2.6, turn=1, scenario="grpc-poll"),
]


def text_of(outcome: Outcome, group: str = "grpc", **left_out: str) -> str:
    return section(
        group,
        facts=FACTS,
        options=Options(2, 1.5, 0.5),
        scenarios=list(SCENARIOS.values()),
        outcome=outcome,
        left_out=left_out,
    )


def test_a_section_takes_the_place_of_the_last_one() -> None:
    text = f"# Title\n\n{BEGIN}\n\nold\n\n{END}\n\nrest\n"
    once = placed(text, "grpc", "fresh\n")
    assert once == f"# Title\n\n{BEGIN}\n\nfresh\n\n{END}\n\nrest\n"
    assert placed(once, "grpc", "fresh") == once


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", "{} {}".format(*marks("http"))]
)
def test_a_file_without_its_marks_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.md"
    path.write_text(text)
    with pytest.raises(PublishError, match="results of scripts/bench grpc"):
        publish(path, {"grpc": "fresh"})
    assert path.read_text() == text


def test_a_file_is_looked_at_before_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file.md"
    path.write_text(f"{BEGIN}old{END}")
    publish(path, {"grpc": "fresh"}, dry=True)
    assert path.read_text() == f"{BEGIN}old{END}"
    publish(path, {"grpc": "fresh"})
    assert "fresh" in path.read_text()


def test_a_section_has_a_row_of_each_proxy_with_its_ratios() -> None:
    lines = text_of(Outcome([*GRPC_RUNS, *RUNS])).splitlines()
    begin = "| grpc-poll | "
    found = [line.replace("  ", " ").removeprefix(begin) for line in lines if line.startswith(begin)]
    assert found == [
        "direct | 500 (500..500) /s | | | | neither |",
        "bare | 500 (500..500) /s | 1,500 (1,000..2,000) us | 1 | 10 | neither |",
        "relay | 500 (500..500) /s | 1,850 (1,100..2,600) us | 1.20 (1.10..1.30) | 10 | proxy |",
    ]
    assert "| scenario | proxy | rate | CPU | / bare | RSS MB | limit |" in lines
    assert "- grpc-poll: at most 1.2 x bare: 1.20, met" in lines
    assert not any("small-call" in line for line in lines)  # of the other group


def test_big_bodies_are_counted_in_bytes() -> None:
    runs = [run(name, 2.0, scenario="grpc-upload") for name in ("bare", "relay")]
    text = text_of(Outcome(runs))
    assert (
        "| grpc-upload | relay | 2,621 (2,621..2,621) MB/s | 2,000 (2,000..2,000) us | 1.00 (1.00..1.00)"
        in text
    )


def test_what_casts_doubt_on_the_numbers_is_published_with_them() -> None:
    busy = [run("relay", 1.0, scenario="grpc-poll", other_cpu=1.0)]
    failure = Failure("grpc-upload", "envoy", "lost a call\nIts log ends with:\n...")
    text = text_of(Outcome(busy, [failure, Failure("small-call", "nginx", "x")]), envoy="no envoy")
    assert "- **Warning:** other processes used 0.50 cores (at most 0.50) during the runs." in text
    assert "- **Failed:** grpc-upload, envoy: lost a call\n" in f"{text}\n"
    assert "- Left out: envoy: no envoy." in text
    assert "- grpc-poll: at most 1.2 x bare: not measured" in text
    assert "The load average before was 0.1; meanwhile other processes used 0.50 cores" in text
    assert "nginx" not in text.splitlines()[-1]
    assert warnings(busy)
