"""The relay serves with aiohttp's C parser, or not at all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from aiohttp import http_parser

ROOT = Path(__file__).parents[2]
#: The first one with the fixes of all advisories in docs/security.md.
FLOOR = (3, 14, 4)


@pytest.mark.timeout(60)
def test_it_does_not_start_with_the_parser_in_python() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "serve"],
        env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"not started: aiohttp runs without its C extensions; .*\n", done.stderr)
    assert done.stdout == ""


def test_the_tests_run_with_the_parser_in_c() -> None:
    assert http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy


def test_the_floor_of_aiohttp_has_the_fixes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = (line for line in project["dependencies"] if line.startswith("aiohttp"))
    floor = re.search(r">=([0-9.]+)", wanted)
    assert floor is not None
    assert tuple(map(int, floor[1].split("."))) >= FLOOR
    assert tuple(map(int, version("aiohttp").split(".")[:3])) >= FLOOR
    page = (ROOT / "docs" / "security.md").read_text()
    assert f"is {floor[1]}," in page
