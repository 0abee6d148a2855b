"""What a node shows to prove which key it holds: its public key, a timestamp, and its signature over that.

The signature covers the timestamp alone, so the same proof can travel on any wire, and a policy may look at
it as a typed value. Nothing is verified here (`relay.credentials.node_signature` does that).

Source: flwr 1.42 `supernode/node_auth_http_interceptor.py` makes the headers, for each request anew, and
`superlink/routers/fleet/node_auth.py` reads them. On HTTP v1 key and signature are base64. Legacy REST
carries none.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

PUBLIC_KEY = b"flwr-public-key"
TIMESTAMP = b"flwr-timestamp"
SIGNATURE = b"flwr-signature"

#: A key of P-384 is 215 bytes of PEM, of P-521 268; a signature of P-521 at most 139; a timestamp 32.
MOST_KEY_BYTES = 1024
MOST_SIGNATURE_BYTES = 256
MOST_TIMESTAMP_BYTES = 64

_NAMES = frozenset({PUBLIC_KEY, TIMESTAMP, SIGNATURE})


class ProofError(Exception):
    """A proof is there and cannot be read; the text says why, without repeating it."""


class NodeProof(NamedTuple):
    """A node's proof as it came.

    Attributes:
        public_key: PEM, byte for byte as the SuperLink knows it.
        timestamp: ISO 8601; the text that was signed.
        signature: ECDSA with SHA-256 over `timestamp`, in DER.
    """

    public_key: bytes
    timestamp: str
    signature: bytes

    @classmethod
    def of_http(cls, metadata: Iterable[tuple[bytes, bytes]]) -> Self | None:
        """Read the proof from the headers of an HTTP v1 call; None if there is no trace of one.

        Raises:
            ProofError: a part is absent, repeated, not base64 or too long. (Of a repeated header a SuperLink
                takes the first one; whoever sends two wants somebody to take the other.)
        """
        found: dict[bytes, bytes] = {}
        for name, value in metadata:
            # By length first: the lower case of each name of each call would cost more than all the rest.
            if len(name) in (14, 15) and (lower := name.lower()) in _NAMES:
                if lower in found:
                    raise ProofError(f"{lower.decode()} is given twice")
                found[lower] = value
        if not found:
            return None
        return cls.of_parts(
            _binary(found, PUBLIC_KEY, MOST_KEY_BYTES),
            found.get(TIMESTAMP, b""),
            _binary(found, SIGNATURE, MOST_SIGNATURE_BYTES),
        )

    @classmethod
    def of_parts(cls, public_key: bytes, timestamp: bytes, signature: bytes) -> Self:
        """Make a proof of its parts as bytes, which is how gRPC carries them. Raises ProofError."""
        if not 0 < len(public_key) <= MOST_KEY_BYTES:
            raise ProofError(f"public key of {len(public_key)} bytes")
        if not 0 < len(signature) <= MOST_SIGNATURE_BYTES:
            raise ProofError(f"signature of {len(signature)} bytes")
        if not 0 < len(timestamp) <= MOST_TIMESTAMP_BYTES:
            raise ProofError(f"timestamp of {len(timestamp)} bytes")
        try:
            return cls(public_key, timestamp.decode("ascii"), signature)
        except UnicodeDecodeError:
            raise ProofError("timestamp that is not ASCII") from None


def _binary(found: dict[bytes, bytes], name: bytes, most: int) -> bytes:
    text = found.get(name, b"")
    if len(text) > most * 4 // 3 + 4:
        raise ProofError(f"{name.decode()} of {len(text)} bytes")
    try:
        return b64decode(text, validate=True)
    except binascii.Error:
        raise ProofError(f"{name.decode()} is not base64") from None
