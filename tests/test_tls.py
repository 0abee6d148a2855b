"""TLS ports: whom they speak to, and that no end of a connection reads like a TLS error to a SuperNode."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import httpx
import psutil
import pytest
import uvloop

from relay import server, tls
from relay.call import Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.wires.http_sockets import BACKLOG
from tests.certificates import make_pair
from tests.relay_process import RelayProcess, free_port
from tests.served import Served, path_of, request
from tests.tls_clients import (
    ALERT,
    GARBAGE,
    PATIENCE,
    RawClient,
    connect_tls,
    ending,
    is_reset_on_close,
    is_survived,
    supernode,
    trusting,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.call import Call

pytestmark = [pytest.mark.timeout(90), pytest.mark.xdist_group("relay-processes")]

Pair = tuple[Path, Path]
each_version = pytest.mark.parametrize("version", ["1.2", "1.3"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Certificate and key of the relay."""
    return make_pair(tmp_path_factory.mktemp("tls"))


# -- contexts -------------------------------------------------------------------------------------------


def talk(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Have both do a handshake in memory; return the sessions, the server's first. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up, server_hostname=name))
    done: set[ssl.SSLObject] = set()
    for _ in range(8):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    assert len(done) == 2
    return ends


@pytest.mark.parametrize(
    ("minimum", "version", "spoken"),
    [("1.2", "1.2", "TLSv1.2"), ("1.2", "1.3", "TLSv1.3"), ("1.3", "1.3", "TLSv1.3")],
)
def test_a_listener_speaks_every_version_from_its_oldest_on(
    pair: Pair, minimum: str, version: str, spoken: str
) -> None:
    server, client = talk(tls.server_context(*pair, minimum), trusting(pair[0], version))
    assert server.version() == client.version() == spoken


def test_a_listener_does_not_speak_an_older_version_than_it_was_told(pair: Pair) -> None:
    with pytest.raises(ssl.SSLError):
        talk(tls.server_context(*pair, "1.3"), trusting(pair[0], "1.2"))
    assert tls.server_context(*pair, "1.2").minimum_version is ssl.TLSVersion.TLSv1_2
    assert tls.server_context(*pair, "1.3").minimum_version is ssl.TLSVersion.TLSv1_3


def test_every_cipher_has_forward_secrecy_and_authenticated_encryption(pair: Pair) -> None:
    ciphers = tls.server_context(*pair, "1.2").get_ciphers()
    old = [cipher for cipher in ciphers if cipher["protocol"] != "TLSv1.3"]
    assert old
    assert all(cipher["aead"] for cipher in ciphers)
    assert {cipher["kea"] for cipher in old} == {"kx-ecdhe"}


@pytest.mark.parametrize(
    "cipher", ["AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA", "DHE-RSA-AES128-GCM-SHA256"]
)
def test_a_client_with_weak_ciphers_alone_is_refused(pair: Pair, cipher: str) -> None:
    client = trusting(pair[0], "1.2")
    client.set_ciphers(cipher)
    with pytest.raises(ssl.SSLError):
        talk(tls.server_context(*pair, "1.2"), client)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(["h2", "http/1.1"], "http/1.1"), (["http/1.1"], "http/1.1"), (["h2"], None), ([], None)],
    ids=["both", "http/1.1", "h2", "none"],
)
def test_a_listener_chooses_http_1_1_of_what_is_offered(
    pair: Pair, offered: list[str], chosen: str | None
) -> None:
    client = trusting(pair[0])
    if offered:
        client.set_alpn_protocols(offered)
    server, _ = talk(tls.server_context(*pair, "1.2"), client)
    assert server.selected_alpn_protocol() == chosen


def test_the_relay_offers_http_1_1_alone_to_the_superlink(pair: Pair) -> None:
    server = tls.server_context(*pair, "1.2")
    server.set_alpn_protocols(["h2", "http/1.1"])
    _, client = talk(server, tls.client_context(pair[0]))
    assert client.selected_alpn_protocol() == "http/1.1"


def test_a_key_that_belongs_to_another_certificate_is_an_error(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError, match="MISMATCH"):
        tls.server_context(pair[0], make_pair(tmp_path)[1], "1.2")


