"""Which releases work together is said for each pair of wires, and nothing is called tested that is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.call import Wire
from relay.settings_tree import CARRIES
from tests.e2e.test_bridging import MEETINGS

ROOT = Path(__file__).parents[2]
NODES = (Wire.HTTP_V1, Wire.GRPC, Wire.GRPC_ADAPTER, Wire.REST_V0)
SUPERLINKS = (Wire.HTTP_V1, Wire.GRPC, Wire.REST_V0)
PAIR = re.compile(r"(1\.\d+\.\d+) before (1\.\d+\.\d+)")

Cells = dict[tuple[Wire, Wire], tuple[str, str]]


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.fixture(scope="module")
def cells() -> Cells:
    """What the page says of each pair: what is tested, and what is expected."""
    page = (ROOT / "docs" / "flower-compatibility.md").read_text()
    section = page.partition("## Releases")[2].partition("Who speaks what")[0]
    found = [row for row in rows(section) if row[0].startswith("`")]
    cells = {(Wire(row[0].strip("`")), Wire(row[1].strip("`"))): (row[2], row[3]) for row in found}
    assert len(found) == len(cells)
    return cells


def test_each_pair_of_wires_has_a_cell(cells: Cells) -> None:
    assert set(cells) == {(node, superlink) for node in NODES for superlink in SUPERLINKS}
    assert all(tested and expected for tested, expected in cells.values())


def test_what_is_refused_is_what_the_relay_refuses_at_its_start(cells: Cells) -> None:
    for (node, superlink), said in cells.items():
        assert (said == ("refused", "refused")) == (node not in CARRIES[superlink])


def test_signing_is_asked_for_where_nodes_cannot_sign(cells: Cells) -> None:
    for (node, superlink), said in cells.items():
        signs = node is Wire.REST_V0 is not superlink
        assert [cell.startswith("with `signing`: ") for cell in said] == [signs, signs]


def test_the_federations_of_the_page_are_those_of_the_tests(cells: Cells) -> None:
    """Of the files of tests that name their releases one by one; the others are read for them."""
    run = {(each.wire, each.spoken, _release(each.node), _release(each.superlink)) for each in MEETINGS}
    said = {(*wires, *pair) for wires, (tested, _) in cells.items() for pair in PAIR.findall(tested)}
    assert run <= said
    others = "".join(
        (ROOT / "tests" / "e2e" / f"test_{name}.py").read_text() for name in ("federation", "signing")
    )
    for node, superlink, *releases in said - run:
        if releases == ["1.41.0", "1.41.0"]:
            assert "flwr==1.41.0" in (ROOT / "requirements" / "dev.lock").read_text()
            continue
        assert Wire.REST_V0 in (node, superlink) or node is superlink is Wire.HTTP_V1
        assert all(f"=={release}" in others for release in releases)


def test_the_readme_says_the_same(cells: Cells) -> None:
    section = (ROOT / "README.md").read_text().partition("## Which flwr")[2].partition("## ")[0]
    _, *body = rows(section)
    assert len(body) == len(NODES)
    for node, (_, *row) in zip(NODES, body, strict=True):
        for superlink, cell in zip(SUPERLINKS, row, strict=True):
            tested, _ = cells[node, superlink]
            same = {"refused": "refused", "none": "expected"}.get(tested, f"tested: {tested}")
            assert cell == same


def _release(requirement: str) -> str:
    return requirement.rpartition("==")[2]
