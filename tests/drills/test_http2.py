"""The calls are made for a real server of grpcio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from grpc import aio

from drills import http2
from relay.fleet import Method
from tests.grpc_ends import GrpcSuperLink

if TYPE_CHECKING:
    from tests.grpc_ends import Asked

REQUEST = (
    b"POST /api/v0/fleet/push-object HTTP/1.1\r\nFlwr-Public-Key: a2V5\r\nflwr-timestamp: now\r\n"
    b"content-length: 40000\r\nx-request-id: 1\r\n\r\n" + bytes(40_000)
)


async def ask(port: int, call: bytes) -> tuple[bytes, bool]:
    """Make a call; return the answer's data, and whether it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http2.PREFACE + call)
    data = b""
    async with asyncio.timeout(10):
        while True:
            head = http2.read_head(await reader.readexactly(http2.HEAD_SIZE))
            payload = await reader.readexactly(head.size)
            if head.kind == http2.DATA:
                data += payload
            writer.write(http2.answer_to(head, payload))
            if head.ends:
                break
    writer.close()
    return data, head.stream == 1


async def test_a_real_server_understands_a_call() -> None:
    async def answer(_: Asked, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        return b"said"

    async with GrpcSuperLink() as superlink:
        superlink.answer = answer
        came, ended = await ask(superlink.port, http2.call_again(REQUEST, "x" * 300))
    assert (came, ended) == (b"\0\0\0\0\x04said", True)
    (asked,) = superlink.asked
    assert (asked.method, asked.data) == (Method.PUSH_OBJECT, bytes(40_000))
    metadata = dict(asked.metadata)
    assert metadata["flwr-public-key-bin"] == b"key"
    assert metadata["flwr-timestamp"] == "now"
    assert metadata["x-request-id"] == "x" * 300
    assert "content-length" not in metadata


def test_what_a_client_answers() -> None:
    def answer(kind: int, flags: int, payload: bytes) -> bytes:
        return http2.answer_to(http2.read_head(http2.frame(kind, flags, 0, payload)), payload)

    assert answer(http2.SETTINGS, 0, bytes(6)) == http2.frame(http2.SETTINGS, http2.ACK, 0)
    assert answer(http2.PING, 0, b"12345678") == http2.frame(http2.PING, http2.ACK, 0, b"12345678")
    assert answer(http2.PING, http2.ACK, b"12345678") == b""
    assert answer(http2.DATA, http2.END_STREAM, b"data") == b""


def test_what_ends_a_call() -> None:
    def ends(kind: int, flags: int) -> bool:
        return http2.read_head(http2.frame(kind, flags, 1)).ends

    assert ends(http2.HEADERS, http2.END_STREAM | http2.END_HEADERS)
    assert ends(http2.RST_STREAM, 0)
    assert not ends(http2.HEADERS, http2.END_HEADERS)
    assert not ends(http2.SETTINGS, http2.ACK)  # the same bit
