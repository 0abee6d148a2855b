"""Signing in a composed relay: where it stands, and a legacy node's way through it to a newer SuperLink."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.app import chains
from relay.settings import load
from relay.wireformat import encode_bytes, encode_uint
from tests.sockets import Listener, connect, response
from tests.test_app import running, settings

if TYPE_CHECKING:
    from pathlib import Path

    from relay.settings import Settings
    from tests.sockets import Message

REST, V1 = "/api/v0/fleet/", "/v1/fleet/"


def signing(tmp_path: Path, port: int = 1, **more: str) -> Settings:
    return settings(
        port,
        SIGNING__DIRECTORY=str(tmp_path / "signing"),
        SIGNING__UNAUTHENTICATED="true",
        LISTENERS__0__WIRES="[http_v1, rest_v0]",
        **more,
    )


@pytest.mark.parametrize("mode", ["normal", "pass_through", "maintenance"])
def test_it_stands_behind_all_that_asks(tmp_path: Path, mode: str) -> None:
    for _, _, _, chain in chains(signing(tmp_path, MODE=mode)):
        assert "retry" not in chain.steps[chain.steps.index("signing") :]
        assert "buffer" not in chain.steps
    assert not (tmp_path / "signing").exists()


def test_without_the_section_there_is_no_trace_of_it() -> None:
    assert not any("signing" in chain.steps for _, _, _, chain in chains(load(None, {})))


@pytest.mark.parametrize("mode", ["normal", "pass_through"])
async def test_a_legacy_node_is_signed_for(tmp_path: Path, mode: str) -> None:
    own = b"the node's own key"
    join = encode_bytes(1, own) + encode_uint(15, 7)
    pull = encode_bytes(1, encode_uint(1, 99))
    came: list[Message] = []

    async def answer() -> None:
        peer = await superlink.accept()
        for body in (encode_uint(1, 99), b""):
            came.append(await peer.message())
            peer.send(response(body))

    async with Listener() as superlink, running(signing(tmp_path, superlink.port, MODE=mode)) as [port]:
        answering = asyncio.ensure_future(answer())
        node = await connect(port)
        for path, body in (("activate-node", join), ("pull-messages", pull)):
            head = f"POST {REST}{path} HTTP/1.1\r\nhost: relay\r\ncontent-type: application/protobuf\r\n"
            more = f"flwr-signature: brought\r\ncontent-length: {len(body)}\r\n\r\n"
            node.send(head.encode() + more.encode() + body)
            assert (await node.message()).status == 200
        await node.close()
        await answering
    activated, pulled = came
    assert activated.start == f"POST {V1}activate-node HTTP/1.1".encode()
    assert own not in activated.body
    assert activated.body.endswith(encode_uint(15, 7))
    assert pulled.body == pull
    assert pulled.one(b"flwr-public-key") == activated.one(b"flwr-public-key")
    for message in came:
        assert message.one(b"flwr-timestamp")
        assert message.one(b"flwr-signature") != b"brought"
