"""A relay whose SuperLink is scripted: the real HTTP front, and behind it answers that a test decides.

What a node gets for a refusal is therefore written by the relay's own code, byte for byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import zipfile
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import DESCRIPTOR, PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.run_pb2 import Run
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from google.protobuf.message_factory import GetMessageClass

from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Kind, Method, peek
from relay.limits import Limits, bodies
from relay.quota import Quota
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_fleet import GrpcFront
from relay.wires.grpc_request import Receiver as GrpcReceiver
from relay.wires.grpc_server import GrpcServer
from relay.wires.http import Front, Route
from relay.wires.http_request import CONTENT_TYPE, Receiver
from relay.wires.http_server import NodeServer
from relay.wires.http_v1 import HTTP_V1
from relay.wires.rest_v0 import REST_V0

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from relay.call import Call

    #: Answers a call wrongly, or raises Refusal. It is given what makes the right answer.
    Fault = Callable[[Callable[[], Awaitable[Reply]]], Awaitable[Reply]]

NODE_ID = 7
#: One message each. One more than a fault is given times, so that the last one is always handled rightly.
RUNS = (1, 2, 3)
FAULTS = len(RUNS) - 1

_SPECS = {spec.wire: spec for spec in (HTTP_V1, REST_V0)}
_APP = {
    "pyproject.toml": """\
