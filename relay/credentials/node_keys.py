"""Which node keys are allowed, and whether a call was signed with one of them.

The rules are those of the SuperLink (flwr 1.42 `superlink/routers/fleet/node_auth.py`, and for gRPC
`server/superlink/fleet/grpc_rere/node_auth_server_interceptor.py`), so that the relay refuses nobody whom the
SuperLink would let in:

- the timestamp is ISO 8601 with an offset, and its age is above -SYSTEM_TIME_TOLERANCE (5 s) and below
  TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE (300 s + 5 s; `common/constant.py`);
- the signature is ECDSA with SHA-256 over the timestamp's text.

That the key belongs to the node id of the call is for the SuperLink to say (`relay.stores.accepted`).

Verifying costs about 0.33 ms, and stays on the event loop: `cryptography` keeps the GIL while it verifies, so
that a thread would stop the loop for as long, and cost twice the time (measured: 0.33 ms inline, 0.61 ms in a
thread, and of two threads together as many as of one). Nodes sign each request anew, so a signature that
comes again is a repeat; it is remembered and costs some us.
"""

from __future__ import annotations

import hashlib
import time
from base64 import b64decode
from collections import OrderedDict
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from relay.credentials.allowed_keys import CURVES, AllowedKey, fingerprint
from relay.proof import NodeProof, ProofError
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from relay.call import Call
    from relay.stores.watched import Watched

NAME = "node_signature"

_ECDSA = ec.ECDSA(SHA256())
#: Keys that are kept parsed, and proofs that are kept verified, per worker: about 1 KiB each.
_KEYS = 4096
_PROOFS = 1024
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


class NodeKey(NamedTuple):
    """A node's public key.

    Attributes:
        public: the key.
        fingerprint: as OpenSSH writes it; the same for all ways to write the key down.
        digest: the SHA-256 that the fingerprint shows.
    """

    public: ec.EllipticCurvePublicKey
    fingerprint: str
    digest: bytes


class KeyFormatError(ValueError):
    """Some bytes are no public key of a node; the text says what would be right."""


def read_key(text: bytes) -> tuple[NodeKey, str, bytes]:
    """Read a public key from PEM or from OpenSSH's format (a `.pub` file).

    Returns:
        The key, its type and its binary form as in OpenSSH's format.

    Raises:
        KeyFormatError: it is none, or of another algorithm or curve than nodes use.
    """
    if b"PRIVATE KEY" in text:
        raise KeyFormatError("is a private key, which stays on its node: give the public one (.pub)")
    try:
        loaded = load_pem_public_key(text) if text.startswith(b"-----") else load_ssh_public_key(text)
        if not isinstance(loaded, ec.EllipticCurvePublicKey) or not isinstance(loaded.curve, _CURVES):
            raise KeyFormatError(f"must be an EC key of {', '.join(CURVES)}")
        key_type, blob = loaded.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[:2]
    except KeyFormatError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFormatError("must be a public key in PEM or OpenSSH format") from None
    decoded = b64decode(blob)
    digest = hashlib.sha256(decoded).digest()
    return NodeKey(loaded, fingerprint(digest), digest), key_type.decode(), decoded


@lru_cache(maxsize=_KEYS)
def node_key(pem: bytes) -> NodeKey:
    """Return the key of a proof; the ones that are in use are kept. Raises KeyFormatError."""
    if not pem.startswith(b"-----BEGIN PUBLIC KEY-----"):
        raise KeyFormatError("must be PEM")  # the one form that nodes send, and a SuperLink reads
    return read_key(pem)[0]


class NodeKeys:
    """Says whether a call was signed by the key that it shows, and whether that key is allowed."""

    def __init__(
        self,
        *,
        window: float = 300.0,
        ahead: float = 5.0,
        allowed: Watched[Mapping[str, AllowedKey] | None] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Verify by these rules.

        Args:
            window: seconds for which a signature is valid; `ahead` is added, as a SuperLink does.
            ahead: seconds by which a node's clock may be wrong.
            allowed: keys that are allowed, by fingerprint; None for any.
            now: this host's clock, in seconds since 1970.
        """
        self._oldest = window + ahead
        self._ahead = ahead
        self._allowed = allowed
        self._now = now
        self._verified: OrderedDict[NodeProof, None] = OrderedDict()

    def tick(self) -> None:
        """Look whether the list of allowed keys has changed; to be called once a second."""
        if self._allowed is not None:
            self._allowed.tick()

    def ensure_verified(self, call: Call) -> AllowedKey:
        """Return whose key has signed this call. It costs 0.33 ms the first time, and some us after that.

        For any policy that answers a call itself with something that only nodes may have.

        Raises:
            Refusal: see `ensure_allowed`; with the cause `signature` if it is not the key's.
        """
        owner = self.ensure_allowed(call)
        if call.proved:
            return owner
        proof = call.proof
        assert proof is not None  # noqa: S101 - else `ensure_allowed` would have raised
        if proof in self._verified:
            self._verified.move_to_end(proof)
        else:
            try:
                node_key(proof.public_key).public.verify(
                    proof.signature, proof.timestamp.encode("ascii"), _ECDSA
                )
            except InvalidSignature:
                raise _wrong("signature", "the signature is not of this key and timestamp") from None
            self._verified[proof] = None
            if len(self._verified) > _PROOFS:
                self._verified.popitem(last=False)
        call.proved = True
        return owner

    def ensure_allowed(self, call: Call) -> AllowedKey:
        """Return whose key this call shows, without a look at the signature; a SuperLink will look at it.

        Raises:
            Refusal: UNAUTHENTICATED, with the cause `missing` (there is no proof), `malformed` or
                `not_allowed`; UPSTREAM_DOWN with the cause `clock` (its timestamp is too old, or ahead of
                this host's clock, which may be wrong itself), or if nobody knows which keys are allowed,
                because the list could not be read yet.
        """
        try:
            proof = call.proof
            if proof is None:
                raise _wrong("missing", "no node signature")
            key = node_key(proof.public_key)
        except (ProofError, KeyFormatError) as error:
            raise _wrong("malformed", f"node signature: {error}") from None
        owner = self._owner(key)
        self._ensure_fresh(proof)
        return owner

    def _owner(self, key: NodeKey) -> AllowedKey:
        if self._allowed is None:
            return AllowedKey(key.fingerprint, key.fingerprint)
        known = self._allowed.value
        if known is None:
            raise Refusal(Reason.UPSTREAM_DOWN, "node_keys.allow could not be read yet", by=NAME, sent=False)
        owner = known.get(key.fingerprint)
        if owner is None:
            raise _wrong("not_allowed", f"{key.fingerprint} is not in node_keys.allow")
        return owner

    def _ensure_fresh(self, proof: NodeProof) -> None:
        try:
            signed = datetime.fromisoformat(proof.timestamp)
            if signed.tzinfo is None:
                raise ValueError("no offset")
            age = self._now() - signed.timestamp()
        except (ValueError, OverflowError):
            raise _wrong("malformed", "a timestamp that is not ISO 8601 with an offset") from None
        if not -self._ahead < age < self._oldest:
            way = f"{age:.1f} s old" if age > 0 else f"{-age:.1f} s ahead of this host's clock"
            # It may be this host's clock that is wrong, and a 401 would then end every node that signs.
            raise Refusal(Reason.UPSTREAM_DOWN, f"the signature is {way}", by=NAME, sent=False, cause="clock")


def _wrong(cause: str, detail: str) -> Refusal:
    return Refusal(Reason.UNAUTHENTICATED, detail, by=NAME, sent=False, cause=cause)
