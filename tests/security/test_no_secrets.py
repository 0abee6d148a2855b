"""No credential, key or payload byte of a whole run is in a log, a metric or an answer of the relay's own.

A real relay writes its log at the level debug. Calls that carry secrets in every place where one can stand
are answered, refused, mangled, cut and meet an upstream that fails in every way.
"""

from __future__ import annotations

import base64
import subprocess
import sys
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from drills.http2 import message
from tests.relay_process import RelayProcess, free_port
from tests.security import http2
from tests.security.corpus import Case, call, chunks, length, push
from tests.security.recorder import ANSWER, Recorder
from tests.security.test_smuggling import exchange

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

#: By where each stands. All have the same length and no byte that a log would escape.
SECRETS = {
    place: f"Zq{number:02d}-secret-{place}-9f8e7d6c".encode()
    for number, place in enumerate(
        (
            "basic",
            "bearer",
            "api-key",
            "proxy",
            "cookie",
            "signature",
            "public-key",
            "payload",
            "object-in-answer",
            "header-of-answer",
            "query",
            "userinfo",
            "trailer",
            "extension",
            "unknown-header",
        )
    )
}
HEADERS = b"\r\n".join(
    [
        b"Authorization: Basic " + base64.b64encode(b"name:" + SECRETS["basic"]),
        b"X-API-Key: " + SECRETS["api-key"],
        b"Proxy-Authorization: Bearer " + SECRETS["proxy"],
        b"Cookie: session=" + SECRETS["cookie"],
        b"flwr-public-key: " + base64.b64encode(SECRETS["public-key"]),
        b"flwr-timestamp: 2026-11-23T12:00:00+00:00",
        b"flwr-signature: " + base64.b64encode(SECRETS["signature"]),
        b"X-Unknown: " + SECRETS["unknown-header"],
    ]
)
BEARER = HEADERS.replace(b"Basic ", b"Bearer " + SECRETS["bearer"])
BODY = push(SECRETS["payload"])


