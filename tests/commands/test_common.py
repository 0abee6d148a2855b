"""A command that cannot use its settings says everything that is wrong with them, and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from relay.__main__ import app
from relay.commands.common import INVALID, TENANT, read_settings
from relay.settings import CertificateRule

if TYPE_CHECKING:
    from pathlib import Path


def test_the_variables_that_are_given_count_and_else_those_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("workers: 2\n")
    monkeypatch.setenv("RELAY_MODE", "maintenance")
    settings = read_settings(path)
    assert (settings.workers, settings.mode) == (2, "maintenance")
    settings = read_settings(path, {"RELAY_WORKERS": "5"})
    assert (settings.workers, settings.mode) == (5, "normal")
    assert read_settings(None, {}).mode == "normal"


@pytest.mark.parametrize("command", [["keys", "create"], ["nodes", "allow"]])
def test_nothing_is_promised_of_a_tenant_but_that_it_is_shown(command: list[str]) -> None:
    said = " ".join(CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300"}).output.split())
    assert TENANT in said
    for text in (said, *(str(field.description) for field in CertificateRule.model_fields.values())):
        assert "shares limits" not in text
        assert "caches" not in text


def test_every_problem_is_printed_and_nothing_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("workers: none\nmode: none\n")
    with pytest.raises(typer.Exit) as caught:
        read_settings(path, {"RELAY_LOG__LEVEL": "loud"})
    assert caught.value.exit_code == INVALID
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(" = ")[0] for line in said.err.splitlines()] == ["workers", "mode", "log.level"]


def test_a_file_that_is_not_there_is_a_problem_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught:
        read_settings(tmp_path / "none.yaml", {})
    assert caught.value.exit_code == INVALID
    assert "none.yaml" in capsys.readouterr().err
