"""Certificates of nodes that the edge passes on: those that it has verified, and never what a node writes."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

from relay import certificates
from relay.authority import Authority
from relay.wires.client_certificate import NAMES, from_header
from tests.certificates import make_crl, make_pair
from tests.nginx.edge import COME_BACK, EMPTY, OK, PULL, PUSH, Answer, answer, answers, play, request
from tests.sockets import response

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.nginx.edge import Edge, Played
    from tests.sockets import Message

    StartEdge = Callable[..., Edge]

FORGED = b"".join(name + b": :AAAA:\r\n" for name in sorted(NAMES))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca")
    for name in ("good", "bad"):
        made.issue_client(name)
    return made


def asks(authority: Authority, how: str, *more: str) -> str:
    """Return what an operator uncomments in site/tls.conf."""
    lines = (f"ssl_client_certificate {authority.files('ca')[0]}", f"ssl_verify_client {how}", *more)
    return "".join(f"{line};\n" for line in lines)


async def ask(
    edge: Edge, path: str = PULL, pair: tuple[Path, Path] | None = None, more: bytes = b""
) -> Answer:
    context: ssl.SSLContext = edge.certificates.client("http/1.1")
    if pair is not None:
        context.load_cert_chain(*pair)
    peer = await edge.connect_tls(context)
    peer.send(request(path, b"x", more=more))
    return await answer(peer)


def passed(relay: Played) -> Message:
    """Return the only call that the relay saw."""
    (call,) = relay.seen
    return call


@pytest.mark.parametrize("how", ["optional", "on"])
async def test_a_verified_certificate_is_passed_on_as_the_relay_reads_it(
    start_edge: StartEdge, authority: Authority, how: str
) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server=asks(authority, how))
        assert await ask(edge, pair=authority.files("good"), more=FORGED) == OK
        call = passed(relay)
    der = ssl.PEM_cert_to_DER_cert(authority.files("good")[0].read_text())
    header = call.one(b"x-ssl-client-cert")
    assert from_header(b"x-ssl-client-cert", header) == certificates.read(der).certificate
    assert [name for name in NAMES if call.all(name)] == [b"x-ssl-client-cert"]


@pytest.mark.parametrize("asked", [True, False])
async def test_what_a_node_writes_itself_is_never_passed_on(
    start_edge: StartEdge, authority: Authority, asked: bool
) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server=asks(authority, "optional") if asked else "")
        assert await ask(edge, more=FORGED) == OK
        assert [name for name in NAMES if passed(relay).all(name)] == []


async def test_nor_on_a_plain_port(start_edge: StartEdge) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        assert await edge.ask(request(PULL, b"x", more=FORGED)) == OK
        assert [name for name in NAMES if passed(relay).all(name)] == []


@pytest.mark.parametrize("how", ["optional", "on"])
async def test_a_node_with_a_wrong_certificate_lives_and_never_gets_to_the_relay(
    start_edge: StartEdge, authority: Authority, tmp_path: Path, how: str
) -> None:
    crl = make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0])
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server=asks(authority, how, f"ssl_crl {crl}"))
        for pair in (make_pair(tmp_path), authority.files("bad")):
            assert await ask(edge, pair=pair) == EMPTY
            assert await ask(edge, PUSH, pair) == COME_BACK
        assert relay.seen == []
        assert await ask(edge, pair=authority.files("good")) == OK


async def test_a_node_without_a_certificate_lives_where_one_is_needed(
    start_edge: StartEdge, authority: Authority
) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server=asks(authority, "on"))
        assert await ask(edge) == EMPTY
        assert await ask(edge, PUSH) == COME_BACK
        assert relay.seen == []
