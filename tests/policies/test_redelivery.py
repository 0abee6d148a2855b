"""A message whose answer was lost is handed out again: to its node, until it has arrived, not too often."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from flwr.proto.error_pb2 import Error
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.call import Call, Ending, Identity, Payload, Reply, Source, View, Wire
from relay.fleet import Method
from relay.pipeline import compose
from relay.policies.redelivery import Redelivery
from relay.refusal import NodeGone, Reason, Refusal
from relay.stores.host import HostTable
from relay.stores.kept import LEASE, PIECE
from relay.stores.records import HostRecords

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeCall = Callable[..., Call]
    Step = Reply | BaseException

NODE = 2**63 + 7
RUN = 9
MESSAGE = "ab" * 32
MAX_SIZE = 100_000


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


class SuperLink:
    """Answers as scripted, and keeps what it was asked; `question` answers whether an object is there."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.question: Step = ok(
            PullObjectResponse(object_found=True, object_available=True, object_content=b"o")
        )
        self.questions: list[Call] = []
        self.asked: list[Call] = []

    async def __call__(self, call: Call) -> Reply:
        if call.method is Method.PULL_OBJECT:
            self.questions.append(call)
            step = self.question
        else:
            self.asked.append(call)
            step = self.steps.pop(0) if self.steps else ok()
        if isinstance(step, BaseException):
            raise step
        return step


class Body:
    """A body that arrives in pieces."""

    def __init__(self, *pieces: bytes | Refusal) -> None:
        self.pieces = list(pieces)
        self.closed = False

    async def read(self) -> bytes:
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Refusal):
            raise piece
        return piece

    def close(self) -> None:
        self.closed = True


def ok(message: object = None) -> Reply:
    data = b"" if message is None else message.SerializeToString()  # type: ignore[attr-defined]
    return Reply(Payload(data), Source.UPSTREAM)


def answer(
    message: str = MESSAGE, *, node: int = NODE, run: int = RUN, ttl: float = 3600.0, trees: int = 1
) -> PullMessagesResponse:
    metadata = Metadata(
        run_id=run,
        message_id=message,
        src_node_id=1,
        dst_node_id=node,
        group_id="1",
        ttl=ttl,
        message_type="train",
        created_at=time.time(),
    )
    tree = ObjectTree(object_id=message, children=[ObjectTree(object_id="cd" * 32)] * trees)
    return PullMessagesResponse(messages_list=[Message(metadata=metadata)], message_object_trees=[tree])


def node_of(node: int) -> Node:
    return Node(node_id=node)


class Relay:
    """The policy before a scripted SuperLink, and the calls of nodes."""

    def __init__(self, make_call: MakeCall, records: HostRecords, table: HostTable, clock: Clock) -> None:
        self.make_call = make_call
        self.superlink = SuperLink()
        self.policy = Redelivery(
            enabled=True, max_size=MAX_SIZE, deliveries=3, records=records, table=table, now=clock
        )

    async def call(
        self,
        method: Method,
        request: object,
        step: Step | None = None,
        *,
        identity: Identity | None = None,
        outcome: str = "ok",
        end: bool = True,
        deadline: float = math.inf,
    ) -> Reply:
        """Make a call that the SuperLink answers with `step`, to its end."""
        if step is not None:
            self.superlink.steps.append(step)
        data = request.SerializeToString()  # type: ignore[attr-defined]
        call = self.make_call(method, data, deadline=deadline)
        call.identity = identity
        try:
            chain = compose([self.policy], self.superlink, method, buffer_limit=1 << 20, strict=True)
            return await chain.handler(call)
        finally:
            if end:
                call.end(Ending(outcome, seconds=0.0))

    async def pull(
        self,
        step: Step | None = None,
        *,
        node: int = NODE,
        identity: Identity | None = None,
        outcome: str = "ok",
        end: bool = True,
        deadline: float = math.inf,
    ) -> bytes:
        """Pull; return what the node gets."""
        reply = await self.call(
            Method.PULL_MESSAGES,
            PullMessagesRequest(node=node_of(node)),
            step,
            identity=identity,
            outcome=outcome,
            end=end,
            deadline=deadline,
        )
        assert reply.status == 200
        return await reply.payload.read(1 << 20)

    async def confirm(self, message: str = MESSAGE, step: Step | None = None, *, node: int = NODE) -> Reply:
        request = ConfirmMessageReceivedRequest(node=node_of(node), run_id=RUN, message_object_id=message)
        return await self.call(Method.CONFIRM_MESSAGE_RECEIVED, request, step)

    async def push(
        self,
        message: str = MESSAGE,
        step: Step | None = None,
        *,
        node: int = NODE,
        error: str = "",
        identity: Identity | None = None,
    ) -> Reply:
        metadata = Metadata(run_id=RUN, message_id="ef" * 32, src_node_id=node, reply_to_message_id=message)
        reply = Message(metadata=metadata, error=Error(code=1, reason=error) if error else None)
        request = PushMessagesRequest(
            node=node_of(node), messages_list=[reply], message_object_trees=[ObjectTree(object_id="ef" * 32)]
        )
        return await self.call(Method.PUSH_MESSAGES, request, step, identity=identity)

    async def heartbeat(self, *, success: bool = True, interval: float = 30.0, node: int = NODE) -> None:
        request = SendNodeHeartbeatRequest(node=node_of(node), heartbeat_interval=interval)
        await self.call(Method.SEND_NODE_HEARTBEAT, request, ok(SendNodeHeartbeatResponse(success=success)))


