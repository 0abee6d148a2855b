"""The relay lets in whom a SuperLink lets in: Flower's own check of a signature is the oracle."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.superlink.routers.fleet import node_auth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.call import Call
from relay.credentials import node_keys
from relay.credentials.allowed_keys import AllowedKey
from relay.credentials.node_keys import KeyFormatError, NodeKeys, node_key, read_key
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from tests.signing import Node

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.call import Metadata

MakeCall = Callable[..., Call]

NODE = Node()
OTHER = Node(node_id=2)
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def at_noon(**rules: Any) -> NodeKeys:
    return NodeKeys(now=NOW.timestamp, **rules)


def cause(keys: NodeKeys, call: Call) -> str:
    """Return why a call is refused; "" if it is not."""
    try:
        keys.ensure_verified(call)
    except Refusal as error:
        refusal = error
    else:
        assert call.proved
        return ""
    # It may be the relay's own clock that is wrong, and a 401 would end the node.
    reason = Reason.UPSTREAM_DOWN if refusal.cause == "clock" else Reason.UNAUTHENTICATED
    assert (refusal.reason, refusal.by) == (reason, "node_signature")
    assert not refusal.sent
    assert not call.proved
    return refusal.cause


def superlink_accepts(
    monkeypatch: pytest.MonkeyPatch, headers: Metadata, message: Any, now: datetime
) -> bool:
    """Ask Flower's own check, at this time, of a SuperLink that knows NODE by its id."""
    state = SimpleNamespace(get_node_id_by_public_key={NODE.pem: NODE.node_id}.get)
    request: Any = SimpleNamespace(
        headers={name.decode().lower(): value.decode("latin-1") for name, value in headers},
        state=SimpleNamespace(protobuf_request=message),
    )
    with monkeypatch.context() as patch:
        patch.setattr(node_auth, "now", lambda: now)
        patch.setattr(node_auth, "get_linkstate", lambda _: state)
        try:
            node_auth.authenticate_node(request)
        except HTTPException as error:
            status = error.status_code
        else:
            return True
    assert status == 401
    return False


PULL = PullMessagesRequest(node=FlowerNode(node_id=NODE.node_id))


def test_a_call_as_flower_signs_it_is_verified(make_call: MakeCall) -> None:
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.headers())
    owner = NodeKeys().ensure_verified(call)
    assert call.proved
    assert owner.fingerprint == owner.name == read_key(NODE.ssh.encode())[0].fingerprint


@pytest.mark.parametrize("age", [-5.1, -5.0, -4.9, 0, 290, 300, 304.9, 305.0, 305.1, 3600, -3600])
def test_a_superlink_and_the_relay_take_a_timestamp_alike(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    headers = NODE.proof((NOW - timedelta(seconds=age)).isoformat())
    found = cause(at_noon(), make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers))
    assert found == ("" if -5 < age < 305 else "clock")
    assert superlink_accepts(monkeypatch, headers, PULL, NOW) == (not found)


TIMESTAMPS = st.one_of(
    st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=5, minutes=30)))).map(
        datetime.isoformat
    ),
    st.floats(-400, 400).map(lambda age: (NOW + timedelta(seconds=age)).isoformat()),
    st.text("0123456789-:+.TZ ", min_size=1, max_size=40),
    st.sampled_from(
        [
            "20261123T120000Z",
            "2026-11-23",
            "2026-W48-1T12:00:00+00:00",
            "2026-11-23T12:00:00",
            "2026-11-23 12:00:00Z",
            "2026-11-23T24:00:00Z",
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
            "2026-11-23T13:00:00+01:00",
        ]
    ),
)


@given(timestamp=TIMESTAMPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_a_superlink_and_the_relay_take_any_text_for_a_timestamp_alike(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch, timestamp: str
) -> None:
    headers = NODE.proof(timestamp)
    found = cause(at_noon(), make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers))
    assert found in ("", "clock", "malformed")
    assert superlink_accepts(monkeypatch, headers, PULL, NOW) == (not found)


