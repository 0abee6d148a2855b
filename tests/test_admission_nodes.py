"""What the settings say of nodes, their keys and quarantine reaches the parts that it is meant for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from relay.app import build, chains
from relay.call import Call
from relay.credentials.node_keys import read_key
from relay.fleet import Method
from relay.refusal import Refusal
from relay.settings import load
from relay.stores.host import HostTable
from relay.stores.nodes import Nodes
from relay.wires.http import Front
from tests.signing import Node

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

    from relay.call import Reply
    from relay.settings import Settings

MakeCall = Callable[..., Call]

NODE, OTHER = Node(17), Node(18)


def read(directory: Path, **sections: Any) -> Settings:
    path = directory / "relay.yaml"
    listeners = [{"address": "127.0.0.1:0", "auth": {"accept": ["node_signature"]}}]
    tree = {"upstream": {"url": "http://127.0.0.1:1"}, "listeners": listeners, "retry": {"enabled": False}}
    path.write_text(yaml.safe_dump(tree | sections))
    return load(path, {})


async def chain(
    settings: Settings,
) -> tuple[Callable[[Call], Awaitable[Reply]], Callable[[], Awaitable[None]]]:
    """Return what handles a pull, and what ends the relay."""
    relay = build(settings, HostTable(64), None, Nodes(64))
    (front,) = relay.fronts
    assert isinstance(front, Front)
    return front._routes["/v1/fleet/pull-messages"].handler, relay.close


async def reason(settings: Settings, call: Call) -> str:
    """Return why a pull is refused by a relay whose SuperLink is not there."""
    handler, close = await chain(settings)
    try:
        with pytest.raises(Refusal) as caught:
            await handler(call)
    finally:
        await close()
    return f"{caught.value.reason.value}:{caught.value.cause}"


def steps(settings: Settings, method: Method = Method.PULL_MESSAGES) -> tuple[str, ...]:
    return next(chain.steps for _, _, of, chain in chains(settings) if of is method)


@pytest.mark.parametrize(
    ("verify", "expected"), [("always", "unauthenticated:signature"), ("local", "upstream_down:")]
)
async def test_signatures_are_verified_where_it_was_chosen(
    tmp_path: Path, make_call: MakeCall, verify: str, expected: str
) -> None:
    forged = make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.proof(by=OTHER))
    assert await reason(read(tmp_path, node_keys={"verify": verify}), forged) == expected


@pytest.mark.parametrize(
    ("rules", "age", "expected"),
    [
        ({}, 304, "upstream_down:"),
        ({}, 306, "upstream_down:clock"),
        ({"window": "10s"}, 14, "upstream_down:"),
        ({"window": "10s"}, 16, "upstream_down:clock"),
        ({"ahead": "60s"}, -50, "upstream_down:"),
        ({}, -50, "upstream_down:clock"),
    ],
)
async def test_the_window_is_the_one_that_was_chosen(
    tmp_path: Path, make_call: MakeCall, rules: dict[str, str], age: float, expected: str
) -> None:
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.proof(age=age))
    assert await reason(read(tmp_path, node_keys=rules), call) == expected


async def test_only_allowed_keys_are_let_in_under_their_names(tmp_path: Path, make_call: MakeCall) -> None:
    (tmp_path / "keys").write_text(f"tenant=north {NODE.ssh} site b\n")
    settings = read(tmp_path, node_keys={"allow": str(tmp_path / "keys")})
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.headers())
    assert await reason(settings, call) == "upstream_down:"
    assert call.identity is not None
    assert (call.identity.name, call.identity.tenant) == ("site b", "north")
    other = make_call(Method.PULL_MESSAGES, OTHER.body, metadata=OTHER.headers())
    assert await reason(settings, other) == "unauthenticated:not_allowed"


async def test_an_allow_list_that_is_not_there_shuts_no_node_down(
    tmp_path: Path, make_call: MakeCall
) -> None:
    settings = read(tmp_path, node_keys={"allow": str(tmp_path / "keys")})
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.headers())
    assert await reason(settings, call) == "upstream_down:"
    assert call.identity is None


@pytest.mark.parametrize("mode", ["normal", "pass_through"])
@pytest.mark.parametrize(("enforce", "expected"), [(True, "forbidden:"), (False, "upstream_down:")])
async def test_quarantine_holds_in_an_emergency_too(
    tmp_path: Path, make_call: MakeCall, mode: str, enforce: bool, expected: str
) -> None:
    (tmp_path / "list").write_text(f"key {read_key(NODE.ssh.encode())[0].fingerprint} why\n")
    section = {"file": str(tmp_path / "list"), "enforce": enforce}
    settings = read(tmp_path, quarantine=section, mode=mode)
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.headers())
    assert await reason(settings, call) == expected


def test_what_is_off_leaves_no_trace(tmp_path: Path) -> None:
    on = steps(read(tmp_path, quarantine={"file": str(tmp_path / "list")}))
    assert {"inventory", "quarantine", "accepted"} < set(on)
    off = steps(read(tmp_path, inventory={"enabled": False}, listeners=[{"address": "127.0.0.1:0"}]))
    assert not {"inventory", "quarantine", "accepted", "auth"} & set(off)


def test_what_a_legacy_superlink_accepts_proves_nothing(tmp_path: Path) -> None:
    keys = {"file": str(tmp_path / "keys")}
    listeners = [{"address": "127.0.0.1:0", "auth": {"accept": ["node_signature", "api_key"]}}]
    legacy = {"url": "http://127.0.0.1:1", "wire": "rest_v0"}
    assert "accepted" in steps(read(tmp_path, listeners=listeners, keys=keys))
    assert "accepted" not in steps(read(tmp_path, listeners=listeners, keys=keys, upstream=legacy))
