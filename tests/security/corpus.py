"""Requests that two HTTP parsers might read differently, and how many calls of each may reach the SuperLink.

A case is what a node sends on one connection. `passes` is the number of calls that the relay makes of it, and
each reaches the upstream as a request of the relay's own making. SMUGGLED is a whole call, well-formed and
deadly (it would unregister a node), that must never be read out of the middle of another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.proto.fleet_pb2 import PullMessagesRequest, UnregisterNodeFleetRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node

NODE = Node(node_id=0x8000_0000_0000_0001)
OBJECT = "5e" * 32


def push(content: bytes) -> bytes:
    """Return the body of a push-object call."""
    message = PushObjectRequest(node=NODE, run_id=7, object_id=OBJECT, object_content=content, session_id="s")
    return message.SerializeToString()


BODY = push(b"content")
PULL = PullMessagesRequest(node=NODE).SerializeToString()
_LEAVE = UnregisterNodeFleetRequest(node_id=NODE.node_id).SerializeToString()
SMUGGLED = (
    b"POST /v1/fleet/unregister-node HTTP/1.1\r\nHost: smuggled\r\nContent-Type: application/protobuf\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_LEAVE), _LEAVE)
)


@dataclass(frozen=True, slots=True)
class Case:
    """One connection's bytes.

    Attributes:
        name: what is tried.
        data: what the node sends.
        passes: calls that reach the upstream through the relay alone; through nginx there may be fewer, or
            one that nginx has made sound.
        pieces: where the data is cut, with a pause; empty to send it at once.
        edge: calls that nginx makes of it at most. It takes a bare LF for the end of a line, and knows no
            upgrades, so that SMUGGLED may really be a second request of the same node.
        framed: whether its answer has the form of HTTP/1.1 with a body.
    """

    name: str
    data: bytes
    passes: int = 0
    pieces: tuple[int, ...] = ()
    edge: int = 1
    framed: bool = True


def call(
    *lines: bytes,
    body: bytes = BODY,
    start: bytes = b"POST /v1/fleet/push-object HTTP/1.1",
    host: bytes | None = b"Host: relay.example",
    end: bytes = b"\r\n",
) -> bytes:
    """Return the bytes of a request with these header lines, framed by none but them."""
    hosts = [] if host is None else [host]
    head = [start, *hosts, b"Content-Type: application/protobuf", *lines, b"", b""]
    return end.join(head) + body


def length(body: bytes = BODY) -> bytes:
    """Return the right Content-Length line."""
    return b"Content-Length: %d" % len(body)


def chunks(*pieces: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    """Return a sound chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last


GET = b"GET /v1/fleet/push-object HTTP/1.1"
HEAD = b"HEAD /v1/fleet/push-object HTTP/1.1"
OLD = b"POST /v1/fleet/push-object HTTP/1.0"
TE = b"Transfer-Encoding: chunked"
SOUND = call(length())
CHUNKED = call(TE, body=chunks(BODY))
SIZE = b"%x" % len(BODY)
#: A chunk whose data is a whole request, for parsers that think that the body ended before it.
HIDDEN = chunks(SMUGGLED)
ENDED = b"0\r\n\r\n" + SMUGGLED


def _two_framings() -> list[Case]:
    short = b"Content-Length: 4"
    return [
        Case("CL.TE", call(b"Content-Length: %d" % len(ENDED), TE, body=ENDED)),
        Case("TE.CL", call(short, TE, body=HIDDEN)),
        Case("TE.CL, TE first", call(TE, short, body=HIDDEN)),
        Case("CL.TE, both right", call(b"Content-Length: %d" % len(chunks(BODY)), TE, body=chunks(BODY))),
        Case("CL.0", call(length(SMUGGLED), body=SMUGGLED)),
        Case("CL.0 in a sound body", call(length(push(SMUGGLED)), body=push(SMUGGLED)), passes=1),
        Case("CL.0 of a GET", call(length(SMUGGLED), body=SMUGGLED, start=GET)),
        Case("CL.0 of a stray", call(length(SMUGGLED), body=SMUGGLED, start=b"POST /static/x HTTP/1.1")),
        Case("CL.0 of a HEAD", call(length(SMUGGLED), body=SMUGGLED, start=HEAD), framed=False),
        Case("0.CL", call(b"Content-Length: 0", length(SMUGGLED), body=SMUGGLED)),
        Case("0.CL by a name nobody knows", call(b"Content-Length\t: 0", length(), body=BODY)),
        Case("chunks of a GET", call(TE, body=ENDED, start=GET)),
        Case("TE in HTTP/1.0", call(TE, body=chunks(BODY), start=OLD)),
        Case(
            "TE in HTTP/1.0, kept alive",
            call(
                TE,
                b"Connection: keep-alive",
                body=chunks(BODY) + SMUGGLED,
                start=OLD,
            ),
        ),
    ]


