"""The fault proxy between a client and a server of the standard library."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from drills.faults import AT_A_TIME, LONG, SLOW_SECONDS, Fault
from drills.proxy import FaultProxy

BIG = bytes(LONG + 1)
PULL = "/v1/fleet/pull-messages"


class Handler(BaseHTTPRequestHandler):
    """Answers with what it was sent; on /big with a million bytes."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(self.path)
        answer = BIG if self.path == "/big" else body
        if self.path == "/late":
            time.sleep(0.3)
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


@pytest.fixture
def seen() -> list[str]:
    """The paths that the server was asked for."""
    return []


@pytest.fixture
def proxy(seen: list[str]) -> Iterator[FaultProxy]:
    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that leave are what this is about

    server = Quiet(("127.0.0.1", 0), type("Own", (Handler,), {"seen": seen}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with FaultProxy() as made:
        made.target = server.server_address[1]
        yield made
    server.shutdown()
    thread.join()
    server.server_close()
    assert made.broken == []


def post(proxy: FaultProxy, path: str = "/", body: bytes = b"hello") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_calls_pass_on_one_connection(proxy: FaultProxy, seen: list[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    for body in (b"", b"hello", BIG):
        connection.request("POST", "/", body)
        assert connection.getresponse().read() == body
    connection.close()
    assert len(seen) == 3
    assert not proxy.hits


@pytest.mark.parametrize(("fault", "status"), [(Fault.STATUS_500, 500), (Fault.STATUS_429, 429)])
def test_an_error_is_answered_in_its_place(
    proxy: FaultProxy, seen: list[str], fault: Fault, status: int
) -> None:
    proxy.set(fault)
    assert post(proxy)[0] == status
    proxy.set(Fault.NONE)
    assert post(proxy) == (200, b"hello")
    assert len(seen) == proxy.hits[fault] == 1


def test_garbage_takes_turns(proxy: FaultProxy, seen: list[str]) -> None:
    proxy.set(Fault.GARBAGE)
    got: list[object] = []
    for _ in range(4):
        try:
            got.append(post(proxy)[1])
        except (http.client.HTTPException, ConnectionError) as error:
            got.append(type(error))
    assert got[0] is http.client.BadStatusLine
    assert got[1] == b"<h1>Please log in</h1>"
    assert got[3] is http.client.RemoteDisconnected
    assert seen == []


def test_a_call_hangs_beyond_the_fault(proxy: FaultProxy, seen: list[str]) -> None:
    proxy.set(Fault.HANG)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.3) as client:
        client.sendall(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.set(Fault.NONE)
        with pytest.raises(TimeoutError):
            client.recv(1)
    assert seen == []


def test_a_cut_call_was_carried_out(proxy: FaultProxy, seen: list[str]) -> None:
    proxy.set(Fault.CUT)
    for _ in range(2):  # a reset, and a close in good order
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            post(proxy, "/big")
    assert seen == ["/big", "/big"]


def test_long_answers_alone_are_cut(proxy: FaultProxy, seen: list[str]) -> None:
    proxy.set(Fault.CUT_LONG)
    assert post(proxy) == (200, b"hello")
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        post(proxy, "/big")
    assert seen == ["/", "/big"]
    assert proxy.hits == {Fault.CUT_LONG: 1}


def test_the_first_answer_with_each_message_is_lost(proxy: FaultProxy, seen: list[str]) -> None:
    proxy.set(Fault.CUT_MESSAGE)
    assert post(proxy, PULL, b"") == (200, b"")
    assert post(proxy, "/v1/fleet/push-messages") == (200, b"hello")
    for body in (b"one", b"two"):
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            post(proxy, PULL, body)
        assert post(proxy, PULL, body) == (200, body)
    assert post(proxy, "/big") == (200, BIG)
    assert proxy.hits == {Fault.CUT_MESSAGE: 2}
    assert seen.count(PULL) == 5, "each of them was carried out"


def test_a_closed_port_refuses_and_resets(proxy: FaultProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as idle:
        idle.sendall(b"POST / HT")
        time.sleep(0.1)
        proxy.set(Fault.REFUSED)
        with pytest.raises(ConnectionResetError):
            idle.recv(1)
    with pytest.raises(ConnectionRefusedError):
        post(proxy)
    assert proxy.hits[Fault.REFUSED] == 1
    proxy.set(Fault.NONE)
    assert post(proxy) == (200, b"hello")


def test_a_relay_that_leaves_is_noted_and_its_call_carried_out(proxy: FaultProxy, seen: list[str]) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        client.sendall(b"POST /late HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        time.sleep(0.1)
    time.sleep(0.1)
    assert proxy.abandoned == {"/late": 1}
    assert seen == ["/late"]


def test_a_closed_port_abandons_nothing(proxy: FaultProxy, seen: list[str]) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        client.sendall(b"POST /late HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        time.sleep(0.1)
        proxy.set(Fault.REFUSED)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert not proxy.abandoned


def test_a_share_of_the_calls(proxy: FaultProxy) -> None:
    proxy.set(Fault.STATUS_500, 0.5)
    statuses = [post(proxy)[0] for _ in range(40)]
    assert 5 < statuses.count(500) < 35
    assert set(statuses) == {200, 500}


def test_a_server_that_is_away_resets(proxy: FaultProxy) -> None:
    proxy.target = 1
    with pytest.raises(ConnectionError):
        post(proxy)


def test_a_request_is_captured_by_the_size_of_its_answer(proxy: FaultProxy) -> None:
    def ask() -> None:
        for path in ("/other", "/api/big", "/big"):
            post(proxy, path, b"content")

    client = threading.Thread(target=ask)
    client.start()
    request = proxy.capture(b"big", len(BIG), 5)
    client.join()
    assert request.startswith(b"POST /big HTTP/1.1\r\n")
    assert request.endswith(b"\r\n\r\ncontent")


def test_capturing_ends(proxy: FaultProxy) -> None:
    with pytest.raises(TimeoutError):
        proxy.capture(b"never", 0, 0.1)


def test_a_slow_superlink_works_on_some_calls_at_a_time(proxy: FaultProxy) -> None:
    proxy.set(Fault.SLOW)
    start = time.monotonic()
    threads = [threading.Thread(target=post, args=(proxy,)) for _ in range(2 * AT_A_TIME)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start >= 2 * SLOW_SECONDS
    assert proxy.hits[Fault.SLOW] == 2 * AT_A_TIME


def test_an_opaque_one_passes_on_anything_and_can_close_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, FaultProxy(opaque=True) as proxy:
        proxy.target = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as client:
            client.sendall(b"\0no HTTP")
            beyond = server.accept()[0]
            beyond.settimeout(5)
            assert beyond.recv(100) == b"\0no HTTP"
            beyond.sendall(b"nor this")
            assert client.recv(100) == b"nor this"
            proxy.set(Fault.REFUSED)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            with pytest.raises(ConnectionResetError):
                beyond.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port), 5)
        beyond.close()
        assert proxy.broken == []


def test_an_opaque_one_loses_what_comes_next(proxy: FaultProxy) -> None:
    with FaultProxy(opaque=True) as before:
        before.target = proxy.port
        assert post(before) == (200, b"hello")
        before.cut_next()
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            post(before)
        assert before.hits[Fault.CUT_MESSAGE] == 1
        assert post(before) == (200, b"hello")


def test_a_message_is_told_of_once(proxy: FaultProxy, seen: list[str]) -> None:
    told = []
    proxy.on_message = lambda: told.append(len(seen))
    for path, body in ((PULL, b"a"), (PULL, b"a"), (PULL, b""), ("/v1/fleet/get-run", b"c"), (PULL, b"d")):
        assert post(proxy, path, body) == (200, body)
    assert told == [1, 5]
