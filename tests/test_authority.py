"""The development authority: its files, what stands in them, and what it does not overwrite."""

from __future__ import annotations

import datetime as dt
import ssl
import stat
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from relay import certificates
from relay.authority import Authority, AuthorityError
from tests.certificates import make_pair
from tests.test_tls_files import handshake
from tests.tls_clients import trusting

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certs")


def leaf(authority: Authority, name: str) -> x509.Certificate:
    return certificates.load(authority.files(name)[0])[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_can_be_read_by_their_owner_alone(authority: Authority, tmp_path: Path) -> None:
    authority.issue_relay(["localhost"])
    authority.issue_client("node")
    for name in ("ca", "relay", "node"):
        certificate, key = authority.files(name)
        assert (mode(certificate), mode(key)) == (0o644, 0o600)
        assert b"PRIVATE" not in certificate.read_bytes()
    assert len(list((tmp_path / "certs").iterdir())) == 6  # nothing half-written is left


def test_all_certificates_hold_against_the_strictest_check(authority: Authority) -> None:
    authority.issue_relay(["relay.example", "10.0.0.5"])
    authority.issue_client("node")
    ends = []
    for name, protocol in (("relay", ssl.PROTOCOL_TLS_SERVER), ("node", ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(*authority.files(name))
        context.load_verify_locations(authority.files("ca")[0])
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        ends.append(context)
    handshake(ends[0], "relay.example", ends[1])


def test_names_may_be_hosts_wildcards_and_addresses(authority: Authority) -> None:
    authority.issue_relay(
        ["relay.example", "*.nodes.example", "10.0.0.5", "::1", "[2001:db8::1]", "bücher.example"]
    )
    made = leaf(authority, "relay")
    assert certificates.all_names(made) == [
        "relay.example",
        "*.nodes.example",
        "10.0.0.5",
        "::1",
        "2001:db8::1",
        "xn--bcher-kva.example",
    ]
    assert made.subject.rfc4514_string() == "CN=relay.example"
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_name_is_written_once(authority: Authority) -> None:
    authority.issue_relay(["localhost", "localhost"])
    assert certificates.all_names(leaf(authority, "relay")) == ["localhost"]


def test_a_long_name_is_no_common_name(authority: Authority) -> None:
    name = f"{'a' * 60}.{'b' * 60}.example"
    authority.issue_relay([name])
    assert certificates.all_names(leaf(authority, "relay")) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "https://relay.example",
        "relay.example:8443",
        "relay example",
        "a..b",
        "*",
        "10.0.0.300",
        "10.0.0.0/8",
        "x" * 70,
    ],
)
def test_what_is_no_name_is_an_error(authority: Authority, name: str) -> None:
    with pytest.raises(AuthorityError, match="neither a host name nor an IP address"):
        authority.issue_relay(["localhost", name])
    assert not authority.files("relay")[0].exists()


@pytest.mark.parametrize(
    "name", ["", "ca", "relay", "Relay", "../x", "a/b", ".x", "node-key", "a b", "x" * 65]
)
def test_a_client_that_would_be_no_file_of_its_own_is_an_error(authority: Authority, name: str) -> None:
    with pytest.raises(AuthorityError, match="cannot name a client"):
        authority.issue_client(name)


def test_a_client_has_its_name_as_common_and_as_dns_name(authority: Authority) -> None:
    authority.issue_client("site-a")
    made = leaf(authority, "site-a")
    assert made.subject.rfc4514_string() == "CN=site-a"
    assert certificates.dns_names(made) == ["site-a"]
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_times_are_sane(authority: Authority) -> None:
    now = dt.datetime.now(dt.UTC)
    authority.issue_relay(["localhost"], days=30)
    authority.issue_client("node")
    minute = dt.timedelta(minutes=1)
    for made, days in (
        (leaf(authority, "relay"), 30),
        (leaf(authority, "node"), 397),
        (authority.certificate, 3650),
    ):
        assert abs(made.not_valid_after_utc - now - dt.timedelta(days=days)) < minute
        assert abs(now - dt.timedelta(hours=1) - made.not_valid_before_utc) < minute


def test_nothing_is_overwritten_unless_told(authority: Authority, tmp_path: Path) -> None:
    authority.issue_relay(["localhost"])
    first = leaf(authority, "relay").serial_number
    with pytest.raises(AuthorityError, match="would be overwritten: use --force"):
        Authority(tmp_path / "certs").issue_relay(["localhost"])
    assert leaf(authority, "relay").serial_number == first
    authority.files("relay")[0].unlink()
    with pytest.raises(AuthorityError, match=r"relay-key\.pem would be overwritten"):
        authority.issue_relay(["localhost"])
    Authority(tmp_path / "certs", overwrite=True).issue_relay(["localhost"])
    assert leaf(authority, "relay").serial_number != first


def test_the_authority_stays_even_then(authority: Authority, tmp_path: Path) -> None:
    again = Authority(tmp_path / "certs", overwrite=True)
    assert again.certificate == authority.certificate
    again.issue_relay(["localhost"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authority.files("relay"))
    handshake(server, "localhost", trusting(authority.files("ca")[0]))


def test_no_two_authorities_have_one_name(authority: Authority, tmp_path: Path) -> None:
    assert Authority(tmp_path / "other").certificate.subject != authority.certificate.subject


@pytest.mark.parametrize("missing", [0, 1])
def test_half_an_authority_is_an_error(authority: Authority, tmp_path: Path, missing: int) -> None:
    authority.files("ca")[missing].unlink()
    with pytest.raises(AuthorityError, match="without its other half"):
        Authority(tmp_path / "certs")


@pytest.mark.parametrize("fault", ["garbage", "encrypted", "another"])
def test_an_authority_that_cannot_sign_is_an_error(authority: Authority, tmp_path: Path, fault: str) -> None:
    key = authority.files("ca")[1]
    if fault == "garbage":
        key.write_bytes(b"garbage")
    elif fault == "encrypted":
        made = ec.generate_private_key(ec.SECP256R1())
        password = BestAvailableEncryption(b"secret")
        key.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password))
    else:
        key.write_bytes(make_pair(tmp_path)[1].read_bytes())
    with pytest.raises(AuthorityError, match=r"cannot be used|is not the key of"):
        Authority(tmp_path / "certs")


def test_a_key_is_never_readable_by_others_not_even_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.fchmod", lambda *_: None)
    key = Authority(tmp_path / "certs").files("ca")[1]
    assert mode(key) == 0o600
