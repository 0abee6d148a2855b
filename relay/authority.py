"""A certificate authority for development and for closed networks: one key, and what it signs, as PEM files.

    ca.pem, ca-key.pem          the authority; nodes are given ca.pem
    relay.pem, relay-key.pem    the relay's certificate
    NAME.pem, NAME-key.pem      one per client

Keys can be read by their owner alone. A file is written beside its place and moved there, so that a relay
that watches it never reads half of one; the key comes first, and the pair is taken up when both are there.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Days that an authority is valid for, and what it signs unless told otherwise (as public ones: 13 months).
AUTHORITY_DAYS = 3650
LEAF_DAYS = 397
#: A certificate is valid since an hour ago: the clocks of nodes differ, and one that is early would give up.
_EARLIER = dt.timedelta(hours=1)

AUTHORITY, RELAY = "ca", "relay"

_HOST = re.compile(
    r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_COMMON_NAME = 64


class AuthorityError(Exception):
    """It cannot be done; the text says why, and what would help."""


class Authority:
    """Signs certificates, and keeps them in a directory."""

    def __init__(self, directory: Path, *, overwrite: bool = False) -> None:
        """Use the authority in `directory`, or make one there if it has none.

        Args:
            directory: made if it does not exist.
            overwrite: replace certificates that are there already; never the authority.

        Raises:
            AuthorityError: a file of the authority is missing or cannot be used.
            OSError: the directory cannot be written to.
        """
        self._directory = directory
        self._overwrite = overwrite
        directory.mkdir(parents=True, exist_ok=True)
        there = [path for path in self.files(AUTHORITY) if path.exists()]
        if len(there) == 1:
            raise AuthorityError(f"{there[0]} is there without its other half: put that back, or remove both")
        if there:
            self.certificate, self._key = self._read()
        else:
            self._key = ec.generate_private_key(ec.SECP384R1())
            self.certificate = self._make()
            self._write(AUTHORITY, self.certificate, self._key)

    def files(self, name: str) -> tuple[Path, Path]:
        """Return where a certificate of this name is kept, and its key."""
        return self._directory / f"{name}.pem", self._directory / f"{name}-key.pem"

    def issue_relay(self, names: Sequence[str], days: int = LEAF_DAYS) -> None:
        """Make the relay's certificate for host names and IP addresses. Raises AuthorityError."""
        alternatives = [_alternative(name) for name in dict.fromkeys(names)]
        self._issue(RELAY, names[0], alternatives, ExtendedKeyUsageOID.SERVER_AUTH, days)

    def issue_client(self, name: str, days: int = LEAF_DAYS) -> None:
        """Make the certificate of a client. Raises AuthorityError."""
        if not _CLIENT.fullmatch(name) or name.lower() in (AUTHORITY, RELAY) or name.endswith("-key"):
            raise AuthorityError(
                f"{name!r} cannot name a client: use letters, digits, dots and dashes, and neither ca nor"
                " relay nor an ending of -key"
            )
        alternatives = [x509.DNSName(name)] if _HOST.fullmatch(name) else []
        self._issue(name, name, alternatives, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def _issue(
        self,
        name: str,
        common_name: str,
        alternatives: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        days: int,
    ) -> None:
        there = [str(path) for path in self.files(name) if path.exists()]
        if there and not self._overwrite:
            raise AuthorityError(f"{' and '.join(there)} would be overwritten: use --force for that")
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            self._builder(_subject(common_name), key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        self._write(name, builder.sign(self._key, hashes.SHA384()), key)

    def _make(self) -> x509.Certificate:
        # No two authorities of one name: who trusts both would check against the wrong one.
        name = _subject(f"flwr-relay development CA {secrets.token_hex(4)}")
        builder = self._builder(name, self._key, AUTHORITY_DAYS, issuer=name)
        return (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(self._key, hashes.SHA384())
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, issuer: x509.Name | None = None
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        authority_key = self._key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLIER)
            .not_valid_after(now + dt.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key), critical=False)
        )

    def _read(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        certificate_path, key_path = self.files(AUTHORITY)
        try:
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
        except (TypeError, ValueError) as error:  # TypeError: it is encrypted
            raise AuthorityError(f"{key_path} or {certificate_path} cannot be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise AuthorityError(f"{key_path} is not the key of {certificate_path}")
        return certificate, key

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        certificate_path, key_path = self.files(name)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _put(key_path, pem, 0o600)
        _put(certificate_path, certificate.public_bytes(Encoding.PEM), 0o644)


def _put(path: Path, data: bytes, mode: int) -> None:
    """Write a file in one step; nobody but its owner can read it before it has its mode."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_LONGEST_COMMON_NAME])])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    try:
        ascii_name = name if name.startswith("*.") else name.encode("idna").decode()
    except UnicodeError:
        ascii_name = ""
    if not _HOST.fullmatch(ascii_name) or re.fullmatch(r"[0-9.]+", ascii_name):
        raise AuthorityError(f"{name!r} is neither a host name nor an IP address: leave scheme and port away")
    return x509.DNSName(ascii_name)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