def _transfer_encodings() -> list[Case]:
    obfuscated = {
        "another word": b"Transfer-Encoding: xchunked",
        "a space before the colon": b"Transfer-Encoding : chunked",
        "a tab before the colon": b"Transfer-Encoding\t: chunked",
        "a vertical tab": b"Transfer-Encoding:\x0bchunked",
        "a form feed": b"Transfer-Encoding:\x0cchunked",
        "a NUL": b"Transfer-Encoding: chunked\x00",
        "a no-break space": b"Transfer-Encoding:\xa0chunked",
        "twice": TE + b"\r\n" + TE,
        "twice, the second unknown": TE + b"\r\nTransfer-Encoding: x",
        "twice, the first unknown": b"Transfer-Encoding: x\r\n" + TE,
        "identity": b"Transfer-Encoding: identity",
        "identity first": b"Transfer-Encoding: identity, chunked",
        "identity last": b"Transfer-Encoding: chunked, identity",
        "chunked twice in one": b"Transfer-Encoding: chunked, chunked",
        "a coding that nobody undoes": b"Transfer-Encoding: gzip, chunked",
        "a parameter": b"Transfer-Encoding: chunked;q=1",
        "in quotes": b'Transfer-Encoding: "chunked"',
        "cut off": b"Transfer-Encoding: chunke",
        "a comma behind": b"Transfer-Encoding: chunked,",
        "a comma before": b"Transfer-Encoding: ,chunked",
        "empty": b"Transfer-Encoding:",
        "folded": b"Transfer-Encoding:\r\n chunked",
        "folded name": b"Transfer-\r\n Encoding: chunked",
        "behind a bare LF": b"X: x\nTransfer-Encoding: chunked",
        "behind a bare CR": b"X: x\rTransfer-Encoding: chunked",
        "behind a space": b"X: x\r\n Transfer-Encoding: chunked",
        "a letter that is K in lower case": b"Transfer-Encoding: chun\xe2\x84\xaaed",
    }
    cases = []
    for name, line in obfuscated.items():
        cases.append(Case(f"TE: {name}", call(line, body=chunks(BODY))))
        cases.append(Case(f"TE.TE: {name}, beside a length", call(length(ENDED), line, body=ENDED)))
    cases += [
        Case("TE: in capitals", call(b"TRANSFER-ENCODING: CHUNKED", body=chunks(BODY)), passes=1),
        Case("TE: spaces around", call(b"Transfer-Encoding: \t chunked \t", body=chunks(BODY))),
        # A name that is another one for all but CGI; the length is right.
        Case("TE: an underscore", call(b"Transfer_Encoding: chunked", length()), passes=1),
    ]
    return cases


