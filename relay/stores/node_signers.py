"""The key pairs by which the relay signs in the name of nodes that cannot, and whose nodes they are.

Nothing but one secret is kept of them. The private key of a node is derived (HKDF-SHA256, RFC 5869, to a
P-384 scalar) from that secret, from the public key that the node itself sends when it registers and
activates, and from the identity of its caller. So every worker of every relay with the same secret comes to
the same key, also where register-node and activate-node meet different ones, and a caller with another
credential comes to another key, whatever it sends. Key pairs that were drawn and stored would have to be
agreed upon by all workers before the first call of a node, and each of them would have to be guarded.

A later call names its node by an id alone, which the SuperLink has chosen. So what leads from the id to the
key is written down when the SuperLink has activated a node: one small file, which holds no secret. All
workers find it, a restarted relay finds it, and so do other relays, if the directory is on a file system
that they share.

    <directory>            0700
        secret             0600; 64 hexadecimal digits. Drawn by the first worker that finds none
        nodes/<node id>    0600; {"owner": {"tenant": ..., "name": ...} or null, "key": SHA-256 of the node's
                           own public key, in hexadecimal}

Files are written under another name and then renamed, so that nobody reads half a one. To part with a node,
remove its file: within a minute it is refused, and exits. Without the secret all of them would have to
register anew. A node that has not been heard of for `forget_after` is forgotten; not at once after a start or
a step of the clock, by which all of them might look forgotten: those that live are heard of in time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from typing import Self

_SECRET_BYTES = 32
#: Order of P-384, and 8 bytes more than it has, so that the remainder is without a bias (FIPS 186-5, A.2.1).
_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
_SCALAR_BYTES = 56
_PURPOSE = b"flwr-relay signing v1"
#: A file of a node that is in use is touched once a day; as often forgotten ones are looked for.
_DAY = 24 * 3600.0
_HALF = ".half-"
#: After a start, or a step of the clock, the file of each node that lives is touched within this time.
_CALM = 600.0
#: More than this between the clock and a steady one is a step.
_STEP = 60.0
#: A secret is new for so long.
_NEW = 600.0


class StoreError(Exception):
    """The directory cannot be used, or not any more; the text says why."""


class Owner(NamedTuple):
    """Whose node it is: what counts of an `Identity`."""

    tenant: str
    name: str


class Node(NamedTuple):
    """What a key pair is derived from, besides the secret.

    Attributes:
        owner: who registered it; None where callers are not asked who they are.
        key: SHA-256 of the public key that the node itself has sent, lower-case hexadecimal.
    """

    owner: Owner | None
    key: str

    @classmethod
    def of(cls, owner: Owner | None, public_key: bytes) -> Self:
        """Return the node that sends this public key."""
        return cls(owner, hashlib.sha256(public_key).hexdigest())


class Signer:
    """A key pair.

    Attributes:
        public_key: PEM, as Flower sends it.
    """

    __slots__ = ("_private_key", "public_key")

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        """Sign with this key."""
        self._private_key = private_key
        self.public_key = private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, message: bytes) -> bytes:
        """Return the signature (ECDSA with SHA-256, DER) as Flower makes it; about 0.3 ms of CPU."""
        return self._private_key.sign(message, ec.ECDSA(hashes.SHA256()))


class NodeSigners:
    """The directory. Every method waits for the disk, so call them off the event loop. Raises StoreError."""

    def __init__(self, directory: Path, forget_after: float) -> None:
        """Keep to `directory`; `forget_after` is in seconds."""
        self._directory = directory
        self._secret_file = directory / "secret"
        self._nodes = directory / "nodes"
        self._forget_after = forget_after
        self._secret = b""
        self._next_sweep = 0.0
        self._ahead: float | None = None

    def derive(self, node: Node) -> Signer:
        """Return the key pair of `node`; about 0.3 ms of CPU."""
        owner = b"\0"
        if node.owner is not None:
            tenant, name = (part.encode() for part in node.owner)
            owner = b"\1" + len(tenant).to_bytes(4) + tenant + name
        info = _PURPOSE + bytes.fromhex(node.key) + owner
        material = HKDF(hashes.SHA256(), _SCALAR_BYTES, salt=None, info=info).derive(self._open())
        scalar = int.from_bytes(material) % (_ORDER - 1) + 1
        return Signer(ec.derive_private_key(scalar, ec.SECP384R1()))

    def find(self, node_id: int) -> Node | None:
        """Return the node of this id; None if there is none.

        Raises:
            StoreError: nobody can say: the directory is not there, or is another one, or the file is damaged.
        """
        secret = self._open()
        path = self._nodes / str(node_id)
        try:
            data = path.read_bytes()
            if time.time() - path.stat().st_mtime > _DAY:
                os.utime(path)
        except FileNotFoundError:
            # Where a file system is not mounted there is none, or an empty directory with a secret that was
            # drawn for it just now; neither must cost the nodes their lives.
            self._doubt(secret)
            return None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        node = _parsed(data)
        if node is None:
            raise StoreError(f"{path} is damaged")
        return node

    def put(self, node_id: int, node: Node) -> None:
        """Write down that the SuperLink has activated `node` by this id. Raises StoreError."""
        owner = node.owner._asdict() if node.owner else None
        data = json.dumps({"owner": owner, "key": node.key}).encode() + b"\n"
        path = self._nodes / str(node_id)
        try:
            self._written(data).replace(path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        self._sweep()

    def remove(self, node_id: int) -> None:
        """Forget the node of this id, if it is known. Raises StoreError."""
        path = self._nodes / str(node_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def _open(self) -> bytes:
        """Return the secret; make what is not there yet."""
        if self._secret:
            return self._secret
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._nodes.mkdir(mode=0o700, exist_ok=True)
            if not self._secret_file.exists():
                self._draw()
        except OSError as error:
            raise StoreError(f"{error.filename or self._directory}: {error.strerror}") from error
        self._secret = read_secret(self._secret_file)
        return self._secret

    def _doubt(self, secret: bytes) -> None:
        """Raise StoreError if this may not be the directory in which the nodes were written down."""
        if read_secret(self._secret_file) != secret:
            raise StoreError(f"{self._secret_file} is not the one that this relay began with")
        if time.time() - self._secret_file.stat().st_mtime < _NEW:
            raise StoreError(
                f"{self._secret_file} is new, so there may be another directory with nodes in it"
            )

    def _draw(self) -> None:
        path = self._written(secrets.token_hex(_SECRET_BYTES).encode() + b"\n")
        # Of several workers that start at once, the first one's counts.
        with contextlib.suppress(FileExistsError):
            self._secret_file.hardlink_to(path)
        path.unlink()

    def _written(self, data: bytes) -> Path:
        """Write a file that only this user can read, under a name that nobody looks for."""
        handle, name = tempfile.mkstemp(dir=self._directory, prefix=_HALF)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        return Path(name)

    def _sweep(self) -> None:
        """Once a day, remove the files of nodes that were not heard of, and what was left half written."""
        now, steady = time.time(), time.monotonic()
        ahead = now - steady
        if self._ahead is None or abs(ahead - self._ahead) > _STEP:
            self._next_sweep = steady + _CALM
        self._ahead = ahead
        if steady < self._next_sweep:
            return
        self._next_sweep = steady + _DAY
        for path, age in [
            *((path, self._forget_after + _DAY) for path in self._nodes.iterdir()),
            *((path, _DAY) for path in self._directory.glob(f"{_HALF}*")),
        ]:
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > age:
                    path.unlink()


def read_secret(path: Path) -> bytes:
    """Return the secret. Raises StoreError if there is none that can be used; it never repeats it."""
    try:
        text = path.read_text("ascii").strip()
        found = bytes.fromhex(text)
    except FileNotFoundError:
        raise StoreError(f"{path} is gone") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except ValueError:
        found = b""
    if len(found) != _SECRET_BYTES:
        raise StoreError(f"{path} is damaged: it must hold {2 * _SECRET_BYTES} hexadecimal digits")
    return found


def _parsed(data: bytes) -> Node | None:
    try:
        read = json.loads(data)
        owner, key = read["owner"], read["key"]
        if len(bytes.fromhex(key)) != hashlib.sha256().digest_size:
            return None
        return Node(Owner(str(owner["tenant"]), str(owner["name"])) if owner is not None else None, key)
    except (ValueError, TypeError, KeyError):
        return None
