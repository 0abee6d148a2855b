"""Calls that are signed as SuperNodes sign them: by Flower's own code."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from relay.wireformat import encode_bytes, encode_uint

if TYPE_CHECKING:
    from relay.call import Metadata


@dataclass
class Node:
    """A node with a key of its own."""

    node_id: int = 0x8000_0000_0000_0001
    pair: Any = field(default_factory=generate_key_pairs)

    @property
    def pem(self) -> bytes:
        """The public key as a SuperLink knows it."""
        return bytes(public_key_to_bytes(self.pair[1]))

    @property
    def ssh(self) -> str:
        """The public key as ssh-keygen writes it to a .pub file."""
        line: bytes = self.pair[1].public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        return line.decode()

    @property
    def body(self) -> bytes:
        """The request body of a pull."""
        return encode_bytes(1, encode_uint(1, self.node_id))

    def headers(self) -> Metadata:
        """Return the headers that Flower's own interceptor puts on a request."""
        request = httpx.Request("POST", "http://localhost/")
        interceptor = NodeAuthHttpInterceptor(*self.pair)
        interceptor.intercept(SimpleNamespace(request=request), lambda _: None)
        return [(name, value) for name, value in request.headers.raw if name.lower().startswith(b"flwr-")]

    def proof(self, timestamp: str | None = None, *, age: float = 0.0, by: Node | None = None) -> Metadata:
        """Return headers with a timestamp of the test's choice, signed by another node's key if told to."""
        if timestamp is None:
            timestamp = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
        signature = sign_message((by or self).pair[0], timestamp.encode())
        return [
            (b"flwr-public-key", b64encode(self.pem)),
            (b"flwr-timestamp", timestamp.encode()),
            (b"flwr-signature", b64encode(signature)),
        ]