def _lengths() -> list[Case]:
    values = {
        "signed": b"+%d" % len(BODY),
        "negative": b"-1",
        "hexadecimal": b"0x%x" % len(BODY),
        "a list": b"%d, %d" % (len(BODY), len(BODY)),
        "a list of two": b"%d, 0" % len(BODY),
        "two numbers": b"%d 0" % len(BODY),
        "a fraction": b"%d.0" % len(BODY),
        "an exponent": b"1e2",
        "an underscore": b"1_0",
        "other digits": "\u0661".encode(),
        "empty": b"",
        "a comma behind": b"%d," % len(BODY),
        "over 64 bits": b"%d" % (2**64 + len(BODY)),
        "over 63 bits": b"%d" % (2**63 + len(BODY)),
        "a vertical tab": b"\x0b%d" % len(BODY),
        "a NUL": b"%d\x00" % len(BODY),
        "in quotes": b'"%d"' % len(BODY),
    }
    return [
        *(
            Case(f"CL: {name}", call(b"Content-Length: " + value) + SMUGGLED)
            for name, value in values.items()
        ),
        Case("CL: the same twice", call(length(), length())),
        Case("CL: two that differ", call(length(), b"Content-Length: 0") + SMUGGLED),
        Case("CL: a space before the colon", call(b"Content-Length : %d" % len(BODY))),
        Case("CL: folded", call(b"Content-Length:\r\n %d" % len(BODY))),
        Case("CL: leading zeros", call(b"Content-Length: 000%d" % len(BODY)), passes=1),
        Case("CL: spaces around", call(b"Content-Length: \t%d\t " % len(BODY)), passes=1),
        Case("CL: none", call(body=b"") + SMUGGLED.replace(b"POST", b"XPOST")),
        Case("CL: shorter than the body", call(b"Content-Length: %d" % (len(BODY) - 5)) + SMUGGLED),
        Case("CL: longer than the body", call(b"Content-Length: 500000")),
    ]


def _chunk_tricks() -> list[Case]:
    broken = {
        "bare LF in an extension": b"%b;a\nb\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "bare CR in an extension": b"%b;a\rb\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "bare LF ends an extension": b"%b;a\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "bare LF behind the size": b"%b\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "bare CR behind the size": b"%b\r%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "CR CR LF behind the size": b"%b\r\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "bare LF behind the data": b"%b\r\n%b\n0\r\n\r\n" % (SIZE, BODY),
        "bare LF behind the last size": b"%b\r\n%b\r\n0\n\r\n" % (SIZE, BODY),
        "bare LF at the end": b"%b\r\n%b\r\n0\r\n\n" % (SIZE, BODY) + SMUGGLED,
        "nothing behind the data": b"%b\r\n%b0\r\n\r\n" % (SIZE, BODY),
        "two bytes of something behind the data": b"%b\r\n%bxx0\r\n\r\n" % (SIZE, BODY),
        "data that spills": b"5\r\n%b\r\n0\r\n\r\n" % BODY + SMUGGLED,
        "a size of 16 digits": b"ffffffffffffffff\r\n%b\r\n0\r\n\r\n" % BODY,
        "a size over 64 bits": b"1000000000000000%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a size of 17 digits": b"10000000000000000\r\n" + ENDED,
        "a negative size": b"-1\r\n" + ENDED,
        "a signed size": b"+%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a prefix before the size": b"0x%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "an underscore in the size": b"0_%b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "no size": b"\r\n%b\r\n0\r\n\r\n" % BODY,
        "a semicolon for a size": b";x\r\n%b\r\n0\r\n\r\n" % BODY,
        "a space before the size": b" %b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a space behind the size": b"%b \r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a tab behind the size": b"%b\t\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a NUL behind the size": b"%b\x00\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a NUL in an extension": b"%b;\x00\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY),
        "a quoted extension over two lines": b'%b;a="\r\n%b\r\n0\r\n\r\n' % (SIZE, BODY),
        "a trailer that is folded": chunks(BODY, last=b"0\r\nA: b\r\n c\r\n\r\n"),
        "a trailer with a bare LF": chunks(BODY, last=b"0\r\nA: b\nContent-Length: 5\r\n\r\n"),
        "a trailer without a colon": chunks(BODY, last=b"0\r\nPOST / HTTP/1.1\r\n\r\n"),
    }
    sound = {
        "an extension": b"%b;name=value\r\n%b\r\n0;last\r\n\r\n" % (SIZE, BODY),
        "an extension in quotes": b'%b;name="a b"\r\n%b\r\n0\r\n\r\n' % (SIZE, BODY),
        "a size in capitals and with zeros": b"00%b\r\n%b\r\n000\r\n\r\n" % (SIZE.upper(), BODY),
        "byte after byte": chunks(*(BODY[at : at + 1] for at in range(len(BODY)))),
        "a trailer": chunks(BODY, last=b"0\r\nX-Trailer: x\r\n\r\n"),
        "a request in a chunk": chunks(push(SMUGGLED)),
    }
    return [
        *(Case(f"chunks: {name}", call(TE, body=body), edge=2) for name, body in broken.items()),
        *(Case(f"chunks: {name}", call(TE, body=body), passes=1) for name, body in sound.items()),
        Case("chunks: an endless extension", call(TE, body=b"%b;%b\r\n" % (SIZE, b"x" * 200_000) + BODY)),
    ]


