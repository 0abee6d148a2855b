import hashlib
from collections.abc import Iterator

import pytest

from bench import messages
from bench.wire import KEPT, Head, Reader, WireError, parse_head

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type:  application/protobuf\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def reader(hash_from: int | None = None, *, requests: bool = False) -> Reader:
    return Reader(requests=requests, heads={}, hash_from=lambda _: hash_from)


def pieces(data: bytes, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield memoryview(data)[start : start + size]


def test_request_head_of_a_node() -> None:
    raw = messages.request_head(path="/v1/fleet/x", node_id=7, content_length=13, host="h")
    head = parse_head(raw)
    assert (head.target, head.length, head.content_type, head.close) == (
        "/v1/fleet/x",
        13,
        "application/protobuf",
        False,
    )
    assert 280 <= len(head.key) <= 320


def test_head_without_an_end_of_its_body_is_refused() -> None:
    with pytest.raises(WireError, match="neither Content-Length nor chunked"):
        parse_head(b"HTTP/1.1 200 OK\r\ndate: x\r\n\r\n")
    with pytest.raises(WireError, match="not a head"):
        parse_head(b"garbage\r\n\r\n")


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("length", [0, 1, 1_000, 3 * KEPT])
def test_body_is_counted_kept_and_hashed_however_it_is_cut(length: int, size: int) -> None:
    body = messages.content_of(length)
    got = reader(hash_from=min(length, 5))
    answers = [got.feed(piece) for piece in pieces(HEAD % length + body, size)]
    assert answers[-1] is True
    assert not any(answers[:-1])
    assert (got.head.target, got.head.content_type) == ("200", "application/protobuf")
    assert got.size == length
    assert got.kept == body[:KEPT]
    assert got.digest == hashlib.sha256(body[5:]).hexdigest()


@pytest.mark.parametrize("size", [1, 9, 1 << 20])
def test_chunked_body(size: int) -> None:
    got = reader(hash_from=0)
    for piece in pieces(CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", size):
        done = got.feed(piece)
    assert done
    assert (got.kept, got.size, got.digest) == (b"abcde", 5, hashlib.sha256(b"abcde").hexdigest())


def test_one_message_after_another() -> None:
    got = reader()
    assert got.feed(memoryview(HEAD % 2 + b"ab"))
    assert got.feed(memoryview(CHUNKED + b"1\r\nx\r\n0\r\n\r\n"))
    assert got.feed(memoryview(HEAD % 1 + b"c"))
    assert (got.kept, got.size, got.digest) == (b"c", 1, None)


def test_heads_are_parsed_once() -> None:
    heads: dict[bytes, Head] = {}
    for _ in range(2):
        Reader(requests=False, heads=heads, hash_from=lambda _: None).feed(memoryview(HEAD % 0))
    assert list(heads) == [HEAD % 0]


@pytest.mark.parametrize("raw", [HEAD % 1 + b"ab", CHUNKED + b"zz\r\n", b"x" * 70_000])
def test_what_is_not_one_message_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        reader().feed(memoryview(raw))
