"""Legacy REST as SuperNodes of flwr 1.23 to 1.32 speak it, with the client library that they use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import requests

from relay.call import Wire
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from tests.wires.conftest import SPECS, echo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Call, Reply
    from tests.wires.conftest import Served

    Serve = Callable[..., Awaitable[Served]]

HEADERS = {"Content-Type": "application/protobuf", "Accept": "application/protobuf"}

pytestmark = pytest.mark.timeout(20)


async def post(served: Served, method: Method, body: bytes = b"abc") -> requests.Response:
    """Ask as `flwr/client/rest_client/connection.py` does: a new connection for every call."""
    url = f"http://127.0.0.1:{served.port}/api/v0/fleet/{method.path}"
    return await asyncio.to_thread(requests.post, url, headers=HEADERS, data=body, timeout=10)


def test_a_node_has_no_timeout_of_its_own_so_the_patience_is_ours() -> None:
    assert SPECS[Wire.REST_V0].prefix == "/api/v0/fleet/"
    assert all(seconds >= 30 for seconds in SPECS[Wire.REST_V0].patience)


async def test_a_requests_client_is_answered_with_exactly_the_type_that_it_insists_on(serve: Serve) -> None:
    served = await serve(echo)
    for method in Method:
        answer = await post(served, method)
        assert (answer.status_code, answer.content) == (200, b"abc")
        assert answer.headers["Content-Type"] == "application/protobuf"
    assert [call.method for call in served.calls] == list(Method)


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.UNAUTHENTICATED])
async def test_a_refused_call_gets_a_status_only_where_its_node_survives_one(
    serve: Serve, reason: Reason
) -> None:
    """Measured with real nodes: a close is retried, but ends a heartbeat thread; a status ends others."""

    async def handler(call: Call) -> Reply:
        raise Refusal(reason)

    served = await serve(handler)
    for method in Method:
        try:
            answer = await post(served, method)
        except requests.exceptions.ConnectionError:
            assert method.kind is not Kind.HEARTBEAT
            assert method.kind is not Kind.PULL or reason is Reason.STRANGER  # it shall learn nothing
            continue
        if answer.status_code == 200:
            assert method.kind in (Kind.PULL, Kind.CONFIRM)
            assert answer.content == b""
            assert answer.headers["Content-Type"] == "application/protobuf"
        else:
            assert method.kind in (Kind.HEARTBEAT, Kind.PUSH)
            assert answer.status_code == (503 if method.kind is Kind.HEARTBEAT else 403)
