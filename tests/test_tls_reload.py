"""Certificates that are renewed under a real relay of several workers: no restart, and nobody is lost."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
from cryptography import x509

from relay.authority import Authority
from relay.fleet import Method
from tests.certificates import make_crl
from tests.relay_process import RelayProcess
from tests.served import path_of
from tests.sockets import Listener, response
from tests.tls_clients import supernode, trusting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

WORKERS = 2


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca", overwrite=True)
    made.issue_relay(["localhost"])
    return made


@contextmanager
def relay(tmp_path: Path, authority: Authority, **sections: Any) -> Iterator[RelayProcess]:
    """Run a relay that answers polls by itself on a TLS port."""
    given: dict[str, Any] = {"workers": WORKERS, "mode": "maintenance"} | sections
    process = RelayProcess(tmp_path, 1, **given)
    certificate, key = authority.files("relay")
    own = {"certificate": str(certificate), "key": str(key)}
    process.settings["listeners"] = [
        {"address": f"127.0.0.1:{process.port}", "tls": own | sections.get("tls", {})}
    ]
    process.settings.pop("tls", None)
    try:
        yield process.start()
    finally:
        process.end()


def serial(authority: Authority, name: str = "relay") -> int:
    return x509.load_pem_x509_certificate(authority.files(name)[0].read_bytes()).serial_number


def served(port: int, context: ssl.SSLContext) -> int:
    """Return the serial number of the certificate that a new connection gets."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as session,
    ):
        der = session.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def all_serve(process: RelayProcess, context: ssl.SSLContext, wanted: int) -> bool:
    """Return whether twelve connections in a row get this certificate: the workers share them."""
    return all(served(process.port, context) == wanted for _ in range(12))


class Nodes:
    """SuperNodes that connect anew for each call, until told to stop.

    Attributes:
        calls: that were answered with 200.
        errors: of the others.
    """

    def __init__(self, port: int, context: ssl.SSLContext, count: int = 4) -> None:
        self._url = f"https://localhost:{port}{path_of(Method.PULL_MESSAGES)}"
        self._context = context
        self._over = threading.Event()
        self.calls = 0
        self.errors: list[object] = []
        self._threads = [threading.Thread(target=self._live) for _ in range(count)]

    def _live(self) -> None:
        while not self._over.is_set():
            with supernode(self._context) as client:
                for _ in range(3):
                    self._ask(client)

    def _ask(self, client: httpx.Client) -> None:
        try:
            answer = client.post(self._url, headers={"content-type": "application/protobuf"})
        except httpx.HTTPError as error:
            self.errors.append(error)
            return
        if answer.status_code == 200:
            self.calls += 1
        else:
            self.errors.append(answer.status_code)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(20)


def test_certificates_are_renewed_under_load_and_no_call_and_no_handshake_is_lost(
    tmp_path: Path, authority: Authority
) -> None:
    context = trusting(authority.files("ca")[0])
    with relay(tmp_path, authority) as process, Nodes(process.port, context) as nodes:
        for _ in range(4):
            calls = nodes.calls
            authority.issue_relay(["localhost"])
            begun = time.monotonic()
            wanted = serial(authority)
            process.until(lambda: all_serve(process, context, wanted))  # noqa: B023 - called at once
            assert time.monotonic() - begun < 10  # a look a second, on a machine that may be busy
            process.until(lambda: nodes.calls > calls + 20)  # noqa: B023
    assert nodes.errors == []
    # A worker may see the key before the certificate, and then refuses that half.
    taken = [line for line in process.lines() if line.get("event") == "TLS files taken up"]
    assert len(taken) == 4 * WORKERS
    assert process.count("worker serves") == WORKERS


def test_numbers_of_files_and_handshakes_are_shown(tmp_path: Path, authority: Authority) -> None:
    context = trusting(authority.files("ca")[0])
    with relay(tmp_path, authority) as process:
        labels = {"listener": f"127.0.0.1:{process.port}", "file": "certificate"}

        def end() -> float:
            return process.metric("relay_tls_certificate_expiry_seconds", **labels)

        assert end() == pytest.approx(time.time() + 397 * 86_400, abs=300)
        authority.issue_relay(["localhost"], days=30)
        wanted = serial(authority)
        process.until(lambda: process.metric("relay_tls_reloads_total", outcome="taken") >= WORKERS)
        assert all_serve(process, context, wanted)
        assert end() == pytest.approx(time.time() + 30 * 86_400, abs=300)
        done = process.metric("relay_tls_handshakes_total", outcome="done", version="TLSv1.3")
        assert done >= 12
        with socket.create_connection(("127.0.0.1", process.port), timeout=10) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        process.until(lambda: process.metric("relay_tls_handshakes_total", outcome="refused") == 1)


