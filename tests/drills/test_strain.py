import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drills import certificates, http2
from drills.strain import (
    Entry,
    SlowReader,
    count_answered,
    count_closed,
    half_handshakes,
    half_requests,
)
from relay.call import Wire
from relay.fleet import Method


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


def test_half_requests_over_grpc(server: socket.socket, entry: Entry) -> None:
    with server, half_requests(entry, Wire.GRPC, 2) as mine:
        clients = [server.accept()[0] for _ in range(2)]
        whole, half = (client.recv(4096) for client in clients)
        assert whole.startswith(http2.PREFACE)
        assert Method.PUSH_OBJECT.grpc.encode() in whole
        message = whole[-(9 + 5 + 1000) // 2 :]
        assert http2.read_head(message) == (http2.DATA, http2.END_STREAM, 1, 1005)
        assert whole.startswith(half)
        clients[0].send(http2.frame(http2.SETTINGS, 0, 0))
        assert count_closed(mine) == 0
        clients[0].close()
        assert count_closed(mine) == 1
        clients[1].close()


def test_a_slow_reader_over_grpc(server: socket.socket, entry: Entry) -> None:
    asked = b""

    def serve() -> None:
        nonlocal asked
        with server.accept()[0] as client:
            client.sendall(http2.frame(http2.SETTINGS, 0, 0))
            while (ack := http2.frame(http2.SETTINGS, http2.ACK, 0)) not in asked:
                asked += client.recv(4096)
            assert ack in asked
            answer = b"\0" + (2000).to_bytes(4, "big") + bytes(2000)
            client.sendall(
                http2.frame(http2.HEADERS, http2.END_HEADERS, 1) + http2.frame(http2.DATA, 0, 1, answer)
            )
            time.sleep(1.6)

    thread = threading.Thread(target=serve)
    thread.start()
    request = b"POST /v1/fleet/pull-object HTTP/1.1\r\nFlwr-Timestamp: now\r\nhost: a\r\n\r\nbody"
    reader = SlowReader(entry, request, grpc=True)
    assert (reader.status, reader.size) == (200, 2000)
    time.sleep(1.3)
    assert reader.read == 1
    reader.close()
    thread.join()
    assert Method.PULL_OBJECT.grpc.encode() in asked
    assert b"flwr-timestamp" in asked
    assert reader.request_id.encode() in asked
    assert b"host" not in asked


def test_a_refusal_over_grpc_is_an_error(server: socket.socket, entry: Entry) -> None:
    def serve() -> None:
        with server.accept()[0] as client:
            client.recv(4096)
            client.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1))

    thread = threading.Thread(target=serve)
    thread.start()
    with server, pytest.raises(ConnectionError):
        SlowReader(entry, b"POST /v1/fleet/pull-object HTTP/1.1\r\n\r\n", grpc=True)
    thread.join()
