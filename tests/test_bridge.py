"""What is said on one side is said on the other, and nothing that belongs to one side alone."""

from __future__ import annotations

from base64 import b64encode
from http import HTTPStatus
from importlib import import_module
from urllib.parse import quote

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import bridge

KEY = b"-----BEGIN PUBLIC KEY-----\nMHYw\x00\xff"
SIGNATURE = bytes(range(103))
TIMESTAMP = "2026-11-23T12:00:00.000001+00:00"

PROOF: list[tuple[str, str | bytes]] = [
    ("flwr-public-key-bin", KEY),
    ("flwr-timestamp", TIMESTAMP),
    ("flwr-signature-bin", SIGNATURE),
]
PROOF_HEADERS = [
    (b"flwr-public-key", b64encode(KEY)),
    (b"flwr-timestamp", TIMESTAMP.encode()),
    (b"flwr-signature", b64encode(SIGNATURE)),
]


def test_a_proof_means_the_same_on_both_sides() -> None:
    assert bridge.to_headers(PROOF) == PROOF_HEADERS
    assert bridge.to_metadata(PROOF_HEADERS) == PROOF


def test_flower_calls_it_so() -> None:
    """The names of the installed release; gRPC's are those of 1.39, which 1.41 still has."""
    constants = import_module("flwr.common.constant")
    assert [name for name, _ in PROOF] == [
        constants.PUBLIC_KEY_HEADER,
        constants.TIMESTAMP_HEADER,
        constants.SIGNATURE_HEADER,
    ]


def test_other_binary_metadata_keeps_its_name() -> None:
    assert bridge.to_headers([("trace-bin", b"\x00\x01")]) == [(b"trace-bin", b"AAE=")]
    assert bridge.to_metadata([(b"trace-bin", b"AAE=")]) == [("trace-bin", b"\x00\x01")]
    assert bridge.to_metadata([(b"trace-bin", b"AAE")]) == [("trace-bin", b"\x00\x01")], "without padding"


def test_what_is_no_base64_is_left_out() -> None:
    assert bridge.to_metadata([(b"flwr-signature", b"!!"), (b"flwr-timestamp", b"x")]) == [
        ("flwr-timestamp", "x")
    ]


@pytest.mark.parametrize("name", [b"flwr-public-key-bin", b"Flwr-Signature-Bin", b"flwr-signature-bin"])
def test_a_proof_under_its_grpc_name_does_not_come_in_over_http(name: bytes) -> None:
    """Nobody has looked at it, and a SuperLink might take it for the one that was looked at."""
    assert bridge.to_metadata([(name, b64encode(SIGNATURE)), *PROOF_HEADERS]) == PROOF


@pytest.mark.parametrize("name", ["flwr-public-key", "flwr-signature"])
def test_a_proof_under_its_http_name_does_not_come_in_over_grpc(name: str) -> None:
    """No SuperLink on gRPC looks at it, so nobody may be let in by it."""
    forged = b64encode(b"forged").decode()
    assert bridge.to_headers([(name, forged), *PROOF, (name, forged)]) == PROOF_HEADERS
    assert bridge.to_headers([(name, forged)]) == []


def test_names_are_lower_case_in_grpc() -> None:
    assert bridge.to_metadata([(b"X-Forwarded-For", b"192.0.2.7"), (b"Flwr-Package-Name", b"flwr")]) == [
        ("x-forwarded-for", "192.0.2.7"),
        ("flwr-package-name", "flwr"),
    ]


@pytest.mark.parametrize(
    "name",
    [b"Content-Type", b"Host", b"user-agent", b"Accept", b"Transfer-Encoding", b"te", b"Server", b"Date"],
)
def test_what_is_of_http_alone_does_not_reach_grpc(name: bytes) -> None:
    assert bridge.to_metadata([(name, b"x")]) == []


@pytest.mark.parametrize("key", ["content-type", "te", "grpc-timeout", "grpc-encoding", ":authority", "host"])
def test_what_is_of_grpc_alone_does_not_reach_http(key: str) -> None:
    assert bridge.to_headers([(key, "x")]) == []


@pytest.mark.parametrize("key", ["content-length", "transfer-encoding", "connection", "upgrade", "expect"])
def test_metadata_does_not_frame_an_http_request(key: str) -> None:
    """Request smuggling otherwise."""
    assert bridge.to_headers([(key, "5")]) == []


