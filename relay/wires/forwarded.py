"""Who the node is behind proxies: Forwarded (RFC 7239) and X-Forwarded-*, from known proxies only."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from relay.wires import client_certificate

if TYPE_CHECKING:
    from collections.abc import Collection

    from relay.call import Certificate, Metadata

    Network = ipaddress.IPv4Network | ipaddress.IPv6Network


#: Longest host name that DNS knows, with a port.
_HOST_BYTES = 262

_FOR = re.compile(rb'(?i)(?:^|[;,\s])for=("[^"]*"|[^;,\s]*)')


class Claims(NamedTuple):
    """The forwarding headers of a request as they came; b"" where absent."""

    forwarded: bytes = b""
    for_: bytes = b""
    proto: bytes = b""
    host: bytes = b""


NO_CLAIMS = Claims()


class Forwarding:
    """Decides per call what is believed, and writes what the upstream is told.

    Attributes:
        certificate_header: in lower case; b"" if no proxy sends one.
    """

    def __init__(self, trusted: Collection[Network], certificate_header: bytes = b"") -> None:
        """Believe what comes from an address in `trusted`; discard it from anybody else.

        Args:
            trusted: networks of proxies.
            certificate_header: name of the one with a node's certificate, in lower case.
        """
        self._trusted = tuple(trusted)
        self.certificate_header = certificate_header
        # Behind a proxy there are few direct peers, without one a node keeps its connection.
        self._is_trusted = lru_cache(maxsize=4096)(self._look_up)
        self._cached_hop = lru_cache(maxsize=1024)(_first_hop)

    def resolve(self, direct: str, host: bytes, claims: Claims, *, tls: bool) -> tuple[str, Metadata]:
        """Return the node's address and the forwarding headers for the upstream.

        Args:
            direct: address at the other end of the connection; "" for a Unix socket.
            host: Host header of the request.
            claims: what the request says of its way.
            tls: whether this connection is TLS.
        """
        # What a client writes is remembered only if it is as short as a host name.
        own = (self._cached_hop if len(host) <= _HOST_BYTES else _first_hop)(direct, host, tls)
        if claims is NO_CLAIMS or not self._is_trusted(direct):
            return direct, list(own)
        (_, element), (_, address), (_, proto), _ = own
        hops = [hop.strip() for hop in claims.for_.split(b",") if hop.strip()]
        path = hops or [match[1] for match in _FOR.finditer(claims.forwarded)]
        return self._client(path) or direct, [
            (b"forwarded", claims.forwarded + b", " + element if claims.forwarded else element),
            (b"x-forwarded-for", b", ".join([*hops, address])),
            (b"x-forwarded-proto", claims.proto or proto),
            (b"x-forwarded-host", claims.host or host),
        ]

    def certificate(self, direct: str, header: bytes, own: Certificate | None) -> Certificate | None:
        """Return the certificate of the node.

        Args:
            direct: address at the other end of the connection.
            header: value of `certificate_header`; b"" if it is not there.
            own: what was shown on the connection itself: behind a proxy, the proxy's, and never a node's.
        """
        if not self._is_trusted(direct):
            return own
        return client_certificate.from_header(self.certificate_header, header) if header else None

    def trusts(self, address: str) -> bool:
        """Return whether this is the address of a proxy that is believed."""
        return self._is_trusted(address)

    def _client(self, hops: list[bytes]) -> str:
        """Return the last hop that is no proxy of ours: what stands before it anybody may have written."""
        address = ""
        for hop in reversed(hops):
            text = _bare(hop.decode("latin-1"))
            if not _address(text):
                break
            address = text
            if not self._is_trusted(text):
                break
        return address

    def _look_up(self, address: str) -> bool:
        parsed = _address(address)
        return parsed is not None and any(parsed in network for network in self._trusted)


def _bare(hop: str) -> str:
    """Take quotes, brackets and a port off: `"[2001:db8::1]:4711"`, `203.0.113.9:4711`."""
    hop = hop.strip('"')
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    host, colon, _ = hop.partition(":")
    return host if colon and hop.count(":") == 1 else hop


def _first_hop(direct: str, host: bytes, tls: bool) -> tuple[tuple[bytes, bytes], ...]:
    """Return the forwarding headers of a request that came from its node without a proxy between."""
    proto = b"https" if tls else b"http"
    asked = b"host=%b;" % _quoted(host) if host else b""  # gRPC's is not looked at
    return (
        (b"forwarded", b"for=%b;%bproto=%b" % (_quoted(_node(direct)), asked, proto)),
        (b"x-forwarded-for", direct.encode() or b"unknown"),
        (b"x-forwarded-proto", proto),
        (b"x-forwarded-host", host),
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def _node(address: str) -> bytes:
    if not address:
        return b"unknown"
    return f"[{address}]".encode() if ":" in address else address.encode()


def _quoted(value: bytes) -> bytes:
    """Quote what is no token of RFC 9110 (a port, an IPv6 address); the C parser let no control byte in."""
    if value.replace(b".", b"").replace(b"-", b"").isalnum():
        return value
    return b'"%b"' % value.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
