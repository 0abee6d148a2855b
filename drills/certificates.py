"""A certificate authority for one federation, and the certificate of the server that its nodes connect to."""

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from relay.demo.processes import LOOPBACK

_LIFE = dt.timedelta(days=1)
#: What the loopback address is called.
HOST: tuple[x509.GeneralName, ...] = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address(LOOPBACK)),
)


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: the authority that nodes trust, and the certificate and key of the server."""

    authority: Path
    certificate: Path
    key: Path


class Authority:
    """Signs certificates (ECDSA P-256) that are good for a day."""

    def __init__(self, file: Path) -> None:
        """Make one, and write its own certificate to `file`."""
        self.file = file
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("drills authority")
        certificate = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(
        self,
        directory: Path,
        names: Sequence[x509.GeneralName] = HOST,
        *,
        ended: dt.timedelta = dt.timedelta(0),
    ) -> Certificates:
        """Write a server's certificate and key into `directory`.

        Args:
            directory: where; `server.pem` and `server-key.pem`.
            names: of the server.
            ended: how long ago it was a good one.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _builder(_name("localhost"), self._name, key.public_key(), ended)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        made = Certificates(self.file, directory / "server.pem", directory / "server-key.pem")
        made.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return made


def make(directory: Path) -> Certificates:
    """Write an authority and a certificate of its for `localhost` and 127.0.0.1."""
    return Authority(directory / "ca.pem").issue(directory)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    ended: dt.timedelta = dt.timedelta(0),
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC) - ended
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _LIFE)
        .not_valid_after(now if ended else now + _LIFE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
