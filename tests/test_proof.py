"""What a node shows is read as it came, or refused with words that do not repeat it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.call import Call, Wire
from relay.fleet import Method
from relay.proof import MOST_KEY_BYTES, MOST_SIGNATURE_BYTES, MOST_TIMESTAMP_BYTES, NodeProof, ProofError
from tests.signing import Node

MakeCall = Callable[..., Call]

TIME = b"2026-11-23T12:00:00.123456+00:00"
WHOLE = {b"flwr-public-key": b"a2V5", b"flwr-timestamp": TIME, b"flwr-signature": b"c2ln"}


def test_what_flower_puts_on_a_request_is_read() -> None:
    node = Node()
    proof = NodeProof.of_http([(b"host", b"localhost"), *node.headers(), (b"accept", b"*/*")])
    assert proof is not None
    assert proof.public_key == node.pem
    assert proof.timestamp.endswith("+00:00")
    assert 90 < len(proof.signature) < 110


def test_names_are_read_in_any_case() -> None:
    proof = NodeProof.of_http([(name.title(), value) for name, value in WHOLE.items()])
    assert proof == NodeProof(b"key", TIME.decode(), b"sig")


def test_a_call_without_a_trace_of_a_proof_has_none() -> None:
    assert NodeProof.of_http([]) is None
    assert (
        NodeProof.of_http([(b"content-type", b"application/protobuf"), (b"flwr-package-name", b"f")]) is None
    )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({b"flwr-public-key": None}, "public key of 0 bytes"),
        ({b"flwr-timestamp": None}, "timestamp of 0 bytes"),
        ({b"flwr-signature": None}, "signature of 0 bytes"),
        ({b"flwr-public-key": b""}, "public key of 0 bytes"),
        ({b"flwr-public-key": b"a2V"}, "flwr-public-key is not base64"),
        ({b"flwr-public-key": b"a2V5\n"}, "flwr-public-key is not base64"),
        ({b"flwr-signature": b"c2ln c2ln"}, "flwr-signature is not base64"),
        ({b"flwr-signature": b"\xff\xfe\xfd\xfc"}, "flwr-signature is not base64"),
        ({b"flwr-timestamp": b"\xd9\xa3" * 3}, "timestamp that is not ASCII"),
        ({b"flwr-timestamp": b"2" * (MOST_TIMESTAMP_BYTES + 1)}, "timestamp of 65 bytes"),
        ({b"flwr-public-key": b64encode(bytes(MOST_KEY_BYTES + 1))}, "public key of 1025 bytes"),
        ({b"flwr-signature": b64encode(bytes(MOST_SIGNATURE_BYTES + 1))}, "signature of 257 bytes"),
        ({b"flwr-public-key": b"A" * 1_000_000}, "flwr-public-key of 1000000 bytes"),
    ],
)
def test_a_proof_that_is_not_whole_is_refused(changed: dict[bytes, bytes | None], problem: str) -> None:
    headers = [(name, value) for name, value in (WHOLE | changed).items() if value is not None]
    with pytest.raises(ProofError, match=problem):
        NodeProof.of_http(headers)


@pytest.mark.parametrize("name", WHOLE)
def test_two_of_one_part_are_refused(name: bytes) -> None:
    """A SuperLink takes the first one, somebody else might take the last."""
    with pytest.raises(ProofError, match="given twice"):
        NodeProof.of_http([*WHOLE.items(), (name.upper(), WHOLE[name])])


@given(
    st.lists(st.tuples(st.sampled_from([*WHOLE, b"flwr-package-name"]), st.binary(max_size=80)), max_size=5)
)
def test_whatever_comes_is_read_or_refused(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        proof = NodeProof.of_http(headers)
    except ProofError as error:
        shown = str(error)
        assert all(len(value) < 8 or value.decode("latin-1") not in shown for _, value in headers)
    else:
        assert proof is None or (proof.public_key and proof.signature and proof.timestamp)


def test_a_call_reads_its_proof_once_and_a_legacy_call_has_none(make_call: MakeCall) -> None:
    headers = Node().headers()
    call = make_call(Method.PULL_MESSAGES, metadata=headers)
    proof = call.proof
    assert proof is not None
    call.metadata = []
    assert call.proof is proof
    assert make_call(Method.PULL_MESSAGES, metadata=headers, wire=Wire.REST_V0).proof is None
    assert not call.proved
