"""What an upstream, or something before it, says to one node reaches that node alone, as one answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.test_http_fuzz import read_strictly
from tests.relay_process import RelayProcess
from tests.security.corpus import BODY, Case, call, length
from tests.security.recorder import ANSWER, Recorder
from tests.security.test_smuggling import HARMLESS, exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(60)

SECRET = b"ANSWER-OF-SOMEBODY-ELSE"


def answer(
    *lines: bytes, body: bytes = b"\x08\x01", length: bool = True, start: bytes = b"HTTP/1.1 200 OK"
) -> bytes:
    head = [start, b"Content-Type: application/protobuf", *lines]
    if length:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*head, b"", b""]) + body


SECOND = answer(b"X-Second: " + SECRET, body=SECRET)
TE = b"Transfer-Encoding: chunked"

#: None of these may reach a node as more than one answer, nor with a header that the upstream did not send.
SPLITTING = {
    "a bare LF in a value": answer(b"X: a\nX-Injected: 1"),
    "a bare CR in a value": answer(b"X: a\rX-Injected: 1"),
    "a bare CR and a body": answer(b"X: a\r\rX-Injected: 1"),
    "a NUL in a value": answer(b"X: a\x00b"),
    "an escape in a value": answer(b"X: \x1b[2J"),
    "folded": answer(b"X: a\r\n X-Injected: 1"),
    "a space before the colon": answer(b"X-Injected : 1"),
    "no colon": answer(b"X-Injected"),
    "no name": answer(b": X-Injected"),
    "a control character in the reason": answer(start=b"HTTP/1.1 200 O\x00K"),
    "a line in the reason": answer(start=b"HTTP/1.1 200 OK\nX-Injected: 1"),
    "both framings": answer(TE, body=b"2\r\n\x08\x01\r\n0\r\n\r\n"),
    "two lengths": answer(b"Content-Length: 0"),
    "a signed length": answer(b"Content-Length: +2", length=False),
    "a second answer behind it": answer() + SECOND,
    "a second answer behind chunks": answer(TE, length=False, body=b"2\r\n\x08\x01\r\n0\r\n\r\n") + SECOND,
    "a second answer behind no body": answer(body=b"") + SECOND,
    "a chunk that spills": answer(TE, length=False, body=b"1\r\n\x08\x01\r\n0\r\n\r\n") + SECOND,
    "a bare LF in a chunk extension": answer(TE, length=False, body=b"2;a\nb\r\n\x08\x01\r\n0\r\n\r\n"),
    "a trailer": answer(TE, length=False, body=b"2\r\n\x08\x01\r\n0\r\nX-Injected: 1\r\n\r\n"),
    "an upgrade": answer(b"Upgrade: h2c", start=b"HTTP/1.1 101 Switching Protocols") + SECOND,
    "early hints": b"HTTP/1.1 103 Early Hints\r\nX-Injected: 1\r\n\r\n" + answer(),
    "hop-by-hop": answer(b"Connection: x-injected", b"X-Injected: 1", b"Keep-Alive: timeout=1"),
    "no HTTP": SECRET * 10,
    "HTTP/0.9": b"<html>" + SECRET,
    "another version": answer(start=b"HTTP/2.0 200 OK"),
}


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, upstream: Recorder) -> Iterator[RelayProcess]:
    relay = RelayProcess(
        tmp_path_factory.mktemp("relay"),
        upstream.port,
        workers=1,
        retry={"enabled": False},
        breaker={"enabled": False},
        repair={"lost_answers": False},  # it would ask the upstream again, for as long as the node waits
        log={"level": "debug", "format": "json"},
    )
    relay.settings["upstream"] |= {"response_timeout": 1, "idle_timeout": 1}
    with relay:
        yield relay


@pytest.mark.parametrize("name", list(SPLITTING))
def test_an_answer_is_one_or_none(relay: RelayProcess, upstream: Recorder, name: str) -> None:
    upstream.answer = SPLITTING[name]
    case = Case(name, call(length(), b"Connection: close"), passes=1)
    got, ending = exchange(relay.port, case)
    answers = read_strictly(got, ending)
    assert len(answers) <= 1
    for one in answers:
        assert one.status in HARMLESS
        assert b"x-injected" not in one.headers
        assert b"x-second" not in one.headers
        assert SECRET not in one.body
        assert one.status != 200 or one.body in (b"\x08\x01", b"\x08", b"")
    # Nothing of it is left for whoever asks next.
    upstream.answer = ANSWER
    time.sleep(0.02)
    for _ in range(3):
        got, ending = exchange(relay.port, case)
        (one,) = read_strictly(got, ending)
        assert (one.status, one.body) == (200, b"\x08\x01")
    assert upstream.wrong == []
    assert upstream.seen[-1].body == BODY


def test_no_byte_of_an_answer_is_in_the_log(relay: RelayProcess) -> None:
    assert SECRET.decode() not in relay.log.read_text()
