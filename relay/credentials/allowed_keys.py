"""The list of node keys that are allowed, in the format of OpenSSH's authorized_keys.

A line is a public key as `ssh-keygen -t ecdsa -b 384` makes it, which is also what `flower-supernode
--auth-supernode-private-key` and `flwr supernode register` take:

    [tenant=T,label=value,...] ecdsa-sha2-nistp384 AAAA... [name]

The name is who the node is for logs, the inventory and quarantine; without one it is the key's fingerprint.
The options before the key are its tenant and labels. `#` begins a comment line. A list without any key cannot
be used: it would shut down every node. Its fingerprint is OpenSSH's, as `ssh-keygen -lf FILE` prints it.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, NamedTuple

from relay.stores import lists

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The curves of a node's key, by the name of the key type, and the bytes of a point on each.
CURVES = {"ecdsa-sha2-nistp256": 65, "ecdsa-sha2-nistp384": 97, "ecdsa-sha2-nistp521": 133}

_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
_OPTION = re.compile(r"(?P<key>[A-Za-z0-9._-]{1,32})=(?P<value>[A-Za-z0-9._-]{1,64})")


class AllowedKey(NamedTuple):
    """A key that is allowed, and who has it.

    Attributes:
        fingerprint: of the key, as OpenSSH writes it.
        name, tenant, labels: of the node; see `relay.call.Identity`.
    """

    fingerprint: str
    name: str
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()


def fingerprint(digest: bytes) -> str:
    """Return OpenSSH's fingerprint of a public key: `digest` is the SHA-256 of its binary form there."""
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def parse(text: str) -> Mapping[str, AllowedKey]:
    """Return the keys of a list by their fingerprints.

    Raises:
        ListError: a line is wrong, a key stands there twice, or there is no key.
    """
    found: dict[str, AllowedKey] = {}
    for number, key in lists.parse(text, _entry):
        if key.fingerprint in found:
            raise lists.ListError(f"line {number}: holds a key that stands above: remove one of them")
        found[key.fingerprint] = key
    if not found:
        raise lists.ListError(
            "holds no key, which would shut down every node: add one with `flwr-relay nodes allow FILE`,"
            " or leave node_keys.allow out to let any key in"
        )
    return found


def numbered(text: str) -> list[tuple[int, AllowedKey]]:
    """Return the keys of a list with the numbers of their lines. Raises ListError."""
    return list(lists.parse(text, _entry))


def line(key_type: str, blob: bytes, key: AllowedKey) -> str:
    """Return the line of a key. Raises ValueError if it could not be read back."""
    options = [("tenant", key.tenant)] if key.tenant else []
    options += key.labels
    written = ",".join(f"{name}={value}" for name, value in options)
    text = " ".join(filter(None, (written, key_type, b64encode(blob).decode(), key.name)))
    if not text.isprintable() or _entry(text) != key:
        raise ValueError(
            "a name has up to 64 printable characters and no space at its ends, a label is WORD=WORD"
        )
    return text


def _entry(text: str) -> AllowedKey:
    first, _, rest = text.partition(" ")
    options = ""
    if first not in CURVES:
        options, (first, _, rest) = first, rest.lstrip().partition(" ")
    if first not in CURVES:
        raise ValueError(f"must be a public key that begins with one of {', '.join(CURVES)}")
    encoded, _, name = rest.strip().partition(" ")
    try:
        blob = b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError("has a key that is not base64: copy the whole line of the .pub file") from None
    if not _is_whole(first, blob):
        raise ValueError("has a damaged key: copy the whole line of the .pub file")
    known = fingerprint(hashlib.sha256(blob).digest())
    name = name.strip()
    if name and not _NAME.fullmatch(name):
        raise ValueError("has a name that is longer than 64 characters, or holds control characters")
    labels = _options(options)
    tenant = dict(labels).get("tenant", "")
    return AllowedKey(known, name or known, tenant, tuple(pair for pair in labels if pair[0] != "tenant"))


def _options(text: str) -> list[tuple[str, str]]:
    if not text:
        return []
    matches = [_OPTION.fullmatch(option) for option in text.split(",")]
    pairs = [(match["key"], match["value"]) for match in matches if match]
    if len(pairs) < len(matches) or len(dict(pairs)) < len(pairs):
        raise ValueError("must begin with a public key, or with options such as tenant=hospital,site=b")
    return pairs


def _is_whole(key_type: str, blob: bytes) -> bool:
    """Return whether a blob is a key of this type: type, curve, and a point of the right size."""
    curve = key_type.rpartition("-")[2]
    head = b"".join(len(part).to_bytes(4) + part for part in (key_type.encode(), curve.encode()))
    size = CURVES[key_type]
    return blob.startswith(head + size.to_bytes(4) + b"\x04") and len(blob) == len(head) + 4 + size
