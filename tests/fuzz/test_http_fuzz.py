"""Broken HTTP and broken protobuf from both sides of a whole relay: it lives on, and no node learns of it.

Every case comes from a seed that stands in the name of its test, so a failure can be had again. What a node
gets is read by a strict parser of its own.
"""

from __future__ import annotations

import asyncio
import random
import re
import traceback
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import app
from relay.call import Wire
from relay.fleet import Ids, Kind, Method
from relay.settings import load
from relay.stores.host import HostTable
from relay.upstreams.pool import Pool
from relay.wires import http as wires_http
from relay.wires import http_connection, http_server
from relay.wires.http import Front
from relay.wires.http_server import NodeServer
from tests.sockets import CutError, Listener, Peer, chunked, connect, response
from tests.test_fleet import build, request_of
from tests.wires.conftest import CHUNKED, SPECS, in_chunks, path_of, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Fuzz = Callable[[Wire], AbstractAsyncContextManager["Fuzzed"]]

pytestmark = pytest.mark.timeout(60)

SECRET = b"SECRET-OF-THE-UPSTREAM"
GOOD = b"\x08\x05\x12\x02hi"
#: A case may take so long, and no longer: the relay here waits for nothing longer than IDLE.
BOUND = 10.0
IDLE = 0.1

TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\x00",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"0\r\n\r\n",
    b"\r\n\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 500 Oops\r\n",
    b"HTTP/1.0",
    b"HTTP/9.9",
    b"POST /v1/fleet/pull-messages HTTP/1.1\r\n",
    b"\xff\xfe",
    b"ffffffffffffffff",
    b"-1",
    b"%00",
    b"\r\n folded",
    b"A" * 9000,
]


def mutate(rng: random.Random, data: bytes, *, keep: int = 0, most: int = 4) -> bytes:
    """Return `data` broken in a few places, but for its first `keep` bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randint(keep, max(keep, len(out)))
        end = min(len(out), at + rng.choice((1, 1, 2, 5, 40)))
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end] * rng.choice((1, 2, 50))
            case 4:
                out[at:at] = rng.choice(TOKENS)
            case 5:
                out[at:at] = rng.randbytes(rng.choice((1, 3, 30)))
            case 6:
                del out[max(keep, at) :]
            case _:
                digits = [match.start() for match in re.finditer(rb"\d", bytes(out)) if match.start() >= keep]
                if digits:
                    out[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(out)


def split(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut `data` in a few pieces."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.choice((0, 0, 1, 2, 6))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# -- a relay in this process ----------------------------------------------------------------------------


class Quiet:
    """A logger that remembers what must not be said."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, dict[str, Any]]] = []

    def exception(self, event: str, **fields: Any) -> None:
        self.errors.append((event, fields | {"trace": traceback.format_exc()}))

    error = exception

    def warning(self, event: str, **fields: Any) -> None:
        """Is expected here."""

    info = debug = warning


class Fuzzed(NamedTuple):
    """A relay, its upstream, and what it complained about."""

    relay: app.Relay
    server: NodeServer
    port: int
    upstream: Listener
    quiet: Quiet
    broken: list[dict[str, Any]]

    async def settled(self) -> None:
        """Check that nothing is left of all the calls, and that nothing broke."""
        async with asyncio.timeout(BOUND):
            while self.server.connections or self.server.front.busy:
                await asyncio.sleep(0.01)
            (pool,) = (address.pool for address in self.relay.pool.addresses)
            assert isinstance(pool, Pool)
            while pool._open != len(pool._idle):
                await asyncio.sleep(0.01)
        assert self.quiet.errors == []
        assert self.broken == []
        assert not pool._queue


