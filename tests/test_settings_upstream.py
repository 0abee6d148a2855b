"""Several addresses of a SuperLink, breaker and shedding: defaults, and what does not fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from relay.settings import load
from relay.settings_types import BaseUrl
from relay.settings_upstream import Breaker, Health, Shed
from tests.test_settings import load_tree, problems

if TYPE_CHECKING:
    from pathlib import Path

A, B = "http://a:8000", "http://b:8000"


def test_one_address_has_a_breaker_and_sheds_by_default() -> None:
    settings = load(None, {})
    assert (settings.upstream.addresses, settings.upstream.standby) == ((), ())
    assert settings.upstream.health == Health()
    assert settings.breaker == Breaker(enabled=True, failures=5, open_seconds=2.0)
    assert settings.shed == Shed(mode="adaptive", limit=128, min_limit=4)


@pytest.mark.parametrize("name", ["addresses", "standby"])
def test_further_addresses_are_taken(name: str) -> None:
    given = {f"RELAY_UPSTREAM__{name.upper()}": f"[{B}]", "RELAY_UPSTREAM__URL": A}
    settings = load(None, given | {"RELAY_UPSTREAM__SHARED_STATE": str(name == "addresses").lower()})
    assert getattr(settings.upstream, name) == (BaseUrl("http", "b", 8000),)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"upstream": {"url": A, "addresses": [B]}},
            (
                f"upstream.addresses = {B}: needs upstream.shared_state: true: SuperLinks that do not share"
                " their state answer each other's nodes with 401, which ends them; a SuperLink that stands by"
                " belongs into upstream.standby (relay.yaml:3)"
            ),
        ),
        (
            {"upstream": {"url": A, "standby": [B], "shared_state": True}},
            (
                f"upstream.standby = {B}: cannot be used with upstream.shared_state: write them into"
                " upstream.addresses (relay.yaml:3)"
            ),
        ),
        (
            {"upstream": {"url": A, "standby": ["https://b:8000"]}},
            "upstream.standby[0] = https://b:8000: must begin with http://, as upstream.url does",
        ),
        (
            {"upstream": {"url": A, "standby": [A]}},
            f"upstream.standby[0] = {A}: is the address of upstream.url as well: write each once",
        ),
        (
            {"upstream": {"url": A, "standby": [B, B]}},
            f"upstream.standby[1] = {B}: is the address of upstream.standby[0] as well: write each once",
        ),
        (
            {"upstream": {"url": A, "wire": "grpc", "standby": [B]}},
            f"upstream.standby = {B}: cannot be used with upstream.wire: grpc, which has one address",
        ),
        (
            {"upstream": {"url": A, "wire": "grpc", "addresses": [B], "shared_state": True}},
            f"upstream.addresses = {B}: cannot be used with upstream.wire: grpc, which has one address",
        ),
        (
            {"upstream": {"url": "https://a", "wire": "grpc", "server_name": "b"}},
            "upstream.server_name = b: cannot be used with upstream.wire: grpc: leave it out",
        ),
        (
            {"upstream": {"health": {"ejection": 61}, "standby": [B]}},
            (
                "upstream.health.ejection = 61s: must be at most upstream.health.max_ejection, which is 60s"
                " (relay.yaml:3)"
            ),
        ),
        (
            {"shed": {"limit": 8, "min_limit": 9}},
            "shed.min_limit = 9: must be at most shed.limit, which is 8 (relay.yaml:3)",
        ),
        ({"shed": {"min_limit": 3}}, "shed.min_limit = 3: must be at least 4"),
        ({"shed": {"queue_timeout": 4}}, "shed.queue_timeout = 4: must be shorter than 4s: a node gives up"),
        ({"breaker": {"open_seconds": "61s"}}, "breaker.open_seconds = '61s': must be shorter than"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    [problem] = problems(tmp_path, tree)
    assert problem.startswith(said)


def test_what_is_wrong_with_several_addresses_is_named_all_at_once(tmp_path: Path) -> None:
    upstream = {"url": A, "addresses": [B], "standby": [A, "https://c:1"]}
    assert [line.partition(" = ")[0] for line in problems(tmp_path, {"upstream": upstream})] == [
        "upstream.addresses",
        "upstream.standby[0]",
        "upstream.standby[1]",
    ]


def test_the_most_itself_is_allowed(tmp_path: Path) -> None:
    upstream = {"health": {"ejection": 60}, "standby": [B]}
    tree = {"upstream": upstream, "shed": {"limit": 9, "min_limit": 9}}
    settings = load_tree(tmp_path, tree)
    assert (settings.upstream.health.ejection, settings.shed.min_limit) == (60.0, 9)
