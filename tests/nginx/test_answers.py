"""What a node is told when nginx itself has to answer: nginx/flower against relay/dialect.py."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, assert_never

import pytest

from relay import dialect
from relay.call import Wire
from relay.fleet import Method
from relay.refusal import Reason
from tests.nginx.edge import (
    CALLS,
    CLOSED,
    COME_BACK,
    EMPTY,
    GIVE_UP,
    NOT_FOUND,
    PULL,
    PUSH,
    SHIPPED,
    Answer,
    Played,
    answer,
    answers,
    drops,
    never_answers,
    path_of,
    play,
    request,
)
from tests.relay_process import free_port
from tests.sockets import Peer, response, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.nginx.edge import Edge

    StartEdge = Callable[..., Edge]

HEARTBEAT = "/api/v0/fleet/send-node-heartbeat"
REST_PUSH = "/api/v0/fleet/push-object"


def wanted(reason: Reason, wire: Wire, method: Method | None) -> Answer:
    """Return the relay's own answer, as nginx words it."""
    match dialect.answer(wire, reason, method):
        case dialect.Empty() | dialect.Hold():
            return EMPTY
        case dialect.Status(503):
            return COME_BACK
        case dialect.Status(code):
            assert code == 403
            return GIVE_UP
        case dialect.Drop():
            return CLOSED
        case dialect.Abort():
            pytest.fail("no HTTP wire is answered so")
        case never:
            assert_never(never)


async def check(
    edge: Edge, reason: Reason, *, query: str = "", more: bytes = b"", body: bytes = b"x"
) -> None:
    """Ask for every path of every wire; each answer must be the relay's own for this reason."""

    async def one(wire: Wire, method: Method | None) -> None:
        got = await edge.ask(request(path_of(wire, method) + query, body, more=more))
        assert got == wanted(reason, wire, method), f"{wire} {method}"

    async with asyncio.TaskGroup() as group:
        for wire, method in CALLS:
            group.create_task(one(wire, method))


def test_all_four_answers_are_wanted() -> None:
    """The four answers do occur, so that `check` compares something."""
    reasons = (Reason.OVERLOADED, Reason.TOO_LARGE)
    all_of_them = {wanted(reason, wire, method) for reason in reasons for wire, method in CALLS}
    assert all_of_them == {EMPTY, COME_BACK, GIVE_UP, CLOSED}


# Statuses that nginx can come to by itself, whatever the reason; 413 has a test of its own.
CODES = (400, 411, 414, 421, 429, 494, 495, 496, 500, 501, 502, 503, 504, 505, 507)


async def test_every_code(start_edge: StartEdge) -> None:
    makes = "".join(f'if ($arg_make = "{code}") {{ return {code}; }}\n' for code in (*CODES, 413, 497))
    edge = start_edge(free_port(), server=makes)
    for code in CODES:
        await check(edge, Reason.OVERLOADED, query=f"?make={code}")
    await check(edge, Reason.TOO_LARGE, query="?make=413")
    for wire, method in CALLS:
        assert await edge.ask(request(f"{path_of(wire, method)}?make=497")) == CLOSED
    for code in (*CODES, 413, 497):
        assert await edge.ask(request(f"/docs?make={code}")) == CLOSED


# -- causes in the relays -------------------------------------------------------------------------------


async def has_a_head_too_large(_: Played, peer: Peer) -> None:
    await peer.message()
    await peer.send_all(response(b"ok", more=b"x-large: " + 300 * 1024 * b"x" + b"\r\n"))
    await peer.close()


async def closes(_: Played, peer: Peer) -> None:
    await peer.message()
    await peer.close()


async def resets_at_once(_: Played, peer: Peer) -> None:
    peer.reset()


@pytest.mark.parametrize("part", [drops, closes, resets_at_once, has_a_head_too_large, never_answers])
async def test_relay(start_edge: StartEdge, part: Callable[[Played, Peer], Awaitable[None]]) -> None:
    async with play(part) as relay:
        edge = start_edge(relay.port, server="proxy_read_timeout 300ms;")
        await check(edge, Reason.UPSTREAM_DOWN)
        await check(edge, Reason.UPSTREAM_DOWN, body=200_000 * b"x")