@pytest.fixture
async def fuzzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    quiet = Quiet()
    monkeypatch.setattr(wires_http, "log", quiet)
    monkeypatch.setattr(http_connection, "log", quiet)
    monkeypatch.setattr(http_server, "log", quiet)
    monkeypatch.setattr(http_connection, "LINGER", IDLE)
    monkeypatch.setattr("relay.policies.access_log.log", quiet)
    broken: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))

    @asynccontextmanager
    async def fuzzed(wire: Wire) -> AsyncIterator[Fuzzed]:
        async with Listener() as upstream:
            file = tmp_path / "relay.yaml"
            tree = {
                "upstream": {
                    "url": f"http://127.0.0.1:{upstream.port}",
                    "wire": wire.value,
                    "idle_timeout": IDLE,
                    "response_timeout": IDLE,
                    "heartbeat_timeout": IDLE,
                },
                "listeners": [{"address": "127.0.0.1:1", "keepalive": IDLE, "wires": [wire.value]}],
                "limits": {"max_body": "1MiB", "head_timeout": 5 * IDLE, "rate_window": 5 * IDLE},
                "retry": {"enabled": False},
                # What the upstream answers is broken on purpose, and each call is to meet it.
                "breaker": {"enabled": False},
                "repair": {"lost_answers": False, "reactivate": False},
                "log": {"level": "debug"},
            }
            file.write_text(yaml.safe_dump(tree))
            relay = app.build(load(file, {}), HostTable())
            front = relay.fronts[0]
            assert isinstance(front, Front)
            server = NodeServer(front, IDLE)
            listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            port = listening.sockets[0].getsockname()[1]
            try:
                yield Fuzzed(relay, server, port, upstream, quiet, broken)
            finally:
                listening.close()
                await server.shutdown(0.01)
                await relay.pool.close()

    return fuzzed


SOUND = Ids(node_id=2**63 + 1, run_id=7, object_id="5e" * 32)


def body_of(method: Method, filling: int = 0) -> bytes:
    """Return the body of a call as a SuperNode sends it."""
    message: bytes = build(method, SOUND, filling=filling).SerializeToString()
    return message


async def answer_well(peer: Peer) -> None:
    """Play a SuperLink that answers everything."""
    while True:
        await peer.message()
        peer.send(response(GOOD))


async def good_call(fuzzed: Fuzzed, wire: Wire) -> None:
    """Check that an ordinary call goes through."""
    node = await connect(fuzzed.port)
    try:
        node.send(request(body_of(Method.PULL_OBJECT), wire=wire, method=Method.PULL_OBJECT))
        answer = await node.message()
        assert (answer.status, answer.body) == (200, GOOD)
    finally:
        node.writer.transport.abort()


# -- what nodes get -------------------------------------------------------------------------------------

_STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [\x20-\x7e]*\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)\r\n")


