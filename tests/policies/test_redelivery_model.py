"""Redelivery against a model of a SuperLink and its nodes, over random schedules of what can go wrong.

The model keeps what matters of flwr 1.32 to 1.42. The SuperLink checks who calls, hands a message out once,
deletes its object when it is confirmed, and gives up a node that is silent. A node is one thread: it pulls,
fetches, confirms, runs its app, answers, and pulls again; a fetch that fails makes it give the message up.
The workers of a host share one table, and the hosts nothing.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.call import Call, Ending, Payload, Reply, Source, Wire
from relay.fleet import Method, peek
from relay.policies.redelivery import Redelivery
from relay.refusal import NodeGone, Reason, Refusal
from relay.stores.host import HostTable
from relay.stores.kept import LEASE, PIECE
from relay.stores.records import HostRecords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

NODES = (1, 2)
#: For each node; fewer than are kept of one.
MESSAGES = 3
DELIVERIES = 3
HOSTS, WORKERS = 2, 2
SECONDS = 3.0


class Event(enum.Enum):
    """What a node does next, and what becomes of it."""

    STEP = "all goes well"
    CUT = "the relay has written its answer, and the node does not get it"
    GONE = "the node is gone before the relay can write"
    KILLED = "the worker is killed before it can say how the call ended"
    FETCH_FAILS = "the node cannot fetch an object, and gives its message up"
    CONFIRM_LOST = "the answer to a confirmation is lost between SuperLink and relay; the node repeats it"
    UNASKABLE = "the SuperLink answers no question"
    STALE = "a pull of the node that hangs somewhere arrives late; nobody takes its answer"
    STRANGER = "somebody who is not the node pulls, confirms, answers and leaves in its name"
    RESTART = "the host is started anew, and remembers nothing"
    SILENCE = "no heartbeat for 70 s"
    STOP_RUN = "the run of the node's messages ends"


HARMLESS = [event for event in Event if event not in (Event.RESTART, Event.SILENCE, Event.STOP_RUN)]


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


def _id(node: int, number: int) -> str:
    return f"{node * 16 + number:064x}"


class SuperLink:
    """Knows the proof of a node: its node id, in a header."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.waiting = {node: [_id(node, number) for number in range(MESSAGES)] for node in NODES}
        self.objects = {message for messages in self.waiting.values() for message in messages}
        self.handed_out: set[str] = set()
        self.answered: Counter[str] = Counter()
        self.stopped: set[int] = set()
        self.askable = True
        self.confirmation_lost = False

    async def __call__(self, call: Call) -> Reply:
        data = call.payload.data or b""
        ids = peek(call.method, data)
        node = ids.node_id or 0
        if call.metadata != [(b"proof", b"%d" % node)]:
            return Reply(Payload(b"no"), Source.UPSTREAM, status=401)
        response: Any = None
        match call.method:
            case Method.SEND_NODE_HEARTBEAT:
                response = SendNodeHeartbeatResponse(success=True)
            case Method.PULL_MESSAGES:
                response = PullMessagesResponse()
                if self.waiting[node] and node not in self.stopped:
                    message = self.waiting[node].pop(0)
                    self.handed_out.add(message)
                    response.messages_list.append(_message(node, message))
            case Method.PULL_OBJECT:
                if not self.askable:
                    raise Refusal(Reason.UPSTREAM_TIMEOUT)
                if node in self.stopped:
                    return Reply(Payload(b"no"), Source.UPSTREAM, status=403)
                found = ids.object_id in self.objects
                response = PullObjectResponse(object_found=found, object_available=found)
            case Method.CONFIRM_MESSAGE_RECEIVED if node in self.stopped:
                raise Refusal(Reason.UPSTREAM_REJECTED, status=403)
            case Method.CONFIRM_MESSAGE_RECEIVED:
                self.objects.discard(ids.object_id or "")
                if self.confirmation_lost:
                    raise Refusal(Reason.UPSTREAM_DOWN)
            case Method.PUSH_MESSAGES if node in self.stopped:
                return Reply(Payload(b"no"), Source.UPSTREAM, status=403)
            case Method.PUSH_MESSAGES:
                request = PushMessagesRequest.FromString(data)
                self.answered[request.messages_list[0].metadata.reply_to_message_id] += 1
        return Reply(Payload(b"" if response is None else response.SerializeToString()), Source.UPSTREAM)


