"""Whatever path a stranger asks for, gRPC goes on taking calls; elsewhere what is no text stays an error."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from drills.http2 import message
from relay.call import Payload, Reply, Source
from relay.fleet import Method
from relay.wires import grpc_paths
from tests.grpc_served import serve_grpc
from tests.security import http2

if TYPE_CHECKING:
    from relay.call import Call

pytestmark = pytest.mark.timeout(30)

PULL = b"\x0a\x02\x08\x07"


async def answer(call: Call) -> Reply:
    return Reply(Payload(b"\x12\x00"), Source.UPSTREAM)


def ask(port: int, path: bytes) -> list[http2.Frame]:
    with http2.Connection(port) as node:
        # The later one counts.
        return node.read(node.call("/", [(b":path", path)], message(b"")), 2.0)


@pytest.mark.parametrize(
    "path", [b"\xff", b"/flwr.proto.Fleet/\xc1\xff", b"/flwr.proto.Fleet/PullMessages\x80"]
)
async def test_a_path_that_is_no_text_ends_nothing(path: bytes) -> None:
    async with AsyncExitStack() as stack:
        served = await serve_grpc(stack, answer)
        assert (await served.node.ask(Method.PULL_MESSAGES, PULL)).code == "OK"
        for _ in range(3):
            await asyncio.to_thread(ask, served.server.port, path)
            assert (await served.node.ask(Method.PULL_MESSAGES, PULL)).code == "OK"
        assert len(served.strays) == 3
        assert len(served.calls) == 4


def test_what_is_no_text_is_an_error_elsewhere() -> None:
    grpc_paths.install()
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode()
    with pytest.raises(UnicodeEncodeError):
        "\udcff".encode()


async def test_it_is_one_in_a_task_of_ours_too() -> None:
    grpc_paths.install()
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode()
    with pytest.raises(UnicodeDecodeError):
        await asyncio.to_thread(b"\xff".decode)