class Got(NamedTuple):
    """One answer as a strict client reads it."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


def read_strictly(data: bytes, ending: str) -> list[Got]:
    """Return the answers in what a node got; fail on anything that is not exactly HTTP/1.1.

    An answer may only be incomplete if the connection was reset.
    """
    answers = []
    at = 0
    while at < len(data):
        line = _STATUS_LINE.match(data, at)
        if line is None:
            assert ending == "reset", data[at : at + 200]
            break
        status, at = int(line[1]), line.end()
        headers: dict[bytes, bytes] = {}
        while (header := _HEADER.match(data, at)) is not None:
            name = header[1].lower()
            assert name not in (b"content-length", b"transfer-encoding") or name not in headers
            headers[name] = header[2]
            at = header.end()
        if data[at : at + 2] != b"\r\n":
            assert ending == "reset", data[at : at + 200]
            break
        at += 2
        body = b""
        if status != 100:
            assert not {b"content-length", b"transfer-encoding"} <= headers.keys()
            size, at, body = _body(data, at, headers)
            if size is None:
                assert ending == "reset", (headers, data[at:][:200])
                break
        answers.append(Got(status, headers, body))
    return answers


def _body(data: bytes, at: int, headers: Mapping[bytes, bytes]) -> tuple[int | None, int, bytes]:
    """Return the size of a body (None if it is cut), where the next answer starts, and the body."""
    if b"content-length" in headers:
        size = int(headers[b"content-length"])
        body = data[at : at + size]
        return (size if len(body) == size else None), at + size, body
    if b"transfer-encoding" not in headers:
        assert headers[b"connection"] == b"close"
        return len(data) - at, len(data), data[at:]
    assert headers[b"transfer-encoding"] == b"chunked"
    body = b""
    while (line := re.compile(rb"([0-9a-f]+)\r\n").match(data, at)) is not None:
        size = int(line[1], 16)
        chunk, at = data[line.end() : line.end() + size], line.end() + size
        if len(chunk) < size or data[at : at + 2] != b"\r\n":
            return None, at, body
        at += 2
        body += chunk
        if size == 0:
            return len(body), at, body
    return None, at, body


#: What a node may be told about a Fleet call, but for what a SuperLink means that way.
HARMLESS = {100, 200, 403, 503}


async def play(port: int, pieces: list[bytes], end: str) -> tuple[bytes, str]:
    """Send the pieces, end as told, and return all that came back, and how the connection ended."""
    node = await connect(port)
    try:
        with suppress(ConnectionError):
            for piece in pieces:
                await node.send_all(piece)
                await asyncio.sleep(0)
            if end == "reset":
                node.reset()
                return b"", "reset"
            if end == "close":
                node.finish()
        return await node.rest(BOUND)
    finally:
        node.writer.transport.abort()


# -- broken requests ------------------------------------------------------------------------------------


def requests_of(wire: Wire) -> list[bytes]:
    """Return sound requests of every form."""
    push = body_of(Method.PUSH_OBJECT)
    pull = request(body_of(Method.PULL_MESSAGES), wire=wire, method=Method.PULL_MESSAGES)
    return [
        pull,
        request(b"", wire=wire, method=Method.PULL_MESSAGES),
        request(body_of(Method.SEND_NODE_HEARTBEAT), wire=wire, method=Method.SEND_NODE_HEARTBEAT),
        request(body_of(Method.ACTIVATE_NODE), wire=wire, method=Method.ACTIVATE_NODE),
        request(body_of(Method.REGISTER_NODE), wire=wire, method=Method.REGISTER_NODE),
        request(body_of(Method.UNREGISTER_NODE), wire=wire, method=Method.UNREGISTER_NODE),
        request(body_of(Method.PUSH_OBJECT, 120_000), wire=wire, method=Method.PUSH_OBJECT),
        request(wire=wire, method=Method.PUSH_OBJECT, framing=CHUNKED)
        + in_chunks(body_of(Method.PUSH_OBJECT)[:9], body_of(Method.PUSH_OBJECT)[9:]),
        request(wire=wire, method=Method.PUSH_MESSAGES, framing=CHUNKED)
        + in_chunks(body_of(Method.PUSH_MESSAGES)),
        request(push, wire=wire, headers=[(b"Expect", b"100-continue")]),
        request(push, wire=wire, version=b"1.0"),
        request(push, wire=wire, version=b"1.0", headers=[(b"Connection", b"keep-alive")]),
        request(
            body_of(Method.GET_RUN), wire=wire, path=b"http://relay.example" + path_of(Method.GET_RUN, wire)
        ),
        request(push, wire=wire, headers=[(b"Forwarded", b"for=1.2.3.4"), (b"X-Forwarded-For", b"::1, a")]),
        request(push, wire=wire, headers=[(b"Connection", b"x-a, close"), (b"X-A", b"1")]),
        pull + request(body_of(Method.GET_FAB), wire=wire, method=Method.GET_FAB) + pull,
        request(wire=wire, method=Method.GET_RUN, framing=CHUNKED)
        + in_chunks(body_of(Method.GET_RUN))
        + pull,
    ]


@pytest.mark.parametrize("wire", list(SPECS))
@pytest.mark.parametrize("seed", range(4))
async def test_broken_requests_break_nothing(fuzzed: Fuzz, wire: Wire, seed: int) -> None:
    rng = random.Random(f"{wire.value} {seed}")
    sound = requests_of(wire)
    strays = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        request(GOOD, path=b"/v9/fleet/pull-messages"),
        request(GOOD, path=b"/v1/control/start-run"),
    ]
    seen: Counter[int] = Counter()
    async with fuzzed(wire) as relay:
        serving = asyncio.create_task(relay.upstream.play(answer_well))

        async def one() -> None:
            data = rng.choice(sound + strays) + rng.choice((b"", b"", rng.choice(sound)))
            if rng.random() < 0.8:
                data = mutate(rng, data, most=3)
            end = rng.choice(("wait", "wait", "close", "reset"))
            for got in read_strictly(*await play(relay.port, split(rng, data), end)):
                assert got.status in HARMLESS | {404, 405}
                assert SECRET not in got.body
                if got.status in (404, 405):
                    assert got.headers[b"connection"] == b"close"
                seen[got.status] += 1

        for _ in range(4):
            async with asyncio.timeout(BOUND):
                await asyncio.gather(*(one() for _ in range(60)))
            await good_call(relay, wire)
        await relay.settled()
        serving.cancel()
    assert seen[200] > 20  # the mutation is not too wild to reach the inside
    assert seen[404] > 1
    assert seen[503] > 1 or wire is Wire.REST_V0


@pytest.mark.parametrize("wire", list(SPECS))
@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_OBJECT, Method.SEND_NODE_HEARTBEAT])
async def test_a_fleet_call_that_is_broken_behind_its_first_line_is_never_told_anything_lethal(
    fuzzed: Fuzz, wire: Wire, method: Method
) -> None:
    rng = random.Random(f"{wire.value} {method.rpc}")
    base = request(body_of(method), wire=wire, method=method, headers=[(b"flwr-signature", b"abc")])
    in_pieces = request(wire=wire, method=method, framing=CHUNKED) + in_chunks(
        body_of(method)[:5], body_of(method)[5:]
    )
    keep = base.index(b"\r\n") + 2
    async with fuzzed(wire) as relay:
        serving = asyncio.create_task(relay.upstream.play(answer_well))

        async def one() -> None:
            data = mutate(rng, rng.choice((base, base, in_pieces)), keep=keep, most=2)
            answers = read_strictly(*await play(relay.port, split(rng, data), "wait"))
            first = [got.status for got in answers if got.status != 100][:1]
            if method.kind is Kind.PULL:
                assert first in ([], [200])
            elif method.kind is Kind.HEARTBEAT:
                assert first in ([], [200], [503])
            else:
                assert first in ([], [200], [403], [503])

        for _ in range(3):
            async with asyncio.timeout(BOUND):
                await asyncio.gather(*(one() for _ in range(60)))
            await good_call(relay, wire)
        await relay.settled()
        serving.cancel()


# -- broken protobuf ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", list(SPECS))
async def test_broken_protobuf_stays_here_and_what_flower_writes_passes_as_it_is(
    fuzzed: Fuzz, wire: Wire
) -> None:
    rng = random.Random(wire.value)
    seen: list[bytes] = []

    async def note(peer: Peer) -> None:
        while True:
            seen.append((await peer.message()).body)
            peer.send(response(GOOD))

    plain = [method for method in Method if method.kind in (Kind.FETCH, Kind.CONFIRM, Kind.LEAVE)]
    async with fuzzed(wire) as relay:
        serving = asyncio.create_task(relay.upstream.play(note))
        sent: list[bytes] = []
        answered: list[bytes] = []
        must_pass: list[bytes] = []

        async def one() -> None:
            method = rng.choice(plain)
            body = rng.choice(
                (
                    rng.randbytes(rng.randint(0, 400)),
                    mutate(rng, body_of(method), most=1),
                    mutate(rng, body_of(method), most=2),
                    body_of(method),
                    b"\x0a\xff\xff\xff\xff\x7f",
                )
            )
            sent.append(body)
            if flower_would_write(method, body):
                must_pass.append(body)
            data = request(body, wire=wire, method=method)
            for got in read_strictly(*await play(relay.port, split(rng, data), "wait")):
                if got.body == GOOD:
                    answered.append(body)
                else:
                    assert got.status in HARMLESS
                    assert got.body in (b"", b"malformed", b"too_large")

        for _ in range(4):
            async with asyncio.timeout(BOUND):
                await asyncio.gather(*(one() for _ in range(40)))
        await relay.settled()
        serving.cancel()
        assert Counter(seen) == Counter(answered)
        assert not Counter(must_pass) - Counter(seen)
        assert len(must_pass) > 20
        assert len(sent) - len(seen) > 40


def flower_would_write(method: Method, body: bytes) -> bool:
    """Return whether these are the bytes of a sound request, as Flower's own serializer writes them."""
    request: Any = GetMessageClass(request_of(method))()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return False
    ids = request.node.node_id if method.ids.node_is_message else request.node_id
    name = getattr(request, "object_id", "") or getattr(request, "message_object_id", "")
    named = method.ids.object != 3 or re.fullmatch("[0-9a-f]{64}", name) is not None
    run = not method.ids.run or request.run_id != 0
    return bool(ids and named and run and request.SerializeToString() == body)


