"""HTTP v1 as SuperNodes of flwr 1.40 and newer speak it, with the client library that they use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import pytest

from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from tests.wires.conftest import SPECS, echo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from relay.call import Call
    from tests.wires.conftest import Served

    Serve = Callable[..., Awaitable[Served]]

HEADERS = {"content-type": "application/protobuf", "accept": "application/protobuf"}

pytestmark = pytest.mark.timeout(20)


def test_a_node_waits_30_seconds_and_5_for_a_heartbeat() -> None:
    assert SPECS[Wire.HTTP_V1].patience == (5.0, 30.0)
    assert SPECS[Wire.HTTP_V1].prefix == "/v1/fleet/"


async def test_an_httpx_client_reuses_its_connection_for_every_method(serve: Serve) -> None:
    served = await serve(echo)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client:
        for method in Method:
            answer = await client.post(f"/v1/fleet/{method.path}", content=b"abc", headers=HEADERS)
            assert (answer.status_code, answer.content) == (200, b"abc")
            assert answer.headers["content-type"] == "application/protobuf"
        assert len(served.server.connections) == 1
    assert [call.method for call in served.calls] == list(Method)


async def test_an_httpx_client_streams_both_ways(serve: Serve) -> None:
    class Twice:
        """Gives each piece of the request back as it comes, without a size."""

        def __init__(self, call: Call) -> None:
            self.stream = call.payload.stream()

        async def read(self) -> bytes:
            return await anext(aiter(self.stream), b"")

        def close(self) -> None:
            """Nothing is held."""

    async def handler(call: Call) -> Reply:
        return Reply(Payload(body=Twice(call)), Source.LOCAL)

    served = await serve(handler)

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(20):
            await asyncio.sleep(0)
            yield b"%d," % number * 5000

    url = f"http://127.0.0.1:{served.port}/v1/fleet/push-object"
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", url, content=pieces(), headers=HEADERS) as answer,
    ):
        back = b"".join([piece async for piece in answer.aiter_raw()])
    assert back == b"".join(b"%d," % number * 5000 for number in range(20))


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.UNAUTHENTICATED])
async def test_no_refusal_has_a_status_that_ends_a_node(serve: Serve, reason: Reason) -> None:
    """Measured with real nodes: 404, 413, 429 and 500 end one, 403 ends a heartbeat thread."""

    async def handler(call: Call) -> Reply:
        raise Refusal(reason)

    served = await serve(handler)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client:
        for method in Method:
            try:
                answer = await client.post(f"/v1/fleet/{method.path}", content=b"abc", headers=HEADERS)
            except httpx.TransportError:
                assert reason is Reason.STRANGER  # it shall learn nothing
                assert method.kind is not Kind.HEARTBEAT
                continue
            if method.kind is Kind.PULL:
                assert (answer.status_code, answer.content) == (200, b"")
            elif method.kind is Kind.CONFIRM:
                assert answer.status_code in (200, 503)
            elif method.kind in (Kind.FETCH, Kind.PUSH):
                assert answer.status_code in (403, 503)
            else:
                assert answer.status_code == 503
