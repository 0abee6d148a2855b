"""A few channels to one SuperLink: lent in turn, looked at, asked whether it is there."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import grpc
import pytest

from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.upstreams.channels import CHANNELS, Channels, connected
from tests.grpc_ends import GrpcSuperLink
from tests.relay_process import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpc import aio

    from tests.grpc_ends import Asked

pytestmark = pytest.mark.timeout(60)

PATH = Method.PULL_MESSAGES.grpc


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Channels]]:
    made: list[Channels] = []

    def make(port: int, *, host: str = "127.0.0.1", connect_timeout: float = 20.0) -> Channels:
        made.append(Channels(host, port, None, connect_timeout=connect_timeout, max_message=1 << 20))
        return made[-1]

    yield make
    for channels in made:
        await channels.close()


async def test_nothing_is_connected_before_the_first_call(make: Callable[..., Channels]) -> None:
    async with GrpcSuperLink() as superlink:
        channels = make(superlink.port)
        state = {"address": f"127.0.0.1:{superlink.port}", "connections": 0, "last_failure": None}
        assert channels.state() == state
        for count in range(1, CHANNELS + 1):
            channel, stub = channels.lend(Method.PULL_MESSAGES)
            assert not connected(channel)
            await stub(b"", timeout=20.0)
            assert connected(channel)
            assert channels.state() == state | {"connections": count}, "each has a connection of its own"


@pytest.mark.parametrize(("code", "status"), [("OK", 200), ("UNAUTHENTICATED", 401), ("UNIMPLEMENTED", 501)])
async def test_a_superlink_that_answers_is_there(
    make: Callable[..., Channels], code: str, status: int
) -> None:
    async def answer(_: Asked, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        if code != "OK":
            await context.abort(grpc.StatusCode[code], "why")
        return b""

    async with GrpcSuperLink() as superlink:
        superlink.answer = answer
        channels = make(superlink.port)
        channels.renew()
        assert await channels.get(PATH) == status


async def test_a_superlink_that_is_not_there_is_down(make: Callable[..., Channels]) -> None:
    with pytest.raises(Refusal) as caught:
        await make(free_port()).get(PATH)
    assert (caught.value.reason, caught.value.sent) == (Reason.UPSTREAM_DOWN, False)


async def test_a_superlink_that_says_nothing_is_down(make: Callable[..., Channels]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(Refusal) as caught:
            await make(silent.getsockname()[1], connect_timeout=0.5).get(PATH)
    assert caught.value.reason is Reason.UPSTREAM_DOWN


async def test_an_ipv6_address_is_one(make: Callable[..., Channels]) -> None:
    channels = make(free_port(), host="::1")
    assert channels.name.startswith("::1:")
    with pytest.raises(Refusal, match="refused"):
        await channels.get(PATH)