async def test_no_relay(start_edge: StartEdge) -> None:
    edge = start_edge(free_port(), free_port())
    await check(edge, Reason.UPSTREAM_DOWN)
    await check(edge, Reason.UPSTREAM_DOWN, body=200_000 * b"x")


async def test_relay_that_takes_no_connection(start_edge: StartEdge) -> None:
    with deaf() as port:
        edge = start_edge(port, server="proxy_connect_timeout 300ms;")
        await check(edge, Reason.UPSTREAM_DOWN)


@contextmanager
def deaf() -> Iterator[int]:
    """A port whose queue is full, so that a SYN to it gets no answer: a host that is gone."""
    with ExitStack() as stack:
        listening, *waiting = [stack.enter_context(socket.socket()) for _ in range(5)]
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


# -- causes in nginx ------------------------------------------------------------------------------------


async def test_limits(start_edge: StartEdge) -> None:
    """The optional limits, as they are shipped but for the numbers."""

    def of(name: str) -> str:
        lines = (SHIPPED / "site" / name / "limits.conf").read_text().splitlines()
        return "\n".join(line.removeprefix("# ") for line in lines if line.startswith("# limit_"))

    zones, limits = of("http.d"), of("server.d")
    rate = limits.replace("burst=1000", "nodelay").replace("connections 500", "connections 300")
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, http=zones.replace("200r/s", "1r/m"), server=rate)
        assert await edge.ask(request(PULL)) == Answer(200, b"ok", b"application/protobuf")
        await check(edge, Reason.OVERLOADED)
    async with play(never_answers) as relay:
        edge = start_edge(relay.port, http=zones, server=limits.replace("connections 500", "connections 1"))
        first = await edge.connect()
        first.send(request(PULL))
        await until(lambda: relay.seen)
        await check(edge, Reason.OVERLOADED)
        assert len(relay.seen) == 1


async def test_body_over_a_limit(start_edge: StartEdge) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server="client_max_body_size 1k;")
        await check(edge, Reason.TOO_LARGE, body=100_000 * b"x")
        # The length may also come out while the body is on its way.
        peer = await edge.connect()
        peer.send(b"POST %b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" % PUSH.encode())
        peer.send(b"1000\r\n%b\r\n0\r\n\r\n" % (4096 * b"x"))
        assert await answer(peer) == GIVE_UP


@pytest.mark.parametrize(
    ("path", "told"), [(PULL, EMPTY), (PUSH, COME_BACK), (REST_PUSH, CLOSED), (HEARTBEAT, COME_BACK)]
)
async def test_full_worker(start_edge: StartEdge, path: str, told: Answer) -> None:
    """It answers calls as the dialect says; further connections wait, and none is closed as it is made."""
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, workers=1, connections=64)
        peer = await edge.connect()
        crowd = [await edge.connect() for _ in range(80)]
        await until(lambda: "accept4() failed (24: Too many open files)" in edge.errors())
        peer.send(request(path))
        assert await answer(peer) == told
        assert relay.seen == []
        for peer in crowd:
            assert await peer.is_silent(0.001)
        for peer in crowd[:60]:
            await peer.close()
        for peer in crowd[60:]:
            peer.send(request(path))
            assert (await answer(peer)).status == 200


HEAD = b"POST %b HTTP/1.1\r\n"
BROKEN = {
    "no host": HEAD + b"\r\n",
    "two hosts": HEAD + b"host: a\r\nhost: b\r\n\r\n",
    "bad length": HEAD + b"host: a\r\ncontent-length: many\r\n\r\n",
    "two lengths": HEAD + b"host: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "length and chunked": HEAD + b"host: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    "unknown coding": HEAD + b"host: a\r\ntransfer-encoding: gzip\r\n\r\n",
    "broken chunks": HEAD + b"host: a\r\ntransfer-encoding: chunked\r\n\r\nmany\r\n",
    "large header": HEAD + b"host: a\r\ncookie: " + 140_000 * b"x" + b"\r\n\r\n",
    "many headers": HEAD + b"host: a\r\n" + 4000 * b"x-many: 0123456789012345678901234567890\r\n" + b"\r\n",
}


