"""What was set and has no effect is named, with the reason; a default, or what is switched off, never is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from relay.settings import load
from relay.settings_unused import idle
from tests.test_settings import load_tree, problems

if TYPE_CHECKING:
    from pathlib import Path

B = "http://b:8000"
GRPC: dict[str, Any] = {"listeners": [{"wires": ["grpc"]}]}
ASKED: dict[str, Any] = {"listeners": [{"auth": {"accept": ["node_signature"]}}]}
SIGNING_FREE = {"wires": ["rest_v0"], "auth": {"accept": ["api_key"]}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"listeners": [{"auth": {"enforce": False}}]},
            (
                "listeners[0].auth.enforce = false: has no effect, because listeners[0].auth.accept is empty"
                " and lets everybody call: name a credential there, or leave this out (relay.yaml:3)"
            ),
        ),
        (
            {"listeners": [{"auth": {"accept": [], "strangers": "drop"}}]},
            "listeners[0].auth.strangers = drop: has no effect, because listeners[0].auth.accept is empty",
        ),
        (
            {"listeners": [{}, {"address": ":81", "auth": {"strangers": "refuse"}}]},
            "listeners[1].auth.strangers = refuse: has no effect, because listeners[1].auth.accept is empty",
        ),
        # Whoever writes it believes that it is so.
        ({"listeners": [{"auth": {"enforce": True}}]}, "listeners[0].auth.enforce = true: has no effect"),
        ({"node_keys": {"verify": "local"}}, "node_keys.verify = local: has no effect, because no listener"),
        ({"node_keys": {"window": 9}}, "node_keys.window = 9s: has no effect, because no listener asks"),
        ({"node_keys": {"ahead": 9}}, "node_keys.ahead = 9s: has no effect, because no listener asks"),
        ({"quarantine": {"enforce": False}}, "quarantine.enforce = false: has no effect, because quarantine"),
        (
            {"listeners": [{"client_certificate_header": "Client-Cert", "trusted_proxies": ["10.0.0.0/8"]}]},
            (
                "listeners[0].client_certificate_header = Client-Cert: has no effect, because"
                " listeners[0].auth.accept names no certificate: leave it out"
            ),
        ),
    ],
)
def test_what_has_no_effect_is_named_with_the_reason(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    [line] = problems(tmp_path, tree)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"limits": {"max_held": "1MiB"}},
            "limits.max_held = 1MiB: has no effect, because nobody speaks gRPC",
        ),
        (
            {"limits": {"min_rate": 0, "rate_window": "5s"}},
            "limits.rate_window = 5s: has no effect, because limits.min_rate is 0: leave it out",
        ),
        ({"keys": {"stale": 0}}, "keys.stale = 0s: has no effect, because keys.redis is not set"),
        (
            {"inventory": {"enabled": False, "redis": "redis://me:s3cret@redis/1"}},
            "inventory.redis = redis://***@redis/1: has no effect, because inventory.enabled is false",
        ),
        (
            {"upstream": {"standby_after": 9}},
            "upstream.standby_after = 9s: has no effect, because upstream.standby is empty: leave it out",
        ),
        (
            {"upstream": {"health": {"interval": 9}}},
            "upstream.health.interval = 9s: has no effect, because upstream.url is the only address",
        ),
        (
            {"upstream": {"wire": "grpc", "keepalive": 1}},
            "upstream.keepalive = 1s: has no effect, because upstream.wire is grpc: leave it out",
        ),
        ({"upstream": {"wire": "grpc", "shared_state": True}}, "upstream.shared_state = true: has no effect"),
    ],
)
def test_a_measure_that_nothing_goes_by_is_taken_and_spoken_of(
    tmp_path: Path, tree: dict[str, Any], said: str
) -> None:
    [line] = idle(load_tree(tmp_path, tree))
    assert line.startswith(said)
    assert "s3cret" not in line


def test_a_key_pair_for_nodes_that_cannot_sign_needs_such_nodes(tmp_path: Path) -> None:
    signing = {"directory": str(tmp_path / "signing")}
    [line] = problems(tmp_path, {"signing": signing, "listeners": [{"wires": ["http_v1"]}]})
    assert line.startswith("signing.directory = signing: has no effect, because no listener serves rest_v0")
    tree = {
        "signing": {**signing, "unauthenticated": True},
        "listeners": [SIGNING_FREE],
        "keys": {"file": str(tmp_path / "keys")},
    }
    [line] = problems(tmp_path, tree)
    assert line.startswith("signing.unauthenticated = true: has no effect, because each listener of rest_v0")
    tree["listeners"] = [SIGNING_FREE, {"address": ":81", "wires": ["rest_v0"]}]
    assert load_tree(tmp_path, tree).signing is not None


@pytest.mark.parametrize(
    "tree",
    [
        {"listeners": [{"auth": {"accept": [], "strangers": "refuse", "forward": False, "enforce": True}}]},
        {"listeners": [{"auth": {"forward": True}}]},
        {**ASKED, "node_keys": {"verify": "local", "window": 9, "ahead": 9}},
        {**GRPC, "limits": {"header_count": 50, "connections": 9, "min_rate": "2KiB", "max_held": "1MiB"}},
        {**GRPC, "limits": {"head_timeout": 5, "connections_per_peer": 9}},
        {"listeners": [{"wires": ["grpc_adapter"]}], "limits": {"max_held": "1MiB"}},
        {"upstream": {"standby": [B], "standby_after": 9, "health": {"interval": 9}}},
        {"upstream": {"addresses": [B], "shared_state": True, "health": {"interval": 9}}},
        {"upstream": {"wire": "grpc"}, "limits": {"max_held": "1MiB"}},
        {"upstream": {"wire": "grpc", "idle_timeout": 9}, "limits": {"min_rate": 9, "rate_window": 9}},
        {"upstream": {"keepalive": 1, "resolve_interval": 9, "max_connections": 9, "shared_state": True}},
        # What is switched off may be switched on again.
        {"retry": {"enabled": False, "cap": 9}},
        {"breaker": {"enabled": False, "failures": 9}},
        {"shed": {"mode": "off", "limit": 9}},
        {"redelivery": {"enabled": False, "deliveries": 9}},
        {"inventory": {"enabled": False, "keep": 9}},
    ],
)
def test_what_has_an_effect_or_is_the_default_is_taken(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert idle(load_tree(tmp_path, tree)) == []


def test_a_file_of_quarantine_or_redis_of_keys_gives_its_keys_an_effect(tmp_path: Path) -> None:
    load_tree(tmp_path, {"quarantine": {"file": str(tmp_path / "list"), "enforce": False}})
    listener = {"auth": {"accept": ["api_key"], "strangers": "drop", "forward": True, "enforce": False}}
    keys = {"redis": "redis://redis/0", "stale": 0}
    assert idle(load_tree(tmp_path, {"listeners": [listener], "keys": keys})) == []


def test_a_variable_is_named_like_a_line_of_the_file() -> None:
    with pytest.raises(Exception, match=r"auth\.enforce = true: .*\(RELAY_LISTENERS__0__AUTH__ENFORCE\)"):
        load(None, {"RELAY_LISTENERS__0__AUTH__ENFORCE": "true"})