def _message(node: int, message: str) -> Message:
    return Message(
        metadata=Metadata(
            run_id=node,
            message_id=message,
            dst_node_id=node,
            ttl=3600.0,
            created_at=time.time(),
        )
    )


class Host:
    """The workers of one host, and what they share."""

    def __init__(self, clock: Clock, deliveries: int) -> None:
        records, table = HostRecords(512, PIECE), HostTable(64)
        self.workers = [
            Redelivery(
                enabled=True,
                max_size=4096,
                deliveries=deliveries,
                records=records,
                table=table,
                now=clock,
            )
            for _ in range(WORKERS)
        ]


class World:
    """Nodes, relays and SuperLink, and what must hold of them at any moment."""

    def __init__(self, hosts: int, deliveries: int = DELIVERIES) -> None:
        self.clock = Clock()
        self.most = deliveries
        self.superlink = SuperLink(self.clock)
        self.hosts = [Host(self.clock, deliveries) for _ in range(hosts)]
        self.received: dict[int, str | None] = dict.fromkeys(NODES)
        self.deliveries: Counter[str] = Counter()
        self.executed: Counter[str] = Counter()
        self.excused: set[str] = set()

    async def ask(
        self,
        where: int,
        method: Method,
        request: Any,
        *,
        proof: int,
        outcome: str | None = "ok",
    ) -> tuple[int, bytes]:
        """Make a call through one worker; `outcome` None: that is killed then. Status 0 is no answer."""
        host = self.hosts[where // WORKERS % len(self.hosts)]
        now = time.monotonic()
        call = Call(
            method,
            Wire.HTTP_V1,
            [(b"proof", b"%d" % proof)],
            Payload(request.SerializeToString()),
            peer="",
            request_id="",
            started=now,
            deadline=math.inf,
        )
        policy = host.workers[where % WORKERS]
        try:
            assert policy.applies(method)
            reply = await policy.handle(call, self.superlink)
        except (Refusal, NodeGone):
            return 0, b""
        finally:
            if outcome is not None:
                call.end(Ending(outcome, seconds=0.0))
        return reply.status, await reply.payload.read(1 << 20)

    async def pull(self, node: int, where: int, *, proof: int, outcome: str | None = "ok") -> str | None:
        request = PullMessagesRequest(node=Node(node_id=node))
        status, body = await self.ask(where, Method.PULL_MESSAGES, request, proof=proof, outcome=outcome)
        if proof != node:
            assert status != 200, "a stranger was answered"
            return None
        messages = PullMessagesResponse.FromString(body).messages_list
        if not messages:
            return None
        metadata = messages[0].metadata
        assert metadata.dst_node_id == node, "a message of another node"
        if outcome != "node_gone":
            self.deliveries[metadata.message_id] += 1
            assert self.deliveries[metadata.message_id] <= DELIVERIES
        return str(metadata.message_id)

    async def confirm(self, node: int, message: str, where: int, *, proof: int) -> int:
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=node, message_object_id=message
        )
        status, _ = await self.ask(where, Method.CONFIRM_MESSAGE_RECEIVED, request, proof=proof)
        return status

    async def push(self, node: int, message: str, where: int, *, proof: int) -> None:
        metadata = Metadata(run_id=node, src_node_id=node, reply_to_message_id=message)
        request = PushMessagesRequest(node=Node(node_id=node), messages_list=[Message(metadata=metadata)])
        await self.ask(where, Method.PUSH_MESSAGES, request, proof=proof)

    async def heartbeats(self) -> None:
        for node in NODES:
            request = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0)
            for host in range(len(self.hosts)):
                await self.ask(host * WORKERS, Method.SEND_NODE_HEARTBEAT, request, proof=node)

    async def stranger(self, node: int, where: int) -> None:
        await self.pull(node, where, proof=99)
        for number in range(MESSAGES):
            await self.confirm(node, _id(node, number), where, proof=99)
            await self.push(node, _id(node, number), where, proof=99)
        await self.ask(where, Method.DEACTIVATE_NODE, DeactivateNodeRequest(node_id=node), proof=99)

    async def live(self, event: Event, node: int, where: int) -> None:
        """Let the node do what it does next, and the event happen to it."""
        self.clock.now += SECONDS
        if event is Event.SILENCE:
            self.excused |= self.superlink.handed_out
            self.clock.now += 70.0
        await self.heartbeats()
        match event:
            case Event.STALE:
                await self.pull(node, where, proof=node)
                return
            case Event.STRANGER:
                await self.stranger(node, where)
                return
            case Event.RESTART:
                host = where // WORKERS % len(self.hosts)
                self.hosts[host] = Host(self.clock, self.most)
                self.excused |= self.superlink.handed_out
                return
            case Event.STOP_RUN:
                self.superlink.stopped.add(node)
                return
        message = self.received[node]
        if message is None:
            self.superlink.askable = event is not Event.UNASKABLE
            outcome = {Event.GONE: "node_gone", Event.KILLED: None}.get(event, "ok")
            got = await self.pull(node, where, proof=node, outcome=outcome)
            self.superlink.askable = True
            if event not in (Event.CUT, Event.GONE, Event.KILLED):
                self.received[node] = got
            return
        self.received[node] = None
        if event is Event.FETCH_FAILS or node in self.superlink.stopped:
            return
        self.superlink.confirmation_lost = event is Event.CONFIRM_LOST
        status = await self.confirm(node, message, where, proof=node)
        self.superlink.confirmation_lost = False
        if status == 0 and event is Event.CONFIRM_LOST:
            # The node asks until it gets an answer; it crashes before, or asks through whatever is there.
            await self.confirm(node, message, where + 1, proof=node)
        self.executed[message] += 1
        assert self.executed[message] == 1, "a message was worked on twice"
        await self.push(node, message, where, proof=node)

    async def quiet(self) -> None:
        """Let all nodes live without faults for long enough."""
        self.clock.now += LEASE
        for turn in range(4 * MESSAGES * DELIVERIES):
            for node in NODES:
                await self.live(Event.STEP, node, turn % (HOSTS * WORKERS))

    def lost(self) -> set[str]:
        """Return the messages that were handed out and nobody worked on."""
        return {message for message in self.superlink.handed_out if not self.executed[message]}


