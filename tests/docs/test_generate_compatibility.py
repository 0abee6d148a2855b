"""The tables about Flower are those that the dialect and the contract test make."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from relay.call import Wire
from relay.dialect import TABLE, Status
from relay.fleet import Method
from relay.refusal import Reason

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "flower-compatibility.md"


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The generator, which works on a copy of the page."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location(
        "generate_compatibility", ROOT / "docs" / "generate_compatibility.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    copy = tmp_path / PAGE.name
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", copy)
    return module


def rows(page: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_the_page_is_up_to_date(generate: ModuleType) -> None:
    assert PAGE.read_text(encoding="utf-8") == generate.render(), "run scripts/docs"


def test_every_reason_has_a_row_for_each_wire(generate: ModuleType) -> None:
    first = [row[0] for row in rows(generate.render())]
    assert [name for name in first if name.strip("`") in {reason.value for reason in Reason}] == [
        f"`{reason.value}`" for _ in Wire for reason in Reason
    ]


def test_a_cell_says_what_becomes_of_nodes_and_why(generate: ModuleType) -> None:
    cell = TABLE[Wire.HTTP_V1, Reason.TOO_LARGE, Method.GET_RUN]
    assert cell.answer == Status(403)
    row = next(row for row in rows(generate.render()) if "GetRun" in row[0] and row[1] == "403")
    assert row[2:] == [
        "`upstream_rejected`, `forbidden`, `too_large`",
        "drops the message",
        "drops the message",
        cell.why,
    ]


def test_other_answers_have_what_was_observed(generate: ModuleType) -> None:
    _, _, others = generate.render().partition("## Other answers")
    http_v1, rest_v0 = (row for row in rows(others) if row[0] == "404")
    assert http_v1.count("exits") == 4
    assert rest_v0.count("goes silent") == 2


def test_releases_that_differ_are_both_shown(generate: ModuleType) -> None:
    old = generate.Release("1.41.0", {"GetRun": {"404": "continues"}})
    new = generate.Release("1.42.0", {"GetRun": {"404": "exits"}})
    both = generate._seen_by_all([old, new], [Method.GET_RUN], "404")
    assert both == "1.41.0: continues; 1.42.0: exits"


def test_a_cell_that_was_never_observed_is_no_page(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcomes = json.loads((ROOT / "tests" / "contract" / "outcomes.json").read_text(encoding="utf-8"))
    del outcomes["1.32.1"]["outcomes"]["PullMessages"]["hold"]
    path = tmp_path / "outcomes.json"
    path.write_text(json.dumps(outcomes), encoding="utf-8")
    monkeypatch.setattr(generate, "OUTCOMES", path)
    with pytest.raises(
        SystemExit, match=r"flwr 1\.32\.1 does when PullMessages gets 'hold'.*UPDATE_OUTCOMES=1"
    ):
        generate.render()


def test_a_page_without_a_place_for_a_table_is_refused(generate: ModuleType) -> None:
    generate.PAGE.write_text("# Flower compatibility\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place for told"):
        generate.render()


def test_a_check_fails_on_a_stale_table_and_changes_nothing(
    generate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    page: Path = generate.PAGE
    assert generate.main(["--check"]) == 0
    stale = page.read_text(encoding="utf-8").replace("| hold 60 s |", "| hold 61 s |", 1)
    page.write_text(stale, encoding="utf-8")
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    assert "hold 61 s" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == stale
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