@pytest.mark.parametrize("missing", [0, 1], ids=["certificate", "key"])
def test_a_file_that_is_not_there_is_an_error(pair: Pair, tmp_path: Path, missing: int) -> None:
    files = [*pair]
    files[missing] = tmp_path / "no-such.pem"
    with pytest.raises(FileNotFoundError):
        tls.server_context(files[0], files[1], "1.2")


def test_the_superlink_is_believed_if_its_authority_is_the_one_that_was_set(
    pair: Pair, tmp_path: Path
) -> None:
    server = tls.server_context(*pair, "1.2")
    talk(server, tls.client_context(pair[0]))
    for other in (make_pair(tmp_path)[0], None):
        with pytest.raises(ssl.SSLCertVerificationError, match=r"self.signed"):
            talk(server, tls.client_context(other))


def test_the_superlink_is_not_believed_under_another_name(pair: Pair) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch"):
        talk(tls.server_context(*pair, "1.2"), tls.client_context(pair[0]), "superlink")


def test_the_superlink_is_spoken_to_in_no_version_before_1_2(pair: Pair) -> None:
    assert tls.client_context(pair[0]).minimum_version is ssl.TLSVersion.TLSv1_2


def test_authorities_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing\n")
    for name in ("empty.pem", "no-such.pem"):
        with pytest.raises(OSError, match=r"(?i)no such file|no certificate"):
            tls.client_context(tmp_path / name)


# -- no FIN within a handshake ----------------------------------------------------------------------------


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def raw(server: Served | RelayProcess, context: ssl.SSLContext) -> Iterator[RawClient]:
    with closing(RawClient(server.port, context)) as client:
        yield client


#: What a client does of its handshake before it stops.
STAGES: dict[str, Callable[[RawClient], object]] = {
    "nothing was sent": lambda client: None,
    "half of its hello was sent": RawClient.say_half,
    "its hello was answered": RawClient.say_hello,
}
each_stage = pytest.mark.parametrize("stage", STAGES)


def no_alert(client: RawClient, data: bytes) -> bool:
    """Return whether `data`, which ended a handshake, holds no alert: its text would be as fatal as a FIN."""
    client._in.write(client.answer + data)
    try:
        client.tls.do_handshake()
        client.tls.read(1)
    except ssl.SSLWantReadError:
        return True
    return False


@each_version
@each_stage
def test_a_handshake_that_takes_too_long_is_reset(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, version: str, stage: str
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.4)
    with Served(pair=pair) as served, raw(served, trusting(pair[0], version)) as client:
        begun = time.monotonic()
        STAGES[stage](client)
        data, end = client.ending()
        assert end == "reset"
        assert time.monotonic() - begun >= 0.35
        assert no_alert(client, data) if stage == "its hello was answered" else data == b""


@pytest.mark.parametrize(
    "said",
    [
        GARBAGE,
        b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
        request(Method.PULL_MESSAGES),
        ALERT,
        b"\x16\x03\x01\x00\x04\xff\x00\x00\x00",
    ],
    ids=["garbage", "GET", "a call", "alert", "broken hello"],
)
def test_who_does_not_speak_tls_is_reset_without_a_word(pair: Pair, said: bytes) -> None:
    with Served(pair=pair) as served, raw(served, trusting(pair[0])) as client:
        client.socket.sendall(said)
        assert client.ending() == (b"", "reset")


@each_version
def test_a_client_that_breaks_off_with_an_alert_is_reset_without_a_word(pair: Pair, version: str) -> None:
    with Served(pair=pair) as served, raw(served, trusting(pair[0], version)) as client:
        client.say_hello()
        client.socket.sendall(ALERT)
        data, end = client.ending()
        assert end == "reset"
        assert no_alert(client, data)


@each_version
def test_a_client_that_does_not_trust_the_certificate_is_reset(
    pair: Pair, tmp_path: Path, version: str
) -> None:
    stranger = trusting(make_pair(tmp_path)[0], version)
    with Served(pair=pair) as served, raw(served, stranger) as client:
        client.say_hello()
        client.socket.sendall(client.reject())
        assert client.ending() == (b"", "reset")


