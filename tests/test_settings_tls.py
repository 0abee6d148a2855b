"""Settings of TLS that are right alone and wrong together, and rules for client certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from relay.authority import Authority
from relay.settings import Settings, SettingsError, load
from tests.certificates import make_crl, make_pair

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    """An authority with certificates relay (localhost) and site-a."""
    made = Authority(tmp_path / "ca")
    made.issue_relay(["localhost"])
    made.issue_client("site-a")
    return made


def loaded(tmp_path: Path, tree: dict[str, Any]) -> Settings:
    path = tmp_path / "relay.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path, {})


def problems(tmp_path: Path, tree: dict[str, Any]) -> list[str]:
    """Return what is said of these settings, without the files' directory and the lines."""
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, tree)
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    return [line.rpartition(" (")[0] for line in lines]


def listener(ca: Authority, **more: Any) -> dict[str, Any]:
    certificate, key = ca.files("relay")
    return {"tls": {"certificate": str(certificate), "key": str(key), **more}}


def asking(ca: Authority, mode: str = "wanted", **more: Any) -> dict[str, Any]:
    return listener(ca, client_certificates=mode, client_ca=str(ca.files("ca")[0]), **more)


ACCEPTS = {"auth": {"accept": ["certificate"]}}
ALLOWS = {"client_certificates": {"allow": [{"match": "CN:*"}]}}


def test_everything_together_holds(tmp_path: Path, ca: Authority) -> None:
    crl = make_crl(tmp_path, (ca.certificate, ca._key))
    certificate, key = make_pair(tmp_path, host="*.example")
    further = [{"certificate": str(certificate), "key": str(key)}]
    own, own_key = ca.files("site-a")
    rules = [
        {"match": "DNS:*.nodes.example", "name": "{DNS}", "tenant": "north", "labels": {"site": "7"}},
        {"match": "fingerprint:" + "ab" * 32},
    ]
    settings = loaded(
        tmp_path,
        {
            "listeners": [
                asking(ca, crl=str(crl), certificates=further) | ACCEPTS,
                {
                    "address": ":8081",
                    "trusted_proxies": ["10.0.0.1"],
                    "client_certificate_header": "X-SSL-Client-Cert",
                    **ACCEPTS,
                },
                {"address": ":8082", **asking(ca, "needed")},
            ],
            "client_certificates": {"allow": rules},
            "upstream": {
                "url": "https://10.1.2.3",
                "ca_file": str(ca.files("ca")[0]),
                "certificate": str(own),
                "key": str(own_key),
                "server_name": "superlink.example",
            },
        },
    )
    first, second = settings.client_certificates.allow
    assert (str(first.match), first.name, first.tenant) == ("DNS:*.nodes.example", "{DNS}", "north")
    assert first.labels == (("site", "7"),)
    assert (second.name, second.labels) == ("{match}", ())
    hash(settings)


def test_further_certificates_are_checked_as_the_first_is(tmp_path: Path, ca: Authority) -> None:
    one, key = make_pair(tmp_path, "one", host="one.example")
    address, address_key = tmp_path / "address.pem", tmp_path / "address-key.pem"
    Authority(tmp_path / "other").issue_relay(["10.0.0.5"])
    (tmp_path / "other" / "relay.pem").rename(address)
    (tmp_path / "other" / "relay-key.pem").rename(address_key)
    further = [
        {"certificate": str(one), "key": str(address_key)},
        {"certificate": str(address), "key": str(address_key)},
        {"certificate": str(one), "key": str(key)},
    ]
    assert problems(tmp_path, {"listeners": [listener(ca, certificates=further)]}) == [
        (
            "listeners[0].tls.certificates[0].key = 'address-key.pem': is not the key of the first"
            " certificate in one.pem: give the key that belongs to it"
        ),
        (
            "listeners[0].tls.certificates[1].certificate = 'address.pem': has no DNS name that a client"
            " could ask for: make it for one, or leave it out"
        ),
    ]


