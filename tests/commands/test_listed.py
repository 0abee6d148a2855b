"""How the commands that edit lists end when they cannot, and that what they print stays in its line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import typer

from relay.commands import listed
from relay.commands.common import INVALID, UNREACHABLE
from relay.commands.listed import NOT_FOUND, RefusedError
from relay.stores import lists
from relay.stores.lists import ListError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], object]], tuple[int, str]]:
    """Return a function that runs something that ends, and returns its exit code and what it complains of."""

    def run(what: Callable[[], object]) -> tuple[int, str]:
        with pytest.raises(typer.Exit) as caught:
            what()
        said = capsys.readouterr()
        assert said.out == ""
        return caught.value.exit_code, said.err.removesuffix("\n")

    return run


def broken(text: str) -> str:
    raise ListError("line 1: must be a key")


def words(text: str) -> list[str]:
    return text.split()


def refuse(text: str) -> str:
    raise RefusedError("it is there already")


def test_a_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list"
    assert listed.read(path, words, ["nobody"]) == ["nobody"]
    assert listed.read(path, words, list[str]()) == [], "an empty list is one as well"
    path.write_text("a b\n")
    assert listed.read(path, words, ["nobody"]) == ["a", "b"]


def numbered(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line]


def test_a_change_that_would_be_another_one_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed.added("a\n", "b", numbered, "b") == "a\nb\n"
    assert listed.removed("a\nb\nc\n", {2}, numbered) == "a\nc\n"
    with pytest.raises(ListError, match="edit it by hand"):
        listed.added("a\n", "b", numbered, "c")
    monkeypatch.setattr(lists, "without_lines", lambda text, _: text.removeprefix("a\n"))
    with pytest.raises(ListError, match="edit it by hand"):
        listed.removed("a\nb\nc\n", {2}, numbered)


def test_a_list_that_cannot_be_read_ends_the_command(
    tmp_path: Path, ended: Callable[[Callable[[], object]], tuple[int, str]]
) -> None:
    path = tmp_path / "list"
    code, said = ended(lambda: listed.read(path, words))
    assert (code, said) == (UNREACHABLE, f"{path} is not there: `flwr-relay nodes allow FILE` makes it")
    assert ended(lambda: listed.read(tmp_path, words, list[str]())) == (
        INVALID,
        f"{tmp_path}: is no file: write one there",
    )
    path.write_text("x")
    assert ended(lambda: listed.read(path, broken, "")) == (INVALID, f"{path}: line 1: must be a key")
    path.write_bytes(b"\xff")
    assert ended(lambda: listed.read(path, words, list[str]())) == (
        INVALID,
        f"{path}: byte 0 is not UTF-8: it must be a text file",
    )


def test_a_list_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "list"
    listed.edit(path, lambda text: text + "a\n")
    listed.edit(path, lambda text: text + "b\n")
    assert path.read_text() == "a\nb\n"


def test_a_list_that_cannot_be_changed_ends_the_command_and_stays(
    tmp_path: Path, ended: Callable[[Callable[[], object]], tuple[int, str]]
) -> None:
    path = tmp_path / "list"
    path.write_text("a\n")
    assert ended(lambda: listed.edit(path, refuse)) == (NOT_FOUND, "it is there already")
    assert ended(lambda: listed.edit(path, broken)) == (INVALID, f"{path}: line 1: must be a key")
    nowhere = tmp_path / "nowhere" / "list"
    assert ended(lambda: listed.edit(nowhere, str.upper)) == (
        UNREACHABLE,
        f"{nowhere}: No such file or directory",
    )
    assert [(at.name, at.read_text()) for at in tmp_path.iterdir()] == [("list", "a\n")]


def test_the_three_ends_can_be_told_apart() -> None:
    assert len({0, INVALID, UNREACHABLE, NOT_FOUND}) == 4


def test_a_table_is_as_wide_as_its_widest_cells(capsys: pytest.CaptureFixture[str]) -> None:
    listed.print_table([("NODE", "NAME"), ("7", "edge"), ("18446744073709551615", "")])
    assert capsys.readouterr().out.splitlines() == [
        "NODE                  NAME",
        "7                     edge",
        "18446744073709551615",
    ]


@pytest.mark.parametrize("evil", ["\x1b[2J", "a\nb", "a\rb", "\x9b1A", "\u202e"])
def test_what_a_node_calls_itself_moves_no_cursor(capsys: pytest.CaptureFixture[str], evil: str) -> None:
    listed.print_table([("NAME", "NEXT"), (evil, "x")])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2
    assert all(char.isprintable() for line in said.splitlines() for char in line)
    assert "?" in said


def test_the_end_says_every_line(ended: Callable[[Callable[[], object]], tuple[int, str]]) -> None:
    assert ended(lambda: listed.end(5, "one", "two")) == (5, "one\ntwo")