Schedule = list[tuple[Event, int, int]]


def schedules(events: Sequence[Event]) -> st.SearchStrategy[Schedule]:
    where = st.integers(0, HOSTS * WORKERS - 1)
    return st.lists(st.tuples(st.sampled_from(events), st.sampled_from(NODES), where), max_size=40)


async def _run(schedule: Schedule, hosts: int) -> World:
    world = World(hosts)
    await world.heartbeats()
    for event, node, where in schedule:
        await world.live(event, node, where)
    await world.quiet()
    return world


@settings(max_examples=100, deadline=None)
@given(schedules(HARMLESS), st.integers(1, HOSTS))
def test_no_message_is_lost_before_it_was_handed_out_so_often(schedule: Schedule, hosts: int) -> None:
    world = asyncio.run(_run(schedule, hosts))
    lost = {message for message in world.lost() if world.deliveries[message] < DELIVERIES}
    assert lost == set()
    assert all(not waiting for waiting in world.superlink.waiting.values())


@settings(max_examples=100, deadline=None)
@given(schedules(list(Event)), st.integers(1, HOSTS))
def test_whatever_happens_nobody_gets_what_is_not_his_or_twice(schedule: Schedule, hosts: int) -> None:
    world = asyncio.run(_run(schedule, hosts))
    assert all(count == 1 for count in world.superlink.answered.values())
    for message in world.lost():
        node = int(message, 16) // 16
        assert (
            message in world.excused
            or node in world.superlink.stopped
            or world.deliveries[message] >= DELIVERIES
        )


def test_the_model_loses_a_message_that_is_delivered_once() -> None:
    async def run() -> World:
        world = World(1, deliveries=1)
        await world.live(Event.CUT, 1, 0)
        await world.quiet()
        return world

    assert asyncio.run(run()).lost() == {_id(1, 0)}


def test_the_model_works_twice_on_a_message_if_nobody_deletes_what_is_confirmed() -> None:
    async def run() -> None:
        world = World(HOSTS)
        world.superlink.objects = _Everything()
        await world.heartbeats()
        await world.live(Event.STEP, 1, 0)  # the pull passes one host
        await world.live(Event.STEP, 1, WORKERS)  # and the confirmation another
        await world.quiet()

    with pytest.raises(AssertionError, match="twice"):
        asyncio.run(run())


class _Everything(set[str]):
    def __contains__(self, _: object) -> bool:
        return True