@pytest.fixture
def records() -> HostRecords:
    return HostRecords(1024, PIECE)


@pytest.fixture
def table() -> HostTable:
    return HostTable(64)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def relay(make_call: MakeCall, records: HostRecords, table: HostTable, clock: Clock) -> Relay:
    return Relay(make_call, records, table, clock)


@pytest.fixture
def other(make_call: MakeCall, records: HostRecords, table: HostTable, clock: Clock) -> Relay:
    """Another worker of the same host."""
    return Relay(make_call, records, table, clock)


class Counted:
    """What was counted since it was made."""

    def __init__(self) -> None:
        self._before = self._all()

    def __call__(self) -> dict[str, int]:
        return dict(self._all() - self._before)

    @staticmethod
    def _all() -> Counter[str]:
        return Counter(
            {
                sample.labels["outcome"]: int(sample.value)
                for metric in REGISTRY.collect()
                if metric.name == "relay_redelivery"
                for sample in metric.samples
                if sample.name.endswith("_total")
            }
        )


@pytest.fixture
def counted() -> Counted:
    return Counted()


BYTES = answer().SerializeToString()


def fresh(message: PullMessagesResponse | bytes = BYTES) -> Reply:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return Reply(Payload(data), Source.UPSTREAM)


# -- what a node gets -------------------------------------------------------------------------------


async def test_a_node_that_pulls_again_gets_the_same_bytes_from_any_worker(
    relay: Relay, other: Relay, counted: Counted
) -> None:
    assert await relay.pull(fresh()) == BYTES
    assert await other.pull() == BYTES
    assert len(other.superlink.asked) == 1, "the SuperLink comes first"
    assert counted() == {"kept": 1, "redelivered": 1}


async def test_the_question_is_put_with_the_proof_of_this_pull(relay: Relay, make_call: MakeCall) -> None:
    await relay.pull(fresh())
    metadata = [(b"flwr-signature", b"fresh")]
    data = PullMessagesRequest(node=node_of(NODE)).SerializeToString()
    call = make_call(Method.PULL_MESSAGES, data, metadata=metadata, started=5.0)
    reply = await relay.policy.handle(call, relay.superlink)
    assert reply.source is Source.LOCAL
    (question,) = relay.superlink.questions
    assert question.metadata is metadata
    assert question.wire is call.wire
    asked = PullObjectRequest.FromString(question.payload.data or b"")
    assert asked == PullObjectRequest(node=node_of(NODE), run_id=RUN, object_id=MESSAGE)
    assert question.deadline < time.monotonic() + 6


