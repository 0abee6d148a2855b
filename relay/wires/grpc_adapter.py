"""gRPC adapter: nodes of flwr 1.23 to 1.39 started with --grpc-adapter, `flwr.proto.GrpcAdapter/SendReceive`.

One method carries all others: the request and the answer travel in a MessageContainer, by the name of their
type. It is read and written here byte by byte, so that the message in it is not parsed.

Source: flwr 1.39 `client/grpc_rere_client/grpc_adapter.py` and `proto/grpcadapter_pb2.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from relay.fleet import BY_REQUEST, Method
from relay.wireformat import TruncatedError, bytes_head, encode_bytes, fields

PATH = "/flwr.proto.GrpcAdapter/SendReceive"

#: Field numbers of MessageContainer.
_METADATA, _NAME, _CONTENT = 1, 2, 3

#: Where the types of the answers are defined; the rest is in `fleet_pb2`.
_MODULES = {
    Method.GET_RUN: "run_pb2",
    Method.GET_FAB: "fab_pb2",
    Method.SEND_NODE_HEARTBEAT: "heartbeat_pb2",
    Method.PUSH_OBJECT: "message_pb2",
    Method.PULL_OBJECT: "message_pb2",
    Method.CONFIRM_MESSAGE_RECEIVED: "message_pb2",
}


class Contained(NamedTuple):
    """What came in a container.

    Attributes:
        method: None if its request is none of the Fleet API's, or the container is broken.
        name: the type that it names, for the log.
        data: the request.
    """

    method: Method | None
    name: str
    data: bytes


def unpack(container: bytes) -> Contained:
    """Take the request out of its container. Never raises."""
    name = data = b""
    try:
        for number, value in fields(container):
            if number == _NAME and isinstance(value, bytes):
                name = value
            elif number == _CONTENT and isinstance(value, bytes):
                data = value
    except TruncatedError:
        return Contained(None, "", b"")
    text = name.decode("utf-8", "replace")
    return Contained(BY_REQUEST.get(text), text, data)


def head(method: Method, size: int) -> bytes:
    """Return what stands in a container before an answer of `size` bytes to `method`, its last field."""
    return _HEADS[method] + bytes_head(_CONTENT, size)


def _head(method: Method) -> bytes:
    module = f"flwr.proto.{_MODULES.get(method, 'fleet_pb2')}"
    metadata = {"grpc-message-module": module, "grpc-message-qualname": method.response}
    entries = [
        encode_bytes(_METADATA, encode_bytes(1, key.encode()) + encode_bytes(2, value.encode()))
        for key, value in metadata.items()
    ]
    return b"".join((*entries, encode_bytes(_NAME, method.response.encode())))


_HEADS = {method: _head(method) for method in Method}
