"""Certificates and keys that tests make for themselves, as PEM files."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

if TYPE_CHECKING:
    from pathlib import Path


def make_pair(
    directory: Path,
    name: str = "relay",
    *,
    host: str = "localhost",
    curve: ec.EllipticCurve | None = None,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    expired: bool = False,
    days: float = 1,
    begins: float = -9,
    password: bytes | None = None,
    key_format: PrivateFormat = PrivateFormat.PKCS8,
) -> tuple[Path, Path]:
    """Write a certificate for `host`, signed by itself, and its key. Return the paths of both.

    It is valid from `begins` to `days`, in days from now; an `expired` one until yesterday.
    """
    key = key or ec.generate_private_key(curve or ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    end = now + dt.timedelta(days=-1 if expired else days)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) + dt.timedelta(days=begins))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    certificate_path, key_path = directory / f"{name}.pem", directory / f"{name}-key.pem"
    certificate_path.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_path.write_bytes(key.private_bytes(Encoding.PEM, key_format, encryption))
    return certificate_path, key_path


def make_crl(
    directory: Path,
    authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
    *revoked: Path,
    name: str = "crl",
    days: float = 1,
) -> Path:
    """Write a revocation list of these certificates, to be renewed `days` from now."""
    certificate, key = authority
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(now - dt.timedelta(days=10))
        .next_update(now + dt.timedelta(days=days))
    )
    for path in revoked:
        serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    path = directory / f"{name}.pem"
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return path
