"""What is read in a certificate, and what an authority has taken back."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
import time
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from relay import certificates
from relay.authority import Authority
from relay.certificates import Revocations
from tests.certificates import make_crl, make_pair

if TYPE_CHECKING:
    from pathlib import Path

SUBJECT = x509.Name(
    [
        x509.NameAttribute(x509.NameOID.COUNTRY_NAME, "DE"),
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Clinic, North"),
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "node-7"),
    ]
)


def certificate(*names: x509.GeneralName, serial: int = 0xABC, days: float = 1) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(SUBJECT)
        .issuer_name(SUBJECT)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=days))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


def der(made: x509.Certificate) -> bytes:
    return made.public_bytes(Encoding.DER)


def test_a_client_certificate_is_read_with_all_names_that_a_rule_can_match() -> None:
    made = certificate(
        x509.DNSName("Node-7.example"),
        x509.UniformResourceIdentifier("spiffe://example/site/7"),
        x509.IPAddress(ipaddress.ip_address("2001:db8::7")),
        x509.RFC822Name("ops@example"),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
    )
    shown = certificates.read(der(made))
    assert shown.certificate == (
        "CN=node-7,O=Clinic\\, North,C=DE",
        ("DNS:Node-7.example", "URI:spiffe://example/site/7", "IP:2001:db8::7", "email:ops@example"),
        made.fingerprint(hashes.SHA256()).hex(),
        "abc",
    )
    assert shown.serial == 0xABC
    assert shown.issuer == SUBJECT.public_bytes()
    assert shown.ends == made.not_valid_after_utc.timestamp()


def test_a_client_certificate_needs_no_names() -> None:
    assert certificates.read(der(certificate())).certificate.names == ()


@pytest.mark.parametrize("data", [b"", b"\x30\x03abc", bytes(5000)])
def test_what_is_no_certificate_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        certificates.read(data)


def test_the_chain_of_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    (one, _), (two, _) = make_pair(tmp_path, "one"), make_pair(tmp_path, "two", host="two.example")
    both = tmp_path / "both.pem"
    both.write_bytes(two.read_bytes() + one.read_bytes())
    assert [certificates.dns_names(read) for read in certificates.load(both)] == [
        ["two.example"],
        ["localhost"],
    ]
    with pytest.raises(ValueError, match=r"."):
        certificates.load(make_pair(tmp_path, "three")[1])
    with pytest.raises(OSError, match="No such file"):
        certificates.load(tmp_path / "none.pem")


def test_names_for_clients_are_dns_names_in_lower_case_and_addresses() -> None:
    made = certificate(x509.DNSName("Relay.Example"), x509.IPAddress(ipaddress.ip_address("10.0.0.5")))
    assert certificates.dns_names(made) == ["relay.example"]
    assert certificates.all_names(made) == ["Relay.Example", "10.0.0.5"]


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("relay.example", "relay.example", True),
        ("relay.example", "x.relay.example", False),
        ("*.relay.example", "x.relay.example", True),
        ("*.relay.example", "relay.example", False),
        ("*.relay.example", "x.y.relay.example", False),
        ("*.relay.example", ".relay.example", False),
        ("*", "relay", False),
        ("*.", "relay", False),
    ],
)
def test_a_wildcard_stands_for_one_label(pattern: str, name: str, covered: bool) -> None:
    assert certificates.covers(pattern, name) is covered


def test_a_chain_ends_with_the_first_of_its_certificates() -> None:
    early, late = certificate(days=1), certificate(days=5)
    assert certificates.chain_ends([late, early]) == early.not_valid_after_utc.timestamp()


def test_of_authorities_the_next_to_end_counts_and_then_the_last_one_that_has() -> None:
    gone, next_, later = certificate(days=-0.5), certificate(days=2), certificate(days=9)
    now = time.time()
    assert certificates.authorities_end([later, gone, next_], now) == next_.not_valid_after_utc.timestamp()
    late = now + 20 * 86_400
    assert certificates.authorities_end([later, gone, next_], late) == later.not_valid_after_utc.timestamp()


def test_a_certificate_is_believed_in_its_time_alone() -> None:
    made = certificate(days=1)
    now = time.time()
    assert certificates.time_fault(made, now) is None
    assert "has expired at " in (certificates.time_fault(made, now + 86_400 + 1) or "")
    assert "is not valid before " in (certificates.time_fault(made, now - 2 * 86_400) or "")


def test_times_are_written_in_utc() -> None:
    assert certificates.show_time(1_900_000_000.9) == "2030-03-17T17:46:40Z"


# -- revocation -----------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path)
    for name in ("good", "bad"):
        made.issue_client(name)
    return made


def shown(authority: Authority, name: str) -> certificates.Shown:
    return certificates.read(ssl.PEM_cert_to_DER_cert(authority.files(name)[0].read_text()))


def test_what_stands_in_a_list_is_revoked_and_nothing_else(authority: Authority, tmp_path: Path) -> None:
    crl = make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0])
    revoked = Revocations(crl.read_bytes(), [authority.certificate])
    assert shown(authority, "bad") in revoked
    assert shown(authority, "good") not in revoked
    assert len(revoked) == 1
    assert revoked.ends == pytest.approx(time.time() + 86_400, abs=60)
    other = Authority(tmp_path / "other")
    other.issue_client("same")
    same_serial = shown(other, "same")._replace(serial=shown(authority, "bad").serial)
    assert same_serial not in revoked  # another authority counts by itself


def test_a_file_may_hold_lists_of_several_authorities(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    (tmp_path / "both.pem").write_bytes(
        make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0]).read_bytes()
        + make_crl(tmp_path, (other.certificate, other._key), days=0.5).read_bytes()
    )
    both = (tmp_path / "both.pem").read_bytes()
    revoked = Revocations(both, [other.certificate, authority.certificate])
    assert shown(authority, "bad") in revoked
    assert revoked.ends == pytest.approx(time.time() + 43_200, abs=60)
    with pytest.raises(ValueError, match=r"development CA \w+ is signed by no authority of client_ca"):
        Revocations(both, [authority.certificate])


def test_a_list_that_another_key_has_signed_is_refused(authority: Authority, tmp_path: Path) -> None:
    forged = make_crl(tmp_path, (authority.certificate, ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(ValueError, match="signed by no authority"):
        Revocations(forged.read_bytes(), [authority.certificate])


def test_an_authority_whose_key_is_of_another_kind_has_not_signed(
    authority: Authority, tmp_path: Path
) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    now = dt.datetime.now(dt.UTC)
    name = authority.certificate.subject
    odd = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, None)
    )
    crl = make_crl(tmp_path, (authority.certificate, authority._key)).read_bytes()
    with pytest.raises(ValueError, match="signed by no authority"):
        Revocations(crl, [odd])
    Revocations(crl, [odd, authority.certificate])


def test_a_list_that_was_not_renewed_in_time_stays_in_force(authority: Authority, tmp_path: Path) -> None:
    crl = make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0], days=-1)
    revoked = Revocations(crl.read_bytes(), [authority.certificate])
    assert shown(authority, "bad") in revoked
    assert shown(authority, "good") not in revoked
    assert revoked.ends is not None
    assert revoked.ends < time.time()


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"nothing",
        b"-----BEGIN X509 CRL-----\nabc\n-----END X509 CRL-----\n",
        b"-----BEGIN X509 CRL-----",
    ],
)
def test_what_is_no_list_is_an_error(pem: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Revocations(pem, [])


def test_no_object_but_a_certificate_is_revoked() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    made = certificate()
    empty = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(SUBJECT)
        .last_update(dt.datetime.now(dt.UTC))
        .next_update(dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    )
    with pytest.raises(ValueError, match="signed by no authority"):
        Revocations(empty.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), [made])
