"""The certificate of a node in a header, from a proxy that terminates TLS: three forms of it.

The proxy has verified the certificate, and it is the relay's `trusted_proxies` that say whom to believe so.
What such a proxy sends and nobody can read is a fault of the proxy, for which no node should be turned away
for good: it becomes UNREADABLE, and the calls are put off.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from relay import certificates
from relay.call import Certificate
from relay.certificates import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Callable

#: Every name under which such a header is known; none is ever passed on, whoever sent it.
NAMES: Final = frozenset(
    {b"client-cert", b"client-cert-chain", b"x-ssl-client-cert", b"x-forwarded-client-cert"}
)

# An element of Envoy's header: pairs with `;` between them, a value in quotes where it holds one of ,;=
_PAIR = re.compile(rb'([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^",;]*)')


def from_header(name: bytes, value: bytes) -> Certificate:
    """Return the certificate in a header of a trusted proxy, or UNREADABLE.

    Args:
        name: in lower case.
        value: not empty.
    """
    try:
        return _read(name, value)
    except ValueError:  # binascii.Error is one
        return UNREADABLE


# A node sends the same one with each call; 4096 of them, of up to some KB each.
@lru_cache(maxsize=4096)
def _read(name: bytes, value: bytes) -> Certificate:
    return _FORMS[name](value)


def _rfc_9440(value: bytes) -> Certificate:
    """A Byte Sequence of RFC 8941: base64 of the DER form between colons."""
    value = value.strip()
    if len(value) < 3 or not (value.startswith(b":") and value.endswith(b":")):
        raise ValueError("no byte sequence")
    return certificates.read(base64.b64decode(value[1:-1], validate=True)).certificate


def _nginx(value: bytes) -> Certificate:
    """The PEM form, percent-encoded."""
    return _from_pem(unquote_to_bytes(value))


def _envoy(value: bytes) -> Certificate:
    """One element; several would be a chain of proxies, of which we cannot know whom to believe."""
    pairs: dict[bytes, list[bytes]] = {}
    at = 0
    while True:
        found = _PAIR.match(value, at)
        if found is None:
            raise ValueError("no pairs")
        text = found[2]
        if text.startswith(b'"'):
            text = re.sub(rb"\\(.)", rb"\1", text[1:-1], flags=re.DOTALL)
        pairs.setdefault(found[1].lower(), []).append(text)
        at = found.end()
        if at == len(value):
            break
        if value[at : at + 1] != b";":
            raise ValueError("more than one element")
        at += 1
    if b"cert" in pairs:
        return _from_pem(unquote_to_bytes(pairs[b"cert"][0]))
    (fingerprint,) = pairs.get(b"hash", [b""])
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", fingerprint):
        raise ValueError("neither Cert nor Hash")
    names = [b"URI:" + uri for uri in pairs.get(b"uri", []) if uri]
    names += [b"DNS:" + name for name in pairs.get(b"dns", []) if name]
    return Certificate(
        subject=pairs.get(b"subject", [b""])[0].decode(),
        names=tuple(name.decode() for name in names),
        fingerprint=fingerprint.decode().lower(),
    )


def _from_pem(pem: bytes) -> Certificate:
    return certificates.read(load_pem_x509_certificate(pem).public_bytes(Encoding.DER)).certificate


_FORMS: dict[bytes, Callable[[bytes], Certificate]] = {
    b"client-cert": _rfc_9440,
    b"x-ssl-client-cert": _nginx,
    b"x-forwarded-client-cert": _envoy,
}
