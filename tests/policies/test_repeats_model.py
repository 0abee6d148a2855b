"""Retry and repair against a model of the SuperLink, over random schedules of failures.

The model keeps what matters of flwr 1.42: a message is handed out once, an object of a reply is stored
once and refused the second time, a key registers once. The node behaves as Flower's: it asks again after a
503, and drops its reply when it is told `stored=false`.
"""

from __future__ import annotations

import asyncio
import enum
import json
import math
import time
from collections.abc import Iterator

import pytest
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.call import Call, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.pipeline import Handler, Policy, compose
from relay.policies.repair import Repair
from relay.policies.retry import Budget, Retry
from relay.refusal import Reason, Refusal
from relay.stores.host import HostTable

OBJECTS = [f"{number:064x}" for number in range(3)]


class Fault(enum.Enum):
    NONE = "none"
    UNSENT = "never left"
    REQUEST_LOST = "left, and did not arrive"
    ANSWER_LOST = "was carried out, and nobody knows"
    FAILED = "the SuperLink failed with a 500 and did nothing"


class SuperLink:
    """Carries calls out, unless the schedule says otherwise."""

    def __init__(self, schedule: list[Fault]) -> None:
        self.schedule = list(schedule)
        self.registered = False
        self.waiting = True
        self.pulls_that_may_have_arrived = 0
        self.confirmed = 0
        self.pending: set[str] = set()
        self.held: set[str] = set()
        self.replies = 0

    async def __call__(self, call: Call) -> Reply:
        fault = self.schedule.pop(0) if self.schedule else Fault.NONE
        if fault is Fault.UNSENT:
            raise Refusal(Reason.UPSTREAM_DOWN, fault.value, sent=False)
        if call.method is Method.PULL_MESSAGES:
            self.pulls_that_may_have_arrived += 1
        if fault is Fault.REQUEST_LOST:
            raise Refusal(Reason.UPSTREAM_DOWN, fault.value)
        if fault is Fault.FAILED:
            raise Refusal(Reason.UPSTREAM_BAD_ANSWER, fault.value, status=503)
        status, body = self.carry_out(call)
        if fault is Fault.ANSWER_LOST and call.method is not Method.PULL_MESSAGES:
            raise Refusal(Reason.UPSTREAM_DOWN, fault.value)
        return Reply(Payload(body), Source.UPSTREAM, status=status)

    def carry_out(self, call: Call) -> tuple[int, bytes]:
        data = call.payload.data or b""
        match call.method:
            case Method.REGISTER_NODE:
                if self.registered:
                    return 412, json.dumps({"code": 23, "detail": "in use"}).encode()
                self.registered = True
            case Method.PULL_MESSAGES:
                waiting, self.waiting = self.waiting, False
                return 200, b"message" if waiting else b""
            case Method.CONFIRM_MESSAGE_RECEIVED:
                self.confirmed += 1
            case Method.PUSH_MESSAGES:
                # A new session: what is missing is listed again.
                self.pending = set(OBJECTS) - self.held
            case Method.PUSH_OBJECT:
                object_id = PushObjectRequest.FromString(data).object_id
                stored = object_id in self.pending
                self.pending.discard(object_id)
                if stored:
                    self.held.add(object_id)
                    self.replies += not self.pending
                return 200, PushObjectResponse(stored=stored).SerializeToString()
            case Method.PULL_OBJECT:
                found = PullObjectRequest.FromString(data).object_id in self.held
                return 200, PullObjectResponse(
                    object_found=True, object_available=found, object_content=b"x" * found
                ).SerializeToString()
            case _:
                raise AssertionError(call.method)
        return 200, b""


class NodeGaveUpError(Exception):
    """The node exited, or dropped its reply."""


class FlowerNode:
    """Asks as a SuperNode does, through the chain of the relay."""

    def __init__(self, superlink: SuperLink) -> None:
        table = HostTable(64)
        policies: list[Policy] = [
            Repair(lost_answers=True, reactivate=True, table=table),
            Retry(enabled=True, base=0.0, cap=0.0, budget=Budget(0.2, 10)),
        ]
        self.chains: dict[Method, Handler] = {
            method: compose(policies, superlink, method, buffer_limit=1 << 20, strict=True).handler
            for method in Method
        }

    async def ask(self, method: Method, data: bytes = b"") -> bytes:
        """Ask until there is an answer, as a node does that is told 503; a refused pull is an empty one."""
        for _ in range(1000):
            call = Call(
                method,
                Wire.HTTP_V1,
                [],
                Payload(data),
                peer="",
                request_id="",
                started=time.monotonic(),
                deadline=math.inf,
            )
            try:
                reply = await self.chains[method](call)
            except Refusal:
                if method is Method.PULL_MESSAGES:
                    return b""
                continue
            if reply.status != 200:
                raise NodeGaveUpError(method, reply.status)
            return await reply.payload.read(1 << 20)
        raise NodeGaveUpError(method, "for ever")

    async def live(self, *, polls: int) -> None:
        await self.ask(Method.REGISTER_NODE, RegisterNodeFleetRequest(public_key=b"key").SerializeToString())
        for _ in range(polls):
            if await self.ask(Method.PULL_MESSAGES):
                break
        else:
            return
        await self.ask(Method.CONFIRM_MESSAGE_RECEIVED)
        await self.ask(Method.PUSH_MESSAGES)
        for object_id in OBJECTS:
            request = PushObjectRequest(
                node=Node(node_id=1), run_id=2, object_id=object_id, session_id="s", object_content=b"c"
            )
            answer = await self.ask(Method.PUSH_OBJECT, request.SerializeToString())
            if not PushObjectResponse.FromString(answer).stored:
                raise NodeGaveUpError(object_id)


@pytest.fixture(autouse=True, scope="module")
def without_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay.policies.repair.PAUSE", 0.0)
        yield


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(Fault), max_size=40))
def test_a_message_is_answered_once_whatever_fails(schedule: list[Fault]) -> None:
    superlink = SuperLink(schedule)
    asyncio.run(FlowerNode(superlink).live(polls=60))
    assert superlink.registered
    assert superlink.replies == 1
    assert superlink.confirmed >= 1


@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.FAILED], ids=lambda fault: fault.value)
def test_a_pull_that_may_have_arrived_is_never_repeated_by_the_relay(fault: Fault) -> None:
    superlink = SuperLink([Fault.NONE, fault])
    asyncio.run(FlowerNode(superlink).live(polls=1))
    assert superlink.pulls_that_may_have_arrived == 1


def test_the_model_punishes_a_relay_that_mends_nothing() -> None:
    superlink = SuperLink([Fault.NONE] * 4 + [Fault.ANSWER_LOST])
    node = FlowerNode(superlink)
    node.chains = dict.fromkeys(Method, superlink)
    with pytest.raises(NodeGaveUpError):
        asyncio.run(node.live(polls=1))
