"""No cell of the table ends a node that was not meant to go.

What a node makes of an answer is asked of Flower's own SuperNode where that is installed (HTTP v1), and
otherwise stated anew from what was measured with real processes (legacy REST, flwr 1.32.1; gRPC, flwr 1.39).
"""

from __future__ import annotations

import enum
import os
import random
import threading
import time
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

import flwr.app
import httpx
import pytest
from flwr.app import Metadata, RecordDict
from flwr.proto.fleet_pb2 import DESCRIPTOR
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection
from google.protobuf.message_factory import GetMessageClass

from relay.call import Wire
from relay.dialect import TABLE, Abort, Answer, Drop, Empty, Hold, Status, answer
from relay.fleet import BY_PATH, Kind, Method
from relay.refusal import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

#: Nobody can help these: the same bytes would be refused again.
LASTING = {Reason.FORBIDDEN, Reason.TOO_LARGE, Reason.UPSTREAM_REJECTED}


def by_name(value: object) -> str:
    return value.name.lower() if isinstance(value, enum.Enum) else str(value)


class Fate(enum.Enum):
    """What a node does about an answer."""

    RETRIES = enum.auto()
    HEARS_NOTHING = enum.auto()  # it pulled and there is no message
    GIVES_MESSAGE_UP = enum.auto()  # and polls on
    LEAVES = enum.auto()  # it wanted to, and does
    EXITS = enum.auto()  # it shuts down because it is told to
    DIES = enum.auto()  # as a process or as a zombie
    GOES_SILENT = enum.auto()  # its heartbeats end, and the SuperLink deems it offline
    BELIEVES_IT = enum.auto()  # it takes a default for the SuperLink's answer


# -- HTTP v1: the real SuperNode, over a network that we are ------------------------------------------


class ExitedError(BaseException):
    """The node sent itself SIGINT."""


class DiedError(BaseException):
    """The node gave up connecting."""


class Network:
    """What httpx takes for the network: a SuperLink that answers one method wrongly, twice."""

    TIMES = 2

    def __init__(self, method: Method, wrong: Callable[[], httpx.Response]) -> None:
        self.method = method
        self.wrong = wrong
        self.asked: Counter[Method] = Counter()
        self.recovered = threading.Event()

    def handle(self, request: httpx.Request) -> httpx.Response:
        method = BY_PATH[request.url.path.removeprefix("/v1/fleet/")]
        self.asked[method] += 1
        if method is self.method:
            if self.asked[method] <= self.TIMES:
                return self.wrong()
            self.recovered.set()
        return protobuf(right_answer(method).SerializeToString())


def right_answer(method: Method) -> Any:
    """Return what a SuperLink with no message for the node says."""
    response = GetMessageClass(DESCRIPTOR.services_by_name["Fleet"].methods_by_name[method.rpc].output_type)()
    right = {"node_id": 7, "success": True, "object_found": True, "object_available": True, "stored": True}
    for name, value in right.items():
        if name in response.DESCRIPTOR.fields_by_name:
            setattr(response, name, value)
    return response


def protobuf(body: bytes) -> httpx.Response:
    return httpx.Response(200, content=body, headers={"content-type": "application/protobuf"})


def rendered(given: Answer) -> httpx.Response:
    """Answer as the wire does; a closed connection as httpx tells of it."""
    match given:
        case Status(code):
            return httpx.Response(code, content=b"reason", headers={"content-type": "text/plain"})
        case Empty() | Hold():
            return protobuf(b"")
        case Drop():
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        case Abort():
            raise AssertionError("no HTTP node is told that")