@pytest.mark.parametrize("wire", list(SPECS))
async def test_calls_over_every_limit_break_nothing(fuzzed: Fuzz, wire: Wire) -> None:
    rng = random.Random(f"limits {wire.value}")
    statuses: Counter[int] = Counter()
    async with fuzzed(wire) as relay:
        serving = asyncio.create_task(relay.upstream.play(answer_well))

        async def one() -> None:
            method = rng.choice(list(Method))
            near = rng.choice(
                (0, 1, 4095, 4096, 4097, 16_385, 65_536, 65_537, 2**20, 2**20 + 1, 2**32, 2**62)
            )
            body = bytes(min(near, 2**20 + 1))
            head_bytes = rng.choice((0, 1000, 8000, 16_300, 16_400, 33_000))
            headers = [(b"X-%d" % at, b"y" * min(4000, head_bytes - at)) for at in range(0, head_bytes, 4000)]
            headers += [(b"A", b"b")] * rng.choice((0, 0, 80, 98, 200))
            declared = rng.random() < 0.6
            head = request(
                wire=wire,
                method=method,
                headers=headers,
                framing=b"Content-Length: %d" % near if declared else CHUNKED,
            )
            pieces = [head, body] if declared else [head, in_chunks(body) if body else in_chunks()]
            for got in read_strictly(*await play(relay.port, pieces, rng.choice(("wait", "close", "reset")))):
                assert got.status in HARMLESS
                statuses[got.status] += 1

        for _ in range(3):
            async with asyncio.timeout(2 * BOUND):
                await asyncio.gather(*(one() for _ in range(40)))
            await good_call(relay, wire)
        await relay.settled()
        serving.cancel()
    assert statuses.total() > (20 if wire is Wire.HTTP_V1 else 5)  # the others were dropped


