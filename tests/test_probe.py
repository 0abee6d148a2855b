"""`flwr-relay check` tells a SuperLink of the right wire from all else that may stand at an address."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.supercore.routers import health

from relay.call import Wire
from relay.probe import ProbeError, probe_upstream
from relay.settings import BaseUrl, Upstream
from tests.grpc_ends import GrpcSuperLink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.grpc_ends import Asked

#: What a server does with one connection: the request that it read is given.
Behave = Callable[[socket.socket, bytes], None]


def answers(status: int, *, path: str) -> Behave:
    """Answer a GET of `path` with `status`, and anything else with 404."""

    def behave(connection: socket.socket, request: bytes) -> None:
        found = request.startswith(f"GET {path} HTTP/1.1\r\n".encode())
        connection.sendall(b"HTTP/1.1 %d -\r\ncontent-length: 0\r\n\r\n" % (status if found else 404))

    return behave


def says(data: bytes) -> Behave:
    return lambda connection, _: connection.sendall(data)


@contextmanager
def serving(behave: Behave, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve on loopback in a thread; give the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection: socket.socket = self.request
            connection.settimeout(10)
            try:
                if tls is not None:
                    connection = tls.wrap_socket(connection, server_side=True)
                behave(connection, connection.recv(65536))
            except OSError:
                return  # the other end did not like us, which is what some tests are about
            finally:
                connection.close()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def upstream(port: int, *, scheme: str = "http", **section: Any) -> Upstream:
    section.setdefault("connect_timeout", 5)
    return Upstream(url=BaseUrl(scheme, "127.0.0.1", port), **section)


# -- a SuperLink --------------------------------------------------------------------------------------

HEALTH, PULL = "/health", "/api/v0/fleet/pull-messages"


@pytest.mark.parametrize(
    ("wire", "status", "path"),
    [(Wire.HTTP_V1, 200, HEALTH), (Wire.REST_V0, 405, PULL)],
    ids=lambda value: value.value if isinstance(value, Wire) else "",
)
def test_a_superlink_of_the_wire_that_was_set_is_known_by_its_answer(
    wire: Wire, status: int, path: str
) -> None:
    with serving(answers(status, path=path)) as port:
        assert probe_upstream(upstream(port, wire=wire)) == (
            f"http://127.0.0.1:{port} answers GET {path} with {status}"
        )


@pytest.mark.parametrize(
    ("wire", "status", "path"),
    [(Wire.REST_V0, 200, HEALTH), (Wire.HTTP_V1, 405, PULL)],
    ids=["set to REST and is HTTP", "set to HTTP and is REST"],
)
def test_a_superlink_of_the_other_wire_is_told_apart(wire: Wire, status: int, path: str) -> None:
    with serving(answers(status, path=path)) as port, pytest.raises(ProbeError) as caught:
        probe_upstream(upstream(port, wire=wire))
    assert "with 404" in str(caught.value)
    assert "check upstream.url and upstream.wire" in str(caught.value)
    assert wire.value in str(caught.value)


async def test_flowers_own_health_check_answers_as_the_probe_expects() -> None:
    app = FastAPI()
    app.include_router(health.router)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as client:
        assert (await client.get(HEALTH)).status_code == 200


def test_a_probe_ends_its_connection() -> None:
    ended = threading.Event()

    def behave(connection: socket.socket, request: bytes) -> None:
        answers(200, path=HEALTH)(connection, request)
        if not connection.recv(1):
            ended.set()

    with serving(behave) as port:
        probe_upstream(upstream(port))
        assert ended.wait(5)


# -- something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 301, 401, 404, 500, 503])
def test_an_answer_that_no_healthy_superlink_gives_is_reported_with_its_status(status: int) -> None:
    with serving(answers(status, path=HEALTH)) as port, pytest.raises(ProbeError) as caught:
        probe_upstream(upstream(port))
    assert f"http://127.0.0.1:{port} answers GET /health with {status}" in str(caught.value)


@pytest.mark.parametrize(
    "behave",
    [
        pytest.param(says(b""), id="closes"),
        pytest.param(says(b"SSH-2.0-OpenSSH_9.2\r\n"), id="is no HTTP"),
        pytest.param(says(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"), id="is gRPC"),
        pytest.param(says(b"HTTP/1.1 2"), id="breaks off"),
        pytest.param(says(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000), id="has too many headers"),
        pytest.param(says(b"HTTP/1.1 200 " + b"x" * 100_000), id="never ends its first line"),
    ],
)
def test_what_speaks_no_http_does_not_answer(behave: Behave) -> None:
    with serving(behave) as port, pytest.raises(ProbeError, match=r"127\.0\.0\.1:\d+ does not answer: .+"):
        probe_upstream(upstream(port))


def test_nobody_there_is_reported_with_the_systems_reason() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ProbeError, match=r"does not answer: .*refused"):
            probe_upstream(upstream(unused.getsockname()[1]))


def test_who_says_nothing_is_waited_for_no_longer_than_the_connect_timeout() -> None:
    enough = threading.Event()

    def silent(connection: socket.socket, request: bytes) -> None:
        enough.wait(20)

    started = time.monotonic()
    with serving(silent) as port:
        with pytest.raises(ProbeError, match=r"does not answer: .*timed out"):
            probe_upstream(upstream(port, connect_timeout=0.2))
        enough.set()
    assert 0.2 <= time.monotonic() - started < 5


@pytest.mark.parametrize("host", ["a" * 64, "a..b"], ids=["a label that is too long", "an empty label"])
def test_a_host_that_can_be_no_name_is_reported_and_not_a_crash(host: str) -> None:
    with pytest.raises(ProbeError, match="does not answer"):
        probe_upstream(Upstream(url=BaseUrl("http", host, 8000), connect_timeout=1))


# -- TLS ----------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority of its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        certificate = self._builder(self.name, self.key).add_extension(constraints, critical=True)
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(self._signed(certificate))

    def server(self, host: str) -> ssl.SSLContext:
        """Return the context of a server that this authority knows as `host`."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            known: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            known = x509.DNSName(host)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        names = x509.SubjectAlternativeName([known])
        certificate = self._builder(subject, key).add_extension(names, critical=False)
        file = self.directory / f"{host}.pem"
        file.write_bytes(
            self._signed(certificate)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
        )

    def _signed(self, certificate: x509.CertificateBuilder) -> bytes:
        return certificate.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


