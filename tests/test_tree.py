"""What holds for the source tree as a whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RELAY = ROOT / "relay"
MOST_LINES = 400


def test_no_module_is_longer_than_can_be_read_in_one_go() -> None:
    sizes = {
        str(module.relative_to(ROOT)): len(module.read_text(encoding="utf-8").splitlines())
        for module in RELAY.rglob("*.py")
    }
    assert len(sizes) > 100
    over = {name: size for name, size in sizes.items() if size > MOST_LINES}
    assert over == {}, "split it by what its parts mean"


def test_the_tests_of_a_module_stand_where_one_looks_for_them() -> None:
    """tests/stores/test_kept.py for relay/stores/kept.py; the app of the demo is run by its federations."""
    modules = [at.relative_to(RELAY) for at in RELAY.rglob("*.py") if at.name != "__init__.py"]
    mirrored = [at for at in modules if at.parts[:2] != ("demo", "app")]
    tests = {at: ROOT / "tests" / at.with_name(f"test_{at.name.replace('__', '')}") for at in mirrored}
    assert [str(at) for at, test in tests.items() if not test.exists()] == []


def is_there(name: str) -> bool:
    """Return whether there is such a file or directory, named from the root or from `relay`; `*` is any."""
    return any(
        next(base.glob(pattern), None)
        for base in (ROOT, RELAY)
        for pattern in (name.rstrip("/"), f"{name}.py")
    )


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_what_a_page_names_of_the_tree_is_there(page: str) -> None:
    """`relay/x.py`, and `policies/x` or `wires/x.py` for short."""
    folders = "|".join(
        ["relay", "docs", "scripts", "tests", *(at.name for at in RELAY.iterdir() if at.is_dir())]
    )
    named = re.findall(rf"`((?:{folders})/[\w/.*-]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [name for name in named if not is_there(name)] == []


def test_the_architecture_names_every_module_at_the_top() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`relay/([\w*]+\.py|\w+/)`", page)
    here = {at.name + "/" * at.is_dir() for at in RELAY.iterdir() if not at.name.startswith("__")}
    known = {at.name + "/" * at.is_dir() for name in named for at in RELAY.glob(name.rstrip("/"))}
    assert here == known
