from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING

import grpc
import pytest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest

from drills.flood import HEARTBEATS, Copies, flood
from drills.strain import Entry
from relay.call import Wire
from relay.fleet import Method
from tests.grpc_ends import GrpcSuperLink

if TYPE_CHECKING:
    from grpc import aio

    from tests.grpc_ends import Asked

BODY = PullObjectRequest(node=Node(node_id=7), run_id=3, object_id="x").SerializeToString()
REQUEST = (
    b"POST /v1/fleet/pull-object HTTP/1.1\r\nflwr-timestamp: now\r\nhost: a\r\nx-request-id: 1\r\n\r\n" + BODY
)
COUNT = 50


def test_the_calls_are_the_nodes_own() -> None:
    copies = Copies(REQUEST, COUNT, userinfo="name:key")
    assert len({call.request_id for call in copies.calls}) == COUNT
    beat, other = copies.calls[0], copies.calls[1]
    assert SendNodeHeartbeatRequest.FromString(beat.body).node.node_id == 7
    asked = GetRunRequest.FromString(other.body)
    assert (other.method, asked.node.node_id, asked.run_id) == (Method.GET_RUN, 7, 3)
    assert sum(call.method is Method.SEND_NODE_HEARTBEAT for call in copies.calls) == -(-COUNT // HEARTBEATS)
    request = copies.http(Wire.REST_V0, beat)
    assert request.startswith(b"POST /api/v0/fleet/send-node-heartbeat HTTP/1.1\r\nhost: 127.0.0.1\r\n")
    assert b"\r\nflwr-timestamp: now\r\n" in request
    assert b"\r\nx-request-id: %b\r\n" % beat.request_id.encode() in request
    assert b"\r\nauthorization: Basic %b\r\n" % b64encode(b"name:key") in request
    assert request.endswith(b"\r\n\r\n" + beat.body)


async def test_what_becomes_of_http_calls_is_counted() -> None:
    at_once = most = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        at_once += 1
        number = most = max(most, at_once)
        head = await reader.readuntil(b"\r\n\r\n")
        if b"heartbeat" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        elif number % 2:
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        entry = Entry(server.sockets[0].getsockname()[1], None)
        came = await flood(entry, Wire.HTTP_V1, Copies(REQUEST, COUNT))
    beats = -(-COUNT // HEARTBEATS)
    assert came.answers[Method.SEND_NODE_HEARTBEAT, "ok"] == beats
    assert came.answers[Method.GET_RUN, "refused"] + came.answers[Method.GET_RUN, "closed"] == COUNT - beats
    assert came.answers[Method.GET_RUN, "refused"] > 0
    assert most == COUNT  # all are connected before the first asks
    assert f"SendNodeHeartbeat: {beats} ok (the last after 0." in str(came)


async def test_what_becomes_of_grpc_calls_is_counted() -> None:
    async def answer(asked: Asked, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        if asked.method is Method.GET_RUN:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")
        return b""  # a message, though an empty one

    async with GrpcSuperLink() as superlink:
        superlink.answer = answer
        came = await flood(Entry(superlink.port, None), Wire.GRPC, Copies(REQUEST, COUNT))
    beats = -(-COUNT // HEARTBEATS)
    assert came.answers == {
        (Method.SEND_NODE_HEARTBEAT, "ok"): beats,
        (Method.GET_RUN, "refused"): COUNT - beats,
    }


@pytest.mark.parametrize("wire", [Wire.HTTP_V1, Wire.GRPC])
async def test_nobody_is_there(wire: Wire, unused_tcp_port: int) -> None:
    came = await flood(Entry(unused_tcp_port, None), wire, Copies(REQUEST, COUNT))
    assert {answer for _, answer in came.answers} == {"closed"}
    assert came.answers.total() == COUNT