@pytest.mark.parametrize("mode", ["wanted", "needed"])
def test_who_asks_for_certificates_names_their_authorities(tmp_path: Path, ca: Authority, mode: str) -> None:
    tree = {"listeners": [listener(ca, client_certificates=mode) | ACCEPTS], **ALLOWS}
    assert problems(tmp_path, tree) == [
        (
            f"listeners[0].tls.client_certificates = {mode}: needs client_ca: the file of the authorities"
            " that sign clients' certificates"
        )
    ]


def test_who_asks_for_none_needs_no_authorities(tmp_path: Path, ca: Authority) -> None:
    crl = make_crl(tmp_path, (ca.certificate, ca._key))
    tree = {"listeners": [listener(ca, client_ca=str(ca.files("ca")[0]), crl=str(crl))]}
    end = "has no effect, because client_certificates is off: make that wanted or needed"
    assert problems(tmp_path, tree) == [
        f"listeners[0].tls.client_ca = 'ca/ca.pem': {end}",
        f"listeners[0].tls.crl = 'crl.pem': {end}",
    ]


def test_certificates_that_are_wanted_must_be_looked_at(tmp_path: Path, ca: Authority) -> None:
    assert problems(tmp_path, {"listeners": [asking(ca)]}) == [
        (
            "listeners[0].tls.client_certificates = wanted: has no effect, because auth.accept names no"
            " certificate: add it there, or make this needed"
        )
    ]
    loaded(tmp_path, {"listeners": [asking(ca, "needed")]})


def test_lists_must_be_signed_by_the_authorities_of_clients(tmp_path: Path, ca: Authority) -> None:
    other = Authority(tmp_path / "other")
    crl = make_crl(tmp_path, (other.certificate, other._key))
    (line,) = problems(tmp_path, {"listeners": [asking(ca, "needed", crl=str(crl))]})
    assert line.startswith("listeners[0].tls.crl = 'crl.pem': cannot be used: a list of CN=flwr-relay")
    assert line.endswith("is signed by no authority of client_ca")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nothing", "must be a file of PEM revocation lists, and this one holds none that can be read"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_lists_must_be_lists(tmp_path: Path, ca: Authority, content: bytes | None, said: str) -> None:
    crl = tmp_path / "crl.pem"
    if content is not None:
        crl.write_bytes(content)
    assert problems(tmp_path, {"listeners": [asking(ca, "needed", crl=str(crl))]}) == [
        f"listeners[0].tls.crl = 'crl.pem': {said}"
    ]


def test_a_header_of_nobody_has_no_effect(tmp_path: Path) -> None:
    tree = {"listeners": [{"client_certificate_header": "Client-Cert", **ACCEPTS}], **ALLOWS}
    assert problems(tmp_path, tree) == [
        (
            "listeners[0].client_certificate_header = Client-Cert: has no effect, because trusted_proxies is"
            " empty: name the proxies that set it"
        )
    ]


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        (["0.0.0.0/0"], "0.0.0.0/0"),
        (["10.0.0.1", "::/0"], "::/0"),
        (["0.0.0.0/1", "128.0.0.0/1"], "0.0.0.0/0"),
        (["64.0.0.0/3"], "64.0.0.0/3"),
        (["2000::/3"], "2000::/3"),
        (["10.0.0.0/8", "fc00::/7", "192.0.2.0/24"], None),
    ],
)
@pytest.mark.parametrize("accept", ["certificate", "certificate+node_signature"])
def test_nobody_but_proxies_says_whose_certificate_it_is(
    tmp_path: Path, networks: list[str], said: str | None, accept: str
) -> None:
    listener = {
        "trusted_proxies": networks,
        "client_certificate_header": "Client-Cert",
        "auth": {"accept": [accept]},
    }
    tree = {"listeners": [listener], **ALLOWS}
    if said is None:
        assert loaded(tmp_path, tree).listeners[0].trusted_proxies
        return
    assert problems(tmp_path, tree) == [
        (
            f"listeners[0].trusted_proxies = {said}: lets anybody in under any name: what stands in"
            " Client-Cert is believed from all of it. Name the addresses of the proxies alone"
        )
    ]


