"""A node's certificate in the header of a proxy: each form of it, and what none of them is."""

from __future__ import annotations

import base64
import ipaddress
import ssl
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import certificates
from relay.authority import Authority
from relay.call import Certificate
from relay.certificates import UNREADABLE
from relay.wires.client_certificate import _FORMS, NAMES, from_header
from relay.wires.forwarded import Forwarding

if TYPE_CHECKING:
    from pathlib import Path

PROXY, STRANGER = "10.0.0.1", "203.0.113.9"
OWN = Certificate("CN=proxy")
RFC_9440, NGINX, ENVOY = b"client-cert", b"x-ssl-client-cert", b"x-forwarded-client-cert"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    authority.issue_client("node-7")
    path: Path = authority.files("node-7")[0]
    return path.read_bytes()


@pytest.fixture(scope="module")
def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


@pytest.fixture(scope="module")
def node(der: bytes) -> Certificate:
    return certificates.read(der).certificate


def test_every_header_that_can_be_read_is_kept_from_the_superlink() -> None:
    assert set(_FORMS) < NAMES


def test_rfc_9440(der: bytes, node: Certificate) -> None:
    value = b":" + base64.b64encode(der) + b":"
    assert from_header(RFC_9440, value) == node
    assert from_header(RFC_9440, b" " + value + b" ") == node


def test_nginx(pem: bytes, node: Certificate) -> None:
    """$ssl_client_escaped_cert: what is neither letter nor digit may be escaped, in either case."""
    assert from_header(NGINX, quote(pem, safe="").encode()) == node
    assert from_header(NGINX, quote(pem, safe="-._~/+=").encode().lower().swapcase()) is UNREADABLE
    assert from_header(NGINX, quote(pem).replace("%0A", "%0a").encode()) == node


def test_envoy_with_the_whole_certificate(pem: bytes, node: Certificate) -> None:
    cert = quote(pem, safe="")
    assert from_header(ENVOY, f'By=spiffe://proxy;Hash={"ab" * 32};Cert="{cert}"'.encode()) == node
    assert from_header(ENVOY, f"Cert={cert}".encode()) == node


def test_envoy_with_names_alone() -> None:
    value = b'By=x;Hash=%b;Subject="CN=\\"a\\",O=b;c";URI=spiffe://example/7;DNS=a.example;DNS=b.example' % (
        b"AB" * 32
    )
    assert from_header(ENVOY, value) == Certificate(
        'CN="a",O=b;c', ("URI:spiffe://example/7", "DNS:a.example", "DNS:b.example"), "ab" * 32
    )


@pytest.mark.parametrize("header", [RFC_9440, NGINX, ENVOY])
@pytest.mark.parametrize(
    "value",
    [
        b"(null)",
        b":",
        b"::",
        b":AAAA:",
        b":!:",
        b"-----BEGIN%20CERTIFICATE-----%0A",
        b"%00",
        b"\xff\xfe",
        b'Hash="',
        b"Hash=ab",
        b"Hash=" + b"ab" * 32 + b",Hash=" + b"cd" * 32,
        b"Hash=" + b"ab" * 32 + b";Hash=" + b"cd" * 32,
        b"Subject=CN=x",
        b"Cert=;",
        b";;;",
        b"Hash=" + b"ab" * 32 + b";Subject=\xff",
    ],
)
def test_what_cannot_be_read_is_the_proxys_fault(header: bytes, value: bytes) -> None:
    assert from_header(header, value) is UNREADABLE


def test_the_same_header_twice_is_nobody(der: bytes) -> None:
    """The wire joins them with a comma."""
    value = b":" + base64.b64encode(der) + b":"
    assert from_header(RFC_9440, value + b"," + value) is UNREADABLE


@given(st.sampled_from([RFC_9440, NGINX, ENVOY]), st.binary(min_size=1, max_size=200))
def test_no_header_raises(header: bytes, value: bytes) -> None:
    assert isinstance(from_header(header, value), Certificate)


@given(st.text(alphabet='Hh=;,"\\ab:/%'), st.sampled_from([b"Hash=" + b"ab" * 32, b""]))
def test_no_header_of_envoy_raises(text: str, start: bytes) -> None:
    assert isinstance(from_header(ENVOY, start + text.encode() or b";"), Certificate)


def forwarding(header: bytes = RFC_9440) -> Forwarding:
    return Forwarding([ipaddress.ip_network("10.0.0.0/8")], header)


def test_a_trusted_proxy_speaks_for_the_node_and_never_for_itself(der: bytes, node: Certificate) -> None:
    value = b":" + base64.b64encode(der) + b":"
    assert forwarding().certificate(PROXY, value, OWN) == node
    assert forwarding().certificate(PROXY, b"", OWN) is None
    assert forwarding().certificate(PROXY, b"x", OWN) is UNREADABLE


def test_nobody_else_is_believed(der: bytes) -> None:
    value = b":" + base64.b64encode(der) + b":"
    for stranger in (STRANGER, ""):
        assert forwarding().certificate(stranger, value, OWN) is OWN
        assert forwarding().certificate(stranger, value, None) is None