def test_what_cannot_be_used_is_not_taken_up_by_anybody(tmp_path: Path, authority: Authority) -> None:
    context = trusting(authority.files("ca")[0])
    before = serial(authority)
    with relay(tmp_path, authority) as process:
        Authority(tmp_path / "other").issue_relay(["localhost"])
        authority.files("relay")[1].write_bytes((tmp_path / "other" / "relay-key.pem").read_bytes())
        process.until(lambda: process.metric("relay_tls_reloads_total", outcome="refused") >= WORKERS)
        assert all_serve(process, context, before)
        assert {line["where"] for line in process.complaints()} == {f"127.0.0.1:{process.port}"}


def test_a_worker_that_starts_while_the_files_are_broken_waits_for_them(
    tmp_path: Path, authority: Authority
) -> None:
    context = trusting(authority.files("ca")[0])
    with relay(tmp_path, authority) as process, Nodes(process.port, context, 2) as nodes:
        key = authority.files("relay")[1]
        kept = key.read_bytes()
        key.write_bytes(b"garbage")
        process.workers()[0].kill()
        process.until(lambda: process.count("files refused; waiting for others") == 1)
        calls = nodes.calls
        process.until(lambda: nodes.calls > calls + 20)  # by the other worker
        key.write_bytes(kept)
        process.until(lambda: process.count("worker serves") == WORKERS + 1)
        assert process.stop() == 0


def test_a_stop_does_not_wait_for_files(tmp_path: Path, authority: Authority) -> None:
    with relay(tmp_path, authority, workers=1) as process:
        authority.files("relay")[1].write_bytes(b"garbage")
        process.workers()[0].kill()
        process.until(lambda: process.count("files refused; waiting for others") == 1)
        assert process.stop() == 0


def test_a_certificate_is_revoked_for_all_workers(tmp_path: Path, authority: Authority) -> None:
    authority.issue_client("bad")
    signs = (authority.certificate, authority._key)
    crl = make_crl(tmp_path, signs)
    ca = str(authority.files("ca")[0])
    asks = {"client_ca": ca, "client_certificates": "needed", "crl": str(crl)}
    context = trusting(authority.files("ca")[0])
    context.load_cert_chain(*authority.files("bad"))
    with relay(tmp_path, authority, tls=asks) as process:
        open_ones = [supernode(context) for _ in range(8)]
        url = f"https://localhost:{process.port}{path_of(Method.PULL_MESSAGES)}"

        def ask(client: httpx.Client) -> bool:
            try:
                return client.post(url, headers={"content-type": "application/protobuf"}).status_code == 200
            except httpx.HTTPError:
                return False

        assert all(ask(client) for client in open_ones)
        make_crl(tmp_path, signs, authority.files("bad")[0])
        process.until(lambda: process.metric("relay_tls_reloads_total", outcome="taken") >= WORKERS)
        process.until(lambda: not any(ask(client) for client in open_ones))
        for client in open_ones:
            client.close()


async def test_the_relay_shows_a_renewed_certificate_to_the_superlink(
    tmp_path: Path, authority: Authority
) -> None:
    authority.issue_client("site-a")
    asks = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    asks.load_cert_chain(*authority.files("relay"))
    asks.load_verify_locations(authority.files("ca")[0])
    asks.verify_mode = ssl.CERT_REQUIRED
    async with Listener(tls=asks) as superlink:
        certificate, key = authority.files("site-a")
        upstream = {
            "url": f"https://127.0.0.1:{superlink.port}",
            "ca_file": str(authority.files("ca")[0]),
            "certificate": str(certificate),
            "key": str(key),
            "server_name": "localhost",
            "keepalive": 0.2,  # so that the connection of before is given up
        }
        process = RelayProcess(tmp_path, 1, workers=1)
        process.settings |= {"upstream": upstream, "limits": {"check_calls": False}}
        try:
            process.start(ready=False)
            await _until(lambda: process.log.exists() and process.count("worker serves") == 1)
            assert await _who(process, superlink) == serial(authority, "site-a")
            authority.issue_client("site-a")
            await _until(lambda: process.metric("relay_tls_reloads_total", outcome="taken") == 1)
            await asyncio.sleep(0.3)
            assert await _who(process, superlink) == serial(authority, "site-a")
        finally:
            process.end()


async def _who(process: RelayProcess, superlink: Listener) -> int:
    """Make a call, and return the serial number of the certificate that the SuperLink sees."""

    def ask() -> int:
        url = f"http://127.0.0.1:{process.port}{path_of(Method.PULL_MESSAGES)}"
        head = {"content-type": "application/protobuf"}
        return httpx.post(url, content=b"x", headers=head, timeout=20).status_code

    asking = asyncio.create_task(asyncio.to_thread(ask))
    async with asyncio.timeout(20):
        peer = await superlink._new.get()
        await peer.message()
        await peer.send_all(response())
        der = peer.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        assert await asking == 200
    return x509.load_der_x509_certificate(der).serial_number


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)
