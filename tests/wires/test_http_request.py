"""What a Call looks like that a node's request became: relay/wires/http_request.py over real sockets."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from relay.call import Certificate, Payload, Reply, Source, Wire
from relay.fleet import MAX_REQUEST, Kind, Method
from relay.limits import bodies
from relay.refusal import Reason, Refusal
from relay.wires.http_request import WHOLE
from tests.sockets import PATIENCE, until
from tests.wires.conftest import CHUNKED, SPECS, echo, in_chunks, request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Call
    from tests.wires.conftest import Served

    Serve = Callable[..., Awaitable[Served]]

pytestmark = pytest.mark.timeout(20)


async def call_of(serve: Serve, data: bytes, **settings: object) -> Call:
    """Return the Call that a request became."""
    served = await serve(**settings)
    await served.ask(data)
    (call,) = served.calls
    return call


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("wire", list(SPECS))
async def test_each_method_of_each_wire_has_its_path(serve: Serve, wire: Wire, method: Method) -> None:
    call = await call_of(serve, request(b"abc", wire=wire, method=method))
    assert (call.wire, call.method) == (wire, method)
    assert call.payload.data == b"abc"
    assert call.fault is None


async def test_a_call_knows_who_sent_it_and_when(serve: Serve) -> None:
    before = time.monotonic()
    call = await call_of(serve, request())
    assert call.peer == "127.0.0.1"
    assert before <= call.started <= time.monotonic()


@pytest.mark.parametrize(
    ("proxy", "believed"),
    [
        ({"trusted": ("127.0.0.0/8",), "certificate_header": b"x-forwarded-client-cert"}, True),
        ({"trusted": ("10.0.0.0/8",), "certificate_header": b"x-forwarded-client-cert"}, False),
        ({"trusted": ("127.0.0.0/8",), "certificate_header": b"client-cert"}, False),
        ({"trusted": ("127.0.0.0/8",)}, False),
    ],
    ids=["a proxy", "a stranger", "in another header", "none was set"],
)
async def test_a_certificate_is_taken_from_the_proxy_and_the_header_that_were_set(
    serve: Serve, proxy: dict[str, Any], believed: bool
) -> None:
    header = (b"X-Forwarded-Client-Cert", b'By=proxy;Hash=%b;Subject="CN=node-7"' % (b"ab" * 32))
    call = await call_of(serve, request(headers=[header]), **proxy)
    assert call.certificate == (Certificate("CN=node-7", fingerprint="ab" * 32) if believed else None)
    assert b"x-forwarded-client-cert" not in {name.lower() for name, _ in call.metadata}


async def test_a_trusted_proxy_is_believed_and_anybody_else_is_not(serve: Serve) -> None:
    data = request(
        headers=[(b"X-Forwarded-For", b"192.0.2.1, 198.51.100.7"), (b"X-Forwarded-Proto", b"https")]
    )
    call = await call_of(serve, data, trusted=("127.0.0.0/8",))
    assert call.peer == "198.51.100.7"
    assert (b"x-forwarded-for", b"192.0.2.1, 198.51.100.7, 127.0.0.1") in call.metadata
    assert (b"x-forwarded-proto", b"https") in call.metadata
    call = await call_of(serve, data)
    assert call.peer == "127.0.0.1"
    assert (b"x-forwarded-for", b"127.0.0.1") in call.metadata
    assert (b"x-forwarded-proto", b"http") in call.metadata


@pytest.mark.parametrize(
    "name", [b"Forwarded", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Proto"]
)
@pytest.mark.parametrize("times", [1, 3])
async def test_no_claim_of_a_stranger_reaches_the_upstream(serve: Serve, name: bytes, times: int) -> None:
    call = await call_of(serve, request(headers=[(name, b"evil")] * times))
    assert b"evil" not in b"".join(value for _, value in call.metadata)
    assert [pair[0].lower() for pair in call.metadata].count(name.lower()) == 1


async def test_request_ids_differ_within_and_between_servers(serve: Serve) -> None:
    ids = set()
    for _ in range(3):
        served = await serve()
        node = await served.node()
        for _ in range(5):
            node.send(request())
            ids.add((await node.message()).one(b"x-request-id"))
    assert len(ids) == 15


# -- bodies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, WHOLE])
@pytest.mark.parametrize("split", [False, True], ids=["with the head", "later"])
async def test_a_small_body_is_at_hand_before_the_chain_starts(serve: Serve, size: int, split: bool) -> None:
    replayable = []

    async def handler(call: Call) -> Reply:
        replayable.append(call.payload.replayable)
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    data = request(b"x" * size)
    if split:
        await node.send_all(data[: len(data) - size])
        await asyncio.sleep(0.01)
        await node.send_all(data[len(data) - size :])
    else:
        node.send(data)
    assert (await node.message()).body == b"x" * size
    assert replayable == [True]


@pytest.mark.parametrize("kind", ["long", "chunked"])
async def test_a_long_or_undeclared_body_reaches_the_chain_before_its_end(serve: Serve, kind: str) -> None:
    first: list[bytes] = []
    sizes: list[int | None] = []

    async def handler(call: Call) -> Reply:
        sizes.append(call.payload.size)
        stream = aiter(call.payload.stream())
        first.append(await anext(stream))
        rest = [piece async for piece in stream]
        return Reply(Payload(b"".join([*first, *rest])), Source.LOCAL)

    served = await serve(handler)
    node = await served.node()
    size = WHOLE + 1
    if kind == "long":
        node.send(request(framing=b"Content-Length: %d" % size) + b"x")
    else:
        node.send(request(framing=CHUNKED) + in_chunks(b"x", last=b""))
    await until(lambda: first)
    assert first == [b"x"]
    assert sizes == [size if kind == "long" else None]
    node.send(b"y" * (size - 1) if kind == "long" else in_chunks(b"y" * (size - 1)))
    assert (await node.message()).body == b"x" + b"y" * (size - 1)


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("framing", ["declared", "chunked"])
@pytest.mark.parametrize("limit", [10, WHOLE * 2])
async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(
    serve: Serve, limit: int, framing: str, over: int
) -> None:
    served = await serve(max_body=limit)
    body = b"x" * (limit + over)
    node = await served.node()
    node.send(request(body) if framing == "declared" else request(framing=CHUNKED) + in_chunks(body))
    answer = await node.message()
    if over:
        assert (answer.status, answer.body) == (403, b"too_large")
        assert served.outcomes() == ["too_large"]
    else:
        assert answer.body == body


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("framing", ["declared", "chunked"])
@pytest.mark.parametrize("method", list(Method))
async def test_a_call_that_carries_ids_alone_may_be_no_longer_than_they_need(
    serve: Serve, method: Method, framing: str, over: int
) -> None:
    served = await serve(bodies=bodies())
    most = MAX_REQUEST.get(method.kind)
    body = b"x" * ((most or 200_000) + over)
    node = await served.node()
    framed = framing == "declared"
    node.send(
        request(body, method=method) if framed else request(method=method, framing=CHUNKED) + in_chunks(body)
    )
    await node.message()
    assert served.outcomes() == ["too_large" if most and over else "ok"]


async def test_a_heartbeat_of_4_gib_is_refused_before_it_comes(serve: Serve) -> None:
    served = await serve(bodies=bodies())
    node = await served.node()
    node.send(request(framing=b"Content-Length: %d" % 2**32, method=Method.SEND_NODE_HEARTBEAT))
    answer = await node.message()
    assert (answer.status, answer.body) == (503, b"too_large")
    assert answer.one(b"connection") == b"close"


@pytest.mark.parametrize("framing", ["declared", "small", "chunked"])
async def test_a_body_that_trickles_is_refused_although_it_never_pauses(serve: Serve, framing: str) -> None:
    served = await serve(min_rate=1000, rate_window=0.3)
    size = {"declared": 100_000, "small": 1000}.get(framing)
    node = await served.node()
    node.send(request(framing=CHUNKED if size is None else b"Content-Length: %d" % size))
    started = time.monotonic()
    while not served.ended and not node.writer.is_closing() and time.monotonic() - started < PATIENCE:
        node.send(b"x" if size else in_chunks(b"x", last=b""))
        await asyncio.sleep(0.02)
    assert time.monotonic() - started > 0.25
    await until(lambda: served.ended)
    assert served.outcomes() == ["malformed"]
    assert served.ended[0].ending.refusal is not None
    assert "limits.min_rate" in served.ended[0].ending.refusal.detail


async def test_a_body_may_stall_if_it_makes_up_for_it(serve: Serve) -> None:
    served = await serve(min_rate=10_000, rate_window=1.2)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 100000"))
    for _ in range(5):
        await asyncio.sleep(0.7)  # alone, each would be far too slow
        node.send(b"x" * 20_000)
    assert len((await node.message()).body) == 100_000


async def test_a_body_that_nobody_reads_is_not_slow(serve: Serve) -> None:
    """A slow SuperLink must not be taken for a slow node."""

    async def handler(call: Call) -> Reply:
        total = 0
        async for piece in call.payload.stream():
            total += len(piece)
            await asyncio.sleep(0.1)
        return Reply(Payload(b"%d" % total), Source.LOCAL)

    served = await serve(handler, min_rate=10_000_000, rate_window=0.05)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 1000000") + b"x" * 1_000_000)
    assert (await node.message()).body == b"1000000"


async def test_no_rate_is_asked_for_if_so_wished(serve: Serve) -> None:
    served = await serve(min_rate=0, rate_window=0.01)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 10"))
    for _ in range(10):
        await asyncio.sleep(0.02)
        node.send(b"x")
    assert (await node.message()).body == b"x" * 10


@pytest.mark.parametrize(
    ("host", "sound"),
    [
        (b"relay.example", True),
        (b"relay.example:8080", True),
        (b"[2001:db8::1]:8080", True),
        (b"10.0.0.1", True),
        (b"xn--bcher-kva_1.example", True),
        (b"", True),
        (b"a b", False),
        (b"a, b", False),
        (b"a/b", False),
        (b"user:key@host", False),
        (b"a:b", False),
        (b"a:123456", False),
        (b"[::1", False),
        (b"a\xff", False),
        (b"a?b", False),
        (b"a" * 256, False),
    ],
)
async def test_a_host_must_be_one(serve: Serve, host: bytes, sound: bool) -> None:
    call = await call_of(serve, request(b"abc").replace(b"Host: relay.example", b"Host: " + host))
    assert (call.fault is None) == sound
    assert call.fault is None or call.fault.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    ("version", "chunked", "sound"),
    [
        (b"1.1", False, True),
        (b"1.1", True, True),
        (b"1.0", False, True),
        (b"1.0", True, False),
        (b"0.9", False, False),
        (b"2.0", False, False),
        (b"2.0", True, False),
    ],
)
async def test_a_version_must_be_known_and_have_the_framing(
    serve: Serve, version: bytes, chunked: bool, sound: bool
) -> None:
    served = await serve()
    node = await served.node()
    keep = [(b"Connection", b"keep-alive")]
    framing = CHUNKED if chunked else b"Content-Length: 3"
    body = in_chunks(b"abc") if chunked else b"abc"
    node.send(request(framing=framing, version=version, headers=keep) + body)
    answer = await node.message()
    assert served.outcomes() == ["ok" if sound else "malformed"]
    if not sound:  # who has sent it may see another end of it
        assert answer.one(b"connection") == b"close"
        assert await node.rest() == (b"", "closed")


async def test_nothing_is_read_behind_a_broken_call(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(b"abc", content_type=b"text/html"))
    assert (await node.message()).one(b"connection") == b"close"
    node.send(request(b"smuggled"))
    assert (await node.rest())[0] == b""
    assert len(served.calls) == 1


async def test_no_long_value_of_a_header_goes_to_the_log(serve: Serve) -> None:
    call = await call_of(serve, request(b"abc", content_type=b"x" * 5000))
    assert call.fault is not None
    assert len(call.fault.detail) < 100


async def test_what_breaks_a_body_is_not_told_with_the_bytes_of_it(serve: Serve) -> None:
    served = await serve()
    node = await served.node()
    node.send(request(framing=CHUNKED) + in_chunks(b"abc", last=b""))
    await until(lambda: served.calls)
    node.send(b"SECRET\r\n")
    await until(lambda: served.ended)
    assert served.outcomes() == ["malformed"]
    assert "SECRET" not in str(served.ended[0].ending.refusal)


async def test_a_body_that_is_declared_too_long_is_refused_before_it_comes(serve: Serve) -> None:
    served = await serve(max_body=100)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 101"))
    answer = await node.message()
    assert answer.body == b"too_large"
    assert answer.one(b"connection") == b"close"
    assert isinstance(served.calls[0].fault, Refusal)


@pytest.mark.parametrize("size", [3, 50_000], ids=["small", "largest"])
async def test_a_stalled_small_body_is_refused_by_the_chain_and_not_behind_its_back(
    serve: Serve, size: int
) -> None:
    """So that it is counted and logged like any other call."""
    served = await serve(idle_timeout=0.05)
    node = await served.node()
    node.send(request(framing=b"Content-Length: %d" % size, method=Method.PULL_MESSAGES) + b"x")
    answer = await node.message()
    assert (answer.status, answer.body) == (200, b"")
    assert answer.one(b"connection") == b"close"
    (call,) = served.calls
    assert call.fault is not None
    assert call.fault.reason is Reason.MALFORMED
    assert served.outcomes() == ["malformed"]


async def test_a_body_may_pause_less_than_the_idle_timeout_as_often_as_it_likes(serve: Serve) -> None:
    served = await serve(idle_timeout=1.5)
    node = await served.node()
    node.send(request(framing=CHUNKED))
    for _ in range(6):
        await asyncio.sleep(0.4)
        node.send(in_chunks(b"ab", last=b""))
    node.send(in_chunks())
    assert (await node.message()).body == b"ab" * 6


async def test_what_a_handler_does_not_read_does_not_reach_the_next_call(serve: Serve) -> None:
    async def handler(call: Call) -> Reply:
        if call.method is Method.PUSH_OBJECT:
            return Reply(Payload(b"\x08\x01"), Source.LOCAL)
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    smuggled = request(b"smuggled", method=Method.PULL_OBJECT)
    body = smuggled * (WHOLE // len(smuggled) + 2)
    for data in (request(body), request(framing=CHUNKED) + in_chunks(body)):
        node.send(data + request(b"next", method=Method.PULL_MESSAGES))
        assert (await node.message()).body == b"\x08\x01"
        assert (await node.message()).body == b"next"
    assert [call.method for call in served.calls] == [Method.PUSH_OBJECT, Method.PULL_MESSAGES] * 2


# -- patience -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("wire", list(SPECS))
async def test_a_deadline_comes_a_little_before_the_node_gives_up(
    serve: Serve, wire: Wire, method: Method
) -> None:
    call = await call_of(serve, request(b"abc", wire=wire, method=method))
    patience = SPECS[wire].patience[method.kind is not Kind.HEARTBEAT]
    assert 0.9 * patience <= call.deadline - call.started < patience


async def test_the_patience_of_a_node_begins_when_it_has_sent_its_call(serve: Serve) -> None:
    """A slow line must not use up the time of the SuperLink."""
    left: list[float] = []

    async def handler(call: Call) -> Reply:
        left.append(call.deadline - time.monotonic())
        return await echo(call)

    served = await serve(handler)
    node = await served.node()
    node.send(request(framing=b"Content-Length: 4", method=Method.SEND_NODE_HEARTBEAT))
    for _ in range(4):
        await asyncio.sleep(0.1)
        node.send(b"\x00")
    await node.message()
    patience = SPECS[Wire.HTTP_V1].patience[0]
    assert 0.9 * patience < left[0] < patience
    assert served.calls[0].deadline - served.calls[0].started < patience + PATIENCE
