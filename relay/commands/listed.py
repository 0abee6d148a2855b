"""What the commands that edit lists share, and how they print and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, TypeVar

import typer

from relay.commands.common import INVALID, UNREACHABLE
from relay.stores import lists

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")

#: Exit code: there is no such thing, or it is there already.
NOT_FOUND = 3


class RefusedError(Exception):
    """The change cannot be made as asked; the text says why."""


def read(path: Path, parse: Callable[[str], T], absent: T | None = None) -> T:
    """Return what `parse` makes of a list, `absent` if it is not there; or print what is wrong and end."""
    try:
        return parse(lists.read(path))
    except FileNotFoundError:
        if absent is not None:
            return absent
        end(UNREACHABLE, f"{path} is not there: `flwr-relay nodes allow FILE` makes it")
    except OSError as error:
        end(UNREACHABLE, f"{path}: {error.strerror}")
    except lists.ListError as error:
        end(INVALID, f"{path}: {error}")


def edit(path: Path, change: Callable[[str], str]) -> None:
    """Change a list; `change` may raise RefusedError. Prints what is wrong and ends if it cannot be."""
    try:
        lists.edit(path, change)
    except RefusedError as error:
        end(NOT_FOUND, str(error))
    except OSError as error:
        end(UNREACHABLE, f"{path}: {error.strerror}")
    except lists.ListError as error:
        end(INVALID, f"{path}: {error}")


def added(text: str, line: str, numbered: Callable[[str], list[tuple[int, T]]], entry: T) -> str:
    """Return a list with a line at its end, which `numbered` reads as `entry`.

    Raises:
        ListError: it would not hold what it held, and `entry`.
    """
    changed = lists.with_line(text, line)
    return _ensured(changed, numbered, [*(known for _, known in numbered(text)), entry])


def removed(text: str, numbers: set[int], numbered: Callable[[str], list[tuple[int, T]]]) -> str:
    """Return a list without the entries that `numbered` finds on these lines.

    Raises:
        ListError: it would not hold what it held but for these.
    """
    changed = lists.without_lines(text, numbers)
    return _ensured(changed, numbered, [known for number, known in numbered(text) if number not in numbers])


def _ensured(text: str, numbered: Callable[[str], list[tuple[int, T]]], entries: list[T]) -> str:
    """Return `text` if these are its entries: who asks for a change must get this one or none."""
    if [known for _, known in numbered(text)] != entries:
        raise lists.ListError("cannot be changed without harm to other lines: edit it by hand")
    return text


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of the same length, the first of which are the headings."""
    # Names and versions are whatever somebody sent: nothing of them may move a terminal's cursor.
    shown = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def end(code: int, *lines: str) -> NoReturn:
    """Print the lines to standard error, and end with the exit code."""
    for line in lines:
        typer.echo(line, err=True)
    raise typer.Exit(code)