@each_version
@each_stage
def test_a_client_that_has_nothing_more_to_say_within_its_handshake_is_reset(
    pair: Pair, version: str, stage: str
) -> None:
    with Served(pair=pair) as served, raw(served, trusting(pair[0], version)) as client:
        STAGES[stage](client)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.ending()[1] == "reset"


@pytest.mark.parametrize("fault", ["version", "cipher"])
def test_a_client_with_which_nothing_is_in_common_is_reset_without_a_word(pair: Pair, fault: str) -> None:
    context = trusting(pair[0], "1.2")
    if fault == "cipher":
        context.set_ciphers("AES256-GCM-SHA384")
    minimum = "1.3" if fault == "version" else "1.2"
    with Served(pair=pair, minimum_version=minimum) as served, raw(served, context) as client:
        client.socket.sendall(client.begin())
        assert client.ending() == (b"", "reset")


@contextmanager
def relay(folder: Path, pair: Pair, superlink: int = 1, **settings: Any) -> Iterator[RelayProcess]:
    """Run a relay of one worker with a TLS port."""
    process = RelayProcess(folder, superlink, workers=1, **settings)
    encrypted = {"certificate": str(pair[0]), "key": str(pair[1])}
    process.settings["listeners"] = [{"address": f"127.0.0.1:{process.port}", "tls": encrypted}]
    try:
        yield process.start()
    finally:
        process.end()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["drain", "kill"])
def test_every_handshake_of_a_worker_that_ends_is_reset(
    tmp_path: Path, pair: Pair, how: signal.Signals
) -> None:
    with relay(tmp_path, pair, drain={"timeout": 5, "idle_grace": 0.1}) as process, ExitStack() as stack:
        clients: list[tuple[str, RawClient]] = []
        for version in ("1.2", "1.3"):
            for stage, go in STAGES.items():
                client = stack.enter_context(raw(process, trusting(pair[0], version)))
                go(client)
                clients.append((stage, client))
        # The worker takes them in their order, so it has all when the last one's hello is answered.
        (worker,) = process.workers()
        if how is signal.SIGTERM:
            process.signal(how)
        else:
            worker.kill()
        for stage, client in clients:
            data, end = client.ending()
            assert end == "reset", stage
            assert no_alert(client, data) if client.answer else data == b""
        if how is signal.SIGTERM:
            assert process.exit_code() == 0


def test_a_handshake_that_waits_for_a_worker_which_is_killed_is_done_by_the_next(
    tmp_path: Path, pair: Pair
) -> None:
    context = trusting(pair[0])
    with relay(tmp_path, pair, mode="maintenance") as process:  # answers by itself
        (worker,) = process.workers()
        worker.suspend()
        wait_for(lambda: worker.status() == psutil.STATUS_STOPPED)
        with raw(process, context) as queued:
            queued.socket.sendall(queued.begin())
            worker.kill()
            queued.finish()
            queued.send(request(Method.PULL_MESSAGES))
            assert queued.read().startswith(b"HTTP/1.1 200 ")


#: The relay with a master that takes a worker for hung after 2 s.
IMPATIENT = """
import sys
from pathlib import Path
from relay import server
from relay.settings import load
server.HUNG_SECONDS = 2
server.serve(lambda: load(Path(sys.argv[1]), {}))
"""


def test_a_worker_that_hangs_is_replaced_before_nodes_give_their_handshakes_up(
    tmp_path: Path, pair: Pair
) -> None:
    assert server.HUNG_SECONDS + 5 < 30  # which they do for good, since the text names ssl
    context = trusting(pair[0])
    with (
        relay(tmp_path, pair, mode="maintenance", program=IMPATIENT) as process,
        raw(process, context) as begun,
    ):
        begun.say_hello()
        (worker,) = process.workers()
        worker.suspend()
        wait_for(lambda: worker.status() == psutil.STATUS_STOPPED)
        with raw(process, context) as queued:
            queued.finish()
            queued.send(request(Method.PULL_MESSAGES))
            assert queued.read().startswith(b"HTTP/1.1 200 ")
        assert begun.ending()[1] == "reset"