@pytest.mark.parametrize("value", ["a\r\nx-admin: 1", "a\nb", "a\x00b", "caf\xe9"])
def test_no_metadata_ends_a_header(value: str) -> None:
    assert bridge.to_headers([("x", value)]) == []


@pytest.mark.parametrize("key", ["a b", "a:b", "a\r\nb", "", "A"])
def test_no_key_is_more_than_a_name(key: str) -> None:
    assert bridge.to_headers([(key, "x")]) == []


@pytest.mark.parametrize("value", [b"caf\xe9", b"tab\there", b"\x7f"])
def test_a_value_that_grpc_would_refuse_is_left_out(value: bytes) -> None:
    assert bridge.to_metadata([(b"x", value)]) == []


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=5))
def test_no_header_whatever_makes_grpc_refuse_a_call(headers: list[tuple[bytes, bytes]]) -> None:
    for key, value in bridge.to_metadata(headers):
        assert key == key.lower()
        assert key.replace("-", "").replace("_", "").replace(".", "").isalnum() or not key.strip("-_.")
        assert isinstance(value, bytes) is key.endswith("-bin")
        assert isinstance(value, bytes) or all(" " <= char <= "~" for char in value)


@given(st.lists(st.tuples(st.text(max_size=20), st.one_of(st.text(max_size=20), st.binary(max_size=20)))))
def test_no_metadata_whatever_makes_more_than_headers(metadata: list[tuple[str, str | bytes]]) -> None:
    for name, value in bridge.to_headers(metadata):
        assert not set(name + value) & set(b"\r\n\x00")
        assert b":" not in name


def test_every_status_of_grpc_has_one_of_http() -> None:
    assert set(bridge.STATUS) == {code.name for code in grpc.StatusCode}
    assert set(bridge.STATUS.values()) <= set(HTTPStatus)


@pytest.mark.parametrize("status", list(HTTPStatus))
def test_every_status_of_http_has_one_of_grpc(status: HTTPStatus) -> None:
    if status >= 400:
        assert bridge.code_of(status) in {code.name for code in grpc.StatusCode} - {"OK"}


@pytest.mark.parametrize(
    ("status", "code"), [(401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (412, "FAILED_PRECONDITION")]
)
def test_what_nodes_understand_is_the_same_there_and_back(status: int, code: str) -> None:
    assert bridge.code_of(status) == code
    assert bridge.STATUS[code] == status


@pytest.mark.parametrize("status", [502, 503, 504])
def test_come_back_is_unavailable(status: int) -> None:
    assert bridge.code_of(status) == "UNAVAILABLE"
    assert bridge.STATUS["UNAVAILABLE"] == 503


def test_metadata_within_the_bound_stay_as_they_are() -> None:
    metadata: list[tuple[str, str | bytes]] = [("x-a", "a" * 65), ("x-b-bin", b"a" * 61)]
    before = list(metadata)
    assert bridge.bounded(metadata, (3 + 65 + 32) + (7 + 84 + 32)) == []
    assert metadata == before
    assert bridge.bounded(metadata, (3 + 65 + 32) + (7 + 84 + 32) - 1) == ["x-b-bin"]


def test_what_is_flowers_own_stays_before_all_other() -> None:
    metadata: list[tuple[str, str | bytes]] = [
        ("x-long", "a" * 3000),
        ("x-a", "a"),
        *PROOF,
        ("x-end", ""),
    ]
    assert bridge.bounded(metadata, 2000) == ["x-long"]
    assert metadata == [("x-a", "a"), *PROOF, ("x-end", "")]


@given(st.binary(max_size=3 * bridge.MOST_DETAILS))
def test_the_text_of_a_status_is_short_as_it_travels(data: bytes) -> None:
    text = bridge.details(data)
    assert len(quote(text, safe="".join(map(chr, range(32, 127))).replace("%", ""))) <= bridge.MOST_DETAILS
    assert data.decode("utf-8", "replace").startswith(text[:-1])


@pytest.mark.parametrize("text", ['{"code":2004}', "", "a" * bridge.MOST_DETAILS, "Ü % \n" * 50])
def test_a_text_that_is_not_long_is_whole(text: str) -> None:
    assert bridge.details(text.encode()) == text


@pytest.mark.parametrize("char", ["a", "%", "Ü", "\n", "\udcff"])
def test_a_long_text_is_cut(char: str) -> None:
    data = char.encode("utf-8", "surrogateescape")
    text = bridge.details(data * 4096)
    assert 0 < len(text) <= bridge.MOST_DETAILS
