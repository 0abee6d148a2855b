"""Broken gRPC and broken containers against a real relay: its worker lives, and calls beside are answered.

What is sent is HTTP/2 written by hand, because no gRPC library would send it. Every case comes from a seed
that stands in the name of its test, so a failure can be had again.
"""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import suppress
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from drills.http2 import frame, message
from relay.fleet import Method
from relay.wireformat import encode_bytes
from relay.wires import grpc_adapter
from tests.fuzz.test_http_fuzz import SOUND, mutate
from tests.grpc_ends import GrpcNode, GrpcSuperLink
from tests.relay_process import RelayProcess
from tests.security import http2
from tests.test_fleet import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.grpc_ends import Answered

    Case = Callable[[random.Random, int], None]

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

#: Broken connections of a test, how many of them at a time, and seconds in which one may be answered.
CASES, AT_ONCE, PATIENCE = 160, 8, 0.3
PULL = b"\x0a\x02\x08\x07"
#: A node that waits longer than this for an ordinary answer is not served.
BOUND = 10.0

NAMES = [
    *(b"authorization", b"x-api-key", b"x-forwarded-for", b"forwarded", b"x-request-id", b"client-cert"),
    *(b"flwr-public-key-bin", b"flwr-signature-bin", b"flwr-timestamp", b"flwr-public-key", b"any-bin"),
    *(b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding", b"grpc-status", b"grpc-message"),
    *(b"content-length", b"transfer-encoding", b"connection", b"host", b"te", b"content-type"),
    *(b":path", b":method", b":authority", b":unknown", b"", b"Upper", b"a b", b"\xff", b"x\r\ny", b"a:b"),
]
VALUES = [
    *(b"", b" ", b"\x00", b"\xff\xfe", b"a\r\nb: c", b"AAAA", b"!!!!", b"A" * 5000, b"0", b"-1", b"9H"),
    *(b"1n", b"0S", b"gzip", b"identity", b"chunked", b"Basic !!!", b"Bearer \xff", b'for="', b"trailers"),
]


def body_of(method: Method) -> bytes:
    """Return what a node sends."""
    body: bytes = build(method, SOUND).SerializeToString()
    return body


def call_of(rng: random.Random) -> tuple[str, bytes]:
    """Return the path and the message of a sound call, on one of the two wires."""
    method = rng.choice(list(Method))
    if rng.random() < 0.5:
        return method.grpc, body_of(method)
    name = method.grpc.rpartition("/")[2].encode() + b"Request"
    return grpc_adapter.PATH, encode_bytes(2, name) + encode_bytes(3, body_of(method))


def broken_metadata(rng: random.Random, port: int) -> None:
    """Call with names and values that no node sends, on paths of which some are none."""
    path, body = call_of(rng)
    if rng.random() < 0.2:
        path = rng.choice(
            ("/flwr.proto.Fleet/CreateNode", "/flwr.proto.Fleet/", "/", "", "//", path[:-1], "\x7f")
        )
    metadata = [
        (
            rng.choice(NAMES) if rng.random() < 0.8 else rng.randbytes(rng.randint(1, 12)),
            rng.choice(VALUES) if rng.random() < 0.6 else rng.randbytes(rng.randint(0, 40)),
        )
        for _ in range(rng.choice((0, 1, 2, 5, 200)))
    ]
    with http2.Connection(port) as node:
        node.read(node.call(path, metadata, message(body)), PATIENCE)


def broken_messages(rng: random.Random, port: int) -> None:
    """Call with bytes that are no message, none, several, or only a part of one."""
    path, body = call_of(rng)
    data = rng.choice(
        (rng.randbytes(rng.randint(0, 300)), mutate(rng, body), mutate(rng, body, most=1), body)
    )
    flag = rng.choice((0, 0, 0, 0, 1, 2, 255))
    length = rng.choice((len(data), len(data), len(data), 0, 1, len(data) + 1, 1 << 20, 0xFFFFFFFF))
    framed = bytes([flag]) + struct.pack(">I", length) + data
    sent = rng.choice((framed, framed, framed * 2, framed[: rng.randint(0, 6)], data))
    with http2.Connection(port) as node:
        node.read(node.call(path, (), sent, end=rng.random() < 0.8), PATIENCE)


def broken_frames(rng: random.Random, port: int) -> None:
    """Send frames in an order, of a kind or of a form that HTTP/2 does not know."""
    path, body = call_of(rng)
    with http2.Connection(port) as node:
        if rng.random() < 0.5:
            sent: list[bytes] = []
            with patch.object(node, "send", sent.append):
                node.call(path, [(b"flwr-timestamp", b"now")], message(body))
            node.send(mutate(rng, b"".join(sent)))
        else:
            node.call(path, (), message(body), end=rng.random() < 0.5)
            for _ in range(rng.randint(1, 5)):
                stream = rng.choice((0, 1, 1, 2, 3, 1 << 31))
                payload = rng.randbytes(rng.choice((0, 4, 8, 30)))
                node.send(frame(rng.randrange(12), rng.randrange(256), stream, payload))
        if rng.random() < 0.7:
            node.read(1, PATIENCE)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", [broken_metadata, broken_messages, broken_frames], ids=lambda f: f.__name__)
async def test_the_worker_lives_and_calls_beside_are_answered(tmp_path: Path, case: Case, seed: int) -> None:
    rng = random.Random(f"{case.__name__} {seed}")
    stopped = asyncio.Event()
    answers: list[Answered] = []

    async def node(port: int) -> None:
        async with GrpcNode(port) as node:
            while not stopped.is_set():
                async with asyncio.timeout(BOUND):
                    answers.append(await node.ask(Method.PULL_MESSAGES, PULL))
                    answers.append(await node.ask(Method.PULL_OBJECT, body_of(Method.PULL_OBJECT)))

    async def attack(port: int, seeds: list[int]) -> None:
        for one in seeds:
            with suppress(OSError):
                await asyncio.to_thread(case, random.Random(one), port)

    async with GrpcSuperLink() as superlink:
        relay = RelayProcess(tmp_path, superlink.port, workers=1, wire="grpc", limits={"max_body": "64KiB"})
        relay.settings["listeners"][0]["wires"] = ["grpc", "grpc_adapter"]
        try:
            await asyncio.to_thread(relay.start)
            before = [worker.pid for worker in relay.workers()]
            beside = [asyncio.create_task(node(relay.port)) for _ in range(2)]
            seeds = [rng.randrange(1 << 32) for _ in range(CASES)]
            await asyncio.gather(*(attack(relay.port, seeds[first::AT_ONCE]) for first in range(AT_ONCE)))
            stopped.set()
            await asyncio.gather(*beside)
            assert [worker.pid for worker in relay.workers()] == before
            assert {(answer.code, answer.details) for answer in answers} == {("OK", "")}
            assert len(answers) > 20
            await asyncio.to_thread(relay.until, lambda: relay.metric("relay_calls_in_flight") == 0)
            assert await asyncio.to_thread(relay.stop) == 0
        finally:
            await asyncio.to_thread(relay.end)
    wrong = [line for line in relay.lines() if "text" in line or line["level"] not in ("info", "warning")]
    assert wrong == []
    assert "Traceback" not in relay.log.read_text()
