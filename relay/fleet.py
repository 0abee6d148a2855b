"""The Fleet API catalogue: what a SuperNode can ask of a SuperLink, written down once.

Twelve methods, the same in every flwr release from 1.23 to 1.42 (field numbers compared over the
`fleet_pb2` descriptors of 1.23, 1.30, 1.32.1, 1.33, 1.39, 1.41 and 1.42: later releases only add
`session_id` to PushObject and PushMessages). Everything that the relay decides by method comes from
here: paths, message types, what may be repeated, what may be cached, where the ids stand in the bytes.
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from relay.wireformat import TruncatedError, fields

if TYPE_CHECKING:
    from typing import Self


class Kind(enum.Enum):
    """What a method means in a node's life; a SuperNode reacts to a failure by kind."""

    JOIN = "join"
    LEAVE = "leave"
    HEARTBEAT = "heartbeat"
    PULL = "pull"
    FETCH = "fetch"
    CONFIRM = "confirm"
    PUSH = "push"


#: Longest request of each kind, in bytes; PUSH carries messages and objects, which are as large as a model.
#: Ids take at most 100 bytes and a public key 300: the rest is room for fields of later releases.
MAX_REQUEST = {
    Kind.JOIN: 16 * 1024,
    Kind.LEAVE: 4 * 1024,
    Kind.HEARTBEAT: 4 * 1024,
    Kind.PULL: 16 * 1024,
    Kind.FETCH: 4 * 1024,
    Kind.CONFIRM: 4 * 1024,
}


class _Ids(NamedTuple):
    """Field numbers of the ids in a request; 0 where the request has none."""

    node: int = 1
    node_is_message: bool = True
    run: int = 0
    object: int = 0


_NONE = _Ids(node=0)
_BARE_NODE = _Ids(node_is_message=False)
_OBJECT = _Ids(run=2, object=3)


#: What the gRPC name of each method begins with.
GRPC_SERVICE = "/flwr.proto.Fleet/"


class Method(enum.Enum):
    """A Fleet method. The value is its RPC name; the attributes are its row of the catalogue.

    Attributes:
        rpc: name in `flwr.proto.Fleet`, e.g. `PullMessages`; also the `method` label of metrics.
        path: last segment of its HTTP path, e.g. `pull-messages`.
        grpc: full gRPC name, e.g. `/flwr.proto.Fleet/PullMessages`.
        request, response: message type names in `flwr.proto.*_pb2`.
        kind: its meaning in a node's life.
        repeatable: sending the same bytes again after an ambiguous failure is safe
            (pull-messages hands a message out once; push-object answers `stored=false` the second
            time; register, activate, deactivate and unregister fail the second time).
        cacheable: two nodes that are entitled to it get the same bytes.
    """

    REGISTER_NODE = ("RegisterNode", Kind.JOIN, _NONE)
    ACTIVATE_NODE = ("ActivateNode", Kind.JOIN, _NONE)
    DEACTIVATE_NODE = ("DeactivateNode", Kind.LEAVE, _BARE_NODE)
    UNREGISTER_NODE = ("UnregisterNode", Kind.LEAVE, _BARE_NODE)
    SEND_NODE_HEARTBEAT = ("SendNodeHeartbeat", Kind.HEARTBEAT, _Ids())
    PULL_MESSAGES = ("PullMessages", Kind.PULL, _Ids())
    PUSH_MESSAGES = ("PushMessages", Kind.PUSH, _Ids())
    GET_RUN = ("GetRun", Kind.FETCH, _Ids(run=2))
    GET_FAB = ("GetFab", Kind.FETCH, _Ids(run=3, object=2))
    PUSH_OBJECT = ("PushObject", Kind.PUSH, _OBJECT)
    PULL_OBJECT = ("PullObject", Kind.FETCH, _OBJECT)
    CONFIRM_MESSAGE_RECEIVED = ("ConfirmMessageReceived", Kind.CONFIRM, _OBJECT)

    def __new__(cls, rpc: str, _kind: Kind, _ids: _Ids) -> Self:
        member = object.__new__(cls)
        member._value_ = rpc
        return member

    def __init__(self, rpc: str, kind: Kind, ids: _Ids) -> None:
        self.rpc = rpc
        self.kind = kind
        self.ids = ids
        self.path = self.name.lower().replace("_", "-")
        self.grpc = f"{GRPC_SERVICE}{rpc}"
        # Registration is the one pair of messages that carries "Fleet" in its name, since the
        # Control API has a RegisterNode of its own.
        fleet = "Fleet" if rpc in {"RegisterNode", "UnregisterNode"} else ""
        self.request = f"{rpc}{fleet}Request"
        self.response = f"{rpc}{fleet}Response"
        self.repeatable = rpc in {
            "SendNodeHeartbeat",
            "GetRun",
            "GetFab",
            "PullObject",
            "PushMessages",
            "ConfirmMessageReceived",
        }
        self.cacheable = rpc in {"GetRun", "GetFab", "PullObject"}

    # Enum hashes by name in Python code; identity is as good and keeps table look-ups cheap.
    __hash__ = object.__hash__


BY_PATH = {method.path: method for method in Method}
BY_GRPC = {method.grpc: method for method in Method}
BY_REQUEST = {method.request: method for method in Method}


class Ids(NamedTuple):
    """The ids that stand at the head of a request; None where absent or not within the bytes seen."""

    node_id: int | None = None
    run_id: int | None = None
    object_id: str | None = None


#: Of a request without any, or that nothing is known of.
NO_IDS = Ids()

# An id stands within the first bytes of every request: node and run take at most 25, an object id 66.
PEEK_BYTES = 256

#: Requests up to this size are polls and heartbeats: a node sends the same bytes each time.
_REPEATED_BYTES = 24


def peek(method: Method, head: bytes) -> Ids:
    """Read the ids from the first bytes of a serialized request, without parsing the message.

    Args:
        method: whose request it is.
        head: its first bytes (PEEK_BYTES are enough), or all of it.

    Returns:
        What was found. Never raises: bytes that are no protobuf give None, so this is for
        routing and logs; it is no validation.
    """
    return (_peek_cached if len(head) <= _REPEATED_BYTES else _peek)(method, head)


def _peek(method: Method, head: bytes) -> Ids:
    at = method.ids
    node: int | None = None
    run: int | None = None
    obj: str | None = None
    seen = 0
    try:
        for number, value in fields(head, (at.node, at.run, at.object)):
            if seen >> number & 1:
                return NO_IDS  # no node repeats one, and who reads it next may take the other
            seen |= 1 << number
            if number == at.node:
                node = _node_id(value) if at.node_is_message else _uint(value)
            elif number == at.run:
                run = _uint(value)
            elif isinstance(value, bytes):
                obj = value.decode("ascii")
    except (TruncatedError, UnicodeDecodeError):
        pass
    return Ids(node, run, obj)


_peek_cached = lru_cache(maxsize=16384)(_peek)


def _uint(value: int | bytes) -> int | None:
    return value if isinstance(value, int) else None


def _node_id(value: int | bytes) -> int | None:
    found: int | None = None
    if isinstance(value, bytes):
        for number, inner in fields(value):
            if number == 1:
                if found is not None:
                    return None
                found = _uint(inner)
    return found
