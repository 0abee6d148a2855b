"""Whoever is in quarantine is refused in the way that its node survives, by whatever it is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from relay import dialect
from relay.call import Call, Identity, Payload, Reply, Source, Wire
from relay.credentials.node_keys import read_key
from relay.fleet import Kind, Method
from relay.pipeline import compose
from relay.policies import Quarantine
from relay.refusal import Reason, Refusal
from relay.stores.quarantine_list import QuarantineList, parse
from relay.wireformat import encode_bytes, encode_uint
from tests.signing import Node

MakeCall = Callable[..., Call]

NODE, OTHER = Node(17), Node(18)
KEY = read_key(NODE.ssh.encode())[0].fingerprint


async def upstream(_: Call) -> Reply:
    return Reply(Payload(b"answer"), Source.UPSTREAM)


def quarantine(text: str, *, enforce: bool = True) -> Quarantine:
    watched: Any = SimpleNamespace(value=parse(text), tick=lambda: None)
    return Quarantine(watched, enforce=enforce)


async def is_refused(policy: Quarantine, call: Call) -> bool:
    try:
        await policy.handle(call, upstream)
    except Refusal as error:
        refusal = error
    else:
        return False
    assert (refusal.reason, refusal.by, refusal.sent) == (Reason.FORBIDDEN, "quarantine", False)
    return True


async def test_a_node_is_known_by_its_id(make_call: MakeCall) -> None:
    policy = quarantine("node 17 why")
    assert await is_refused(policy, make_call(Method.PULL_MESSAGES, NODE.body))
    assert await is_refused(policy, make_call(Method.DEACTIVATE_NODE, encode_uint(1, 17)))
    assert await is_refused(policy, make_call(Method.PULL_MESSAGES, NODE.body, wire=Wire.REST_V0))
    assert not await is_refused(policy, make_call(Method.PULL_MESSAGES, OTHER.body))
    assert not await is_refused(policy, make_call(Method.PULL_MESSAGES, b""))
    assert not await is_refused(policy, make_call(Method.PULL_MESSAGES, b"\xff\xff\xff"))


async def test_an_object_that_is_still_arriving_is_known_by_its_first_bytes(make_call: MakeCall) -> None:
    class Arriving:
        def __init__(self) -> None:
            self.pieces = [NODE.body + encode_uint(2, 5), b"rest"]

        async def read(self) -> bytes:
            return self.pieces.pop(0) if self.pieces else b""

        def close(self) -> None:
            pass

    call = make_call(Method.PUSH_OBJECT, Payload(body=Arriving(), size=1 << 30))
    assert await is_refused(quarantine("node 17"), call)


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.REGISTER_NODE], ids=lambda m: m.rpc)
async def test_a_node_is_known_by_the_key_that_it_shows(make_call: MakeCall, method: Method) -> None:
    policy = quarantine(f"key {KEY}")
    assert await is_refused(policy, make_call(method, metadata=NODE.headers()))
    assert not await is_refused(policy, make_call(method, metadata=OTHER.headers()))
    assert not await is_refused(policy, make_call(method, metadata=NODE.headers()[:2])), "auth refuses it"
    assert not await is_refused(policy, make_call(method, metadata=[(b"flwr-public-key", b"eA==")] * 2))


async def test_a_legacy_node_that_joins_is_known_by_the_key_in_the_body(make_call: MakeCall) -> None:
    policy = quarantine(f"key {KEY}")
    for method in (Method.REGISTER_NODE, Method.ACTIVATE_NODE):
        joining = make_call(method, encode_bytes(1, NODE.pem) + encode_uint(2, 30), wire=Wire.REST_V0)
        assert await is_refused(policy, joining)
    for body in (encode_bytes(1, OTHER.pem), encode_bytes(1, b"garbage"), b"", b"\x0a\xff"):
        assert not await is_refused(policy, make_call(Method.ACTIVATE_NODE, body, wire=Wire.REST_V0))


async def test_a_node_is_known_by_its_identity(make_call: MakeCall) -> None:
    policy = quarantine("identity north/b\nnode 1")
    for identity, expected in ((Identity("b", "north"), True), (Identity("b"), False), (None, False)):
        call = make_call(Method.PULL_MESSAGES, NODE.body)
        call.identity = identity
        assert await is_refused(policy, call) == expected


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
async def test_it_looks_at_no_more_than_it_declares(make_call: MakeCall, method: Method) -> None:
    policy = quarantine(f"node 99\nkey SHA256:{'x' * 43}\nidentity b")
    chain = compose([policy], upstream, method, buffer_limit=100, strict=True)
    call = make_call(method, NODE.body, metadata=NODE.headers())
    assert (await chain.handler(call)).payload.data == b"answer"


async def test_in_shadow_mode_it_is_counted_and_passes(make_call: MakeCall) -> None:
    def count(enforced: str) -> float:
        labels = {"method": "PullMessages", "enforced": enforced}
        return REGISTRY.get_sample_value("relay_quarantined_total", labels) or 0.0

    before = count("false"), count("true")
    assert not await is_refused(
        quarantine("node 17", enforce=False), make_call(Method.PULL_MESSAGES, NODE.body)
    )
    assert (count("false") - before[0], count("true") - before[1]) == (1, 0)
    assert await is_refused(quarantine("node 17"), make_call(Method.PULL_MESSAGES, NODE.body))
    assert (count("false") - before[0], count("true") - before[1]) == (1, 1)


async def test_the_list_may_change_at_any_time(make_call: MakeCall) -> None:
    ticks = []
    watched: Any = SimpleNamespace(value=QuarantineList(), tick=lambda: ticks.append(1))
    policy = Quarantine(watched)
    assert not await is_refused(policy, make_call(Method.PULL_MESSAGES, NODE.body))
    watched.value = parse("node 17")
    assert await is_refused(policy, make_call(Method.PULL_MESSAGES, NODE.body))
    policy.tick()
    assert ticks == [1]


@pytest.mark.parametrize("wire", Wire)
@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_what_it_is_told_leaves_a_node_alive(wire: Wire, method: Method) -> None:
    """The outcome of each of these answers was observed: docs/flower-compatibility.md."""
    assert quarantine("node 17").applies(method)
    assert not Quarantine(None).applies(method)
    answer = dialect.answer(wire, Reason.FORBIDDEN, method)
    lives: dict[tuple[Wire, Kind], set[dialect.Answer]] = {
        (Wire.HTTP_V1, Kind.JOIN): {dialect.Status(503)},
        (Wire.HTTP_V1, Kind.HEARTBEAT): {dialect.Status(503)},
        (Wire.HTTP_V1, Kind.PULL): {dialect.Empty()},
        (Wire.HTTP_V1, Kind.FETCH): {dialect.Status(403)},
        (Wire.HTTP_V1, Kind.PUSH): {dialect.Status(403)},
        (Wire.HTTP_V1, Kind.CONFIRM): {dialect.Empty()},
        (Wire.HTTP_V1, Kind.LEAVE): {dialect.Status(503)},
        (Wire.REST_V0, Kind.JOIN): {dialect.Drop()},
        (Wire.REST_V0, Kind.HEARTBEAT): {dialect.Status(503)},
        (Wire.REST_V0, Kind.PULL): {dialect.Empty()},
        (Wire.REST_V0, Kind.FETCH): {dialect.Drop()},
        (Wire.REST_V0, Kind.PUSH): {dialect.Status(403)},
        (Wire.REST_V0, Kind.CONFIRM): {dialect.Empty()},
        (Wire.REST_V0, Kind.LEAVE): {dialect.Drop()},
    }
    come_back = dialect.Abort("UNAVAILABLE")
    for kind in Kind:
        lives[Wire.GRPC, kind] = {come_back}
        lives[Wire.GRPC_ADAPTER, kind] = {come_back}
    for over_grpc in (Wire.GRPC, Wire.GRPC_ADAPTER):
        lives[over_grpc, Kind.PULL] = lives[over_grpc, Kind.CONFIRM] = {dialect.Empty()}
        lives[over_grpc, Kind.FETCH] = lives[over_grpc, Kind.PUSH] = {dialect.Abort("PERMISSION_DENIED")}
    assert answer in lives[wire, method.kind]