async def test_it_is_handed_out_three_times_in_all(relay: Relay, counted: Counted) -> None:
    await relay.pull(fresh())
    assert [bool(await relay.pull()) for _ in range(4)] == [True, True, False, False]
    assert counted() == {"kept": 1, "redelivered": 2, "exhausted": 1}


async def test_an_idle_poll_is_passed_on_and_asks_nothing(relay: Relay, counted: Counted) -> None:
    empty = ok()
    reply = await relay.call(Method.PULL_MESSAGES, PullMessagesRequest(node=node_of(NODE)), empty)
    assert reply is empty
    assert not relay.superlink.questions
    assert counted() == {}


async def test_a_fresh_message_is_passed_on_before_an_older_one(relay: Relay) -> None:
    second = answer("cd" * 32).SerializeToString()
    await relay.pull(fresh())
    assert await relay.pull(fresh(second)) == second
    assert [await relay.pull() for _ in range(5)] == [BYTES, BYTES, second, second, b""]


async def test_a_message_reaches_no_other_node(relay: Relay) -> None:
    await relay.pull(fresh())
    assert await relay.pull(node=NODE + 1) == b""
    assert not relay.superlink.questions
    assert await relay.pull() == BYTES


async def test_a_message_to_somebody_else_is_not_kept(relay: Relay, counted: Counted) -> None:
    stray = answer(node=NODE + 1).SerializeToString()
    assert await relay.pull(fresh(stray)) == stray
    assert await relay.pull() == b""
    assert counted() == {}


@pytest.mark.parametrize(
    "step",
    [
        Reply(Payload(), Source.LOCAL),
        Reply(Payload(b"no"), Source.UPSTREAM, status=401),
        Reply(Payload(b"no"), Source.UPSTREAM, status=403),
    ],
    ids=["empty, but made here", "401", "403"],
)
async def test_who_is_not_accepted_by_the_superlink_gets_nothing(relay: Relay, step: Reply) -> None:
    await relay.pull(fresh())
    request = PullMessagesRequest(node=node_of(NODE))
    for _ in range(5):
        assert await relay.call(Method.PULL_MESSAGES, request, step) is step
    assert not relay.superlink.questions
    assert await relay.pull() == BYTES


@pytest.mark.parametrize("error", [Refusal(Reason.UPSTREAM_DOWN), NodeGone()], ids=repr)
async def test_a_pull_that_fails_takes_nothing(relay: Relay, error: BaseException) -> None:
    await relay.pull(fresh())
    with pytest.raises(type(error)):
        await relay.pull(error)
    assert await relay.pull() == BYTES


async def test_another_identity_gets_nothing_and_forges_nothing(relay: Relay) -> None:
    mine, tenants = Identity("edge-7", "a"), [Identity("edge-7", "b"), Identity("edge-8", "a"), None]
    await relay.pull(fresh(), identity=mine)
    for stranger in tenants:
        assert await relay.pull(identity=stranger) == b""
        await relay.push(identity=stranger)
    assert not relay.superlink.questions
    assert await relay.pull(identity=Identity("edge-7", "a", by=("api_key",))) == BYTES


async def test_one_pull_gets_it_while_its_first_delivery_is_under_way(
    relay: Relay, other: Relay, clock: Clock
) -> None:
    await relay.pull(fresh(), end=False)
    assert await other.pull() == b""
    assert not other.superlink.questions
    clock.now += LEASE + 1
    assert await other.pull(end=False) == BYTES
    assert await relay.pull() == b""


async def test_one_pull_gets_it_while_the_superlink_is_asked(relay: Relay, other: Relay) -> None:
    await relay.pull(fresh())
    asked, answered = asyncio.Event(), asyncio.Event()
    there = relay.superlink.question

    async def slow(call: Call) -> Reply:
        if call.method is not Method.PULL_OBJECT:
            return ok()
        asked.set()
        await answered.wait()
        assert isinstance(there, Reply)
        return there

    data = PullMessagesRequest(node=node_of(NODE)).SerializeToString()
    call = relay.make_call(Method.PULL_MESSAGES, data)
    first = asyncio.ensure_future(relay.policy.handle(call, slow))
    await asked.wait()
    assert await other.pull() == b""
    answered.set()
    assert (await first).payload.data == BYTES
    assert await other.pull() == b"", "it is being written"
    call.end(Ending("ok", seconds=0.0))
    assert await other.pull() == BYTES


