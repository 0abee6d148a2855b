"""A SuperLink of HTTP v1: where it is asked, and which of its statuses reach a node."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.call import Wire
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.upstreams import http_v1
from relay.upstreams.http import Timeouts
from tests.sockets import PATIENCE, response

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Call
    from relay.upstreams.pool import Pool
    from tests.sockets import Listener

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("method", "status"),
    [
        *((method, b"401 Unauthorized") for method in Method),
        (Method.PULL_MESSAGES, b"403 Forbidden"),
        (Method.GET_RUN, b"403 Forbidden"),
        (Method.PUSH_OBJECT, b"403 Forbidden"),
        (Method.UNREGISTER_NODE, b"403 Forbidden"),
        (Method.REGISTER_NODE, b"412 Precondition Failed"),
        (Method.ACTIVATE_NODE, b"412 Precondition Failed"),
    ],
)
async def test_a_status_by_which_the_superlink_means_the_node_reaches_it(
    make_pool: Callable[..., Pool],
    upstream: Listener,
    make_call: Callable[..., Call],
    method: Method,
    status: bytes,
) -> None:
    handler = http_v1.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    task = asyncio.ensure_future(handler(make_call(method)))
    peer = await upstream.accept()
    request = await peer.message()
    assert request.start == f"POST /v1/fleet/{method.path} HTTP/1.1".encode()
    peer.send(response(b'{"code":1}', status=status, content_type=b"application/json"))
    reply = await task
    assert reply.status == int(status[:3])
    assert reply.payload.data == b'{"code":1}'


@pytest.mark.parametrize(
    ("wire", "method", "status", "reason"),
    [
        (Wire.HTTP_V1, Method.SEND_NODE_HEARTBEAT, b"403 Forbidden", Reason.UPSTREAM_BAD_ANSWER),
        (Wire.HTTP_V1, Method.ACTIVATE_NODE, b"403 Forbidden", Reason.UPSTREAM_BAD_ANSWER),
        (Wire.HTTP_V1, Method.CONFIRM_MESSAGE_RECEIVED, b"403 Forbidden", Reason.UPSTREAM_REJECTED),
        (Wire.HTTP_V1, Method.PULL_MESSAGES, b"412 Precondition Failed", Reason.UPSTREAM_BAD_ANSWER),
        (Wire.HTTP_V1, Method.PULL_OBJECT, b"500 Internal Server Error", Reason.UPSTREAM_REJECTED),
        (Wire.HTTP_V1, Method.PULL_MESSAGES, b"500 Internal Server Error", Reason.UPSTREAM_BAD_ANSWER),
        (Wire.HTTP_V1, Method.PULL_MESSAGES, b"503 Service Unavailable", Reason.UPSTREAM_DOWN),
        # What only newer nodes understand:
        (Wire.REST_V0, Method.PULL_MESSAGES, b"403 Forbidden", Reason.UPSTREAM_BAD_ANSWER),
        (Wire.REST_V0, Method.PULL_OBJECT, b"403 Forbidden", Reason.UPSTREAM_REJECTED),
        (Wire.REST_V0, Method.PUSH_OBJECT, b"403 Forbidden", Reason.UPSTREAM_REJECTED),
        (Wire.REST_V0, Method.UNREGISTER_NODE, b"403 Forbidden", Reason.UPSTREAM_BAD_ANSWER),
    ],
)
async def test_a_status_that_would_only_harm_the_node_does_not_reach_it(
    make_pool: Callable[..., Pool],
    upstream: Listener,
    make_call: Callable[..., Call],
    wire: Wire,
    method: Method,
    status: bytes,
    reason: Reason,
) -> None:
    handler = http_v1.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    serving = asyncio.ensure_future(upstream.serve(response(b"x", status=status)))
    with pytest.raises(Refusal) as caught:
        await handler(make_call(method, wire=wire))
    assert (caught.value.reason, caught.value.status) == (reason, int(status[:3]))
    await serving


@pytest.mark.parametrize(
    ("method", "status"), [(Method.REGISTER_NODE, b"412 Precondition Failed"), (Method.GET_RUN, b"401 No")]
)
async def test_what_policies_have_to_see_of_a_legacy_nodes_answer_is_a_reply(
    make_pool: Callable[..., Pool],
    upstream: Listener,
    make_call: Callable[..., Call],
    method: Method,
    status: bytes,
) -> None:
    handler = http_v1.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    serving = asyncio.ensure_future(upstream.serve(response(b"x", status=status)))
    assert (await handler(make_call(method, wire=Wire.REST_V0))).status == int(status[:3])
    await serving


async def test_an_object_is_awaited_whole_for_a_legacy_node_alone(
    make_pool: Callable[..., Pool], upstream: Listener, make_call: Callable[..., Call]
) -> None:
    handler = http_v1.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    for wire in (Wire.HTTP_V1, Wire.REST_V0):
        task = asyncio.ensure_future(handler(make_call(Method.PULL_OBJECT, b"ask", wire=wire)))
        peer = await upstream.accept()
        await peer.message()
        peer.send(response(b"\x08\x01" + b"x" * 1000, size=5 * 1024 * 1024))
        if wire is Wire.HTTP_V1:
            (await task).payload.close()
            continue
        await asyncio.sleep(0.05)
        assert not task.done()
        await peer.close()
        with pytest.raises(Refusal):
            await task
