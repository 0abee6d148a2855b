"""Settings about nodes: the lists are read when the settings are, and what does not fit together is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from relay.settings import SettingsError, load
from tests.signing import Node

if TYPE_CHECKING:
    from pathlib import Path

SIGNED = {"listeners": [{"auth": {"accept": ["node_signature"]}}]}


def problems(directory: Path, tree: dict[str, Any]) -> list[str]:
    path = directory / "relay.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        load(path, {})
    except SettingsError as error:
        return [str(problem).replace(f"{directory}/", "") for problem in error.problems]
    return []


def test_lists_that_can_be_used_or_are_not_there_yet_are_fine(tmp_path: Path) -> None:
    keys, quarantine = tmp_path / "keys", tmp_path / "quarantine"
    tree = {**SIGNED, "node_keys": {"allow": str(keys)}, "quarantine": {"file": str(quarantine)}}
    assert problems(tmp_path, tree) == []
    keys.write_text(f"{Node().ssh} a\n")
    quarantine.write_text("")
    assert problems(tmp_path, tree) == []


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        (
            ("node_keys", "allow"),
            "x\n",
            "line 1: must be a public key that begins with one of ecdsa-sha2-nistp256",
        ),
        (("node_keys", "allow"), "#\n", "holds no key, which would shut down every node"),
        (("quarantine", "file"), "\nnode x\n", "line 2: must have a node id: a whole number below 2**64"),
        (("quarantine", "file"), b"\xff", "byte 0 is not UTF-8: it must be a text file"),
    ],
)
def test_a_broken_list_is_named_with_its_line_and_what_would_be_right(
    tmp_path: Path, key: tuple[str, str], text: str | bytes, problem: str
) -> None:
    path = tmp_path / "list"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    found = problems(tmp_path, {**SIGNED, key[0]: {key[1]: str(path)}})
    assert len(found) == 1
    assert found[0].startswith(f"{key[0]}.{key[1]} = 'list': {problem}")


@pytest.mark.parametrize("path", ["nowhere/list", "."])
def test_a_list_has_a_place(tmp_path: Path, path: str) -> None:
    (found,) = problems(tmp_path, {"quarantine": {"file": str(tmp_path / path)}})
    assert "is in no directory that exists" in found or "is a directory" in found


@pytest.mark.parametrize("accept", [["node_signature"], ["node_signature+api_key", "node_signature"]])
def test_legacy_nodes_cannot_be_asked_to_sign(tmp_path: Path, accept: list[str]) -> None:
    tree = {
        "upstream": {"wire": "rest_v0"},
        "listeners": [{"auth": {"accept": accept[:1]}}],
        "keys": {"file": str(tmp_path / "keys")},
    }
    found = [text for text in problems(tmp_path, tree) if "node_signature" in text and "rest_v0" in text]
    assert len(found) == 1
    assert found[0].startswith("listeners[0].auth.accept = node_signature: cannot be asked of rest_v0 nodes")


def test_legacy_nodes_may_have_another_way_in(tmp_path: Path) -> None:
    tree = {
        "upstream": {"wire": "rest_v0"},
        "listeners": [{"auth": {"accept": ["node_signature", "api_key"]}}],
        "keys": {"file": str(tmp_path / "keys")},
    }
    assert problems(tmp_path, tree) == []


def test_a_list_that_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {"node_keys": {"allow": str(tmp_path / "keys")}})
    assert found.startswith("node_keys.allow = ")
    assert "no listener asks for a signature: add node_signature to listeners[0].auth.accept" in found


def test_one_file_cannot_be_both_lists(tmp_path: Path) -> None:
    both = str(tmp_path / "list")
    (found,) = problems(tmp_path, {**SIGNED, "node_keys": {"allow": both}, "quarantine": {"file": both}})
    assert found.startswith("quarantine.file = ")
    assert "cannot be the file of node_keys.allow as well" in found


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"inventory": {"nodes": 63}}, "inventory.nodes = 63: must be at least 64 (relay.yaml:2)"),
        (
            {"inventory": {"nodes": 500_001}},
            "inventory.nodes = 500001: must be at most 500000 (relay.yaml:2)",
        ),
        (
            {"inventory": {"keep": 0}},
            "inventory.keep = 0: must be above zero and finite: a number of seconds",
        ),
        ({"node_keys": {"verify": "never"}}, "node_keys.verify = 'never': must be 'always' or 'local'"),
        ({"quarantine": {"enforce": "no way"}}, "quarantine.enforce = 'no way': must be true or false"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    (found,) = problems(tmp_path, tree)
    assert found.startswith(said)
