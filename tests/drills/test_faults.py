import pytest

from drills.faults import ANSWERS, Fault, UnknownFramingError, body_size, cut_at


@pytest.mark.parametrize("name", [b"content-length", b"Content-Length", b"CONTENT-LENGTH"])
def test_a_length_is_read_in_any_case(name: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nhost: a\r\n" + name + b":  12 \r\nx: 3\r\n\r\n"
    assert body_size(head, request=True) == 12


def test_a_request_without_a_length_has_no_body() -> None:
    assert body_size(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", request=True) == 0


@pytest.mark.parametrize(
    ("head", "request_"),
    [
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nx-content-length: 3\r\n\r\n", False),
    ],
)
def test_other_framing_is_not_guessed(head: bytes, request_: bool) -> None:
    with pytest.raises(UnknownFramingError):
        body_size(head, request=request_)


def test_a_cut_leaves_half_of_the_body_or_of_the_head() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"
    assert cut_at(head, 100) == len(head) + 50
    assert cut_at(head, 0) == cut_at(head, 1) == len(head) // 2


def test_answers_say_their_length() -> None:
    for fault in (Fault.STATUS_500, Fault.STATUS_429):
        for answer in ANSWERS[fault]:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert body_size(head + b"\r\n\r\n", request=False) == len(body)