def _framing_in_trailers() -> list[Case]:
    # RFC 9110 section 6.5.1: a trailer never frames, and is no header. It does not reach the upstream.
    lines = {b"Content-Length: 0": 0, TE: 0, b"Host: b": 1, b"Connection: close": 1, b"flwr-signature: x": 1}
    return [
        Case(f"trailer: {line.decode()}", call(TE, body=chunks(BODY, last=b"0\r\n%b\r\n\r\n" % line)), passes)
        for line, passes in lines.items()
    ]


def _headers() -> list[Case]:
    broken = {
        "a bare CR in a value": b"X: a\rX-Injected: 1",
        "a bare LF in a value": b"X: a\nX-Injected: 1",
        "a NUL in a value": b"X: a\x00b",
        "a NUL in a name": b"X\x00: a",
        "an escape in a value": b"X: \x1b[2J",
        "a delete in a value": b"X: \x7f",
        "a space in a name": b"X Y: a",
        "a name in brackets": b"X[]: a",
        "no name": b": a",
        "no colon": b"just words",
        "folded": b"X: a\r\n b",
        "folded by a tab": b"X: a\r\n\tb",
        "a CR before the end": b"X: a\r",
        "one of 40 KiB": b"X: " + b"x" * 40_000,
        "a name of 40 KiB": b"x" * 40_000 + b": x",
        "1000 of them": b"\r\n".join(b"X%d: x" % number for number in range(1000)),
        "a head of 200 KiB": b"\r\n".join(b"X%d: %b" % (number, b"x" * 8000) for number in range(25)),
    }
    sound = {
        "a value of high bytes": b"X: \xc3\xa9\xff",
        "an empty value": b"X:",
        "a name of odd letters": b"!#$%&'*+-.^_`|~0: x",
        "a request id to be injected": b"X-Request-Id: a b\tc",
        "framing named in Connection": b"Connection: content-length, host, transfer-encoding, keep-alive",
        "a proof named in Connection": b"Connection: via, x-forwarded-for, forwarded, x-request-id",
        "claims of a proxy": b"X-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1;host=evil",
        "hop-by-hop": b"Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nTrailer: X",
    }
    first = call(length()).replace(b"\r\nHost:", b"\r\n folded: x\r\nHost:", 1)
    return [
        *(Case(f"header: {name}", call(line, length()) + SMUGGLED[:0]) for name, line in broken.items()),
        *(Case(f"header: {name}", call(line, length()), passes=1) for name, line in sound.items()),
        Case("header: the first one folded", first),
        Case("header: the first one empty", call(length()).replace(b"\r\nHost:", b"\r\n: x\r\nHost:", 1)),
    ]


