#!/usr/bin/env python3
"""Write docs/configuration.md from the settings; with --check, only say whether it is up to date."""

import argparse
import difflib
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relay.settings import Settings
from relay.settings_source import CONFIG_VARIABLE, Key, annotation_at, dotted, keys, variable
from relay.settings_types import Doc

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = f"""\
# Configuration

<!-- Made by scripts/docs from relay/settings_*.py. Change the text there. -->

The relay starts without any settings: each has a default, or belongs to a section that is left out by
default. Settings come from a YAML file, from environment variables, or from both; a variable wins over the
file. The file's path is given by `{CONFIG_VARIABLE}`; [`relay.example.yaml`](../relay.example.yaml) is such a
file with every setting in it.

- **Variables** are named `RELAY_<SECTION>__<KEY>`, with two underscores between levels. A number is an index
  of a list: `RELAY_LISTENERS__0__ADDRESS` is the address of the first listener, and the index after the last
  adds one. A value is read as YAML: `RELAY_LISTENERS__0__WIRES=[http_v1]` is a list of one wire. No other
  variable may begin with `RELAY_`. Kubernetes makes such variables in a namespace that has a Service named
  `relay`: set `enableServiceLinks: false` in the pod's spec there.
- **Durations** are seconds, or a number with a unit: `500ms`, `25s`, `2m`, `1h`.
- **Sizes** are bytes, or a number with a unit: `512KiB`, `64MiB`, `4GiB`, `1TiB`.
- **Addresses** are `host:port`, `[::1]:port` for IPv6, or `:port` for every IPv4 interface.
- **Paths** are relative to the working directory.

A key that does not exist, a value that cannot be, or values that do not fit together keep the relay from
starting. Every such problem is reported at once, each with the key, the value, what would be right, and the
place it came from:

```
workers = 0: must be at least 1 (relay.yaml:1)
upstream.conect_timeout: is not a setting; did you mean connect_timeout? (relay.yaml:3)
admin.address = 'localhost': has no port: write host:port, such as 0.0.0.0:8080 (RELAY_ADMIN__ADDRESS)
```
"""
HEADER = "| Key | Type | Default | Variable | Meaning |\n| --- | --- | --- | --- | --- |"


def render() -> str:
    """Return the page's text."""
    return "\n".join([INTRODUCTION, *_sections()])


def main(arguments: list[str]) -> int:
    """Write the page; see `publish`."""
    return publish(PAGE, render(), "made from the settings", arguments)


def publish(page: Path, wanted: str, source: str, arguments: list[str]) -> int:
    """Write a page, or with --check compare it: print the difference, and return 1 when there is one.

    Args:
        page: its file.
        wanted: its text as it should be.
        source: what the text was made from, for the heading of a difference.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=f"Write {page.name}.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 when the page is stale"
    )
    check: bool = parser.parse_args(arguments).check
    if not check:
        page.write_text(wanted, encoding="utf-8")
        return 0
    present = page.read_text(encoding="utf-8") if page.exists() else ""
    difference = difflib.unified_diff(
        present.splitlines(keepends=True), wanted.splitlines(keepends=True), str(page), source
    )
    sys.stdout.writelines(difference)
    return int(present != wanted)


def _sections() -> Iterator[str]:
    """A heading, a sentence and a table for each section, in the order of the tree."""
    for parent, group in groupby(keys(Settings), key=lambda key: key[:-1]):
        section = annotation_at(Settings, parent)
        title = f"`{dotted(parent).replace('[0]', '[]')}`" if parent else "The whole relay"
        sentence = f"{_words(section.__doc__)}\n\n" if parent else ""
        rows = "\n".join(_row(key, section) for key in group)
        yield f"## {title}\n\n{sentence}{HEADER}\n{rows}\n"


def _row(key: Key, section: type[BaseModel]) -> str:
    field = section.model_fields[str(key[-1])]
    kind, default = _kind_and_default(field)
    cells = [f"`{key[-1]}`", kind, default, f"`{variable(key)}`", _words(field.description)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind_and_default(field: FieldInfo) -> tuple[str, str]:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation)), f"`{field.default}`"
    doc = next(entry for entry in field.metadata if isinstance(entry, Doc))
    default = "required" if field.is_required() else doc.default or _default(doc, field.default)
    return doc.kind, default


def _default(doc: Doc, value: Any) -> str:
    if value is None:
        return "none"
    return "`[]`" if value == () else f"`{doc.show(value)}`"


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
