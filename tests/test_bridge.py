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


# -- as it stands in HTTP/2 -----------------------------------------------------------------------------


def as_fields(metadata: list[tuple[str, str | bytes]], *, padded: bool = True) -> list[tuple[bytes, bytes]]:
    """Write metadata as a gRPC client does."""
    fields = []
    for key, value in metadata:
        text = b64encode(value) if isinstance(value, bytes) else value.encode()
        fields.append((key.encode(), text if padded else text.rstrip(b"=")))
    return fields


@pytest.mark.parametrize("padded", [True, False])
def test_a_proof_means_the_same_as_it_stands_in_http_2(padded: bool) -> None:
    assert bridge.from_fields(as_fields(PROOF, padded=padded)) == PROOF_HEADERS
    assert bridge.to_fields(PROOF_HEADERS) == as_fields(PROOF)


def test_a_proof_may_come_as_it_is_behind_a_zero() -> None:
    fields = [(b"flwr-public-key-bin", b"\0" + KEY), (b"flwr-timestamp", TIMESTAMP.encode())]
    assert bridge.from_fields([*fields, (b"flwr-signature-bin", b"\0" + SIGNATURE)]) == PROOF_HEADERS
    assert bridge.from_fields([(b"x-some", b"\0abc")]) == [], "only what is binary by its name"


@pytest.mark.parametrize("name", [b"flwr-public-key", b"flwr-signature"])
def test_a_proof_under_its_http_name_does_not_come_in_with_http_2(name: bytes) -> None:
    forged = (name, b64encode(b"forged"))
    assert bridge.from_fields([forged, *as_fields(PROOF), forged]) == PROOF_HEADERS


@pytest.mark.parametrize("name", [b"flwr-public-key-bin", b"Flwr-Signature-Bin"])
def test_a_proof_under_its_grpc_name_does_not_go_out_with_http_2(name: bytes) -> None:
    assert bridge.to_fields([(name, b64encode(SIGNATURE))]) == []


@pytest.mark.parametrize(
    "name",
    [
        *(b"content-type", b"te", b"grpc-timeout", b"grpc-encoding", b"host", b"content-length"),
        *(b"transfer-encoding", b"connection", b"upgrade", b"expect", b"accept", b"A", b"a b", b"a:b", b""),
        *(b":path", b"x\xff", b"a" * 257),
    ],
)
def test_neither_what_is_of_one_protocol_nor_what_is_no_name_comes_in_with_http_2(name: bytes) -> None:
    assert bridge.from_fields([(name, b"5"), (b"x-some", b"5")]) == [(b"x-some", b"5")]


@pytest.mark.parametrize("value", [b"a\r\nx-admin: 1", b"a\nb", b"a\0b", b"caf\xe9", b"tab\there", b"\x7f"])
def test_no_field_ends_a_header(value: bytes) -> None:
    assert bridge.from_fields([(b"x-some", value), (b"x-some-bin", value)]) == []
    assert bridge.to_fields([(b"x-some", value), (b"x-some-bin", value)]) == []


def test_names_of_an_answer_are_lower_case_in_http_2_and_none_is_of_http_alone() -> None:
    answer = [(b"X-Some", b"a"), (b"Server", b"uvicorn"), (b"Date", b"today"), (b"content-length", b"5")]
    assert bridge.to_fields([*answer, (b"grpc-status", b"0"), (b":status", b"500")]) == [(b"x-some", b"a")]


FIELDS = st.lists(
    st.tuples(
        st.one_of(st.binary(max_size=20), st.sampled_from([b"x-a", b"x-a-bin", b"flwr-signature-bin"])),
        st.one_of(st.binary(max_size=20), st.binary(max_size=20).map(b64encode)),
    ),
    max_size=5,
)


@given(FIELDS)
def test_no_field_whatever_makes_more_than_headers(fields: list[tuple[bytes, bytes]]) -> None:
    for name, value in bridge.from_fields(fields):
        assert name == name.lower()
        assert not set(name + value) & set(b"\r\n\0")
        assert b":" not in name
        assert not name.startswith(b"grpc-")


@given(FIELDS)
def test_no_header_whatever_makes_grpc_refuse_an_answer(headers: list[tuple[bytes, bytes]]) -> None:
    fields = bridge.to_fields(headers)
    assert all(name == name.lower() and not name.startswith((b":", b"grpc-")) for name, _ in fields)
    assert all(0x20 <= byte < 0x7F for _, value in fields for byte in value)


KEYS = st.one_of(
    st.text(max_size=20), st.sampled_from(["x-a", "x-a-bin", "flwr-signature-bin", "flwr-signature"])
)


@given(st.lists(st.tuples(KEYS, st.text(max_size=20), st.binary(max_size=20)), max_size=5), st.booleans())
def test_what_comes_in_is_the_same_with_a_library_of_grpcs_between(
    given: list[tuple[str, str, bytes]], padded: bool
) -> None:
    metadata: list[tuple[str, str | bytes]] = [
        (key, binary if key.endswith("-bin") else text) for key, text, binary in given
    ]
    assert bridge.from_fields(as_fields(metadata, padded=padded)) == bridge.to_headers(metadata)


def test_fields_are_bounded_as_metadata_are() -> None:
    fields = [(b"x-a", b"a" * 65), (b"x-b", b"b" * 61), (b"flwr-c", b"")]
    before, size = list(fields), (3 + 65 + 32) + (3 + 61 + 32) + (6 + 32)
    assert bridge.bounded_fields(fields, size) == []
    assert fields == before
    assert bridge.bounded_fields(fields, size - 1) == ["x-b"]
    assert fields == [before[0], before[2]]
    assert bridge.bounded_fields(fields, 40) == ["x-a"]
    assert fields == [(b"flwr-c", b"")], "Flower's own stays before all other"


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