@given(place=st.integers(0, 102), flip=st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
def test_a_superlink_and_the_relay_take_a_changed_signature_alike(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch, place: int, flip: int
) -> None:
    headers = NODE.proof(NOW.isoformat())
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers)
    assert call.proof is not None
    signature = bytearray(call.proof.signature)
    signature[place % len(signature)] ^= flip
    headers[2] = (headers[2][0], b64encode(bytes(signature)))
    assert cause(at_noon(), make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers)) == "signature"
    assert not superlink_accepts(monkeypatch, headers, PULL, NOW)


def test_wrong_proofs_are_refused_with_their_cause(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = NODE.proof(NOW.isoformat())
    cases: list[tuple[Metadata, str]] = [
        ([], "missing"),
        (good[:2], "malformed"),
        (NODE.proof(NOW.isoformat(), by=OTHER), "signature"),
        (
            [good[0], (b"flwr-timestamp", (NOW + timedelta(seconds=1)).isoformat().encode()), good[2]],
            "signature",
        ),
        ([(b"flwr-public-key", b64encode(b"-----BEGIN PUBLIC KEY-----\ngarbage")), *good[1:]], "malformed"),
        ([(b"flwr-public-key", b64encode(NODE.ssh.encode())), *good[1:]], "malformed"),
        ([good[0], good[1], (b"flwr-signature", b64encode(b"no DER"))], "signature"),
    ]
    for headers, expected in cases:
        assert cause(at_noon(), make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers)) == expected
        assert not superlink_accepts(monkeypatch, headers, PULL, NOW)
    assert superlink_accepts(monkeypatch, good, PULL, NOW), "the oracle lets somebody in"
    assert not superlink_accepts(monkeypatch, good, ActivateNodeRequest(public_key=OTHER.pem), NOW)


def _foreign_keys() -> Mapping[str, bytes]:
    made: dict[str, Any] = {
        "rsa": rsa.generate_private_key(65537, 1024),
        "dsa": dsa.generate_private_key(1024),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()),
        "brainpool": ec.generate_private_key(ec.BrainpoolP256R1()),
    }
    return {
        name: key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for name, key in made.items()
    }


@pytest.mark.parametrize("name", ["rsa", "dsa", "ed25519", "secp256k1", "brainpool"])
def test_keys_that_no_node_has_are_refused(make_call: MakeCall, name: str) -> None:
    pem = _foreign_keys()[name]
    headers = [(b"flwr-public-key", b64encode(pem)), *NODE.proof(NOW.isoformat())[1:]]
    assert cause(at_noon(), make_call(Method.PULL_MESSAGES, metadata=headers)) == "malformed"


@given(garbage=st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_garbage_in_place_of_a_key_is_refused(make_call: MakeCall, garbage: bytes) -> None:
    body = b64encode(garbage)
    for pem in (garbage, b"-----BEGIN PUBLIC KEY-----\n" + body + b"\n-----END PUBLIC KEY-----\n"):
        headers = [(b"flwr-public-key", b64encode(pem)), *NODE.proof(NOW.isoformat())[1:]]
        assert cause(at_noon(), make_call(Method.PULL_MESSAGES, metadata=headers)) == "malformed"


def test_a_key_that_is_cut_or_changed_anywhere_never_raises_but_its_own_error() -> None:
    der = NODE.pair[1].public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for place in range(len(der)):
        for changed in (der[:place], der[:place] + bytes([der[place] ^ 0x55]) + der[place + 1 :]):
            pem = b"-----BEGIN PUBLIC KEY-----\n" + b64encode(changed) + b"\n-----END PUBLIC KEY-----\n"
            with pytest.raises(KeyFormatError):
                node_key(pem)


def test_a_key_is_the_same_however_it_is_written() -> None:
    """Or a node in quarantine could write its own in another way."""
    wide = NODE.pem.replace(b"\n", b"\r\n") + b"\n\n"
    compressed = NODE.pair[1].public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    again = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), compressed)
    pem = again.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    known = {node_key(text).fingerprint for text in (NODE.pem, wide, pem)}
    assert known == {read_key(NODE.ssh.encode())[0].fingerprint}