#: The relay with workers that are killed when they find a handshake done, or some turns of their loop later.
KILLED_IN_TURN = """
import os, signal, sys
from pathlib import Path
from relay import server
from relay.settings import load
from relay.wires.http_connection import NodeConnection
original = NodeConnection.connection_made
def connection_made(self, transport):
    original(self, transport)
    die(TURN, self._loop)
def die(turns, loop):
    if turns == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    loop.call_soon(die, turns - 1, loop)
NodeConnection.connection_made = connection_made
server.serve(lambda: load(Path(sys.argv[1]), {}))
"""


@pytest.mark.parametrize("turn", range(4))
@each_version
def test_a_worker_that_is_killed_as_a_handshake_ends_resets_it_or_has_sent_all_of_it(
    tmp_path: Path, pair: Pair, version: str, turn: int
) -> None:
    """TLS 1.2 ends with a message of the server, which is not yet sent when it finds the handshake done."""
    program = KILLED_IN_TURN.replace("TURN", str(turn))
    with (
        relay(tmp_path, pair, program=program) as process,
        raw(process, trusting(pair[0], version)) as client,
    ):
        try:
            client.finish()  # EOFError would be fatal
            client.ending()
        except ConnectionResetError:
            pass


def test_a_connection_that_came_before_the_first_worker_began_is_reset_as_well(
    tmp_path: Path, pair: Pair
) -> None:
    process = RelayProcess(tmp_path, 1, workers=1)
    encrypted = {"certificate": str(pair[0]), "key": str(pair[1])}
    process.settings["listeners"] = [{"address": f"127.0.0.1:{process.port}", "tls": encrypted}]
    try:
        process.start(ready=False)
        process.until(lambda: is_open(process.port))
        with raw(process, trusting(pair[0])) as client:
            assert process.count("worker serves") == 0
            client.say_hello()
            process.workers()[0].kill()
            data, end = client.ending()
            assert end == "reset"
            assert no_alert(client, data)
    finally:
        process.end()


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


# -- after the handshake ----------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("why", ["idle", "told", "shut down"])
def test_a_normal_close_says_so_and_is_no_reset(pair: Pair, version: str, why: str) -> None:
    keepalive = 0.3 if why == "idle" else 75.0
    with Served(pair=pair, keepalive=keepalive) as served, raw(served, trusting(pair[0], version)) as client:
        client.finish()
        client.send(request(Method.GET_RUN, b"abc", more=b"Connection: close\r\n" if why == "told" else b""))
        assert client.read().endswith(b"abc")
        if why == "shut down":
            served.run(served.servers[0].shutdown(0.01))
        assert client.read() == b""  # close_notify
        client.tls.unwrap()
        client.socket.sendall(client._out.read())
        assert client.ending() == (b"", "closed")


def test_a_connection_that_was_never_used_is_closed_in_good_order_as_well(pair: Pair) -> None:
    with Served(pair=pair, keepalive=0.3) as served, raw(served, trusting(pair[0])) as client:
        client.finish()
        assert client.read() == b""


async def test_every_connection_is_born_to_be_reset_and_cured_when_its_handshake_was_sent() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        tls.reset_unfinished_handshakes(listening)
        with socket.create_connection(listening.getsockname()) as client:
            accepted, _ = listening.accept()
            with accepted:
                tls.handshake_done(Transport(accepted))
                assert is_reset_on_close(accepted)
                await asyncio.sleep(0)  # the end of the handshake is sent in this turn of the loop
                assert is_reset_on_close(accepted)
                await asyncio.sleep(0)
                assert not is_reset_on_close(accepted)
            assert ending(client) == (b"", "closed")
        tls.close_in_good_order(listening)
        assert not is_reset_on_close(listening)


