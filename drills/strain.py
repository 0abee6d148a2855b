"""Clients with bad manners, beside the nodes: they send half of what they should, or hardly read."""

import secrets
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drills import http2
from relay.call import Wire
from relay.demo.processes import LOOPBACK
from relay.fleet import Method

_SECONDS: Final = 10.0
_SMALL_BUFFER: Final = 4096
#: What HTTP paths of the Fleet API begin with.
PREFIX: Final = {Wire.HTTP_V1: "/v1/fleet/", Wire.REST_V0: "/api/v0/fleet/"}


@dataclass(frozen=True, slots=True)
class Entry:
    """What the SuperNodes connect to, and such clients, too.

    Attributes:
        port: of the loopback address.
        authority: PEM file to check its certificate against; None where TLS is not used.
        protocols: what nodes offer in a TLS handshake (ALPN).
    """

    port: int
    authority: Path | None
    protocols: tuple[str, ...] = ()

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """Open a connection, TLS included; `receive_buffer` limits what the kernel holds of an answer."""
        plain = self.connect_plain(receive_buffer)
        return (
            plain if self.authority is None else self.context().wrap_socket(plain, server_hostname=LOOPBACK)
        )

    def connect_plain(self, receive_buffer: int | None = None) -> socket.socket:
        """Open a TCP connection and say nothing."""
        client = socket.socket()
        client.settimeout(_SECONDS)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect((LOOPBACK, self.port))
        return client

    def hello(self) -> bytes:
        """Return the first bytes of a TLS handshake."""
        outgoing = ssl.MemoryBIO()
        session = self.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=LOOPBACK)
        try:
            session.do_handshake()
        except ssl.SSLWantReadError:
            return outgoing.read()
        raise AssertionError("a handshake cannot be over before its answer")

    def context(self) -> ssl.SSLContext:
        """Return what a node checks the certificate with."""
        context = ssl.create_default_context(cafile=self.authority)
        if self.protocols:
            context.set_alpn_protocols(self.protocols)
        return context


@contextmanager
def half_requests(entry: Entry, wire: Wire, count: int) -> Iterator[list[socket.socket]]:
    """Hold `count` connections open: half of them end in the head of a call, the others in its body."""
    head, body = _grpc_call() if wire.grpc else _http_call(wire)
    with ExitStack() as stack:
        clients = [stack.enter_context(entry.connect()) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(head[: len(head) // 2] if number % 2 else head + body[: len(body) // 2])
        yield clients


def _http_call(wire: Wire) -> tuple[bytes, bytes]:
    head = (
        f"POST {PREFIX[wire]}pull-messages HTTP/1.1\r\nhost: {LOOPBACK}\r\n"
        "content-type: application/protobuf\r\ncontent-length: 1000\r\n\r\n"
    )
    return head.encode("ascii"), bytes(1000)


def _grpc_call() -> tuple[bytes, bytes]:
    """Return the two halves. The first begins with what the other side waits for with each connection."""
    # Of all calls this one has the most to hold before it is whole.
    whole = http2.call(Method.PUSH_OBJECT, bytes(1000))
    data = len(http2.frame(http2.DATA, 0, 1)) + 5 + 1000
    return http2.PREFACE + whole[:-data], whole[-data:]


@contextmanager
def half_handshakes(entry: Entry, count: int) -> Iterator[list[socket.socket]]:
    """Hold `count` connections open, each in the middle of its first TLS message."""
    hello = entry.hello()
    with ExitStack() as stack:
        clients = [stack.enter_context(entry.connect_plain()) for _ in range(count)]
        for client in clients:
            client.sendall(hello[: len(hello) // 2])
        yield clients


def count_answered(clients: Iterable[socket.socket]) -> int:
    """Count the connections on which the other side has answered, or which it has closed."""
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    return len(poll.poll(0))


def count_closed(clients: Iterable[socket.socket]) -> int:
    """Count the connections that the other side has closed; what it said before does not matter."""
    return sum(map(_is_closed, clients))


def _is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        while client.recv(_SMALL_BUFFER):
            pass
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True  # reset
    return True


class SlowReader:
    """Makes a call and reads a byte of its answer a second, in a thread.

    Attributes:
        request_id: of the call, as the relay named it; "" before the head of the answer was there.
        status: of the answer; 0 before.
        size: length of its body.
        read: bytes of the body that were read. What else has come lies in the kernel, also after a close.
    """

    def __init__(self, entry: Entry, request: bytes, *, grpc: bool = False) -> None:
        """Send the request and read the head of the answer. Raises OSError when that fails.

        Args:
            entry: where to connect.
            request: of HTTP/1.1.
            grpc: make a gRPC call of it.
        """
        self.request_id = secrets.token_hex(8) if grpc else ""
        self.status = self.size = self.read = 0
        self._client = entry.connect(_SMALL_BUFFER)
        try:
            if grpc:
                self._client.sendall(http2.PREFACE + http2.call_again(request, self.request_id))
                self._grpc_head()
            else:
                self._client.sendall(request)
                self._head()
        except OSError:
            self._client.close()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slow reader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave."""
        self._stop.set()
        self._thread.join(_SECONDS)
        self._client.close()

    def _head(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self._client.recv(1)
            if not byte:
                raise ConnectionError(f"no answer, but {head!r}")
            head += byte
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        self.status = int(first.split(" ")[1])
        headers = dict(line.lower().split(": ", 1) for line in lines)
        self.request_id = headers.get("x-request-id", "")
        self.size = int(headers.get("content-length", 0))

    def _grpc_head(self) -> None:
        while True:
            head = http2.read_head(self._exactly(http2.HEAD_SIZE))
            if head.kind == http2.DATA:
                self.status, self.size = 200, int.from_bytes(self._exactly(5)[1:], "big")
                return
            payload = self._exactly(head.size)
            if head.ends or head.kind == http2.GOAWAY:
                raise ConnectionError(f"no answer, but {payload!r}")
            self._client.sendall(http2.answer_to(head, payload))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._client.recv(size - len(data))
            if not piece:
                raise ConnectionError(f"no answer, but {data!r}")
            data += piece
        return data

    def _run(self) -> None:
        while not self._stop.wait(1.0) and self.read < self.size:
            try:
                self.read += len(self._client.recv(1))
            except TimeoutError:
                continue
            except OSError:
                return
