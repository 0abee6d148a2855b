"""What a certificate says: whom it names, until when, and whether its authority has taken it back.

Nothing here decides whom to believe: a certificate that is read here was verified by TLS, ours or that of a
trusted proxy, or is one of our own.
"""

from __future__ import annotations

import datetime as dt
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes

from relay.call import Certificate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

#: What a trusted proxy sent in place of a certificate: nothing can be told of its client, for no fault of it.
UNREADABLE: Final = Certificate("")


class Shown(NamedTuple):
    """A client certificate as a connection keeps it.

    Attributes:
        certificate: for the calls.
        issuer: DER of its issuer's name; with the serial number, what a revocation list goes by.
        serial: its serial number.
        ends: until when it is valid, in seconds since 1970.
    """

    certificate: Certificate
    issuer: bytes
    serial: int
    ends: float


# A node that connects for each call shows the same one each time.
@lru_cache(maxsize=4096)
def read(der: bytes) -> Shown:
    """Read a client certificate.

    Raises:
        ValueError: it is none.
    """
    parsed = x509.load_der_x509_certificate(der)
    certificate = Certificate(
        subject=parsed.subject.rfc4514_string(),
        names=tuple(_names(parsed)),
        fingerprint=parsed.fingerprint(hashes.SHA256()).hex(),
        serial=f"{parsed.serial_number:x}",
    )
    ends = parsed.not_valid_after_utc.timestamp()
    return Shown(certificate, parsed.issuer.public_bytes(), parsed.serial_number, ends)


def _names(parsed: x509.Certificate) -> Iterable[str]:
    """Yield the alternative names of the kinds that a rule can match; otherName and the like are left out."""
    for name in _alternatives(parsed):
        match name:
            case x509.DNSName():
                yield f"DNS:{name.value}"
            case x509.UniformResourceIdentifier():
                yield f"URI:{name.value}"
            case x509.IPAddress():
                yield f"IP:{name.value}"
            case x509.RFC822Name():
                yield f"email:{name.value}"
            case _:
                continue


def _alternatives(parsed: x509.Certificate) -> Iterable[x509.GeneralName]:
    try:
        return parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()


# -- our own --------------------------------------------------------------------------------------------


def load(path: Path) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, in its order.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds none, or a damaged one.
    """
    return x509.load_pem_x509_certificates(path.read_bytes())


def dns_names(leaf: x509.Certificate) -> list[str]:
    """Return the names that clients may ask for by SNI, in lower case; wildcards among them."""
    return [name.value.lower() for name in _alternatives(leaf) if isinstance(name, x509.DNSName)]


def all_names(leaf: x509.Certificate) -> list[str]:
    """Return every name that clients may connect to, IP addresses among them."""
    return [name.partition(":")[2] for name in _names(leaf) if name.startswith(("DNS:", "IP:"))]


def covers(pattern: str, name: str) -> bool:
    """Return whether a name of a certificate stands for the name that a client asks for (RFC 6125)."""
    if pattern.startswith("*."):
        label, _, rest = name.partition(".")
        return bool(label and rest) and rest == pattern[2:]
    return name == pattern


def chain_ends(chain: Sequence[x509.Certificate]) -> float:
    """Return when the first certificate of a chain ends: nodes refuse all of it then. Seconds since 1970."""
    return min(certificate.not_valid_after_utc for certificate in chain).timestamp()


def authorities_end(authorities: Sequence[x509.Certificate], now: float) -> float:
    """Return when the next of several authorities ends; if all have, when the last one did."""
    ends = sorted(certificate.not_valid_after_utc.timestamp() for certificate in authorities)
    return next((end for end in ends if end > now), ends[-1])


def time_fault(leaf: x509.Certificate, now: float) -> str | None:
    """Say why a certificate would not be believed at this time; None if it would."""
    if leaf.not_valid_after_utc.timestamp() <= now:
        return f"has expired at {show_time(leaf.not_valid_after_utc.timestamp())}"
    if leaf.not_valid_before_utc.timestamp() > now:
        return f"is not valid before {show_time(leaf.not_valid_before_utc.timestamp())}"
    return None


def show_time(seconds: float) -> str:
    """Write a time as people and machines can read it: 2030-01-31T12:00:00Z."""
    return f"{dt.datetime.fromtimestamp(int(seconds), dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


# -- revocation -----------------------------------------------------------------------------------------


class Revocations:
    """The certificates that authorities have taken back.

    A list that was not renewed in time stays in force: to refuse everybody then, as TLS libraries do, would
    be an outage of all nodes for the fault of one office.

    Attributes:
        ends: when the first of the lists should have been renewed, in seconds since 1970; None if none says.
    """

    def __init__(self, pem: bytes, authorities: Sequence[x509.Certificate]) -> None:
        """Take over the lists in `pem`, each signed by one of `authorities`.

        Raises:
            ValueError: there is none, one is damaged, or nobody we believe has signed it.
        """
        self._revoked: set[tuple[bytes, int]] = set()
        ends = []
        for crl in lists(pem):
            name = crl.issuer.rfc4514_string()
            if not any(_signed(crl, authority) for authority in authorities):
                raise ValueError(f"a list of {name} is signed by no authority of client_ca")
            issuer = crl.issuer.public_bytes()
            self._revoked |= {(issuer, entry.serial_number) for entry in crl}
            if crl.next_update_utc is not None:
                ends.append(crl.next_update_utc.timestamp())
        self.ends = min(ends, default=None)

    def __len__(self) -> int:
        """How many they are."""
        return len(self._revoked)

    def __contains__(self, shown: object) -> bool:
        """Whether this `Shown` is among them."""
        return isinstance(shown, Shown) and (shown.issuer, shown.serial) in self._revoked


_BEGIN, _END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


def lists(pem: bytes) -> list[x509.CertificateRevocationList]:
    """Return the revocation lists of a PEM file.

    Raises:
        ValueError: there is none, or a damaged one.
    """
    blocks = [_BEGIN + block.partition(_END)[0] + _END + b"\n" for block in pem.split(_BEGIN)[1:]]
    if not blocks:
        raise ValueError("it holds no revocation list")
    return [x509.load_pem_x509_crl(block) for block in blocks]


def _signed(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    if crl.issuer != authority.subject:
        return False
    try:
        return crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # hence TypeError
    except (InvalidSignature, TypeError, ValueError):  # a key of a type that signs no lists
        return False
