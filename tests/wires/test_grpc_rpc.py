"""A pull goes on without its node, so that its message is kept; what a call holds is given back once."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, PullObjectResponse
from flwr.proto.node_pb2 import Node

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Method
from relay.pipeline import compose
from relay.policies.redelivery import Redelivery
from relay.refusal import Reason, Refusal
from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.records import HostRecords
from tests.grpc_served import Served, serve_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Any

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(60)

NODE = 7
REQUEST = PullMessagesRequest(node=Node(node_id=NODE)).SerializeToString()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:
        yield partial(serve_grpc, stack)


class Slow:
    """A SuperLink that answers when it may.

    Attributes:
        came, go: that it was asked, and that it may answer.
        step: its answer.
    """

    def __init__(self, step: Reply | BaseException) -> None:
        self.came, self.go = asyncio.Event(), asyncio.Event()
        self.step = step

    async def __call__(self, call: Call) -> Reply:
        self.came.set()
        await self.go.wait()
        if isinstance(self.step, BaseException):
            raise self.step
        return self.step


class Body:
    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.closed = False

    async def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def close(self) -> None:
        self.closed = True


def reply(data: bytes = b"\x08\x01") -> Reply:
    return Reply(Payload(data), Source.UPSTREAM)


async def left(served: Served, slow: Slow, **options: Any) -> None:
    """Have a node pull, and leave while the SuperLink is at it."""
    pull = served.node.call(Method.PULL_MESSAGES, REQUEST, **options)
    await slow.came.wait()
    slow.came.clear()
    pull.cancel()


async def test_a_pull_goes_on_without_its_node_and_ends_with_its_answer_lost(serve: Serve) -> None:
    slow = Slow(reply())
    served = await serve(slow)
    await left(served, slow)
    await served.until(lambda: served.front.left)
    assert not served.ended
    assert served.front.in_flight == 1, "a drain waits for it"
    assert served.calls[0].deadline == -math.inf, "if it waits in a queue it must not be sent"
    slow.go.set()
    ending = await served.ending()
    assert (ending.outcome, ending.source, ending.lost, ending.sent) == (
        "node_gone",
        Source.UPSTREAM,
        True,
        0,
    )
    assert served.front.in_flight == 0
    assert not served.front.left
    assert (await served.node.ask(Method.PULL_MESSAGES, REQUEST)).code == "OK"


async def test_its_answer_is_read_to_the_end_and_closed(serve: Serve) -> None:
    body = Body(b"ab", b"cd")
    slow = Slow(Reply(Payload(body=body, size=4), Source.UPSTREAM))
    served = await serve(slow)
    await left(served, slow)
    await served.until(lambda: served.front.left)
    slow.go.set()
    assert (await served.ending()).lost
    assert body.closed or not body.pieces
    assert served.held.held == 0


@pytest.mark.parametrize("reason", [Reason.UPSTREAM_DOWN, Reason.INTERNAL])
async def test_a_failure_without_a_node_is_nobodys_loss(serve: Serve, reason: Reason) -> None:
    slow = Slow(ZeroDivisionError() if reason is Reason.INTERNAL else Refusal(reason))
    served = await serve(slow)
    await left(served, slow)
    await served.until(lambda: served.front.left)
    slow.go.set()
    ending = await served.ending()
    assert (ending.outcome, ending.lost, ending.source) == ("node_gone", False, None)
    assert ending.refusal is not None
    assert ending.refusal.reason is reason
    assert served.front.in_flight == 0


async def test_it_goes_on_for_as_long_as_its_node_would_have_waited(serve: Serve) -> None:
    slow = Slow(reply())
    served = await serve(slow)
    started = time.monotonic()
    await left(served, slow, timeout=1.0)
    ending = await served.ending()
    assert (ending.outcome, ending.lost) == ("node_gone", False)
    assert 0.5 < time.monotonic() - started < 10
    assert served.front.in_flight == 0


async def test_only_so_many_go_on_at_a_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.wires.grpc_rpc.MOST_LEFT", 1)
    slow = Slow(reply())
    served = await serve(slow)
    await left(served, slow)
    await served.until(lambda: served.front.left)
    await left(served, slow)
    async with asyncio.timeout(5):
        assert not (await served.ending()).lost
    assert len(served.front.left) == served.front.in_flight == 1
    slow.go.set()
    assert (await served.ending(2)).lost


async def test_a_drain_waits_for_a_pull_whose_node_has_left(serve: Serve) -> None:
    slow = Slow(reply())
    served = await serve(slow)
    await left(served, slow)
    await served.until(lambda: served.front.left)
    await served.node.channel.close()
    draining = asyncio.ensure_future(served.server.drain(20.0))
    await asyncio.sleep(0.5)
    assert not draining.done()
    slow.go.set()
    await draining
    assert (await served.ending()).lost


async def test_a_drain_that_times_out_cuts_it(serve: Serve) -> None:
    slow = Slow(reply())
    served = await serve(slow)
    await left(served, slow)
    await served.until(lambda: served.front.left)
    async with asyncio.timeout(5):
        await served.server.drain(0.2)
        await served.until(lambda: served.ended)
    ending = await served.ending()
    assert (ending.outcome, ending.lost) == ("cancelled", False)
    assert served.front.in_flight == 0


async def test_the_message_of_a_lost_answer_is_handed_out_with_the_next_pull(serve: Serve) -> None:
    """The SuperLink hands it out once."""
    metadata = Metadata(run_id=9, message_id="ab" * 32, dst_node_id=NODE, created_at=time.time(), ttl=3600.0)
    message = PullMessagesResponse(messages_list=[Message(metadata=metadata)]).SerializeToString()
    answers = [message]
    came, go = asyncio.Event(), asyncio.Event()

    async def superlink(call: Call) -> Reply:
        if call.method is Method.PULL_OBJECT:
            found = PullObjectResponse(object_found=True, object_available=True)
            return reply(found.SerializeToString())
        came.set()
        await go.wait()
        return reply(answers.pop() if answers else b"")

    redelivery = Redelivery(
        enabled=True,
        max_size=100_000,
        deliveries=3,
        records=HostRecords(256, PIECE),
        table=HostTable(64),
    )
    chain = compose([redelivery], superlink, Method.PULL_MESSAGES, buffer_limit=1 << 20)
    served = await serve(chain.handler)
    pull = served.node.call(Method.PULL_MESSAGES, REQUEST)
    await came.wait()
    pull.cancel()
    await served.until(lambda: served.front.left)
    go.set()
    await served.ending()
    assert (await served.node.ask(Method.PULL_MESSAGES, REQUEST)).data == message


async def test_a_call_that_is_over_holds_no_message(serve: Serve) -> None:
    """gRPC's own cycle of a call and its callback may stay until the collector comes, which is seldom."""

    async def answer(call: Call) -> Reply:
        return reply(b"x" * 100)

    served = await serve(answer)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(found, (Call, Reply)) for found in gc.get_objects())
        for method in (Method.PULL_OBJECT, Method.PULL_MESSAGES):
            assert (await served.node.ask(method, REQUEST)).code == "OK"
        await served.ending(2)
        served.calls.clear()
        served.ended.clear()
        assert sum(isinstance(found, (Call, Reply)) for found in gc.get_objects()) == before
    finally:
        gc.enable()
