"""Protobuf's wire format, against the real library."""

from __future__ import annotations

import tracemalloc

import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, PullObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from relay.wireformat import (
    TruncatedError,
    double,
    encode_bytes,
    encode_uint,
    fields,
    replace_bytes,
    uint,
    well_formed,
)

UINT64 = st.integers(min_value=0, max_value=2**64 - 1)


@given(node=UINT64, run=UINT64, object_id=st.text(alphabet="0123456789abcdef", max_size=64))
def test_what_is_encoded_is_what_the_library_reads(node: int, run: int, object_id: str) -> None:
    data = encode_bytes(1, encode_uint(1, node)) + encode_uint(2, run) + encode_bytes(3, object_id.encode())
    message = PullObjectRequest.FromString(data)
    assert message == PullObjectRequest(node=Node(node_id=node), run_id=run, object_id=object_id)


@given(UINT64.filter(bool))
def test_a_number_that_the_library_wrote_is_read(node_id: int) -> None:
    assert uint(DeactivateNodeRequest(node_id=node_id).SerializeToString(), 1) == node_id


@pytest.mark.parametrize("data", [b"", b"\x12\x00", b"\x08"], ids=["empty", "another field", "cut"])
def test_a_number_that_is_not_there_is_none(data: bytes) -> None:
    assert uint(data, 1) is None


@given(st.text(max_size=40))
def test_every_message_of_the_library_is_well_formed(text: str) -> None:
    message = PullMessagesResponse(messages_list=[Message()])
    message.messages_list[0].metadata.message_id = text
    message.messages_list[0].metadata.ttl = 1.5
    assert well_formed(message.SerializeToString())


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>Bad Gateway</body></html>",
        b'{"detail": "no"}',
        b"\x0a\x05abc",
        b"\x09\x00\x00",
        b"\x0d\x00",
        b"\x80" * 11,
        b"\x00",
        b"\x0b",
    ],
    ids=["html", "json", "cut bytes", "cut fixed64", "cut fixed32", "endless varint", "field 0", "group"],
)
def test_what_is_no_message_is_not_well_formed(data: bytes) -> None:
    assert not well_formed(data)
    with pytest.raises(TruncatedError):
        list(fields(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_judged_without_an_error(data: bytes) -> None:
    well_formed(data)
    uint(data, 1)


@given(
    run=UINT64, group=st.text(max_size=200), ttl=st.floats(min_value=0.5), created=st.floats(min_value=0.5)
)
def test_a_double_that_the_library_wrote_is_read(run: int, group: str, ttl: float, created: float) -> None:
    data = Metadata(run_id=run, group_id=group, ttl=ttl, created_at=created).SerializeToString()
    assert (double(data, 7), double(data, 9), double(data, 8)) == (ttl, created, None)


@given(st.binary(max_size=40))
def test_a_double_is_looked_for_in_any_bytes(data: bytes) -> None:
    value = double(data, 1)
    assert value is None or isinstance(value, float)


def test_a_double_that_is_cut_is_none() -> None:
    data = Metadata(ttl=3.5).SerializeToString()
    assert double(data, 7) == 3.5
    assert [double(data[:size], 7) for size in range(len(data))] == [None] * len(data)


#: Fields as they may stand in a message: number, what stands before the content, the content.
FIELD = st.tuples(
    st.integers(1, 40),
    st.one_of(
        st.tuples(st.just(0), UINT64.map(lambda value: encode_uint(1, value)[1:])),
        st.tuples(st.just(1), st.binary(min_size=8, max_size=8)),
        st.tuples(st.just(2), st.binary(max_size=200).map(lambda value: encode_bytes(1, value)[1:])),
        st.tuples(st.just(5), st.binary(min_size=4, max_size=4)),
    ),
)


def _field(number: int, wire_type: int, content: bytes) -> bytes:
    return encode_uint(1, number << 3 | wire_type)[1:] + content


@given(st.lists(FIELD, max_size=8), st.integers(1, 40), st.binary(max_size=300))
def test_a_field_is_replaced_and_all_else_stays_byte_for_byte(
    message: list[tuple[int, tuple[int, bytes]]], number: int, value: bytes
) -> None:
    data = b"".join(_field(n, *content) for n, content in message)
    wanted = b"".join(
        encode_bytes(number, value) if (n, content[0]) == (number, 2) else _field(n, *content)
        for n, content in message
    )
    assert replace_bytes(data, number, value) == wanted


@given(st.binary(max_size=60))
def test_garbage_is_told_from_a_message_when_a_field_is_replaced(data: bytes) -> None:
    if well_formed(data):
        replace_bytes(data, 1, b"x")
    else:
        with pytest.raises(TruncatedError):
            replace_bytes(data, 1, b"x")


def read(data: bytes, only: set[int] | None = None, at: int = 0) -> list[tuple[int, int | bytes]]:
    """Return the fields; (0, b"") stands where they break off."""
    found: list[tuple[int, int | bytes]] = []
    try:
        for field in fields(data, only, at):
            found.append(field)  # noqa: PERF402 - what came before the error stands
    except TruncatedError:
        found.append((0, b""))
    return found


@given(
    parts=st.lists(
        st.tuples(st.integers(min_value=1, max_value=5), st.binary(max_size=20) | UINT64), max_size=8
    ),
    garbage=st.binary(max_size=12),
    only=st.sets(st.integers(min_value=1, max_value=6)),
)
def test_the_fields_that_are_wanted_are_those_of_all(
    parts: list[tuple[int, int | bytes]], garbage: bytes, only: set[int]
) -> None:
    encoded = [encode_uint(n, v) if isinstance(v, int) else encode_bytes(n, v) for n, v in parts]
    data = b"".join(encoded) + garbage
    assert read(data, only) == [field for field in read(data) if field[0] in only | {0}]
    if parts:
        assert read(data, at=len(encoded[0])) == read(data)[1:]


def test_what_is_not_wanted_is_not_copied() -> None:
    data = encode_uint(1, 7) + encode_bytes(2, bytes(4 << 20))
    tracemalloc.start()
    try:
        assert read(data, {1}) == [(1, 7)]
        assert well_formed(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