async def test_a_connection_that_is_gone_when_its_handshake_was_sent_is_no_trouble(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = socket.socket()
    closed.close()
    for sock in (closed, None):
        tls.handshake_done(Transport(sock))
    for _ in range(4):
        await asyncio.sleep(0)
    assert caplog.records == []  # the loop logs what is raised in it


class Transport(asyncio.BaseTransport):
    """A transport as far as `handshake_done` looks at it."""

    def __init__(self, sock: socket.socket | None) -> None:
        super().__init__({"socket": sock})


# -- what a SuperNode reads in an error ---------------------------------------------------------------------

DROPPED = Method.CONFIRM_MESSAGE_RECEIVED  # which REST v0 answers with a close, when it is refused


class Broken:
    """A body that breaks off."""

    def __init__(self) -> None:
        self._pieces = 3

    async def read(self) -> bytes:
        self._pieces -= 1
        if self._pieces < 0:
            raise Refusal(Reason.UPSTREAM_DOWN)
        return b"x" * 50_000

    def close(self) -> None:
        pass


async def refuse(_: Call) -> Reply:
    raise Refusal(Reason.UPSTREAM_DOWN)


async def cut(_: Call) -> Reply:
    return Reply(Payload(body=Broken(), size=1 << 20), Source.LOCAL)


async def cut_chunks(_: Call) -> Reply:
    return Reply(Payload(body=Broken()), Source.LOCAL)


async def never(_: Call) -> Reply:
    await asyncio.sleep(3600)
    raise AssertionError


class Ask(Protocol):
    """Makes one call, and returns how it failed."""

    def __call__(
        self, method: Method = ..., body: bytes = ..., *, wire: Wire = ..., client: httpx.Client | None = ...
    ) -> Exception | None: ...


def asking(port: int, context: ssl.SSLContext) -> Ask:
    def ask(
        method: Method = Method.GET_RUN,
        body: bytes = b"abc",
        *,
        wire: Wire = Wire.HTTP_V1,
        client: httpx.Client | None = None,
    ) -> Exception | None:
        url = f"https://localhost:{port}{path_of(method, wire)}"
        with ExitStack() as stack:
            client = client or stack.enter_context(supernode(context))
            try:
                client.post(url, content=body, headers={"content-type": "application/protobuf"})
            except httpx.HTTPError as error:
                return error
        return None

    return ask


def survived(errors: list[Exception | None]) -> set[str]:
    """Return the texts of errors; fail if a SuperNode would give up for one of them, or if there is none."""
    texts = {f"{type(error).__name__}: {error}" for error in errors if error is not None}
    assert texts
    assert [str(error) for error in errors if error is not None and not is_survived(error)] == []
    return texts


@each_version
@pytest.mark.parametrize("size", [3, 4 << 20], ids=["small", "large"])
def test_a_supernode_survives_a_dropped_call(pair: Pair, version: str, size: int) -> None:
    with Served(refuse, pair=pair) as served:
        ask = asking(served.port, trusting(pair[0], version))
        survived([ask(DROPPED, b"x" * size, wire=Wire.REST_V0) for _ in range(10)])


@each_version
@pytest.mark.parametrize("handler", [cut, cut_chunks])
def test_a_supernode_survives_an_answer_that_breaks_off(
    pair: Pair, version: str, handler: Callable[[Call], object]
) -> None:
    with Served(pair=pair) as served:
        served.handler = handler  # type: ignore[assignment]
        ask = asking(served.port, trusting(pair[0], version))
        survived([ask(Method.PULL_OBJECT) for _ in range(10)])


@each_version
def test_a_supernode_survives_a_drain_that_cuts_its_call(pair: Pair, version: str) -> None:
    with Served(never, pair=pair) as served, ThreadPoolExecutor(1) as pool:
        ask = asking(served.port, trusting(pair[0], version))
        errors = []
        for _ in range(5):
            waiting = pool.submit(ask)
            wait_for(lambda: served.front.busy)
            served.run(served.servers[0].shutdown(0.01))
            errors.append(waiting.result(PATIENCE))
        survived(errors)


@each_version
def test_a_supernode_survives_a_close_at_any_moment_of_its_upload(pair: Pair, version: str) -> None:
    body = b"x" * (4 << 20)
    with Served(pair=pair) as served, ThreadPoolExecutor(1) as pool:
        ask = asking(served.port, trusting(pair[0], version))
        errors = []
        for turn in range(24):
            waiting = pool.submit(ask, Method.PUSH_OBJECT, body)
            time.sleep(0.0015 * turn)
            served.run(served.servers[0].shutdown(0.0005))
            errors.append(waiting.result(PATIENCE))
        survived(errors)


@each_version
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_supernode_survives_that_its_idle_connection_is_closed_as_it_sends_its_next_call(
    pair: Pair, version: str, how: str
) -> None:
    def end() -> None:
        for connection in served.servers[0].connections:
            if how == "close":
                connection.force_close()
            else:
                connection.reset()  # type: ignore[attr-defined]

    context = trusting(pair[0], version)
    with Served(pair=pair) as served, supernode(context) as client:
        ask = asking(served.port, context)
        errors = []
        for turn in range(200):
            ask(client=client)
            if turn % 2:
                served.soon(end)
            else:
                threading.Timer(random.random() * 0.002, served.soon, [end]).start()
            errors.append(ask(client=client, body=b"x" * (1 << 16)))
        survived(errors)


# Python's ssl leaves the socket open that it could not wrap.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@each_version
def test_a_supernode_survives_that_its_handshake_took_too_long_before_it_began(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, version: str
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.1)
    context = trusting(pair[0], version)
    with Served(pair=pair) as served:
        ask = asking(served.port, context)
        with supernode(context, before_handshake=lambda: time.sleep(0.5)) as slow:
            texts = survived([ask(client=slow) for _ in range(3)])
    assert all("ConnectError" in text for text in texts)


@each_version
def test_a_supernode_survives_that_its_worker_is_killed_within_its_handshake(
    tmp_path: Path, pair: Pair, version: str
) -> None:
    context = trusting(pair[0], version)
    with relay(tmp_path, pair) as process, ExitStack() as stack:
        (worker,) = process.workers()

        def die_after_the_hello() -> None:
            time.sleep(0.3)  # it has been accepted
            worker.suspend()
            wait_for(lambda: worker.status() == psutil.STATUS_STOPPED)
            killer = threading.Timer(0.3, worker.kill)
            stack.callback(killer.join)
            killer.start()

        client = stack.enter_context(supernode(context, before_handshake=die_after_the_hello))
        (text,) = survived([asking(process.port, context)(client=client)])
        assert "ConnectError" in text


@each_version
def test_a_supernode_survives_that_its_worker_is_killed_within_its_call(
    tmp_path: Path, pair: Pair, version: str
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        ThreadPoolExecutor(1) as pool,
        relay(tmp_path, pair, silent.getsockname()[1]) as process,
    ):
        waiting = pool.submit(asking(process.port, trusting(pair[0], version)))
        silent.settimeout(PATIENCE)
        upstream, _ = silent.accept()
        with upstream:
            process.workers()[0].kill()
            survived([waiting.result(PATIENCE)])


def test_supernodes_that_connect_for_each_call_survive_reloads_a_killed_worker_and_a_stop(
    tmp_path: Path, pair: Pair
) -> None:
    context = trusting(pair[0])
    errors: list[Exception | None] = []
    over = threading.Event()

    def live(ask: Ask) -> None:
        while not over.is_set():
            errors.append(ask(Method.PULL_MESSAGES))

    with relay(tmp_path, pair, mode="maintenance", drain={"idle_grace": 0.2, "timeout": 5}) as process:
        nodes = [threading.Thread(target=live, args=[asking(process.port, context)]) for _ in range(6)]
        for node in nodes:
            node.start()
        try:
            for event in ("reload", "kill", "reload", "kill", "stop"):
                seen = len(errors)
                wait_for(lambda: errors[seen:].count(None) > 20)  # noqa: B023 - called at once
                if event == "reload":
                    process.signal(signal.SIGHUP)
                elif event == "kill":
                    process.workers()[-1].kill()
                else:
                    assert process.stop() == 0
        finally:
            over.set()
            for node in nodes:
                node.join(PATIENCE)
    assert any("Connection refused" in text for text in survived(errors))  # it was stopped


def closing_early(how: str, listening: socket.socket) -> None:
    """Play a server that does what ours must not."""
    accepted, _ = listening.accept()
    with accepted:
        accepted.recv(65536)
        if how == "plain":
            accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        elif how == "alert":
            accepted.sendall(ALERT)


@pytest.mark.parametrize("how", ["fin", "plain", "alert"])
def test_a_supernode_does_not_survive_what_the_relay_takes_care_not_to_do(pair: Pair, how: str) -> None:
    """Should this fail, then Flower has become kinder, and SO_LINGER may go."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=closing_early, args=(how, listening))
        thread.start()
        error = asking(listening.getsockname()[1], trusting(pair[0]))()
        thread.join(PATIENCE)
    assert error is not None
    assert not is_survived(error)


# -- handshakes when there is much to do --------------------------------------------------------------------


class Pressure(threading.Thread):
    """Connections that always have more calls on their way than were answered: a worker is never done.

    Attributes:
        answered: how many calls were.
    """

    def __init__(self, port: int, connections: int) -> None:
        super().__init__(name="pressure")
        self._port, self._connections = port, connections
        self._over = threading.Event()
        self.under_way = threading.Event()
        self.answered = 0
        self.failed: list[BaseException] = []

    def __enter__(self) -> Self:
        self.start()
        assert self.under_way.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(PATIENCE)

    def run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._press())

    async def _press(self) -> None:
        await asyncio.gather(*(self._one() for _ in range(self._connections)))

    async def _one(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        call = request(Method.PULL_MESSAGES)
        try:
            writer.write(call)
            while not self._over.is_set():
                writer.write(call)
                await reader.readuntil(b"\r\n\r\n")
                self.answered += 1
                self.under_way.set()
        except (OSError, asyncio.IncompleteReadError) as error:
            self.failed.append(error)
        finally:
            writer.transport.abort()


@pytest.fixture
def two_ports(tmp_path: Path, pair: Pair) -> Iterator[tuple[RelayProcess, int]]:
    """A relay of one worker that answers pulls by itself, on a TLS port and a plain one; its plain one."""
    plain = free_port()
    process = RelayProcess(tmp_path, 1, workers=1, mode="maintenance", log={"level": "warning"})
    encrypted = {"certificate": str(pair[0]), "key": str(pair[1])}
    process.settings["listeners"] = [
        {"address": f"127.0.0.1:{process.port}", "tls": encrypted},
        {"address": f"127.0.0.1:{plain}"},
    ]
    try:
        process.start(ready=False)
        process.until(lambda: is_ready(process))
        yield process, plain
    finally:
        process.end()


def is_ready(process: RelayProcess) -> bool:
    """Return whether a worker answers; its log says nothing at this level."""
    try:
        return process.get("/readyz")[0] == 200
    except OSError:
        return False


async def shake_and_call(port: int, context: ssl.SSLContext) -> float:
    """Connect, make a call, and return how many seconds the handshake took."""
    begun = time.monotonic()
    async with asyncio.timeout(30):  # when a node gives up
        node = await connect_tls(port, context)
        took = time.monotonic() - begun
        node.send(request(Method.PULL_MESSAGES))
        head = await node.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    node.writer.transport.abort()
    return took


async def test_a_busy_worker_finishes_every_handshake(
    two_ports: tuple[RelayProcess, int], pair: Pair
) -> None:
    process, plain = two_ports
    context = trusting(pair[0])
    with Pressure(plain, 64) as pressure:
        before = pressure.answered
        times = []
        for _ in range(10):
            times += await asyncio.gather(*(shake_and_call(process.port, context) for _ in range(20)))
        assert pressure.answered > before
    assert pressure.failed == []
    assert len(times) == 200
    print(max(times), sum(times) / 200, pressure.answered)
    assert max(times) < 10.0


async def test_200_handshakes_that_never_go_on_keep_nobody_from_being_served(
    two_ports: tuple[RelayProcess, int], pair: Pair
) -> None:
    process, _ = two_ports
    context = trusting(pair[0])
    with ExitStack() as stack:
        for number in range(200):
            client = stack.enter_context(raw(process, context))
            if number % 2:
                client.say_half()
        for _ in range(3):
            assert await shake_and_call(process.port, context) < 5.0


async def test_connections_may_wait_in_a_queue_that_is_long_enough_for_a_fleet(
    two_ports: tuple[RelayProcess, int],
) -> None:
    process, plain = two_ports
    if shutil.which("ss") is None:
        pytest.skip("no ss here (Debian: apt-get install iproute2)")
    assert BACKLOG >= 1024
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    for port in (process.port, plain):
        said = subprocess.run(
            ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.split()
        assert int(said[2]) == min(BACKLOG, most)
