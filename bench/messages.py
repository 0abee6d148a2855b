"""The Fleet messages, HTTP heads and gRPC metadata of the benchmark, rendered to bytes.

Encoded by hand because load generator and stub must start fast; the tests compare them with Flower's own
message classes. Field numbers: flwr/proto/fleet.proto, message.proto and node.proto.
"""

import base64
import hashlib
import struct
from typing import Final

PULL_MESSAGES: Final = "/v1/fleet/pull-messages"
HEARTBEAT: Final = "/v1/fleet/send-node-heartbeat"
PULL_OBJECT: Final = "/v1/fleet/pull-object"
PUSH_OBJECT: Final = "/v1/fleet/push-object"

#: The gRPC names of the methods at these paths.
GRPC: Final = {
    PULL_MESSAGES: "/flwr.proto.Fleet/PullMessages",
    HEARTBEAT: "/flwr.proto.Fleet/SendNodeHeartbeat",
    PULL_OBJECT: "/flwr.proto.Fleet/PullObject",
    PUSH_OBJECT: "/flwr.proto.Fleet/PushObject",
}
PUBLIC_KEY: Final = "flwr-public-key-bin"  # the name of a node's key in gRPC metadata

STORED: Final = b"\x08\x01"  # PushObjectResponse(stored=True)
BEATEN: Final = b"\x08\x01"  # SendNodeHeartbeatResponse(success=True)
RUN_ID: Final = 0x0123456789ABCDEF
FIRST_NODE_ID: Final = (
    1 << 63
)  # ten bytes as a varint, so a pull-messages body has the 13 bytes of a real one


def varint(number: int) -> bytes:
    """`number` (not negative) as a protobuf varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _uint(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _bytes_head(field: int, length: int) -> bytes:
    return varint(field << 3 | 2) + varint(length)


def _node(node_id: int) -> bytes:
    node = _uint(1, node_id)
    return _bytes_head(1, len(node)) + node


def pull_messages_request(node_id: int) -> bytes:
    """PullMessagesRequest of one node; its empty answer is zero bytes."""
    return _node(node_id)


def heartbeat_request(node_id: int) -> bytes:
    """SendNodeHeartbeatRequest of one node, with Flower's interval of 30 s."""
    return _node(node_id) + varint(2 << 3 | 1) + struct.pack("<d", 30.0)


def pull_object_request(node_id: int, object_id: str) -> bytes:
    """PullObjectRequest for `object_id` (64 hex digits)."""
    return _node(node_id) + _uint(2, RUN_ID) + _bytes_head(3, len(object_id)) + object_id.encode()


def pull_object_response(content: bytes) -> bytes:
    """PullObjectResponse: found, available, `content`."""
    return _uint(1, 1) + _uint(2, 1) + _bytes_head(3, len(content)) + content


def push_object_prefix(node_id: int, object_id: str, content_length: int) -> bytes:
    """PushObjectRequest up to its content: the content goes last, so that all nodes share one copy of it.

    The length of the result depends on `content_length` only.
    """
    return pull_object_request(node_id, object_id) + _bytes_head(4, content_length)


def content_of(size: int) -> bytes:
    """`size` bytes, the same in every process, that no compression shrinks."""
    return hashlib.shake_256(b"flwr-relay benchmark").digest(size)


def object_id_of(content: bytes) -> str:
    """Flower's object id: the SHA-256 of the content."""
    return hashlib.sha256(content).hexdigest()


def _random(seed: str, size: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


def _text(seed: str, size: int) -> str:
    return base64.b64encode(_random(seed, size)).decode()


def metadata(node_id: int) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of a SuperNode's call over gRPC (flwr 1.39): `request_head` with raw key and signature."""
    return (
        ("flwr-package-name", "flwr"),
        ("flwr-package-version", "1.39.0"),
        ("flwr-component-name", "SuperNode"),
        (PUBLIC_KEY, _random(f"key {node_id}", 215)),
        ("flwr-timestamp", "2026-01-01T00:00:00.000000+00:00"),
        ("flwr-signature-bin", _random(f"signature {node_id}", 103)),
    )


def request_head(*, path: str, node_id: int, content_length: int, host: str) -> bytes:
    """The head of a SuperNode's request (flwr 1.42 over httpx), with a proof as long as one of a P-384 key.

    The proof is not valid: the SuperLink of the benchmark does not check it and neither may the proxies.
    """
    lines = (
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Accept: application/protobuf",
        "Accept-Encoding: gzip, deflate",
        "Connection: keep-alive",
        "User-Agent: python-httpx/0.28.1",
        "content-type: application/protobuf",
        "flwr-package-name: flwr",
        "flwr-package-version: 1.42.0",
        "flwr-component-name: SuperNode",
        f"flwr-public-key: {_text(f'key {node_id}', 215)}",
        "flwr-timestamp: 2026-01-01T00:00:00.000000+00:00",
        f"flwr-signature: {_text(f'signature {node_id}', 103)}",
        f"Content-Length: {content_length}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def response(body: bytes) -> bytes:
    """A whole 200 of the stub, with the headers of the SuperLink's uvicorn."""
    lines = (
        "HTTP/1.1 200 OK",
        "date: Thu, 01 Jan 2026 00:00:00 GMT",
        "server: uvicorn",
        f"content-length: {len(body)}",
        "content-type: application/protobuf",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def refusal(text: str) -> bytes:
    """A 400 that tells the load generator what the stub did not like; the connection ends with it."""
    body = text.encode()
    lines = (
        "HTTP/1.1 400 Bad Request",
        f"content-length: {len(body)}",
        "content-type: text/plain",
        "connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