def test_a_superlink_with_a_certificate_of_the_given_authority_is_believed(authority: Authority) -> None:
    with serving(answers(200, path=HEALTH), authority.server("127.0.0.1")) as port:
        answer = probe_upstream(upstream(port, scheme="https", ca_file=authority.file))
    assert answer == f"https://127.0.0.1:{port} answers GET /health with 200"


@pytest.mark.parametrize("ca_file", ["another", None], ids=["another authority", "the system's authorities"])
def test_a_superlink_of_an_unknown_authority_does_not_answer(
    authority: Authority, tmp_path: Path, ca_file: str | None
) -> None:
    other = Authority(tmp_path, ca_file).file if ca_file else None
    with (
        serving(answers(200, path=HEALTH), authority.server("127.0.0.1")) as port,
        pytest.raises(ProbeError, match=r"does not answer: .*CERTIFICATE_VERIFY_FAILED"),
    ):
        probe_upstream(upstream(port, scheme="https", ca_file=other))


def test_a_superlink_whose_certificate_names_another_host_does_not_answer(authority: Authority) -> None:
    with (
        serving(answers(200, path=HEALTH), authority.server("superlink.example")) as port,
        pytest.raises(ProbeError, match=r"does not answer: .*IP address mismatch"),
    ):
        probe_upstream(upstream(port, scheme="https", ca_file=authority.file))


def test_https_asked_of_a_plain_port_does_not_answer(authority: Authority) -> None:
    with serving(says(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port, pytest.raises(ProbeError) as caught:
        probe_upstream(upstream(port, scheme="https", ca_file=authority.file))
    assert "does not answer" in str(caught.value)


def test_plain_http_asked_of_a_tls_port_does_not_answer(authority: Authority) -> None:
    with (
        serving(answers(200, path=HEALTH), authority.server("127.0.0.1")) as port,
        pytest.raises(ProbeError, match="does not answer"),
    ):
        probe_upstream(upstream(port))


def test_an_authority_file_that_has_vanished_is_reported_and_not_a_crash(authority: Authority) -> None:
    settings = upstream(1, scheme="https", ca_file=authority.file)
    authority.file.unlink()
    with pytest.raises(ProbeError, match="No such file"):
        probe_upstream(settings)


# -- gRPC ---------------------------------------------------------------------------------------------


async def probed(superlink: GrpcSuperLink, **section: Any) -> str:
    return await asyncio.to_thread(probe_upstream, upstream(superlink.port, wire=Wire.GRPC, **section))


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "UNKNOWN", "OK"])
async def test_a_superlink_that_speaks_grpc_is_known_by_any_answer(code: str) -> None:
    async def answer(_: Asked, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if code != "OK":
            await context.abort(grpc.StatusCode[code], "Missing authentication metadata")
        return b""

    async with GrpcSuperLink() as superlink:
        superlink.answer = answer
        found = await probed(superlink)
    assert found.startswith(f"http://127.0.0.1:{superlink.port} answers /flwr.proto.Fleet/PullMessages")
    assert (code in found) is (code != "OK")


async def test_a_grpc_server_that_is_no_superlink_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async with GrpcSuperLink() as superlink:
        monkeypatch.setattr(superlink, "service", lambda _: None)
        with pytest.raises(ProbeError, match=r"check upstream\.url and upstream\.wire"):
            await probed(superlink)


async def test_no_answer_in_grpc_is_no_answer() -> None:
    async with GrpcSuperLink() as superlink:
        pass
    with pytest.raises(ProbeError, match="does not answer"):
        await probed(superlink)


def test_an_http_server_is_no_answer_in_grpc() -> None:
    with serving(answers(200, path=HEALTH)) as port, pytest.raises(ProbeError, match="does not answer"):
        probe_upstream(upstream(port, wire=Wire.GRPC, connect_timeout=1))