# -- broken answers -------------------------------------------------------------------------------------


def answers() -> list[bytes]:
    """Return what an upstream, or something before it, may say."""
    page = b"<html>" + SECRET + b"</html>"
    return [
        response(GOOD),
        response(GOOD),
        response(b""),
        response(GOOD * 20_000),
        chunked(GOOD, GOOD * 30),
        chunked(GOOD * 20_000),
        b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n\r\n" + GOOD,
        b"HTTP/1.1 100 Continue\r\n\r\n" + response(GOOD),
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + response(GOOD),
        b"HTTP/1.0 200 OK\r\nContent-Type: application/protobuf\r\nContent-Length: 6\r\n\r\n" + GOOD,
        response(GOOD) + response(page, status=b"400 Bad Request"),
        response(page, content_type=b"text/html"),
        response(page, status=b"404 Not Found", content_type=b"text/html"),
        response(page, status=b"429 Too Many Requests", content_type=b"text/html"),
        response(page, status=b"500 Internal Server Error", content_type=b"text/html"),
        response(page, status=b"503 Service Unavailable", content_type=b"text/html"),
        response(page * 4000, status=b"502 Bad Gateway", content_type=b"text/html"),
        response(page, status=b"418 I'm a teapot", content_type=b"application/protobuf"),
        response(b"", status=b"204 No Content"),
        response(page, status=b"302 Found", more=b"Location: http://elsewhere/\r\n"),
        chunked(page).replace(b"200 OK", b"400 Bad Request"),
        b"HTTP/1.1 500 Oops\r\nContent-Type: text/html\r\n\r\n" + page,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n" + SECRET,
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"",
    ]