def _targets_and_hosts() -> list[Case]:
    def to(target: bytes, host: bytes | None = b"Host: relay.example") -> bytes:
        return call(length(), start=b"POST %b HTTP/1.1" % target, host=host)

    path = b"/v1/fleet/push-object"
    return [
        Case("host: none", to(path, None)),
        Case("host: two", to(path, b"Host: a\r\nHost: b")),
        Case("host: the same twice", to(path, b"Host: a\r\nhost: a")),
        Case("host: empty", to(path, b"Host:"), passes=1),
        Case("host: a list", to(path, b"Host: a, b")),
        Case("host: with a path", to(path, b"Host: a/v1/control")),
        Case("host: with a user", to(path, b"Host: a@b")),
        Case("host: with a space", to(path, b"Host: a b")),
        Case("host: with a port that is none", to(path, b"Host: a:b")),
        Case("host: an address", to(path, b"Host: [::1]:8080"), passes=1),
        Case("target: absolute", to(b"http://relay.example" + path), passes=1),
        Case("target: absolute, of another host", to(b"http://other" + path), passes=1),
        Case("target: absolute, to the Control API", to(b"http://relay.example/v1/control/list-runs")),
        Case("target: the Control API", to(b"/v1/control/list-runs")),
        Case("target: the Control API by dots", to(b"/v1/fleet/../control/list-runs")),
        Case("target: the Control API by escaped dots", to(b"/v1/fleet/%2e%2e/control/list-runs")),
        Case("target: an escaped slash", to(b"/v1%2ffleet%2fpush-object")),
        Case("target: an escaped letter", to(b"/v1/fleet/push%2dobject")),
        Case("target: two slashes", to(b"//v1/fleet/push-object")),
        Case("target: injected lines", to(path + b"%0d%0aX-Injected:%201")),
        Case("target: a space", to(path + b" x")),
        Case("target: a NUL", to(path + b"\x00")),
        Case("target: a tab", to(b"/v1/fleet/\tpush-object")),
        Case("target: high bytes", to(path + b"\xff")),
        Case("target: of 40 KiB", to(path + b"?" + b"x" * 40_000)),
        Case("target: a backslash", to(b"\\v1\\fleet\\push-object")),
        Case("target: none", call(length(), start=b"POST HTTP/1.1")),
    ]