async def test_a_delivery_that_could_not_be_written_does_not_count(relay: Relay) -> None:
    await relay.pull(fresh(), outcome="node_gone")
    for _ in range(6):
        assert await relay.pull(outcome="node_gone") == BYTES
    assert [bool(await relay.pull()) for _ in range(4)] == [True, True, True, False]


async def test_a_redelivery_is_logged_without_its_content(relay: Relay) -> None:
    await relay.pull(fresh())
    with capture_logs() as lines:
        await relay.pull()
    assert lines == [
        {
            "event": "message handed out again",
            "log_level": "info",
            "run_id": RUN,
            "node_id": NODE,
            "delivery": 2,
            "request_id": "test-1",
        }
    ]


# -- what ends it -----------------------------------------------------------------------------------


async def test_a_confirmation_ends_it(relay: Relay, other: Relay, counted: Counted) -> None:
    await relay.pull(fresh())
    await other.confirm()
    assert await relay.pull() == b""
    assert not relay.superlink.questions
    assert counted() == {"kept": 1, "confirmed": 1}


async def test_a_confirmation_of_another_message_does_not(relay: Relay) -> None:
    await relay.pull(fresh())
    await relay.confirm("cd" * 32)
    await relay.confirm(node=NODE + 1)
    assert await relay.pull() == BYTES


@pytest.mark.parametrize("error", ["", "x" * 9000], ids=["reply", "error"])
async def test_a_reply_ends_it(relay: Relay, counted: Counted, error: str) -> None:
    await relay.pull(fresh())
    await relay.push("cd" * 32, error=error)
    await relay.push(node=NODE + 1, error=error)
    assert await relay.pull() == BYTES
    await relay.push(error=error)
    assert await relay.pull() == b""
    assert counted() == {"kept": 1, "redelivered": 1, "confirmed": 1}


async def test_a_reply_to_nobody_knows_what_ends_nothing(relay: Relay) -> None:
    await relay.pull(fresh())
    broken = PushMessagesRequest(node=node_of(NODE)).SerializeToString() + b"\x12\x04\x0a\x02\x2a\x05"
    call = relay.make_call(Method.PUSH_MESSAGES, broken)
    assert (await relay.policy.handle(call, relay.superlink)).status == 200
    assert await relay.pull() == BYTES


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        (Method.DEACTIVATE_NODE, DeactivateNodeRequest),
        (Method.UNREGISTER_NODE, UnregisterNodeFleetRequest),
    ],
)
async def test_a_node_that_has_left_gets_nothing(
    relay: Relay, counted: Counted, method: Method, request_type: type
) -> None:
    await relay.pull(fresh())
    await relay.pull(fresh(answer("cd" * 32)))
    await relay.call(method, request_type(node_id=NODE))
    assert await relay.pull() == b""
    assert counted() == {"kept": 2, "expired": 2}


FORGED: list[Step] = [
    Reply(Payload(b"no"), Source.UPSTREAM, status=401),
    Reply(Payload(b"no"), Source.UPSTREAM, status=403),
    Reply(Payload(), Source.LOCAL),
    Refusal(Reason.UPSTREAM_REJECTED, status=403),
    Refusal(Reason.UPSTREAM_DOWN),
]


@pytest.mark.parametrize("step", FORGED, ids=["401", "403", "made here", "refused", "down"])
async def test_what_the_superlink_has_not_accepted_ends_nothing(relay: Relay, step: Step) -> None:
    await relay.pull(fresh())
    expected = pytest.raises(Refusal) if isinstance(step, Refusal) else nullcontext()
    with expected:
        await relay.confirm(step=step)
    with expected:
        await relay.push(step=step)
    for method, request in (
        (Method.DEACTIVATE_NODE, DeactivateNodeRequest(node_id=NODE)),
        (Method.UNREGISTER_NODE, UnregisterNodeFleetRequest(node_id=NODE)),
    ):
        with expected:
            await relay.call(method, request, step)
    assert await relay.pull() == BYTES


