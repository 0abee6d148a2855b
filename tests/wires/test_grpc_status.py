from __future__ import annotations

import grpc
import pytest

from relay.bridge import STATUS
from relay.wires.grpc_status import CODES, HEAD, OK, broken, end, is_grpc, status
from relay.wires.hpack import Decoder


def fields(block: bytes) -> list[tuple[bytes, bytes]]:
    return Decoder().decode(block, 1 << 20)[0]


def test_the_numbers_are_those_of_the_library() -> None:
    assert {code.name: code.value[0] for code in grpc.StatusCode} == CODES
    assert CODES.keys() == STATUS.keys()


def test_an_answer_that_is_well() -> None:
    assert fields(HEAD) == [(b":status", b"200"), (b"content-type", b"application/grpc")]
    assert fields(OK) == [(b"grpc-status", b"0")]
    assert end([]) is OK
    assert fields(end([(b"x-some", b"thing")])) == [(b"grpc-status", b"0"), (b"x-some", b"thing")]


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ("plain text, with signs: \"{}'~", b"plain text, with signs: \"{}'~"),
        ("100% no\nline", b"100%25 no%0Aline"),
        ("für", b"f%C3%BCr"),
        ("", b""),
    ],
)
def test_details_are_written_as_grpc_writes_them(details: str, told: bytes) -> None:
    """https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: %XX for all but printable ASCII."""
    assert fields(status("PERMISSION_DENIED", details, [(b"x-request-id", b"1")])) == [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"7"),
        (b"grpc-message", told),
        (b"x-request-id", b"1"),
    ]


def test_an_answer_that_broke_off_is_one_to_ask_for_again() -> None:
    assert fields(broken("a-1")) == [
        (b"grpc-status", b"14"),
        (b"grpc-message", b"cut"),
        (b"x-request-id", b"a-1"),
    ]


@pytest.mark.parametrize(
    ("content_type", "spoken"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc; charset=utf-8", True),
        (b"application/grpc-web", False),
        (b"application/json", False),
    ],
)
def test_grpc_is_known_by_its_type(content_type: bytes, spoken: bool) -> None:
    assert is_grpc([(b"te", b"trailers"), (b"content-type", content_type)]) is spoken


def test_what_has_no_type_is_none() -> None:
    assert not is_grpc([(b"te", b"trailers")])