def _upgrades() -> list[Case]:
    h2c = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__"
    websocket = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"
    return [
        Case("upgrade: h2c", call(h2c, length()) + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED, edge=2),
        Case("upgrade: h2c with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
        # CVE-2026-69243
        Case("upgrade: WebSocket with a body", call(websocket, length()) + SMUGGLED, edge=2),
        Case("upgrade: WebSocket by GET", call(websocket, start=GET, body=b"") + SMUGGLED),
        Case("upgrade: TLS", call(b"Connection: Upgrade\r\nUpgrade: TLS/1.0", length()) + SMUGGLED, edge=2),
        Case("upgrade: of no connection", call(b"Upgrade: h2c", length()) + SMUGGLED, edge=2),
        Case("CONNECT", b"CONNECT superlink:8000 HTTP/1.1\r\nHost: superlink:8000\r\n\r\n" + SMUGGLED),
    ]


def _expectations() -> list[Case]:
    wait = b"Expect: 100-continue"
    return [
        Case("expect: a body at once", call(wait, length()), passes=1),
        Case("expect: in HTTP/1.0", call(wait, length(), start=OLD), passes=1),
        Case("expect: something else", call(b"Expect: 200-ok", length()), passes=1),
        Case("expect: obfuscated", call(b"Expect: y 100-continue", length()), passes=1),
        Case("expect: twice", call(wait, wait, length()), passes=1),
        Case("expect: and nothing comes", call(wait, length(), body=b"")),
        Case("expect: of a GET", call(wait, length(SMUGGLED), body=SMUGGLED, start=GET)),
        Case("expect: both framings", call(wait, b"Content-Length: 6", TE, body=ENDED)),
    ]


def _lines_and_versions() -> list[Case]:
    def version(text: bytes) -> bytes:
        return call(length(), start=b"POST /v1/fleet/push-object " + text)

    return [
        Case("lines: LF alone", call(length(), end=b"\n")),
        Case("lines: CR alone", call(length(), end=b"\r")),
        Case("lines: the last LF alone", call(length(), body=b"").removesuffix(b"\r\n") + b"\n" + BODY),
        Case("lines: LF behind the first", call(length()).replace(b"\r\n", b"\n", 1)),
        Case("lines: LF CR", call(length(), end=b"\n\r")),
        Case("lines: CR CR LF", call(length(), end=b"\r\r\n")),
        Case("lines: two before", b"\r\n\r\n" + SOUND, passes=1),
        Case("lines: a space before", b" " + SOUND),
        Case("lines: a NUL before", b"\x00" + SOUND),
        Case("version: 0.9", b"POST /v1/fleet/push-object\r\n\r\n" + SMUGGLED),
        Case("version: 0.9 of a GET", b"GET /\r\n\r\n" + SMUGGLED, framed=False),
        Case("version: 1.0", version(b"HTTP/1.0"), passes=1),
        Case("version: 1.0 without a length", call(start=OLD)),
        Case("version: 1.2", version(b"HTTP/1.2")),
        Case("version: 2.0", version(b"HTTP/2.0")),
        Case("version: 01.1", version(b"HTTP/01.1")),
        Case("version: 1.1 and more", version(b"HTTP/1.1x")),
        Case("version: lower case", version(b"http/1.1")),
        Case("version: none of HTTP", version(b"ICE/1.0")),
        Case("verb: lower case", SOUND.replace(b"POST", b"post", 1)),
        Case("verb: unknown", SOUND.replace(b"POST", b"SMUGGLE", 1)),
        Case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
    ]


def _pipelines() -> list[Case]:
    half = len(SOUND) - 3
    return [
        Case("one sound call", SOUND, passes=1),
        Case("one sound call in chunks", CHUNKED, passes=1),
        Case("two calls at once", SOUND + CHUNKED, passes=2, edge=2),
        Case("a stray behind a call", SOUND + call(start=b"GET /docs HTTP/1.1", body=b""), passes=1),
        Case("garbage behind a call", SOUND + b"\x00\x01\x02\r\n\r\n"),
        Case("a call behind garbage", b"garbage\r\n\r\n" + SMUGGLED),
        Case("a call behind one that closes", call(b"Connection: close", length()) + SMUGGLED),
        Case("a call behind a broken one", call(b"Content-Type: text/html", length(b"x"), body=b"x")),
        Case("cut in the line", SOUND, passes=1, pieces=(7,)),
        Case("cut between CR and LF", SOUND, passes=1, pieces=(SOUND.index(b"\r\n") + 1,)),
        Case("cut in the length", SOUND, passes=1, pieces=(SOUND.index(b"Length: ") + 9,)),
        Case("cut in the body", SOUND, passes=1, pieces=(half,)),
        Case("cut in a chunk size", CHUNKED, passes=1, pieces=(CHUNKED.index(b"\r\n\r\n") + 5,)),
        Case("cut before the last LF", CHUNKED, passes=1, pieces=(len(CHUNKED) - 1,)),
    ]


def _truncated() -> list[Case]:
    return [
        Case("truncated: the line", SOUND[:10]),
        Case("truncated: the head", SOUND[:60]),
        Case("truncated: before the last LF", SOUND[: SOUND.index(b"\r\n\r\n") + 3]),
        Case("truncated: no body", call(length(), body=b"")),
        Case("truncated: the body", SOUND[:-1]),
        Case("truncated: a long body", call(b"Content-Length: 300000", body=push(b"x" * 1000))),
        Case("truncated: no chunk", call(TE, body=b"")),
        Case("truncated: a chunk size", call(TE, body=SIZE)),
        Case("truncated: a chunk", call(TE, body=SIZE + b"\r\n" + BODY[:-1])),
        Case("truncated: the last chunk", CHUNKED[:-5]),
        Case("truncated: the end of the last chunk", CHUNKED[:-2]),
        Case("truncated: long chunks", call(TE, body=chunks(push(b"x" * 5000), last=b""))),
    ]


CASES = [
    *_two_framings(),
    *_transfer_encodings(),
    *_lengths(),
    *_chunk_tricks(),
    *_framing_in_trailers(),
    *_headers(),
    *_targets_and_hosts(),
    *_upgrades(),
    *_expectations(),
    *_lines_and_versions(),
    *_pipelines(),
    *_truncated(),
]