class SuperNode:
    """A real SuperNode's connection, on which it does what leads to a call of `method`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
        self.method = method
        self.thread_ended = threading.Event()
        self.thread_error: BaseException | None = None
        monkeypatch.setattr(os, "kill", self._raise(ExitedError))
        monkeypatch.setattr(fleet_http_connection, "flwr_exit", self._raise(DiedError))
        monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)  # no waiting between two tries
        monkeypatch.setattr(threading, "excepthook", self._note)
        self.monkeypatch = monkeypatch

    @staticmethod
    def _raise(error: type[BaseException]) -> Callable[..., None]:
        def instead(*args: object) -> None:
            raise error(*args)

        return instead

    def _note(self, args: threading.ExceptHookArgs) -> None:
        self.thread_error = args.exc_value
        self.thread_ended.set()

    def fate(self, wrong: Callable[[], httpx.Response]) -> Fate:
        """Return what the node does when the network answers its call with `wrong()`."""
        network = Network(self.method, wrong)
        self.monkeypatch.setattr(httpx.HTTPTransport, "handle_request", network.handle)
        try:
            with fleet_http_connection.http_request_response("superlink:8000", insecure=True) as connection:
                fate = self._inside(network, *connection)
        except ExitedError:
            return Fate.EXITS
        except (DiedError, RunNotRunningException):
            return Fate.DIES
        if fate is not None:
            return fate
        if network.recovered.is_set():
            return Fate.RETRIES
        return Fate.LEAVES if self.method.kind is Kind.LEAVE else Fate.BELIEVES_IT

    def _inside(self, network: Network, _: int, *callbacks: Callable[..., Any]) -> Fate | None:
        """Make the call; return None if it worked in the end."""
        if self.method.kind in (Kind.JOIN, Kind.LEAVE):
            return None
        if self.method.kind is Kind.HEARTBEAT:
            return self._heartbeat(network)
        receive, send, get_run, get_fab, pull_object, push_object, confirm = callbacks
        calls: dict[Method, Callable[[], object]] = {
            Method.PULL_MESSAGES: receive,
            Method.PUSH_MESSAGES: lambda: send(*a_message(), 0.5),
            Method.GET_RUN: lambda: get_run(1),
            Method.GET_FAB: lambda: get_fab("hash", 1),
            Method.PULL_OBJECT: lambda: pull_object(1, "id"),
            Method.PUSH_OBJECT: lambda: push_object(1, "session", "id", b"content"),
            Method.CONFIRM_MESSAGE_RECEIVED: lambda: confirm(1, "id"),
        }
        try:
            calls[self.method]()
        except ExitedError:
            return Fate.EXITS
        except RunNotRunningException:
            return Fate.GIVES_MESSAGE_UP
        except Exception:  # noqa: BLE001 - around these start_client_internal does that, elsewhere it does not
            caught = {Kind.PUSH, Kind.CONFIRM}
            drops = self.method.kind in caught or self.method is Method.PULL_OBJECT
            return Fate.GIVES_MESSAGE_UP if drops else Fate.DIES
        nothing = self.method is Method.PULL_MESSAGES and network.asked[self.method] == 1
        return Fate.HEARS_NOTHING if nothing else None

    def _heartbeat(self, network: Network) -> Fate | None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if self.thread_ended.wait(0.01):
                return Fate.EXITS if isinstance(self.thread_error, ExitedError) else Fate.GOES_SILENT
            if network.recovered.is_set():
                return None
        raise AssertionError("the node sends no heartbeats")


def a_message() -> tuple[Any, Any]:
    message = flwr.app.Message(
        RecordDict(), metadata=Metadata(1, "id", 7, 1, "other", "", time.time(), 60.0, "train")
    )
    return message, get_object_tree(message)


def wished(reason: Reason, kind: Kind) -> Fate:
    """Return what a node is to do when it is refused for `reason`, on every wire that can say it."""
    if reason is Reason.UNAUTHENTICATED:
        return Fate.LEAVES if kind is Kind.LEAVE else Fate.EXITS
    if reason is Reason.STRANGER:
        return Fate.LEAVES if kind is Kind.LEAVE else Fate.RETRIES
    match kind:
        case Kind.PULL:
            return Fate.HEARS_NOTHING
        case Kind.LEAVE:
            return Fate.LEAVES
        case Kind.CONFIRM if reason in LASTING:
            return Fate.BELIEVES_IT  # an empty answer is what a confirmation gets
        case Kind.FETCH | Kind.PUSH if reason in LASTING:
            return Fate.GIVES_MESSAGE_UP
        case _:
            return Fate.RETRIES


@pytest.mark.parametrize("method", Method, ids=by_name)
@pytest.mark.parametrize("reason", Reason, ids=by_name)
def test_a_real_supernode_does_what_is_wished_of_it(
    monkeypatch: pytest.MonkeyPatch, reason: Reason, method: Method
) -> None:
    given = answer(Wire.HTTP_V1, reason, method)
    assert SuperNode(monkeypatch, method).fate(lambda: rendered(given)) is wished(reason, method.kind)


@pytest.mark.parametrize("code", [404, 413, 429, 500])
@pytest.mark.parametrize(
    ("method", "fate"),
    [
        (Method.ACTIVATE_NODE, Fate.DIES),
        (Method.PULL_MESSAGES, Fate.DIES),
        (Method.GET_RUN, Fate.DIES),
        (Method.PULL_OBJECT, Fate.GIVES_MESSAGE_UP),
        (Method.PUSH_OBJECT, Fate.GIVES_MESSAGE_UP),
        (Method.SEND_NODE_HEARTBEAT, Fate.GOES_SILENT),
    ],
    ids=by_name,
)
def test_a_real_supernode_does_not_survive_what_the_table_avoids(
    monkeypatch: pytest.MonkeyPatch, code: int, method: Method, fate: Fate
) -> None:
    """Guards the test above: it can see a node die."""
    assert SuperNode(monkeypatch, method).fate(lambda: rendered(Status(code))) is fate


@pytest.mark.parametrize(
    ("given", "method", "fate"),
    [
        (Status(403), Method.ACTIVATE_NODE, Fate.DIES),
        (Status(403), Method.PULL_MESSAGES, Fate.GIVES_MESSAGE_UP),
        (Status(403), Method.SEND_NODE_HEARTBEAT, Fate.GOES_SILENT),
        (Empty(), Method.ACTIVATE_NODE, Fate.BELIEVES_IT),
        (Empty(), Method.SEND_NODE_HEARTBEAT, Fate.GOES_SILENT),
        (Empty(), Method.PUSH_MESSAGES, Fate.BELIEVES_IT),
        (Empty(), Method.PULL_OBJECT, Fate.GIVES_MESSAGE_UP),
        (Drop(), Method.PULL_MESSAGES, Fate.RETRIES),
        (Drop(), Method.SEND_NODE_HEARTBEAT, Fate.RETRIES),
        (Status(502), Method.PULL_OBJECT, Fate.RETRIES),
        (Status(504), Method.SEND_NODE_HEARTBEAT, Fate.RETRIES),
    ],
    ids=by_name,
)
def test_a_real_supernode_reacts_as_was_measured(
    monkeypatch: pytest.MonkeyPatch, given: Answer, method: Method, fate: Fate
) -> None:
    assert SuperNode(monkeypatch, method).fate(lambda: rendered(given)) is fate


# -- legacy REST: what was measured with flwr 1.32.1 ---------------------------------------------------


def fate_of_a_rest_node(given: Answer, method: Method) -> Fate:
    """Return what flwr 1.32.1 started with --rest does about an answer to its call."""
    match given, method.kind:
        case Empty() | Hold(), Kind.PULL:
            return Fate.HEARS_NOTHING
        case Empty() | Hold(), _:
            return Fate.BELIEVES_IT
        case Drop(), Kind.HEARTBEAT:
            return Fate.GOES_SILENT  # requests.ConnectionError is not caught in that thread
        case Drop(), Kind.LEAVE:
            return Fate.LEAVES  # one try, and the error is caught; a status is not
        case Drop(), _:
            return Fate.RETRIES
        case Status(), Kind.HEARTBEAT:
            return Fate.RETRIES
        case Status(), Kind.PUSH:
            return Fate.GIVES_MESSAGE_UP
        case Status(401), Kind.PULL | Kind.JOIN:
            return Fate.EXITS  # as on any other status, but this one says that it is meant
        case _:
            return Fate.DIES


def wished_of_rest(reason: Reason, kind: Kind) -> Fate:
    """As `wished`, for a wire on which no fetch can be refused for good."""
    if reason is Reason.UNAUTHENTICATED:
        return {
            Kind.PULL: Fate.EXITS,
            Kind.JOIN: Fate.EXITS,
            Kind.PUSH: Fate.GIVES_MESSAGE_UP,
            Kind.LEAVE: Fate.LEAVES,
        }.get(kind, Fate.RETRIES)
    if kind is Kind.FETCH:
        return Fate.RETRIES
    return wished(reason, kind)


@pytest.mark.parametrize("method", Method, ids=by_name)
@pytest.mark.parametrize("reason", Reason, ids=by_name)
def test_a_rest_node_does_what_is_wished_of_it(reason: Reason, method: Method) -> None:
    given = answer(Wire.REST_V0, reason, method)
    assert fate_of_a_rest_node(given, method) is wished_of_rest(reason, method.kind)


# -- gRPC: what was measured with flwr 1.39.0 and 1.32.1 -----------------------------------------------


def fate_of_a_grpc_node(given: Answer, method: Method) -> Fate:
    """Return what flwr 1.39 does about an answer to its call; `tests/contract` asks the real one."""
    match given, method.kind:
        case Empty() | Hold(), Kind.PULL:
            return Fate.HEARS_NOTHING
        case Empty() | Hold(), _:
            return Fate.BELIEVES_IT
        case Abort(_), Kind.LEAVE:
            return Fate.LEAVES
        case Abort("UNAUTHENTICATED"), _:
            return Fate.EXITS
        case Abort("UNAVAILABLE"), _:
            return Fate.RETRIES
        case Abort("PERMISSION_DENIED"), Kind.HEARTBEAT:
            return Fate.GOES_SILENT
        case Abort("PERMISSION_DENIED"), Kind.PULL | Kind.FETCH | Kind.PUSH | Kind.CONFIRM:
            return Fate.GIVES_MESSAGE_UP
        case _:
            return Fate.DIES


@pytest.mark.parametrize("method", Method, ids=by_name)
@pytest.mark.parametrize("reason", Reason, ids=by_name)
def test_a_grpc_node_does_what_is_wished_of_it(reason: Reason, method: Method) -> None:
    given = answer(Wire.GRPC, reason, method)
    assert fate_of_a_grpc_node(given, method) is wished(reason, method.kind)


def fate_of_an_adapter_node(given: Answer, method: Method) -> Fate:
    """Return what flwr 1.39 started with --grpc-adapter does: nothing that it does is ever repeated."""
    match given, method.kind:
        case Empty() | Hold(), Kind.PULL:
            return Fate.HEARS_NOTHING
        case Empty() | Hold(), _:
            return Fate.BELIEVES_IT
        case Abort(_), Kind.LEAVE:
            return Fate.LEAVES
        case Abort("UNAVAILABLE"), Kind.HEARTBEAT:
            return Fate.RETRIES
        case Abort(_), Kind.PUSH | Kind.CONFIRM:
            return Fate.GIVES_MESSAGE_UP
        case Abort(_), _ if method is Method.PULL_OBJECT:
            return Fate.GIVES_MESSAGE_UP
        case Abort(_), Kind.HEARTBEAT:
            return Fate.GOES_SILENT
        case Abort("UNAUTHENTICATED"), _:
            return Fate.EXITS  # as on any other status, but this one says that it is meant
        case _:
            return Fate.DIES


@pytest.mark.parametrize("reason", Reason, ids=by_name)
def test_an_adapter_node_lives_where_it_can(reason: Reason) -> None:
    fates = {
        method: fate_of_an_adapter_node(answer(Wire.GRPC_ADAPTER, reason, method), method)
        for method in Method
    }
    goes = Fate.EXITS if reason is Reason.UNAUTHENTICATED else None
    assert fates[Method.PULL_MESSAGES] is (goes or Fate.HEARS_NOTHING)
    assert fates[Method.ACTIVATE_NODE] is (goes or Fate.DIES)
    assert fates[Method.SEND_NODE_HEARTBEAT] is Fate.RETRIES
    assert fates[Method.CONFIRM_MESSAGE_RECEIVED] is Fate.BELIEVES_IT
    assert fates[Method.DEACTIVATE_NODE] is Fate.LEAVES
    for method in (Method.PULL_OBJECT, Method.PUSH_OBJECT, Method.PUSH_MESSAGES):
        assert fates[method] is Fate.GIVES_MESSAGE_UP


# -- the table as a whole -----------------------------------------------------------------------------


def test_there_is_one_cell_for_every_wire_reason_and_method_and_for_unknown_methods() -> None:
    assert set(TABLE) == set(product(Wire, Reason, (*Method, None)))


@pytest.mark.parametrize("wire", Wire, ids=by_name)
@pytest.mark.parametrize("reason", Reason, ids=by_name)
def test_an_unknown_method_is_refused_in_a_way_that_no_known_call_but_a_rest_heartbeat_dies_of(
    wire: Wire, reason: Reason
) -> None:
    given = answer(wire, reason, None)
    if reason is Reason.UNAUTHENTICATED and wire is Wire.HTTP_V1:
        assert given == Status(401)
    elif reason is Reason.STRANGER and not wire.grpc:
        assert given == Drop()
    elif reason is Reason.UNAUTHENTICATED and wire is Wire.GRPC:
        assert given == Abort("UNAUTHENTICATED")
    else:
        assert given == (
            Abort("UNAVAILABLE") if wire.grpc else {Wire.HTTP_V1: Status(503), Wire.REST_V0: Drop()}[wire]
        )


def test_no_node_is_ever_told_anything_but_these() -> None:
    assert {cell.answer for cell in TABLE.values() if not isinstance(cell.answer, Hold)} == {
        Status(401),
        Status(403),
        Status(503),
        Empty(),
        Drop(),
        Abort("UNAVAILABLE"),
        Abort("PERMISSION_DENIED"),
        Abort("UNAUTHENTICATED"),
    }


def test_each_wire_is_told_in_its_own_words() -> None:
    for (wire, _, _), cell in TABLE.items():
        assert not isinstance(cell.answer, Status | Drop if wire.grpc else Abort)


def test_only_nodes_without_a_timeout_are_held_and_no_longer_than_was_measured() -> None:
    held = {
        (wire, method, cell.answer.seconds)
        for (wire, _, method), cell in TABLE.items()
        if isinstance(cell.answer, Hold)
    }
    assert {(wire, method) for wire, method, _ in held} == {
        (wire, Method.PULL_MESSAGES) for wire in Wire if wire is not Wire.HTTP_V1
    }
    assert all(0 < seconds <= 75 for _, _, seconds in held)


def test_a_stranger_is_told_nothing_but_at_a_heartbeat_which_is_never_closed() -> None:
    told = {
        (wire, method): cell.answer
        for (wire, reason, method), cell in TABLE.items()
        if reason is Reason.STRANGER and cell.answer != Drop() and not wire.grpc
    }
    assert told == {(wire, Method.SEND_NODE_HEARTBEAT): Status(503) for wire in (Wire.HTTP_V1, Wire.REST_V0)}


def test_only_a_reason_that_wishes_it_makes_a_node_go() -> None:
    going = (Status(401), Abort("UNAUTHENTICATED"))
    assert {reason for (_, reason, _), cell in TABLE.items() if cell.answer in going} == {
        Reason.UNAUTHENTICATED
    }


def test_an_empty_message_is_told_where_it_is_a_whole_answer_and_nowhere_else() -> None:
    assert {(wire, method) for (wire, _, method), cell in TABLE.items() if cell.answer == Empty()} == {
        (wire, method) for wire in Wire for method in (Method.PULL_MESSAGES, Method.CONFIRM_MESSAGE_RECEIVED)
    }


def test_every_cell_says_why() -> None:
    assert all(cell.why for cell in TABLE.values())