@pytest.mark.parametrize("head", BROKEN.values(), ids=BROKEN)
async def test_broken_call(start_edge: StartEdge, head: bytes) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port)
        for wire, method in CALLS:
            got = await edge.ask(head % path_of(wire, method).encode())
            assert got == wanted(Reason.MALFORMED, wire, method), f"{wire} {method}"
        assert await edge.ask(head % b"/docs") in {CLOSED, NOT_FOUND}
        assert relay.seen == []


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/fleet/pull-messages HTTP/7.1\r\nhost: a\r\n\r\n",
        b"POST http://[::bad/v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST /v1/fleet/pull-messages?" + 140_000 * b"x" + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["words", "TLS", "version", "authority", "long line", "HTTP/2"],
)
async def test_not_http(start_edge: StartEdge, data: bytes) -> None:
    edge = start_edge(free_port())
    peer = await edge.connect()
    peer.send(data)
    assert await peer.rest() == (b"", "reset")


async def test_stalled_body(start_edge: StartEdge) -> None:
    """The one error of nginx that cannot be given an answer: it closes, for a REST heartbeat too."""
    async with play(never_answers) as relay:
        edge = start_edge(relay.port, server="client_body_timeout 300ms;")

        async def one(path: str) -> None:
            peer = await edge.connect()
            peer.send(request(path, b"12345")[:-1])
            assert await peer.rest() == (b"", "reset")

        await asyncio.gather(*(one(path_of(wire, method)) for wire, method in CALLS))


async def test_connection_after_an_answer(start_edge: StartEdge) -> None:
    """A node that is told to come back may do so on the same connection."""
    edge = start_edge(free_port())
    peer = await edge.connect()
    for path, told in ((PULL, EMPTY), (PUSH, COME_BACK), (PULL, EMPTY), (HEARTBEAT, COME_BACK)):
        peer.send(request(path, 1000 * b"x"))
        assert await answer(peer) == told
    peer.send(request(REST_PUSH))
    assert await peer.rest() == (b"", "reset")


async def test_request_id_of_an_answer(start_edge: StartEdge) -> None:
    edge = start_edge(free_port())
    peer = await edge.connect()
    for path in (PULL, PUSH):
        peer.send(request(path, more=b"x-request-id: node-7.1\r\n"))
        assert (await peer.message()).one(b"x-request-id") == b"node-7.1"


async def test_access_log(start_edge: StartEdge) -> None:
    async with play(answers(response(b"ok"))) as relay:
        edge = start_edge(relay.port, server='if ($arg_make = "502") { return 502; }')
        asked = {
            "empty": (PULL, 200),
            "come_back": (PUSH, 503),
            "closed": (REST_PUSH, 444),
        }
        for name, (path, _) in asked.items():
            await edge.ask(request(f"{path}?make=502", more=b"x-request-id: id-%b\r\n" % name.encode()))
        for _ in range(50):
            await edge.ask(request(PULL))
        await edge.ask(request("/docs", more=b"x-request-id: id-stray\r\n"))
        entries = edge.access_log(*(f"id-{name}" for name in asked), "id-stray")
        by_id = {entry["request_id"]: entry for entry in entries}
        for name, (path, status) in asked.items():
            entry = by_id[f"id-{name}"]
            assert (entry["edge_answer"], entry["status"], entry["path"]) == (
                name,
                status,
                f"{path}?make=502",
            )
        assert by_id["id-stray"]["status"] == 404
        assert len(entries) < 30, "calls that went well are sampled"
        assert edge.errors() == ""