async def test_what_the_superlink_has_deleted_was_confirmed_elsewhere(relay: Relay, counted: Counted) -> None:
    await relay.pull(fresh())
    relay.superlink.question = ok(PullObjectResponse(object_found=False))
    assert await relay.pull() == b""
    assert await relay.pull() == b""
    assert len(relay.superlink.questions) == 1
    assert counted() == {"kept": 1, "confirmed": 1}


async def test_an_object_that_the_serverapp_is_still_pushing_is_there(relay: Relay) -> None:
    await relay.pull(fresh())
    relay.superlink.question = ok(PullObjectResponse(object_found=True))
    assert await relay.pull() == BYTES


@pytest.mark.parametrize(
    "step",
    [
        Reply(Payload(b"no"), Source.UPSTREAM, status=403),
        Refusal(Reason.UPSTREAM_REJECTED, status=403),
        Refusal(Reason.UPSTREAM_REJECTED, status=500),
    ],
    ids=["403", "403 that no node may see", "500"],
)
async def test_what_the_superlink_refuses_is_over(relay: Relay, counted: Counted, step: Step) -> None:
    await relay.pull(fresh())
    relay.superlink.question = step
    assert await relay.pull() == b""
    assert await relay.pull() == b""
    assert len(relay.superlink.questions) == 1
    assert counted() == {"kept": 1, "refused": 1}


@pytest.mark.parametrize(
    "step",
    [
        Refusal(Reason.UPSTREAM_DOWN),
        Refusal(Reason.UPSTREAM_TIMEOUT),
        Refusal(Reason.UPSTREAM_BAD_ANSWER),
        Reply(Payload(b"no"), Source.UPSTREAM, status=401),
        Refusal(Reason.UPSTREAM_REJECTED, status=404),
        Refusal(Reason.UPSTREAM_REJECTED, status=413),
    ],
    ids=["down", "timeout", "bad answer", "401", "404", "413"],
)
async def test_as_long_as_the_superlink_cannot_be_asked_it_waits(
    relay: Relay, counted: Counted, step: Step
) -> None:
    """No SuperLink says 404 or 413 of a message: that is a proxy between."""
    await relay.pull(fresh())
    there = relay.superlink.question
    relay.superlink.question = step
    for _ in range(5):
        assert await relay.pull() == b""
    relay.superlink.question = there
    assert [await relay.pull() for _ in range(3)] == [BYTES, BYTES, b""]
    assert counted() == {"kept": 1, "redelivered": 2, "exhausted": 1}


async def test_a_call_that_is_cancelled_at_the_question_gives_the_claim_back(relay: Relay) -> None:
    await relay.pull(fresh())
    there = relay.superlink.question
    relay.superlink.question = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        await relay.pull()
    relay.superlink.question = there
    assert await relay.pull() == BYTES


async def test_the_next_one_is_tried_when_one_is_over(relay: Relay) -> None:
    second = answer("cd" * 32).SerializeToString()
    await relay.pull(fresh())
    await relay.pull(fresh(second))
    superlink = relay.superlink
    gone = ok(PullObjectResponse(object_found=False))
    there = superlink.question

    async def answers(call: Call) -> Reply:
        if call.method is not Method.PULL_OBJECT:
            return ok()
        asked = PullObjectRequest.FromString(call.payload.data or b"").object_id
        return gone if asked == MESSAGE else there  # type: ignore[return-value]

    data = PullMessagesRequest(node=node_of(NODE)).SerializeToString()
    reply = await relay.policy.handle(relay.make_call(Method.PULL_MESSAGES, data), answers)
    assert reply.payload.data == second


# -- time -------------------------------------------------------------------------------------------


async def test_its_ttl_ends_it(relay: Relay, clock: Clock, counted: Counted) -> None:
    await relay.heartbeat(interval=1000)
    await relay.pull(fresh(answer(ttl=100)))
    clock.now += 99
    assert await relay.pull() != b""
    clock.now += 2
    assert await relay.pull() == b""
    assert counted() == {"kept": 1, "redelivered": 1, "expired": 1}