def test_a_certificate_must_be_able_to_come_and_to_be_let_in(tmp_path: Path) -> None:
    assert problems(tmp_path, {"listeners": [ACCEPTS]}) == [
        (
            "listeners[0].auth.accept = certificate: cannot be shown on this port: set"
            " tls.client_certificates, or client_certificate_header if a proxy terminates TLS"
        ),
        (
            "listeners[0].auth.accept = certificate: lets nobody in, because client_certificates.allow is"
            " empty: add a rule, such as match: DNS:*.example"
        ),
    ]


def test_rules_that_nobody_asks_for_have_no_effect(tmp_path: Path) -> None:
    assert problems(tmp_path, ALLOWS) == [
        (
            "client_certificates.allow = 1 rules: has no effect, because no listener asks for a certificate:"
            " add certificate to listeners[0].auth.accept"
        )
    ]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"match": "node.example"},
            "match = 'node.example': must be one of DNS, URI, IP, email, CN, subject,",
        ),
        ({"match": 7}, "match = 7: must be one of DNS, URI"),
        ({}, "match: is missing, and has no default"),
        (
            {"match": "CN:x", "name": "{OU}"},
            "name = '{OU}': must be a text, with nothing in braces but {match}",
        ),
        ({"match": "CN:x", "labels": ["a"]}, "labels = ['a']: must be a mapping of texts"),
        ({"match": "CN:x", "labels": {"a": 1}}, "labels = {'a': 1}: must be a mapping of texts"),
        ({"match": "CN:x", "who": "me"}, "who: is not a setting; known here: match, name, tenant, labels"),
    ],
)
def test_a_wrong_rule_is_named_with_what_would_be_right(
    tmp_path: Path, rule: dict[str, Any], said: str
) -> None:
    proxied = {"trusted_proxies": ["10.0.0.1"], "client_certificate_header": "Client-Cert", **ACCEPTS}
    tree = {"listeners": [proxied], "client_certificates": {"allow": [rule]}}
    (line,) = problems(tmp_path, tree)
    assert line.startswith(f"client_certificates.allow[0].{said}")


def test_certificate_and_key_of_the_upstream_belong_together(tmp_path: Path, ca: Authority) -> None:
    certificate, key = ca.files("site-a")
    url = {"url": "https://superlink"}
    assert problems(tmp_path, {"upstream": url | {"certificate": str(certificate)}}) == [
        "upstream.certificate = 'ca/site-a.pem': needs upstream.key: set both, or none of them"
    ]
    assert problems(tmp_path, {"upstream": url | {"key": str(key)}}) == [
        "upstream.key = 'ca/site-a-key.pem': needs upstream.certificate: set both, or none of them"
    ]
    both = {"certificate": str(certificate), "key": str(ca.files("relay")[1])}
    assert problems(tmp_path, {"upstream": url | both}) == [
        (
            "upstream.key = 'ca/relay-key.pem': is not the key of the first certificate in ca/site-a.pem:"
            " give the key that belongs to it"
        )
    ]


def test_nothing_of_tls_has_an_effect_on_a_plain_upstream(tmp_path: Path, ca: Authority) -> None:
    certificate, key = ca.files("site-a")
    tree = {
        "url": "http://superlink",
        "ca_file": str(ca.files("ca")[0]),
        "certificate": str(certificate),
        "key": str(key),
        "server_name": "other",
    }
    lines = problems(tmp_path, {"upstream": tree})
    assert [line.partition(" = ")[0] for line in lines] == [
        "upstream.ca_file",
        "upstream.certificate",
        "upstream.key",
        "upstream.server_name",
    ]
    assert all("because upstream.url is http://superlink: use https" in line for line in lines)


@pytest.mark.parametrize("name", ["https://x", "x:8443", "", "a b", "x/y"])
def test_a_server_name_is_a_name(tmp_path: Path, name: str) -> None:
    (line,) = problems(tmp_path, {"upstream": {"url": "https://superlink", "server_name": name}})
    assert line == f"upstream.server_name = {name!r}: must be a host name, such as superlink.example"
