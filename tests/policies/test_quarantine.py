"""Whoever is in quarantine is refused in the way that its node survives, by whatever it is known."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client import REGISTRY

from relay import bridge, dialect
from relay.call import Call, Identity, Metadata, Payload, Reply, Source, Wire
from relay.credentials.node_keys import read_key
from relay.fleet import PEEK_BYTES, Kind, Method
from relay.pipeline import compose
from relay.policies import Quarantine
from relay.refusal import Reason, Refusal
from relay.stores.quarantine_list import QuarantineList, parse
from relay.stores.watched import Watched
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


UNREADABLE_NODES = {
    "absent": b"",
    "broken": b"\xff\xff\xff",
    "behind more than is looked at": encode_bytes(99, bytes(PEEK_BYTES)) + NODE.body,
    "given twice": OTHER.body + NODE.body,
    "given twice inside": encode_bytes(1, encode_uint(1, 18) + encode_uint(1, 17)),
    "of another type": encode_uint(1, 17),
}


@pytest.mark.parametrize("body", UNREADABLE_NODES.values(), ids=UNREADABLE_NODES)
@pytest.mark.parametrize("wire", Wire)
async def test_who_hides_a_node_id_gets_by_only_where_none_is_listed(
    make_call: MakeCall, wire: Wire, body: bytes
) -> None:
    """A SuperLink reads some of these, and `limits.check_calls` may be off."""
    call = make_call(Method.PULL_MESSAGES, body, wire=wire)
    assert await is_refused(quarantine("node 17"), call)
    assert not await is_refused(quarantine("node 17", enforce=False), call)
    assert not await is_refused(quarantine("identity b"), call)


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
    join = encode_bytes(1, OTHER.pem)
    assert not await is_refused(policy, make_call(method, join, metadata=OTHER.headers()))
    assert not await is_refused(policy, make_call(method, join)), "a SuperLink refuses it"


def hidden() -> dict[str, Metadata]:
    """Return ways to show a key that is listed, so that only the SuperLink may read it."""
    good, other = dict(NODE.headers()), dict(OTHER.headers())
    key, signed = b"flwr-public-key", b"flwr-signature"
    rest = [pair for pair in good.items() if pair[0] != key]
    return {
        "without a signature": [pair for pair in good.items() if pair[0] != signed],
        "without a key": rest,
        "two keys": [*good.items(), (key, other[key])],
        "two keys of different case": [(b"Flwr-Public-Key", good[key]), (key, other[key]), *rest],
        "two timestamps": [*good.items(), (b"flwr-timestamp", other[b"flwr-timestamp"])],
        "without padding": [*rest, (key, b64encode(NODE.pem).rstrip(b"="))],
        "with spaces": [*rest, (key, b" ".join((good[key][:40], good[key][40:])))],
        "no base64": [*rest, (key, b"***")],
        "in another form": [*rest, (key, b64encode(b"\n" + NODE.pem))],
        "of another kind": [*rest, (key, b64encode(ED25519))],
        "too long": [*rest, (key, b64encode(NODE.pem + bytes(1024)))],
        "empty": [*rest, (key, b"")],
    }


ED25519 = (
    Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
)
HIDDEN = hidden()


@pytest.mark.parametrize("shown", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.REGISTER_NODE], ids=lambda m: m.rpc)
async def test_who_hides_a_key_gets_by_only_where_none_is_listed(
    make_call: MakeCall, method: Method, shown: Metadata
) -> None:
    body = encode_bytes(1, OTHER.pem)
    for wire in (Wire.HTTP_V1, Wire.GRPC, Wire.GRPC_ADAPTER):
        call = make_call(method, body, wire=wire, metadata=shown)
        assert await is_refused(quarantine(f"key {KEY}"), call)
        assert not await is_refused(quarantine(f"key {KEY}", enforce=False), call)
        assert not await is_refused(quarantine("identity b"), call)


async def test_a_proof_in_binary_metadata_is_no_way_around(make_call: MakeCall) -> None:
    """What gRPC carries as bytes, and what it would carry as text beside it."""
    good = {name.decode(): b64decode(value) for name, value in NODE.headers() if name != b"flwr-timestamp"}
    binary: list[tuple[str, str | bytes]] = [(f"{name}-bin", value) for name, value in good.items()]
    stamp = ("flwr-timestamp", dict(NODE.headers())[b"flwr-timestamp"].decode())
    plain = ("flwr-public-key", b64encode(OTHER.pem).decode())
    for metadata in ([*binary, stamp], [*binary, stamp, plain], binary, [*binary, *binary, stamp]):
        call = make_call(Method.PULL_MESSAGES, wire=Wire.GRPC, metadata=bridge.to_headers(metadata))
        assert await is_refused(quarantine(f"key {KEY}"), call)


async def test_a_legacy_node_that_joins_is_known_by_the_key_in_the_body(make_call: MakeCall) -> None:
    policy = quarantine(f"key {KEY}")
    for method in (Method.REGISTER_NODE, Method.ACTIVATE_NODE):
        joining = make_call(method, encode_bytes(1, NODE.pem) + encode_uint(2, 30), wire=Wire.REST_V0)
        assert await is_refused(policy, joining)
        other = make_call(method, encode_bytes(1, OTHER.pem), wire=Wire.REST_V0)
        assert not await is_refused(policy, other)


UNREADABLE_JOINS = {
    "the last of two": encode_bytes(1, OTHER.pem) + encode_bytes(1, NODE.pem),
    "behind much else": encode_bytes(1, OTHER.pem) + encode_bytes(9, bytes(2000)) + encode_bytes(1, NODE.pem),
    "behind too much": encode_bytes(1, OTHER.pem) + encode_bytes(9, bytes(17_000)),
    "absent": b"",
    "empty": encode_bytes(1, b""),
    "garbage": encode_bytes(1, b"garbage"),
    "broken off": encode_bytes(1, OTHER.pem) + b"\x0a\xff",
}


@pytest.mark.parametrize("body", UNREADABLE_JOINS.values(), ids=UNREADABLE_JOINS)
@pytest.mark.parametrize("wire", Wire)
async def test_who_hides_a_key_in_the_body_does_not_join(
    make_call: MakeCall, wire: Wire, body: bytes
) -> None:
    for method in (Method.REGISTER_NODE, Method.ACTIVATE_NODE):
        metadata = [] if wire is Wire.REST_V0 else OTHER.headers()
        call = make_call(method, body, wire=wire, metadata=metadata)
        assert await is_refused(quarantine(f"key {KEY}"), call)
        assert not await is_refused(quarantine("node 17"), call)


@pytest.mark.parametrize("size", [256, 1024, 4096, 16 * 1024, 16 * 1024 + 1])
async def test_a_key_is_found_wherever_what_was_looked_at_may_end(make_call: MakeCall, size: int) -> None:
    before = encode_bytes(1, OTHER.pem)
    # A tag, and two bytes of a length where the filling is longer than 127.
    filling = encode_bytes(9, bytes(size - len(before) - (2 if size == 256 else 3)))
    assert len(before + filling) == size
    body = before + filling + encode_bytes(1, NODE.pem)
    assert await is_refused(quarantine(f"key {KEY}"), make_call(Method.REGISTER_NODE, body))


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
    body = encode_bytes(1, NODE.pem) if method.kind is Kind.JOIN else NODE.body
    body = encode_uint(1, 17) if method.kind is Kind.LEAVE else body
    call = make_call(method, body, metadata=NODE.headers())
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


async def test_a_list_that_was_broken_from_the_beginning_lets_nobody_in(
    make_call: MakeCall, tmp_path: Path
) -> None:
    """Taken for an empty one, it would let in whom it names."""
    path = tmp_path / "list"
    path.write_text("node seventeen\n")
    listed = Watched(path, parse, name="quarantine", absent=QuarantineList())
    call = make_call(Method.PULL_MESSAGES, OTHER.body)
    with pytest.raises(Refusal) as caught:
        await Quarantine(listed).handle(call, upstream)
    refusal = caught.value
    assert (refusal.reason, refusal.by, refusal.sent) == (Reason.UPSTREAM_DOWN, "quarantine", False)
    assert not await is_refused(Quarantine(listed, enforce=False), call)


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
