"""A SuperLink that writes down every byte, and reads it with a parser that forgives nothing."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\nContent-Length: 2\r\n\r\n\x08\x01"  # stored
)

_LINE = re.compile(rb"POST /v1/fleet/([a-z-]+) HTTP/1\.1")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?((?:[\x21-\x7e\x80-\xff](?:[\t -\x7e\x80-\xff]*))?)")


class IllFormedError(Exception):
    """What came is not exactly one request of HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that came whole.

    Attributes:
        method: last segment of its path.
        headers: by lower-case name; none comes twice.
        body: without its chunking.
    """

    method: str
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def request_id(self) -> str:
        return self.headers[b"x-request-id"].decode()


@dataclass
class Recorder:
    """The server; to be used as a context.

    Attributes:
        seen: all requests that came whole.
        wrong: what was ill-formed, in words.
        answer: what each of them is answered.
        answers: the same for some methods.
    """

    seen: list[Seen] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answer: bytes = ANSWER
    answers: dict[str, bytes] = field(default_factory=dict)
    port: int = 0
    _open: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self._open.add(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        data = b""
        with suppress(OSError), sock:
            while piece := sock.recv(65536):
                data += piece
                try:
                    found = parse(data)
                except IllFormedError as error:
                    self.wrong.append(str(error))
                    break
                if found is None:
                    continue
                seen, size = found
                # The relay sends nothing more before it has its answer: what is left over is no request.
                if len(data) > size:
                    self.wrong.append(f"bytes behind a request: {data[size:][:100]!r}")
                    break
                data = b""
                self.seen.append(seen)
                sock.sendall(self.answers.get(seen.method, self.answer))
        self._open.discard(sock)


def parse(data: bytes) -> tuple[Seen, int] | None:
    """Return the request that `data` begins with and its size; None if it is not complete.

    Raises:
        IllFormedError: it cannot become one, or could be read in two ways.
    """
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        if re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|$)", head):
            raise IllFormedError(f"a control character in {head[:200]!r}")
        return None
    start, *lines = head.split(b"\r\n")
    line = _LINE.fullmatch(start)
    if line is None:
        raise IllFormedError(f"the line {start[:100]!r}")
    headers: dict[bytes, bytes] = {}
    for text in lines:
        header = _HEADER.fullmatch(text)
        if header is None:
            raise IllFormedError(f"the header {text[:100]!r}")
        name = header[1].lower()
        if name in headers:
            raise IllFormedError(f"{name!r} twice")
        headers[name] = header[2]
    if headers.get(b"host", b"").startswith(b"127.0.0.1:") is False:
        raise IllFormedError(f"the host {headers.get(b'host')!r}")
    framing = headers.keys() & {b"content-length", b"transfer-encoding"}
    if len(framing) != 1:
        raise IllFormedError(f"framed by {sorted(framing)}")
    at = len(head) + 4
    if b"content-length" in headers:
        if not re.fullmatch(rb"0|[1-9][0-9]*", headers[b"content-length"]):
            raise IllFormedError(f"the length {headers[b'content-length']!r}")
        size = int(headers[b"content-length"])
        body = data[at : at + size]
        at += size
        return None if len(body) < size else (Seen(line[1].decode(), headers, body), at)
    if headers[b"transfer-encoding"] != b"chunked":
        raise IllFormedError(f"the coding {headers[b'transfer-encoding']!r}")
    body = b""
    while True:
        found = re.compile(rb"([0-9a-f]{1,8})\r\n").match(data, at)
        if found is None:
            if not re.fullmatch(rb"([0-9a-f]{1,8}\r?)?", data[at:]):
                raise IllFormedError(f"the chunk {data[at:][:50]!r}")
            return None
        size = int(found[1], 16)
        chunk, after = data[found.end() : found.end() + size], found.end() + size
        if len(data) < after + 2:
            return None
        if data[after : after + 2] != b"\r\n":
            raise IllFormedError(f"behind a chunk {data[after:][:50]!r}")
        at = after + 2
        body += chunk
        if not size:
            return Seen(line[1].decode(), headers, body), at