def forms(secret: bytes) -> set[bytes]:
    """Return the ways in which a secret may have been written down."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode(), secret[::-1]}
    found |= {quote(secret).encode(), "".join(f"%{byte:02X}" for byte in secret).encode()}
    for lead in range(3):  # base64 of a text that it is a part of
        coded = base64.b64encode(bytes(lead) + secret)
        found.add(coded[4 if lead else 0 : len(coded) // 4 * 4 - 4])
        found.add(base64.urlsafe_b64encode(bytes(lead) + secret)[4 if lead else 0 : len(coded) // 4 * 4 - 4])
    return found


def leaks(text: bytes) -> list[str]:
    return [place for place, secret in SECRETS.items() if any(form in text for form in forms(secret))]


def test_the_search_finds_what_it_looks_for() -> None:
    for place, secret in SECRETS.items():
        assert leaks(b"x" + secret + b"y") == [place]
        assert leaks(base64.b64encode(b"name:" + secret)) == [place]
        assert leaks(base64.b64encode(b"ab" + secret)) == [place]
        assert leaks(repr({"a": secret}).encode()) == [place]
    assert leaks(b"Zq00-secret") == []


def calls() -> list[Case]:
    """Return calls with secrets in every place, sound and broken."""
    sound = call(HEADERS, length(BODY), body=BODY)
    target = b"POST http://name:%b@relay.example/v1/fleet/push-object?key=%b HTTP/1.1" % (
        SECRETS["userinfo"],
        SECRETS["query"],
    )
    hidden = b"X: " + SECRETS["unknown-header"]
    in_chunks = call(HEADERS, b"Transfer-Encoding: chunked", body=chunks(BODY))
    made = {
        "sound": sound,
        "bearer": call(BEARER, length(BODY), body=BODY),
        "absolute": call(HEADERS, length(BODY), body=BODY, start=target),
        "in chunks": in_chunks,
        "extension": in_chunks.replace(b"\r\n0\r\n", b"\r\n0;" + SECRETS["extension"] + b"\r\n"),
        "trailer": in_chunks.removesuffix(b"\r\n") + b"X: " + SECRETS["trailer"] + b"\r\n\r\n",
        "malformed": call(HEADERS, length(SECRETS["payload"]), body=SECRETS["payload"]),
        "another type": sound.replace(b"application/protobuf", b"text/plain"),
        "no such method": sound.replace(b"push-object", b"push-objects"),
        "another API": sound.replace(b"/fleet/", b"/control/"),
        "another verb": sound.replace(b"POST", b"PUT", 1),
        "two lengths": call(HEADERS, length(BODY), b"Content-Length: 1", body=BODY),
        "too large": call(HEADERS, b"Content-Length: 99999999999999", body=BODY),
        "NUL": call(HEADERS, hidden + b"\x00", length(BODY), body=BODY),
        "bare LF": call(HEADERS, hidden, length(BODY), body=BODY, end=b"\n"),
        "no colon": call(HEADERS, SECRETS["unknown-header"], length(BODY), body=BODY),
        "long header": call(HEADERS, hidden * 1000, length(BODY), body=BODY),
        "long head": call(HEADERS, *[hidden * 100] * 20, length(BODY), body=BODY),
        "upgrade": call(HEADERS, b"Connection: upgrade\r\nUpgrade: h2c", length(BODY), body=BODY),
        "broken chunk": in_chunks.replace(b"0\r\n\r\n", SECRETS["payload"]),
        "broken chunk later": call(
            HEADERS,
            b"Transfer-Encoding: chunked",
            body=chunks(push(SECRETS["payload"] * 99), last=SECRETS["payload"]),
        ),
        "behind a close": call(HEADERS, b"Connection: close", length(BODY), body=BODY) + SECRETS["payload"],
        "behind a call": sound + SECRETS["payload"] + b"\r\n\r\n",
        "truncated": sound[:-3],
        "truncated head": sound[: len(HEADERS)],
        "a secret alone": SECRETS["payload"] + b"\r\n\r\n",
        "a secret as the verb": SECRETS["bearer"] + b" / HTTP/1.1\r\n\r\n",
        "a secret as the host": call(length(BODY), body=BODY, host=b"Host: a b" + SECRETS["userinfo"]),
    }
    return [Case(name, data) for name, data in made.items()]


def answers() -> list[bytes]:
    """Return what the upstream says, right and wrong."""
    body = SECRETS["object-in-answer"]
    header = b"X-Secret: " + SECRETS["header-of-answer"]
    kind = b"Content-Type: application/protobuf"

    def answer(start: bytes, *lines: bytes) -> bytes:
        return b"\r\n".join([start, *lines, header, b"Content-Length: %d" % len(body), b"", b""]) + body

    return [
        ANSWER,
        answer(b"HTTP/1.1 200 OK", kind),
        answer(b"HTTP/1.1 200 OK", b"Content-Type: text/html"),
        answer(b"HTTP/1.1 401 Unauthorized", kind),
        answer(b"HTTP/1.1 403 Forbidden", kind),
        answer(b"HTTP/1.1 500 Internal Server Error", kind),
        answer(b"HTTP/1.1 503 Service Unavailable", b"Content-Type: text/plain"),
        answer(b"HTTP/1.1 200 OK", kind, b"X: " + body + b"\x00"),
        answer(b"HTTP/1.1 200 " + body, kind, b"Content-Length: 7"),
        body + b"\r\n\r\n",
        answer(b"HTTP/1.1 200 OK", kind)[:-5],
        b"HTTP/1.1 200 OK\r\n" + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body,
    ]


def test_nothing_of_a_whole_run_tells_a_secret(tmp_path: Path) -> None:
    with Recorder() as upstream:
        relay = RelayProcess(
            tmp_path,
            upstream.port,
            workers=2,
            log={"level": "debug", "format": "json"},
            limits={"max_body": "1MiB", "head_timeout": 1},
            retry={"base": 0.01, "cap": 0.01},
            repair={"lost_answers": False},
        )
        relay.settings["upstream"] |= {"response_timeout": 0.3, "heartbeat_timeout": 0.3, "idle_timeout": 0.3}
        with relay:
            told = b""
            for answer in answers():
                upstream.answer = answer
                for case in calls()[:5] if answer is not ANSWER else calls():
                    told += (
                        exchange(relay.port, case)[0]
                        .replace(SECRETS["object-in-answer"], b"")
                        .replace(SECRETS["header-of-answer"], b"")
                    )  # what the SuperLink says to a node is for the node
            # Nobody is there, and then the pool has connections that have ended.
            upstream.answer = b""
            relay.settings["upstream"]["url"] = f"http://127.0.0.1:{free_port()}"
            relay.write()
            reloaded = subprocess.run(
                [sys.executable, "-m", "relay", "explain", "-c", str(relay.config)],
                capture_output=True,
                timeout=60,
                check=False,
            )
            for case in calls()[:3]:
                told += exchange(relay.port, case)[0]
            pages = [relay.get(path)[1] for path in ("/metrics", "/readyz", "/livez", "/nodes", "/breakers")]
            assert relay.stop() == 0
        log = relay.log.read_bytes()
        assert leaks(log) == []
        assert leaks(told) == []
        assert leaks("".join(pages).encode()) == []
        assert leaks(reloaded.stdout + reloaded.stderr) == []
        # It was a run in which all of that happened.
        for outcome in (
            b'"ok"',
            b"malformed",
            b"too_large",
            b"upstream_bad_answer",
            b"upstream_403",
            b"upstream_down",
        ):
            assert outcome in log, outcome
        assert log.count(b"not HTTP, or broken") > 8
        assert upstream.seen
        sent = b"".join(b"".join(seen.headers.values()) + seen.body for seen in upstream.seen)
        assert {"payload", "signature"} <= set(leaks(sent))  # the search would have found them


def test_nothing_of_a_run_over_grpc_tells_a_secret(tmp_path: Path) -> None:
    """gRPC itself writes metadata that is no UTF-8 to the log, before anybody was asked who he is."""
    path, port = "/flwr.proto.Fleet/PullMessages", free_port()
    proof = [
        (b"flwr-public-key-bin", base64.b64encode(SECRETS["public-key"])),
        (b"flwr-timestamp", b"2026-11-23T12:00:00+00:00"),
        (b"flwr-signature-bin", base64.b64encode(SECRETS["signature"])),
    ]
    credentials = {
        b"authorization": b"Bearer " + SECRETS["bearer"],
        b"x-api-key": SECRETS["api-key"],
        b"cookie": b"session=" + SECRETS["cookie"],
        b"x-unknown": SECRETS["unknown-header"],
    }
    sound = message(BODY)
    with (
        Recorder() as upstream,
        RelayProcess(
            tmp_path,
            upstream.port,
            log={"level": "debug", "format": "json"},
            listeners=[{"address": f"127.0.0.1:{port}", "wires": ["grpc", "grpc_adapter"]}],
        ) as relay,
    ):
        told = b""
        for end in (b"", b"\xff", b"\xa0", b"\x00"):
            metadata = [*proof, *((name, value + end) for name, value in credentials.items())]
            for data in (sound, sound[:-2], sound + SECRETS["payload"], message(SECRETS["payload"])):
                with http2.Connection(port) as node:
                    stream = node.call(path, metadata, data)
                    told += b"".join(frame.payload for frame in node.read(stream, 1.0))
        with http2.Connection(port) as node:
            node.send(SECRETS["payload"] * 100)
            told += b"".join(frame.payload for frame in node.read(1, 1.0))
        pages = [relay.get(page)[1] for page in ("/metrics", "/nodes")]
        assert relay.stop() == 0
        log = relay.log.read_bytes()
        assert log.count(b'"PullMessages"') > 4
        assert upstream.seen
        sent = b"".join(b"".join(seen.headers.values()) + seen.body for seen in upstream.seen)
        assert "signature" in leaks(sent)  # the search would have found it
    assert leaks(log) == []
    assert leaks(told) == []
    assert leaks("".join(pages).encode()) == []