@pytest.mark.parametrize("ttl", [0.0, -3601.0, math.nan])
async def test_a_message_without_time_left_is_not_kept(relay: Relay, counted: Counted, ttl: float) -> None:
    await relay.pull(fresh(answer(ttl=ttl)))
    assert await relay.pull() == b""
    assert counted() == {}


async def test_it_lasts_as_long_as_the_superlink_calls_the_node_available(
    relay: Relay, other: Relay, clock: Clock
) -> None:
    await other.heartbeat(interval=10)
    clock.now += 5
    await relay.pull(fresh())
    clock.now += 14
    await other.heartbeat(interval=10)
    clock.now += 19
    assert await relay.pull() == BYTES
    clock.now += 2
    assert await relay.pull() == b""


async def test_the_time_since_the_last_heartbeat_counts(relay: Relay, other: Relay, clock: Clock) -> None:
    await other.heartbeat(interval=10)
    clock.now += 15
    await relay.pull(fresh())
    clock.now += 4
    assert await relay.pull() == BYTES
    clock.now += 2
    assert await relay.pull() == b""


async def test_an_activation_makes_a_node_available(relay: Relay, clock: Clock) -> None:
    request = ActivateNodeRequest(public_key=b"k" * 215, heartbeat_interval=20)
    await relay.call(Method.ACTIVATE_NODE, request, ok(ActivateNodeResponse(node_id=NODE)))
    await relay.pull(fresh())
    clock.now += 39
    assert await relay.pull() == BYTES
    await relay.call(Method.ACTIVATE_NODE, request, ok(ActivateNodeResponse(node_id=NODE)))
    clock.now += 39
    assert await relay.pull() == BYTES


@pytest.mark.parametrize("interval", [math.nan, math.inf, -5.0, 1e300, 0.0])
async def test_any_interval_is_borne(relay: Relay, interval: float) -> None:
    await relay.heartbeat(interval=interval)
    await relay.pull(fresh())
    await relay.heartbeat(interval=interval)
    assert await relay.pull() == BYTES


async def test_a_heartbeat_that_was_not_accepted_prolongs_nothing(relay: Relay, clock: Clock) -> None:
    await relay.pull(fresh())
    clock.now += 50
    await relay.heartbeat(success=False)
    clock.now += 11
    assert await relay.pull() == b""


# -- what is kept -----------------------------------------------------------------------------------


async def test_an_answer_of_many_objects_is_kept_whole(relay: Relay) -> None:
    large = answer(trees=1000).SerializeToString()
    assert 64_000 < len(large) < MAX_SIZE
    assert await relay.pull(fresh(large)) == large
    assert await relay.pull() == large


@pytest.mark.parametrize("declared", [True, False], ids=["of known length", "chunked"])
async def test_an_answer_that_is_still_arriving_is_kept(relay: Relay, declared: bool) -> None:
    large = answer(trees=1000).SerializeToString()
    body = Body(large[:70], large[70:50_000], large[50_000:])
    reply = Reply(Payload(body=body, size=len(large) if declared else None), Source.UPSTREAM)
    assert await relay.pull(reply) == large
    assert await relay.pull() == large


@pytest.mark.parametrize("declared", [True, False], ids=["of known length", "chunked"])
async def test_a_longer_answer_passes_by(relay: Relay, counted: Counted, declared: bool) -> None:
    await relay.pull(fresh())
    large = answer(trees=2000).SerializeToString()
    body = Body(large[:70], large[70:50_000], large[50_000:])
    reply = Reply(Payload(body=body, size=len(large) if declared else None), Source.UPSTREAM)
    assert await relay.pull(reply) == large
    assert await relay.pull() == BYTES
    assert counted() == {"kept": 1, "too_large": 1, "redelivered": 1}


async def test_a_longer_answer_at_hand_passes_by(relay: Relay, counted: Counted) -> None:
    large = answer(trees=2000).SerializeToString()
    assert await relay.pull(fresh(large)) == large
    assert await relay.pull() == b""
    assert counted() == {"too_large": 1}


