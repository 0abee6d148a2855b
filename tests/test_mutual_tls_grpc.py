"""Client certificates on the gRPC port of a real relay, shown by grpcio: who gets in, as whom, who lives."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio

from relay.authority import Authority
from relay.fleet import Method
from tests.certificates import make_crl, make_pair
from tests.grpc_ends import OPTIONS, GrpcNode, GrpcSuperLink
from tests.relay_process import RelayProcess
from tests.tls_clients import trusting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.grpc_ends import Answered

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

REQUEST = b"\x0a\x02\x08\x07"
#: A status with these words in its details ends a node for good (docs/flower-compatibility.md).
FATAL = "handshake failed"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    made.issue_relay(["localhost"])
    for name in ("site-a", "site-b", "else"):
        made.issue_client(name)
    return made


@pytest.fixture
async def superlink() -> AsyncIterator[GrpcSuperLink]:
    async with GrpcSuperLink() as superlink:
        yield superlink


@pytest.fixture
async def start(
    tmp_path: Path, authority: Authority, superlink: GrpcSuperLink
) -> AsyncIterator[Callable[..., Awaitable[RelayProcess]]]:
    """A function that starts a relay whose gRPC port asks for certificates, with more settings of its TLS."""
    relay = RelayProcess(tmp_path, superlink.port, workers=1, wire="grpc")
    relay.settings["log"]["level"] = "debug"

    async def start(**tls: str) -> RelayProcess:
        certificate, key = authority.files("relay")
        files = {"certificate": str(certificate), "key": str(key), "client_ca": str(authority.files("ca")[0])}
        relay.settings["listeners"] = [
            {
                "address": f"127.0.0.1:{relay.port}",
                "tls": files | tls,
                "auth": {"accept": ["certificate"]},
            }
        ]
        relay.settings["client_certificates"] = {"allow": [{"match": "CN:site-*", "tenant": "north"}]}
        relay.start(ready=False)
        await until(lambda: relay.count("worker serves") == 1)
        return relay

    try:
        yield start
    finally:
        await asyncio.to_thread(relay.end)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


class Site(GrpcNode):
    """A node that shows a certificate, if it has one."""

    def __init__(
        self, relay: RelayProcess, authority: Authority, shown: tuple[Path, Path] | None = None
    ) -> None:
        key = chain = None
        if shown is not None:
            chain, key = (path.read_bytes() for path in shown)
        credentials = grpc.ssl_channel_credentials(authority.files("ca")[0].read_bytes(), key, chain)
        self.channel = aio.secure_channel(f"localhost:{relay.port}", credentials, OPTIONS)

    async def poll(self) -> Answered:
        return await self.ask(Method.PULL_MESSAGES, REQUEST)


@pytest.mark.parametrize("mode", ["wanted", "needed"])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_a_certificate_that_a_rule_matches_lets_its_node_in(
    authority: Authority, start: Callable[..., Awaitable[RelayProcess]], mode: str, version: str
) -> None:
    relay = await start(client_certificates=mode, minimum_version=version)
    async with Site(relay, authority, authority.files("site-a")) as site:
        assert [(await site.poll()).code for _ in range(3)] == ["OK"] * 3
    await until(lambda: sum("identity" in line for line in relay.lines()) == 3)
    callers = {(line["identity"], line["tenant"]) for line in relay.lines() if "identity" in line}
    assert callers == {("site-a", "north")}
    assert relay.metric("relay_tls_handshakes_total", outcome="done", version="TLSv1.3") == 1


@pytest.mark.parametrize("who", [None, "else"])
async def test_auth_decides_about_who_shows_none_or_one_that_no_rule_matches(
    authority: Authority,
    superlink: GrpcSuperLink,
    start: Callable[..., Awaitable[RelayProcess]],
    who: str | None,
) -> None:
    relay = await start(client_certificates="wanted")
    async with Site(relay, authority, authority.files(who) if who else None) as site:
        assert (await site.poll()).code == "UNAUTHENTICATED"
    assert superlink.asked == []


@pytest.mark.parametrize("who", ["nobody", "stranger", "server"])
async def test_a_node_survives_that_its_handshake_is_refused(
    authority: Authority,
    superlink: GrpcSuperLink,
    start: Callable[..., Awaitable[RelayProcess]],
    tmp_path: Path,
    who: str,
) -> None:
    relay = await start(client_certificates="needed")
    shown = {"nobody": None, "stranger": make_pair(tmp_path, "stranger"), "server": authority.files("relay")}
    async with Site(relay, authority, shown[who]) as site:
        answers = [await site.poll() for _ in range(5)]
    assert {answer.code for answer in answers} == {"UNAVAILABLE"}
    assert not [answer.details for answer in answers if FATAL in answer.details.lower()]
    assert superlink.asked == []
    await until(lambda: relay.count("TLS handshake refused"))


async def test_a_certificate_that_is_revoked_loses_its_connection(
    authority: Authority,
    superlink: GrpcSuperLink,
    start: Callable[..., Awaitable[RelayProcess]],
    tmp_path: Path,
) -> None:
    signs = (authority.certificate, authority._key)
    crl = make_crl(tmp_path, signs)
    relay = await start(client_certificates="needed", crl=str(crl))
    async with (
        Site(relay, authority, authority.files("site-a")) as good,
        Site(relay, authority, authority.files("site-b")) as bad,
    ):
        held = asyncio.Event()

        async def hold(asked: Any, context: Any) -> bytes:
            await held.wait()
            return b""

        superlink.answer = hold
        calls = [asyncio.create_task(site.poll()) for site in (good, bad)]
        await until(lambda: len(superlink.asked) == 2)
        make_crl(tmp_path, signs, authority.files("site-b")[0])
        lost = await calls[1]
        assert (lost.code, FATAL in lost.details.lower()) == ("UNAVAILABLE", False)
        again = await bad.poll()
        assert (again.code, FATAL in again.details.lower()) == ("UNAVAILABLE", False)
        held.set()
        assert (await calls[0]).code == "OK"
    refused = [line["problem"] for line in relay.lines() if line.get("event") == "client certificate refused"]
    assert set(refused) == {"it has expired, or was revoked"}


async def test_a_port_may_speak_the_newest_version_alone(
    authority: Authority, start: Callable[..., Awaitable[RelayProcess]]
) -> None:
    relay = await start(client_certificates="wanted", minimum_version="1.3")

    def handshake(version: str) -> str | None:
        context = trusting(authority.files("ca")[0], version)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", relay.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as session,
        ):
            return session.selected_alpn_protocol()

    assert await asyncio.to_thread(handshake, "1.3") == "h2"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.to_thread(handshake, "1.2")
