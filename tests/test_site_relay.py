"""A relay at a site that shows a certificate for its nodes, and the relay that lets it in."""

from __future__ import annotations

import http.server
import ssl
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

from relay.authority import Authority
from relay.fleet import Method
from tests.relay_process import RelayProcess, free_port
from tests.served import path_of
from tests.tls_clients import supernode, trusting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

PULL = path_of(Method.PULL_MESSAGES)
TYPE = {"content-type": "application/protobuf"}


class SuperLink(http.server.BaseHTTPRequestHandler):
    """Answers every call with nothing, and notes its headers."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, str]] = []  # noqa: RUF012 - the server makes a handler for each connection

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(200)
        self.send_header("content-type", "application/protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def superlink() -> Iterator[int]:
    """The port of a SuperLink."""
    SuperLink.seen.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SuperLink)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca")
    made.issue_relay(["localhost"])
    for name in ("site-a", "site-b"):
        made.issue_client(name)
    return made


class Central(RelayProcess):
    """A relay that lets site-a in, on a TLS port and from a proxy on this host.

    Attributes:
        proxied: its plain port for the proxy.
    """

    def __init__(self, directory: Path, upstream: int, authority: Authority) -> None:
        directory.mkdir()
        super().__init__(directory, upstream, workers=1, limits={"check_calls": False})
        self.proxied = free_port()
        certificate, key = map(str, authority.files("relay"))
        ca = str(authority.files("ca")[0])
        tls = {"certificate": certificate, "key": key, "client_ca": ca, "client_certificates": "wanted"}
        accepts = {"auth": {"accept": ["certificate"]}}
        proxy = {"trusted_proxies": ["127.0.0.1"], "client_certificate_header": "X-SSL-Client-Cert"}
        self.settings["listeners"] = [
            {"address": f"127.0.0.1:{self.port}", "tls": tls, **accepts},
            {"address": f"127.0.0.1:{self.proxied}", **proxy, **accepts},
        ]
        self.settings["client_certificates"] = {"allow": [{"match": "CN:site-a", "tenant": "north"}]}

    def refusals(self, cause: str) -> float:
        return self.metric("relay_auth_refusals_total", cause=cause)


@pytest.fixture
def central(tmp_path: Path, superlink: int, authority: Authority) -> Iterator[Central]:
    with Central(tmp_path / "central", superlink, authority) as process:
        yield process


def node(authority: Authority, name: str | None) -> ssl.SSLContext:
    context = trusting(authority.files("ca")[0])
    if name is not None:
        context.load_cert_chain(*authority.files(name))
    return context


def test_who_is_let_in_by_its_certificate(central: Central, authority: Authority) -> None:
    statuses = {}
    for name in ("site-a", "site-b", None):
        with supernode(node(authority, name)) as client:
            statuses[name] = client.post(f"https://localhost:{central.port}{PULL}", headers=TYPE).status_code
    assert statuses == {"site-a": 200, "site-b": 401, None: 401}
    assert len(SuperLink.seen) == 1
    central.until(lambda: central.refusals("certificate_not_allowed") == 1)
    central.until(lambda: central.refusals("missing") == 1)
    assert central.metric("relay_tls_handshakes_total", outcome="done") == 3


def test_who_is_let_in_by_what_a_trusted_proxy_says(central: Central, authority: Authority) -> None:
    def ask(header: str | None) -> int:
        given = TYPE if header is None else TYPE | {"x-ssl-client-cert": header}
        return httpx.post(f"http://127.0.0.1:{central.proxied}{PULL}", headers=given).status_code

    pem = {name: quote(authority.files(name)[0].read_text(), safe="") for name in ("site-a", "site-b")}
    assert ask(pem["site-a"]) == 200
    assert ask(pem["site-b"]) == 401
    assert ask(None) == 401
    assert len(SuperLink.seen) == 1
    assert "x-ssl-client-cert" not in SuperLink.seen[0]
    before = central.refusals("missing")
    assert ask("garbled") == 200  # "nothing for you now": the proxy's fault ends no node
    assert len(SuperLink.seen) == 1
    assert central.refusals("missing") == before


def test_the_nodes_of_a_site_are_let_in_by_the_certificate_of_its_relay(
    tmp_path: Path, central: Central, authority: Authority
) -> None:
    def site(name: str) -> RelayProcess:
        folder = tmp_path / name
        folder.mkdir()
        certificate, key = map(str, authority.files(name))
        upstream: dict[str, Any] = {
            "url": f"https://localhost:{central.port}",
            "ca_file": str(authority.files("ca")[0]),
            "certificate": certificate,
            "key": key,
        }
        process = RelayProcess(folder, 1, workers=1)
        process.settings |= {"upstream": upstream, "limits": {"check_calls": False}}
        return process

    with ExitStack() as stack:
        answers = {}
        for name in ("site-a", "site-b"):
            process = stack.enter_context(site(name))
            answers[name] = httpx.post(f"http://127.0.0.1:{process.port}{PULL}", headers=TYPE, timeout=30)
    assert answers["site-a"].status_code == 200
    assert answers["site-b"].status_code == 401  # it reaches the nodes, as docs/tls.md warns
    assert len(SuperLink.seen) == 1