async def test_an_answer_that_breaks_off_is_a_refusal(relay: Relay) -> None:
    body = Body(BYTES[:70], Refusal(Reason.UPSTREAM_BAD_ANSWER, "broke off"))
    with pytest.raises(Refusal):
        await relay.pull(Reply(Payload(body=body, size=len(BYTES)), Source.UPSTREAM))
    assert await relay.pull() == b""


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x02\x08\x05",
        b"\x12\x00",
        b"\x12\x02\x0a\x00",
        b"\x12\x04\x0a\x02\x0a\x05",
        b"\xff" * 9,
        BYTES[:100],
    ],
    ids=repr,
)
async def test_what_carries_no_message_passes_by(relay: Relay, counted: Counted, data: bytes) -> None:
    await relay.pull(fresh())
    assert await relay.pull(fresh(data)) == data
    assert counted() == {"kept": 1}
    assert await relay.pull() == BYTES


@pytest.mark.parametrize("request_bytes", [b"", b"\xff" * 30, b"\x0a\x00"], ids=repr)
@pytest.mark.parametrize(
    "method",
    [
        Method.PULL_MESSAGES,
        Method.PUSH_MESSAGES,
        Method.CONFIRM_MESSAGE_RECEIVED,
        Method.SEND_NODE_HEARTBEAT,
        Method.ACTIVATE_NODE,
        Method.DEACTIVATE_NODE,
    ],
)
async def test_garbage_passes_by(
    relay: Relay, make_call: MakeCall, method: Method, request_bytes: bytes
) -> None:
    reply = ok()
    relay.superlink.steps.append(reply)
    assert await relay.policy.handle(make_call(method, request_bytes), relay.superlink) is reply


def _damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """Return the bytes with one of them changed, and perhaps cut."""
    return st.builds(
        lambda at, byte, end: (data[:at] + bytes([byte]) + data[at + 1 :])[:end],
        st.integers(0, len(data) - 1),
        st.integers(0, 255),
        st.integers(1, len(data)),
    )


@given(st.one_of(st.binary(max_size=200), _damaged(BYTES)), st.binary(max_size=40))
@example(answer(message="").SerializeToString(), b"")
def test_any_answer_reaches_the_node_as_it_is(body: bytes, other: bytes) -> None:
    async def run() -> None:
        records, table = HostRecords(64, PIECE), HostTable(64)
        policy = Redelivery(enabled=True, max_size=MAX_SIZE, deliveries=3, records=records, table=table)
        superlink = SuperLink()
        for method, request in (
            (Method.PULL_MESSAGES, PullMessagesRequest(node=node_of(NODE)).SerializeToString()),
            (Method.PUSH_MESSAGES, body),
            (Method.SEND_NODE_HEARTBEAT, other),
            (Method.ACTIVATE_NODE, other),
            (Method.CONFIRM_MESSAGE_RECEIVED, other),
            (Method.UNREGISTER_NODE, other),
        ):
            reply = Reply(Payload(body), Source.UPSTREAM)
            superlink.steps.append(reply)
            call = Call(
                method,
                Wire.HTTP_V1,
                [],
                Payload(request),
                peer="",
                request_id="",
                started=0.0,
                deadline=math.inf,
            )
            assert await policy.handle(call, superlink) is reply
            assert reply.payload.data == body
            call.end(Ending("ok", seconds=0.0))

    asyncio.run(run())


def test_it_looks_at_no_call_that_it_does_not_need(
    relay: Relay, records: HostRecords, table: HostTable
) -> None:
    assert Redelivery.sees is View.PEEK
    assert {method for method in Method if not relay.policy.applies(method)} == {
        Method.REGISTER_NODE,
        Method.GET_RUN,
        Method.GET_FAB,
        Method.PULL_OBJECT,
        Method.PUSH_OBJECT,
    }
    off = Redelivery(enabled=False, max_size=1, deliveries=3, records=records, table=table)
    assert not any(off.applies(method) for method in Method)