@pytest.mark.parametrize("wire", list(SPECS))
@pytest.mark.parametrize("seed", range(4))
async def test_broken_answers_reach_no_node(fuzzed: Fuzz, wire: Wire, seed: int) -> None:
    rng = random.Random(f"answers {wire.value} {seed}")
    sound = answers()
    wild = True

    async def misbehave(peer: Peer) -> None:
        with suppress(CutError, ConnectionError):
            while True:
                await peer.message()
                if not wild:
                    peer.send(response(GOOD))
                    continue
                data = rng.choice(sound)
                if rng.random() < 0.7:
                    data = mutate(rng, data)
                for piece in split(rng, data):
                    await peer.send_all(piece)
                    await asyncio.sleep(0)
                match rng.randrange(4):
                    case 0:
                        return await peer.close()
                    case 1:
                        return peer.reset()

    seen: Counter[int] = Counter()
    async with fuzzed(wire) as relay:
        serving = asyncio.create_task(relay.upstream.play(misbehave))

        async def one() -> None:
            method = rng.choice(list(Method))
            version = rng.choice((b"1.1", b"1.1", b"1.0"))
            body = body_of(method, rng.choice((0, 0, 120_000)) if method.kind is Kind.PUSH else 0)
            data = request(body, wire=wire, method=method, version=version)
            got = read_strictly(*await play(relay.port, [data], "wait"))
            assert len(got) <= 1
            for answer in got:
                seen[answer.status] += 1
                passed = {401: True, 403: True, 412: method.kind is Kind.JOIN}.get(answer.status, False)
                assert answer.status in HARMLESS or passed
                if SECRET in answer.body:  # it may only have become what a SuperLink says
                    kind = answer.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
                    assert passed or (answer.status == 200 and kind == b"application/protobuf")

        for _ in range(4):
            wild = True
            async with asyncio.timeout(BOUND):
                await asyncio.gather(*(one() for _ in range(50)))
            wild = False
            await asyncio.sleep(0.01)
            await good_call(relay, wire)
        await relay.settled()
        serving.cancel()
    assert seen[200] > 20
    assert seen.total() > 30


# -- the strict reader itself, and splits ---------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=5), st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_strict_reader_reads_what_is_right_and_nothing_less(
    bodies: list[bytes], data: st.DataObject
) -> None:
    wire = b"".join(
        chunked(body, body) if body and number % 2 else response(body) for number, body in enumerate(bodies)
    )
    expected = [body * 2 if body and number % 2 else body for number, body in enumerate(bodies)]
    assert [got.body for got in read_strictly(wire, "closed")] == expected
    cut = data.draw(st.integers(0, max(0, len(wire) - 1)))
    whole = read_strictly(wire[:cut], "reset")
    assert [got.body for got in whole] == expected[: len(whole)]
    ends = [len(b"".join(parts)) for parts in _prefixes(bodies)]
    if cut not in ends:
        with pytest.raises(AssertionError):
            read_strictly(wire[:cut], "closed")


def _prefixes(bodies: list[bytes]) -> list[list[bytes]]:
    parts = [chunked(body, body) if body and n % 2 else response(body) for n, body in enumerate(bodies)]
    return [parts[:count] for count in range(len(parts) + 1)]
