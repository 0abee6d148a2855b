"""What must hold of the head of a request."""

from __future__ import annotations

import pytest

from relay.wires import http2_request
from tests.http2_ends import ASKS

Fields = list[tuple[bytes, bytes]]


def read(fields: Fields) -> http2_request.Head | None:
    return http2_request.read(fields, sum(len(name) + len(value) for name, value in fields))


def test_a_head_is_its_pseudo_fields_and_the_others() -> None:
    head = read([*ASKS, (b"content-length", b"12"), (b"x", b"y")])
    assert head is not None
    assert (head.method, head.path, head.length) == (b"POST", b"/flwr.proto.Fleet/PullMessages", 12)
    assert head.fields == [*ASKS[4:], (b"content-length", b"12"), (b"x", b"y")]
    assert head.size == sum(len(name) + len(value) for name, value in head.fields)
    bare = read([(b":path", b"*"), (b":method", b"OPTIONS"), (b":scheme", b"https")])
    assert bare == (b"OPTIONS", b"*", [], 0, None)


@pytest.mark.parametrize("missing", [b":method", b":scheme", b":path"])
def test_none_of_the_pseudo_fields_may_be_missing_or_there_twice(missing: bytes) -> None:
    assert read([field for field in ASKS if field[0] != missing]) is None
    assert read([*(field for field in ASKS if field[0] == missing), *ASKS]) is None


@pytest.mark.parametrize(
    "field",
    [
        (b":path", b"/late"),
        (b":status", b"200"),
        (b"", b"x"),
        (b"X-Upper", b"x"),
        (b"with space", b"x"),
        (b"colon:", b"x"),
        (b"nul\0", b"x"),
        (b"\xc3\xa4", b"x"),
        (b"x", b"a\rb"),
        (b"x", b"a\nb"),
        (b"x", b"a\0b"),
        (b"x", b"\0b"),
        (b"x-bin", b"a\0b"),
        (b"connection", b"close"),
        (b"keep-alive", b"1"),
        (b"proxy-connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"te", b"gzip"),
        (b"content-length", b""),
        (b"content-length", b"-1"),
        (b"content-length", b"+1"),
        (b"content-length", b"1_0"),
        (b"content-length", b"1 "),
        (b"content-length", b"\xb2"),
        (b"content-length", b"1" * 19),
    ],
)
def test_a_field_that_is_not_sound_spoils_the_head(field: tuple[bytes, bytes]) -> None:
    assert read([*ASKS, field]) is None
    assert read([*ASKS, (b"x", b"y")]) is not None


def test_an_empty_path_is_none() -> None:
    assert read([*(field for field in ASKS if field[0] != b":path"), (b"x", b"y")]) is None
    fields = [(name, b"" if name == b":path" else value) for name, value in ASKS]
    assert read(fields) is None


def test_two_lengths_are_one_too_many() -> None:
    assert read([*ASKS, (b"content-length", b"1"), (b"content-length", b"1")]) is None


@pytest.mark.parametrize(
    "field", [(b"x-bin", b"\0\r\n\0\xff"), (b"x", b""), (b"x", b"\xff\x01"), (b"!#$%&'*+.^_`|~-09", b"x")]
)
def test_what_http2_allows_is_sound(field: tuple[bytes, bytes]) -> None:
    assert read([*ASKS, field]) is not None


def test_names_that_were_found_sound_take_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[bytes] = set()
    monkeypatch.setattr(http2_request, "_known", known)
    assert http2_request.names_are_sound([(b"x" * 65, b""), (b"x" * 64, b"")])
    assert known == {b"x" * 64}
    assert http2_request.names_are_sound([(b"x-%d" % at, b"") for at in range(3000)])
    assert len(known) == 1024
    assert not http2_request.names_are_sound([(b"X", b"")])
