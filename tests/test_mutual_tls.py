"""Client certificates on real connections: who gets in, as whom, and that no node dies of the others."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from relay.authority import Authority
from relay.fleet import Method
from tests.certificates import make_crl, make_pair
from tests.served import Served, echo, path_of, request
from tests.tls_clients import PATIENCE, RawClient, is_survived, supernode, trusting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from relay.call import Call, Reply

pytestmark = [pytest.mark.timeout(90), pytest.mark.xdist_group("relay-processes")]

each_version = pytest.mark.parametrize("version", ["1.2", "1.3"])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    made.issue_relay(["localhost"])
    for name in ("good", "bad"):
        made.issue_client(name)
    return made


class Shown:
    """A handler that notes the certificate of each call.

    Attributes:
        subjects: of the calls so far; None for a call without one.
    """

    def __init__(self) -> None:
        self.subjects: list[str | None] = []

    async def __call__(self, call: Call) -> Reply:
        self.subjects.append(call.certificate.subject if call.certificate is not None else None)
        return await echo(call)


@pytest.fixture
def shown() -> Shown:
    return Shown()


@pytest.fixture
def serve(authority: Authority, shown: Shown) -> Iterator[Callable[..., Served]]:
    """A function that serves with client certificates `wanted` or `needed`."""
    running: list[Served] = []

    def serve(mode: str, **more: Any) -> Served:
        ca: dict[str, Any] = {"client_ca": authority.files("ca")[0], "client_certificates": mode}
        running.append(Served(shown, pair=authority.files("relay"), **(ca | more)))
        return running[-1].__enter__()

    yield serve
    for served in running:
        served.__exit__(None, None, None)


def node(authority: Authority, name: str | None, version: str | None = None) -> ssl.SSLContext:
    context = trusting(authority.files("ca")[0], version)
    if name is not None:
        context.load_cert_chain(*authority.files(name))
    return context


def post(served: Served, context: ssl.SSLContext) -> int | Exception:
    """Make a call as a SuperNode does; return the status, or how it failed."""
    with supernode(context) as client:
        try:
            url = f"https://localhost:{served.port}{path_of(Method.GET_RUN)}"
            head = {"content-type": "application/protobuf"}
            return client.post(url, content=b"x", headers=head).status_code
        except httpx.HTTPError as error:
            return error


@each_version
@pytest.mark.parametrize("mode", ["wanted", "needed"])
def test_calls_carry_the_certificate_of_their_connection(
    authority: Authority, serve: Callable[..., Served], shown: Shown, mode: str, version: str
) -> None:
    served = serve(mode)
    with supernode(node(authority, "good", version)) as client:
        for _ in range(3):
            url = f"https://localhost:{served.port}{path_of(Method.PULL_MESSAGES)}"
            client.post(url, headers={"content-type": "application/protobuf"}).raise_for_status()
    assert shown.subjects == ["CN=good"] * 3


@each_version
def test_a_call_without_a_certificate_is_for_the_policies_to_judge(
    authority: Authority, serve: Callable[..., Served], shown: Shown, version: str
) -> None:
    assert post(serve("wanted"), node(authority, None, version)) == 200
    assert shown.subjects == [None]


@each_version
@pytest.mark.parametrize("who", ["nobody", "stranger", "server"])
def test_a_supernode_survives_that_it_is_not_let_in_and_never_gets_to_call(
    authority: Authority,
    serve: Callable[..., Served],
    shown: Shown,
    tmp_path: Path,
    who: str,
    version: str,
) -> None:
    """TLS 1.3 tells a client after it took the handshake for done; a TLS alert would then end a node."""
    context = node(authority, "relay" if who == "server" else None, version)
    if who == "stranger":
        context.load_cert_chain(*make_pair(tmp_path))
    served = serve("needed")
    for _ in range(5):
        error = post(served, context)
        assert isinstance(error, Exception)
        assert is_survived(error), repr(error)
    assert shown.subjects == []
    assert post(served, node(authority, "good", version)) == 200


@each_version
def test_who_is_not_let_in_is_reset_without_an_alert(
    authority: Authority, serve: Callable[..., Served], version: str
) -> None:
    client = RawClient(serve("needed").port, node(authority, None, version))
    try:
        if version == "1.3":
            client.finish()  # as far as a client can tell
        else:
            with pytest.raises(ConnectionResetError):
                client.finish()
            return
        assert client.ending()[1] == "reset"
    finally:
        client.close()


@each_version
def test_a_revoked_certificate_is_reset_before_it_can_call(
    authority: Authority, serve: Callable[..., Served], shown: Shown, tmp_path: Path, version: str
) -> None:
    crl = make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0])
    served = serve("wanted", crl=crl)
    for _ in range(3):
        error = post(served, node(authority, "bad", version))
        assert isinstance(error, Exception)
        assert is_survived(error), repr(error)
    assert shown.subjects == []
    assert post(served, node(authority, "good", version)) == 200


@each_version
def test_open_connections_of_a_certificate_that_is_revoked_are_reset_and_no_others(
    authority: Authority, serve: Callable[..., Served], tmp_path: Path, version: str
) -> None:
    signs = (authority.certificate, authority._key)
    crl = make_crl(tmp_path, signs)
    served = serve("wanted", crl=crl)
    clients = {}
    for name in ("good", "bad", None):
        clients[name] = RawClient(served.port, node(authority, name, version))
        clients[name].finish()
        clients[name].send(request(Method.GET_RUN, b"abc"))
        assert clients[name].read().endswith(b"abc")
    make_crl(tmp_path, signs, authority.files("bad")[0])

    async def beat() -> None:
        assert served.tls is not None
        assert served.tls.tick() == "taken"
        served.servers[0].check_certificates()

    served.run(beat())
    assert clients["bad"].ending()[1] == "reset"
    for name in ("good", None):
        clients[name].send(request(Method.GET_RUN, b"again"))
        assert clients[name].read().endswith(b"again")
    for client in clients.values():
        client.close()


def test_a_port_without_client_certificates_knows_nobody(authority: Authority, shown: Shown) -> None:
    with Served(shown, pair=authority.files("relay")) as served:
        assert post(served, node(authority, "good")) == 200
        served.soon(served.servers[0].check_certificates)
        assert post(served, node(authority, "good")) == 200
    assert shown.subjects == [None, None]


@pytest.mark.parametrize(
    "name", ["Client-Cert", "X-SSL-Client-Cert", "X-Forwarded-Client-Cert", "Client-Cert-Chain"]
)
def test_what_a_node_says_of_its_certificate_is_not_believed_and_not_passed_on(
    authority: Authority, name: str
) -> None:
    heard: list[tuple[object, list[bytes]]] = []

    async def note(call: Call) -> Reply:
        heard.append((call.certificate, [key.lower() for key, _ in call.metadata]))
        return await echo(call)

    with Served(note, pair=authority.files("relay")) as served:
        client = RawClient(served.port, node(authority, None))
        client.finish()
        client.send(request(Method.GET_RUN, b"abc", more=name.encode() + b": :AAAA:\r\n"))
        assert client.read().endswith(b"abc")
        client.close()
    ((certificate, names),) = heard
    assert certificate is None
    assert name.lower().encode() not in names


@each_version
def test_a_supernode_does_not_survive_the_alert_that_other_servers_send(
    authority: Authority, version: str
) -> None:
    """Should this fail, then Flower has become kinder, and the table in docs/tls.md may change."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.files("relay"))
    context.load_verify_locations(authority.files("ca")[0])
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            accepted, _ = listening.accept()
            with context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False) as session:
                with suppress(ssl.SSLError):
                    session.do_handshake()
                while socket.socket.recv(session, 65536):  # a close with something unread would be a reset
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"https://localhost:{listening.getsockname()[1]}/"
        with (
            supernode(node(authority, None, version)) as client,
            pytest.raises(httpx.TransportError, match=r"(?i)alert") as caught,
        ):
            client.post(url, content=b"x")
        thread.join(PATIENCE)
    assert not is_survived(caught.value)