[project]
name = "answering"
version = "1.0.0"
description = "Answers with nothing."
license = "Apache-2.0"
dependencies = ["flwr>=1.32"]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "answering.app:server"
clientapp = "answering.app:client"
""",
    "answering/__init__.py": "",
    "answering/app.py": """\
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client = ClientApp()
server = ServerApp()
@client.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
""",
}


class _Task(NamedTuple):
    """A message to the node, and what belongs to it."""

    proto: Any
    tree: Any
    objects: dict[str, bytes]


def _task(run_id: int) -> _Task:
    """Return a train message of this run, with an object within an object."""
    message = Message(
        RecordDict({"config": ConfigRecord({"rate": 0.1})}),
        metadata=Metadata(run_id, "", 1, NODE_ID, "", "", time.time(), 3600.0, "train"),
    )
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
    return _Task(message_to_proto(message), get_object_tree(message), objects)


def _fab() -> bytes:
    """Return the app as a FAB: a ZIP with a list of what is in it, as `flwr build` makes it."""
    file = io.BytesIO()
    content = []
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in _APP.items():
            archive.writestr(path, text)
            content.append(f"{path},{hashlib.sha256(text.encode()).hexdigest()},{len(text) * 8}")
        archive.writestr(".info/CONTENT", "\n".join(content))
    return file.getvalue()


_FAB = _fab()
_FAB_HASH = hashlib.sha256(_FAB).hexdigest()


class SuperLink:
    """Has a message of each of RUNS for its one node, and answers one method wrongly the first times.

    Attributes:
        wire, method: what the node speaks, and the method whose calls fail.
        asked: how often each method was called.
        served: how often each was answered rightly.
        answered: runs whose message the node has answered, to the last object.
        faults: wrong answers given.
        empty_polls: polls since there are no more messages.
        heartbeats_in_a_row: heartbeats since the last call that was none.
        on_call: called when a call has been dealt with.
    """

    def __init__(self, wire: Wire, method: Method, fault: Fault) -> None:
        self.wire = wire
        self.method = method
        self.asked: Counter[Method] = Counter()
        self.served: Counter[Method] = Counter()
        self.answered: set[int] = set()
        self.faults = 0
        self.empty_polls = 0
        self.heartbeats_in_a_row = 0
        self.on_call: Callable[[], None] = lambda: None
        self._fault = fault
        self._waiting = [_task(run) for run in RUNS]
        self._objects = {key: value for task in self._waiting for key, value in task.objects.items()}
        self._wanted: dict[int, set[str]] = {}

    async def handle(self, method: Method, call: Call) -> Reply:
        """Answer a call."""
        self.asked[method] += 1
        self.heartbeats_in_a_row = self.heartbeats_in_a_row + 1 if method.kind is Kind.HEARTBEAT else 0
        try:
            if method is self.method and self.faults < FAULTS:
                self.faults += 1
                return await self._fault(partial(self._right, method, call))
            reply = await self._right(method, call)
            self.served[method] += 1
            return reply
        finally:
            self.on_call()

    async def _right(self, method: Method, call: Call) -> Reply:
        data = await call.payload.read(1 << 20)
        # A node whose activation was answered with no bytes takes itself for node 0.
        stranger = method.kind is not Kind.JOIN and peek(method, data).node_id != NODE_ID
        if stranger and method.kind is not Kind.HEARTBEAT and self.wire is not Wire.REST_V0:
            return http(401, b"text/plain", b"not this node's key")
        service = DESCRIPTOR.services_by_name["Fleet"]
        response = GetMessageClass(service.methods_by_name[method.rpc].output_type)()
        self._fill(method, data, response, stranger=stranger)
        return http(200, CONTENT_TYPE, response.SerializeToString())

    def _fill(self, method: Method, data: bytes, response: Any, *, stranger: bool) -> None:
        match method:
            case Method.REGISTER_NODE | Method.ACTIVATE_NODE:
                response.node_id = NODE_ID
            case Method.SEND_NODE_HEARTBEAT:
                response.success = not stranger
            case Method.PULL_MESSAGES:
                if self._waiting and not stranger:
                    task = self._waiting.pop(0)
                    response.messages_list.append(task.proto)
                    response.message_object_trees.append(task.tree)
                else:
                    self.empty_polls += 1
            case Method.GET_RUN:
                response.run.CopyFrom(_run(peek(method, data).run_id or 0))
            case Method.GET_FAB:
                if peek(method, data).object_id == _FAB_HASH:
                    response.fab.CopyFrom(Fab(hash_str=_FAB_HASH, content=_FAB))
            case Method.PULL_OBJECT:
                response.object_found = response.object_available = True
                response.object_content = self._objects[peek(method, data).object_id or ""]
            case Method.PUSH_MESSAGES:
                messages = PushMessagesRequest.FromString(data)
                wanted = set(_ids(messages.message_object_trees[0]))
                self._wanted[messages.messages_list[0].metadata.run_id] = wanted
                response.objects_to_push.extend(wanted)
            case Method.PUSH_OBJECT:
                response.stored = True
                pushed = PushObjectRequest.FromString(data)
                wanted = self._wanted[pushed.run_id]
                wanted.discard(pushed.object_id)
                if not wanted:
                    self.answered.add(pushed.run_id)
            case Method.CONFIRM_MESSAGE_RECEIVED | Method.DEACTIVATE_NODE | Method.UNREGISTER_NODE:
                pass


def _run(run_id: int) -> Any:
    return Run(
        run_id=run_id, fab_id="tests/answering", fab_version="1.0.0", fab_hash=_FAB_HASH, series_id=run_id
    )


def _ids(tree: Any) -> list[str]:
    return [tree.object_id, *(found for child in tree.children for found in _ids(child))]


def http(status: int, content_type: bytes, body: bytes) -> Reply:
    """Return an answer as a SuperLink, or something before it, could give it."""
    return Reply(Payload(body), Source.UPSTREAM, status=status, metadata=[(b"content-type", content_type)])


@asynccontextmanager
async def relay(superlink: SuperLink) -> AsyncIterator[str]:
    """Serve nodes of the SuperLink's wire on a loopback port; give the address."""
    if superlink.wire.grpc:
        async with _grpc_relay(superlink) as address:
            yield address
        return
    spec = _SPECS[superlink.wire]
    routes = {
        spec.prefix + method.path: Route(spec, method, partial(superlink.handle, method)) for method in Method
    }
    receiver = Receiver(Forwarding(()), Limits(bodies(1 << 20)), idle_timeout=30.0)
    front = Front(routes, receiver, idle_timeout=30.0, on_stray=lambda _: None)
    server = NodeServer(front, keepalive=75.0)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        host, port = listener.sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        listener.close()
        await server.shutdown(0.0)


@asynccontextmanager
async def _grpc_relay(superlink: SuperLink) -> AsyncIterator[str]:
    handlers = {(superlink.wire, method): partial(superlink.handle, method) for method in Method}
    front = GrpcFront(
        handlers,
        GrpcReceiver(Forwarding(()), Limits(dict.fromkeys(Method, 1 << 20)), 30.0),
        Quota(1 << 30),
        idle_timeout=30.0,
        on_stray=lambda _: None,
    )
    server = GrpcServer(front, "127.0.0.1", 0, keepalive=75.0)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.drain(0.0)
