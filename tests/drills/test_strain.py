import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drills import certificates
from drills.strain import Entry, SlowReader, count_answered, half_handshakes, half_requests
from relay.call import Wire


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as made:
        made.settimeout(5)
        yield made


@pytest.fixture
def entry(server: socket.socket) -> Entry:
    return Entry(server.getsockname()[1], None)


def test_half_requests(server: socket.socket, entry: Entry) -> None:
    with server, half_requests(entry, Wire.REST_V0, 2) as mine:
        assert count_answered(mine) == 0
        clients = [server.accept()[0] for _ in range(2)]
        whole, half = (client.recv(4096) for client in clients)
        assert whole.startswith(b"POST /api/v0/fleet/pull-messages HTTP/1.1\r\n")
        assert b"content-length: 1000\r\n" in whole
        assert whole.endswith(b"\r\n\r\n" + bytes(500))
        assert whole.startswith(half)
        assert b"\r\n\r\n" not in half
        clients[1].send(b"HTTP/1.1 408 Request Timeout\r\n")
        assert count_answered(mine) == 1
        mine[1].recv(4096)
    for client in clients:
        assert client.recv(1) == b""
        client.close()


def test_half_handshakes(server: socket.socket, tmp_path: Path) -> None:
    made = certificates.make(tmp_path)
    entry = Entry(server.getsockname()[1], made.authority)
    hello = entry.hello()
    assert hello[0] == 22  # a handshake record
    with server, half_handshakes(entry, 1):
        client = server.accept()[0]
        got = client.recv(4096)
        assert 0 < len(got) < len(hello)
        client.close()


def test_the_certificate_is_good_for_a_client_that_trusts_its_authority(
    server: socket.socket, tmp_path: Path
) -> None:
    made = certificates.make(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)

    def serve() -> None:
        with context.wrap_socket(server.accept()[0], server_side=True) as client:
            client.sendall(client.recv(5))

    thread = threading.Thread(target=serve)
    thread.start()
    with server, Entry(server.getsockname()[1], made.authority).connect() as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
    thread.join()


def test_a_slow_reader_reads_the_head_and_then_hardly(server: socket.socket, entry: Entry) -> None:
    def serve() -> None:
        with server.accept()[0] as client:
            client.recv(4096)
            client.sendall(
                b"HTTP/1.1 200 OK\r\nX-Request-Id: abc\r\nContent-Length: 2000\r\n\r\n" + bytes(2000)
            )
            time.sleep(1.6)

    thread = threading.Thread(target=serve)
    thread.start()
    reader = SlowReader(entry, b"POST / HTTP/1.1\r\n\r\n")
    assert (reader.status, reader.request_id, reader.size) == (200, "abc", 2000)
    time.sleep(1.3)
    assert reader.read == 1
    reader.close()
    thread.join()


def test_no_answer_is_an_error(server: socket.socket, entry: Entry) -> None:
    def serve() -> None:
        server.accept()[0].close()

    thread = threading.Thread(target=serve)
    thread.start()
    with server, pytest.raises(ConnectionError):
        SlowReader(entry, b"")
    thread.join()
