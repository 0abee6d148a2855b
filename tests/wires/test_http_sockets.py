"""What is asked of the kernel about a connection of ours: relay/wires/http_sockets.py over real sockets."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from relay.wires.http_sockets import reset, untaken
from tests.sockets import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1024 * 1024


def all_of(node: socket.socket) -> int:
    """Return how many bytes come up to an orderly end."""
    return sum(iter(lambda: len(node.recv(MIB)), 0))


@pytest.fixture
async def ends() -> AsyncIterator[tuple[asyncio.Transport, socket.socket]]:
    """A connection: the transport of its one end, and the socket of the other."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        node = socket.socket()
        node.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        node.connect(listening.getsockname())
        accepted, _ = listening.accept()
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
        with node:
            yield transport, node
        transport.abort()


async def test_what_the_kernel_still_holds_is_not_taken(
    ends: tuple[asyncio.Transport, socket.socket],
) -> None:
    transport, node = ends
    transport.write(bytes(64))
    await until(lambda: untaken(transport) == 0)  # the other end's kernel has it
    transport.write(bytes(MIB))
    here = transport.get_write_buffer_size()
    assert here < MIB
    assert MIB - 64 * 1024 < untaken(transport) <= MIB
    left = MIB + 64
    while left:
        left -= len(await asyncio.get_running_loop().run_in_executor(None, node.recv, left))
    await until(lambda: untaken(transport) == 0)


async def test_a_transport_that_is_closed_holds_nothing(
    ends: tuple[asyncio.Transport, socket.socket],
) -> None:
    transport, _ = ends
    transport.abort()
    await until(lambda: untaken(transport) == 0)
    reset(transport)


@pytest.mark.parametrize("waiting", [0, MIB])
async def test_a_reset_is_no_end_that_could_pass_for_an_orderly_one(
    ends: tuple[asyncio.Transport, socket.socket], waiting: int
) -> None:
    transport, node = ends
    transport.write(bytes(waiting))
    reset(transport)
    await asyncio.sleep(0)
    node.settimeout(5)
    with pytest.raises(ConnectionResetError):
        all_of(node)
