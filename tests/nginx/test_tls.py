"""The TLS side of the edge, with the HTTP client of real SuperNodes and their own judgement of its errors."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest
from flwr.supercore.retry.http_retry import make_simple_http_retry_invoker

from tests.nginx.edge import (
    CALLS,
    CLOSED,
    COME_BACK,
    EMPTY,
    OK,
    PULL,
    PUSH,
    Played,
    answer,
    answers,
    path_of,
    play,
    request,
)
from tests.relay_process import free_port
from tests.sockets import Peer, response

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.nginx.edge import Edge

    StartEdge = Callable[..., Edge]


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [((), None), (("http/1.1",), "http/1.1"), (("h2", "http/1.1"), "http/1.1")],
    ids=["none", "http/1.1", "both"],
)
async def test_alpn(start_edge: StartEdge, offered: tuple[str, ...], chosen: str | None) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        peer = await edge.connect_tls(edge.certificates.client(*offered))
        assert peer.writer.get_extra_info("ssl_object").selected_alpn_protocol() == chosen
        peer.send(request(PULL))
        assert await answer(peer) == OK


async def test_alpn_of_grpc(start_edge: StartEdge) -> None:
    """A gRPC node has come to the wrong port."""
    edge = start_edge(free_port())
    with pytest.raises(ssl.SSLError, match=r"(?i)application.protocol"):
        await edge.connect_tls(edge.certificates.client("h2"))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions(start_edge: StartEdge, version: ssl.TLSVersion) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        context = edge.certificates.client("http/1.1")
        context.minimum_version = context.maximum_version = version
        peer = await edge.connect_tls(context)
        assert "GCM" in peer.writer.get_extra_info("cipher")[0]
        peer.send(request(PULL))
        assert await answer(peer) == OK


async def test_old_version(start_edge: StartEdge) -> None:
    edge = start_edge(free_port())
    context = edge.certificates.client()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        await edge.connect_tls(context)


async def test_answers_over_tls(start_edge: StartEdge) -> None:
    edge = start_edge(free_port())
    for path, told in (
        (PULL, EMPTY),
        (PUSH, COME_BACK),
        ("/api/v0/fleet/pull-messages", EMPTY),
        ("/api/v0/fleet/pull-object", CLOSED),
        ("/api/v0/fleet/send-node-heartbeat", COME_BACK),
    ):
        assert await edge.ask(request(path), tls=True) == told


async def test_plaintext_on_the_tls_port(start_edge: StartEdge) -> None:
    edge = start_edge(free_port())
    for wire, method in CALLS:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", edge.tls_port))
        edge.peers.append(peer)
        peer.send(request(path_of(wire, method), b"x"))
        assert await peer.rest() == (b"", "reset")


# -- the client of a node -------------------------------------------------------------------------------


def retries(error: Exception) -> bool:
    """Return whether a SuperNode would try again after this error, by its own code."""
    invoker = make_simple_http_retry_invoker()
    assert invoker.should_giveup is not None
    return isinstance(error, invoker.recoverable_exceptions) and not invoker.should_giveup(error)


def post(client: httpx.Client, url: str, size: int) -> str:
    """Make a call as a node does; return what it takes from it."""
    try:
        got = client.post(url, content=bytes(size), headers={"content-type": "application/protobuf"})
        got.raise_for_status()
    except httpx.HTTPError as error:
        return "retry" if retries(error) else f"gives up after {error!r}"
    return "ok"


@pytest.mark.parametrize("path", [PULL, PUSH, "/v1/fleet/pull-object", "/v1/fleet/send-node-heartbeat"])
async def test_relay_that_fails_at_any_moment(start_edge: StartEdge, path: str) -> None:
    """Whenever it fails, a node survives: over TLS the wrong close would read as a TLS error to it."""
    dice = random.Random(path)

    async def fails(_: Played, peer: Peer) -> None:
        with suppress(TimeoutError):
            for _piece in range(dice.randrange(30)):
                async with asyncio.timeout(0.02):
                    await peer.reader.read(20_000)
        match dice.randrange(3):
            case 0:
                await peer.close()
            case 1:
                peer.send(response(b"half", size=100_000))
                await asyncio.sleep(0.005)
                peer.reset()
            case _:
                peer.reset()

    def run(edge: Edge) -> Counter[str]:
        took: Counter[str] = Counter()
        url = f"https://localhost:{edge.tls_port}{path}"
        with httpx.Client(verify=edge.certificates.client("http/1.1"), timeout=10) as client:
            for _ in range(40):
                took[post(client, url, dice.choice((10, 50_000, 500_000, 3_000_000)))] += 1
        return took

    async with play(fails) as relay:
        took = await asyncio.to_thread(run, start_edge(relay.port))
        assert set(took) <= ({"ok", "retry"} if path == PULL else {"retry"})
        assert took["retry"] > 0


async def test_node_on_the_wrong_port(start_edge: StartEdge) -> None:
    edge = start_edge(free_port())

    def run() -> str:
        with httpx.Client(timeout=10) as client:
            return post(client, f"http://127.0.0.1:{edge.tls_port}{PULL}", 10)

    assert await asyncio.to_thread(run) == "retry"