def test_a_private_key_is_refused_as_one() -> None:
    private = NODE.pair[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(KeyFormatError, match="is a private key, which stays on its node"):
        read_key(private)


class Known:
    """A list of allowed keys that is not read from a file."""

    def __init__(self, *owners: AllowedKey) -> None:
        self.value: dict[str, AllowedKey] | None = {owner.fingerprint: owner for owner in owners}


def test_only_keys_on_the_list_are_allowed_and_whose_they_are_is_known(make_call: MakeCall) -> None:
    owner = AllowedKey(read_key(NODE.ssh.encode())[0].fingerprint, "site b", "north", (("a", "b"),))
    known: Any = Known(owner)
    keys = NodeKeys(allowed=known)
    assert keys.ensure_verified(make_call(Method.PULL_MESSAGES, metadata=NODE.headers())) == owner
    assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=OTHER.headers())) == "not_allowed"
    # Taken off the list, a proof that was verified before is worth nothing.
    headers = NODE.headers()
    assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=headers)) == ""
    known.value = {}
    assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=headers)) == "not_allowed"


def test_a_list_that_could_not_be_read_shuts_no_node_down(make_call: MakeCall) -> None:
    known: Any = SimpleNamespace(value=None)
    with pytest.raises(Refusal) as caught:
        NodeKeys(allowed=known).ensure_verified(make_call(Method.PULL_MESSAGES, metadata=NODE.headers()))
    assert caught.value.reason is Reason.UPSTREAM_DOWN


def test_a_proof_is_verified_once_and_stays_bound_to_its_time(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    keys = NodeKeys(now=lambda: clock[0])
    headers = NODE.headers()
    assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=headers)) == ""
    asked: list[bytes] = []

    def looked_up(pem: bytes) -> Any:
        asked.append(pem)

        def verify(*_: object) -> None:
            raise AssertionError("verified again")

        return SimpleNamespace(fingerprint="", digest=b"", public=SimpleNamespace(verify=verify))

    monkeypatch.setattr(node_keys, "node_key", looked_up)
    call = make_call(Method.PULL_MESSAGES, metadata=headers)
    assert cause(keys, call) == ""
    assert cause(keys, call) == ""
    clock[0] += 306
    again = make_call(Method.PULL_MESSAGES, metadata=headers)
    assert cause(keys, again) == "clock"
    assert asked


def test_proofs_that_are_remembered_are_bounded(make_call: MakeCall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_keys, "_PROOFS", 3)
    keys = NodeKeys()
    for _ in range(5):
        assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=NODE.headers())) == ""
    assert len(keys._verified) == 3


def test_a_wrong_signature_is_never_remembered_as_right(make_call: MakeCall) -> None:
    keys = at_noon()
    headers = NODE.proof(NOW.isoformat(), by=OTHER)
    for _ in range(2):
        assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=headers)) == "signature"


def test_the_window_is_the_one_that_was_chosen(make_call: MakeCall) -> None:
    keys = at_noon(window=10.0, ahead=1.0)
    for age, expected in ((-0.9, ""), (-1.1, "clock"), (10.9, ""), (11.1, "clock")):
        headers = NODE.proof((NOW - timedelta(seconds=age)).isoformat())
        assert cause(keys, make_call(Method.PULL_MESSAGES, metadata=headers)) == expected


def test_no_refusal_repeats_what_was_shown(make_call: MakeCall) -> None:
    headers = NODE.proof("2020-01-01T00:00:00+00:00")
    with pytest.raises(Refusal) as caught:
        NodeKeys().ensure_verified(make_call(Method.PULL_MESSAGES, metadata=headers))
    assert all(value.decode() not in str(caught.value) for _, value in headers)
