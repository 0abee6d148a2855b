"""The page about the settings is the one that the settings make."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from relay.settings import Settings, SettingsError, load
from relay.settings_source import keys, variable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The generator, which writes to a directory of the test."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "configuration.md")
    return module


def test_the_page_is_up_to_date(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == generate.render(), "run scripts/docs"


def test_every_setting_has_a_row(generate: ModuleType) -> None:
    rows = [line.split(" | ") for line in generate.render().splitlines() if line.startswith("| `")]
    assert [row[3] for row in rows] == [f"`{variable(key)}`" for key in keys(Settings)]
    assert all(len(row) == 5 and all(cell.strip("| ") for cell in row) for row in rows)


def test_a_row_says_type_and_default(generate: ModuleType) -> None:
    page = generate.render()
    assert "| `url` | URL | `http://127.0.0.1:8000` | `RELAY_UPSTREAM__URL` | Where" in page
    assert "| `keepalive` | duration | `75s` | `RELAY_LISTENERS__0__KEEPALIVE` | Idle" in page
    assert "| `max_body` | size | `4GiB` | `RELAY_LIMITS__MAX_BODY` | Largest" in page
    assert "| `wire` | `http_v1`, `rest_v0` or `grpc` | `http_v1` | `RELAY_UPSTREAM__WIRE` | Wire" in page
    assert "| `format` | `json`, `console`, `auto` | `auto` | `RELAY_LOG__FORMAT` | `json` is" in page
    assert "| usable cores, at most 4 | `RELAY_WORKERS` |" in page
    assert "| `key` | path | required | `RELAY_LISTENERS__0__TLS__KEY` | PEM" in page
    assert "| `delay` | duration, or 0 | `0s` | `RELAY_DRAIN__DELAY` | How" in page
    assert "| `enabled` | `true` or `false` | `true` | `RELAY_RETRY__ENABLED` | Whether" in page
    assert "| `budget` | number, 0 to 1 | `0.2` | `RELAY_RETRY__BUDGET` | Repeats" in page
    assert "| `floor` | number above 0 | `10` | `RELAY_RETRY__FLOOR` | Repeats" in page


def test_a_section_that_may_be_left_out_is_on_the_page(generate: ModuleType) -> None:
    assert "## `listeners[].tls`\n\nHow a port is encrypted." in generate.render()


def test_the_problems_on_the_page_are_real(generate: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("workers: 0\nupstream:\n  conect_timeout: 1s\n")
    with pytest.raises(SettingsError) as caught:
        load(path, {"RELAY_ADMIN__ADDRESS": "localhost"})
    shown = generate.render().split("```")[1].split("\n")[1:-1]
    assert sorted(str(caught.value).replace(f"{tmp_path}/", "").splitlines()) == sorted(shown)


def test_a_check_fails_on_a_stale_page_and_changes_nothing(
    generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    assert generate.main(["--check"]) == 1
    assert not page.exists()
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    capsys.readouterr()
    page.write_text(page.read_text(encoding="utf-8").replace("`75s`", "`70s`"), encoding="utf-8")
    assert generate.main(["--check"]) == 1
    removed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("-|")]
    assert len(removed) == 1
    assert "`70s`" in removed[0]
    assert "`70s`" in page.read_text(encoding="utf-8")
