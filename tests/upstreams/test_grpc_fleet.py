"""A call becomes a gRPC call, its answer a reply or a refusal: upstreams/grpc_fleet.py over loopback."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from relay.call import Payload, Source, Wire
from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from relay.upstreams.channels import Channels, Secured
from relay.upstreams.grpc_fleet import GrpcUpstream
from relay.upstreams.http import Timeouts
from relay.upstreams.http_v1 import PASSES
from tests.certificates import make_pair
from tests.grpc_ends import GrpcSuperLink, server_credentials
from tests.relay_process import free_port
from tests.upstreams.conftest import Endless, body

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from grpc import aio

    from relay.call import Call, Reply
    from tests.grpc_ends import Asked

    MakeCall = Callable[..., Call]
    MakeUpstream = Callable[..., GrpcUpstream]

pytestmark = pytest.mark.timeout(60)

PATIENCE = 20.0
#: What makes sense as an answer to every method.
ANSWER = b"\x08\x01"


@pytest.fixture
async def superlink() -> AsyncIterator[GrpcSuperLink]:
    async with GrpcSuperLink() as superlink:

        async def answer(asked: Asked, _: aio.ServicerContext[bytes, bytes]) -> bytes:
            return ANSWER

        superlink.answer = answer
        yield superlink


@pytest.fixture
async def make_upstream() -> AsyncIterator[MakeUpstream]:
    made: list[Channels] = []

    def make(
        port: int,
        *,
        tls: Secured | None = None,
        host: str = "127.0.0.1",
        max_message: int = 1 << 30,
        timeouts: Timeouts | None = None,
        **more: Any,
    ) -> GrpcUpstream:
        channels = Channels(host, port, tls, connect_timeout=PATIENCE, max_message=max_message, count=2)
        made.append(channels)
        return GrpcUpstream(
            channels,
            timeouts or Timeouts(PATIENCE, PATIENCE),
            **more,
        )

    yield make
    for channels in made:
        await channels.close()


@pytest.fixture
def upstream(make_upstream: MakeUpstream, superlink: GrpcSuperLink) -> GrpcUpstream:
    return make_upstream(superlink.port)


def says(superlink: GrpcSuperLink, code: str, details: str = "", trailing: Any = ()) -> None:
    """Have the SuperLink fail every call with this status."""

    async def answer(_: Asked, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(grpc.StatusCode[code], details, trailing)
        raise AssertionError

    superlink.answer = answer


async def refused(upstream: GrpcUpstream, call: Call) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await upstream(call)
    return caught.value


async def whole(reply: Reply) -> bytes:
    return b"".join([piece async for piece in reply.payload.stream()])


# -- the request ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(Method))
async def test_bytes_pass_as_they_are_under_the_name_of_the_method(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall, method: Method
) -> None:
    reply = await upstream(make_call(method, b"\x00\xffrequest", wire=Wire.GRPC))
    assert (superlink.asked[0].method, superlink.asked[0].data) == (method, b"\x00\xffrequest")
    assert (reply.status, reply.source, reply.payload.data) == (200, Source.UPSTREAM, ANSWER)
    assert reply.metadata == [(b"content-type", b"application/protobuf")]


async def test_metadata_are_the_headers_in_grpcs_words(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    metadata = [
        (b"Host", b"relay"),
        (b"Content-Type", b"application/protobuf"),
        (b"flwr-public-key", b"AGtleQ=="),
        (b"flwr-timestamp", b"now"),
        (b"X-Request-Id", b"id-1"),
        (b"X-Forwarded-For", b"192.0.2.7"),
        (b"broken", b"\xff\x00"),
    ]
    await upstream(make_call(Method.PULL_MESSAGES, b"x", metadata=metadata))
    came = dict(superlink.asked[0].metadata)
    agent = came.pop("user-agent")
    assert str(agent).startswith("grpc-python")
    assert came == {
        "flwr-public-key-bin": b"\x00key",
        "flwr-timestamp": "now",
        "x-request-id": "id-1",
        "x-forwarded-for": "192.0.2.7",
    }


async def test_more_headers_than_grpc_takes_do_not_keep_a_call_from_the_superlink(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    metadata = [(b"x-big-%d" % number, b"a" * 5000) for number in range(5)]
    metadata.append((b"flwr-timestamp", b"now"))
    assert (await upstream(make_call(Method.PULL_MESSAGES, b"x", metadata=metadata))).status == 200
    came = dict(superlink.asked[0].metadata)
    assert came["flwr-timestamp"] == "now"
    assert came.keys() & {"x-big-0", "x-big-1"} == {"x-big-0"}


async def test_metadata_of_the_answer_are_headers_but_for_its_request_id(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    async def answer(_: Asked, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        context.set_trailing_metadata((("first", "1"), ("last-bin", b"\x00"), ("x-request-id", "not ours")))
        return b""

    superlink.answer = answer
    reply = await upstream(make_call(Method.PULL_MESSAGES, wire=Wire.GRPC))
    assert reply.metadata == [
        (b"first", b"1"),
        (b"last-bin", b"AA=="),
        (b"content-type", b"application/protobuf"),
    ]


@pytest.mark.parametrize(
    ("method", "left", "low", "high"),
    [
        (Method.SEND_NODE_HEARTBEAT, 1000.0, 170.0, 205.0),
        (Method.PULL_MESSAGES, 1000.0, 20.0, 55.0),
        (Method.PULL_MESSAGES, 30.0, 5.0, 32.0),
        (Method.PUSH_OBJECT, 1000.0, 90.0, 125.0),
        (Method.PUSH_OBJECT, 30.0, 5.0, 32.0),
    ],
)
async def test_the_superlink_is_told_how_long_it_may_take(
    make_upstream: MakeUpstream,
    superlink: GrpcSuperLink,
    make_call: MakeCall,
    method: Method,
    left: float,
    low: float,
    high: float,
) -> None:
    upstream = make_upstream(superlink.port, timeouts=Timeouts(response=50.0, heartbeat=200.0))
    await upstream(make_call(method, b"x", wire=Wire.GRPC, deadline=time.monotonic() + left))
    seconds = superlink.asked[0].seconds_left
    assert seconds is not None
    assert low < seconds <= high


async def test_a_call_without_time_left_is_not_sent(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    refusal = await refused(upstream, make_call(Method.PULL_MESSAGES, b"x", deadline=time.monotonic()))
    assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_TIMEOUT, False)
    assert not superlink.asked


async def test_a_superlink_that_takes_too_long(
    make_upstream: MakeUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    async def answer(_: Asked, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        await asyncio.sleep(60)
        return b""

    superlink.answer = answer
    upstream = make_upstream(superlink.port, timeouts=Timeouts(response=0.3, heartbeat=0.3))
    refusal = await refused(upstream, make_call(Method.PULL_MESSAGES, b"x"))
    assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_TIMEOUT, True)


async def test_calls_take_turns_on_the_channels(upstream: GrpcUpstream) -> None:
    lent = [upstream.pool.lend(Method.PULL_MESSAGES)[0] for _ in range(4)]
    assert lent[0] is lent[2]
    assert lent[1] is lent[3]
    assert lent[0] is not lent[1]


# -- no answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_OBJECT])
async def test_a_call_that_found_no_connection_was_not_sent(
    make_upstream: MakeUpstream, make_call: MakeCall, method: Method
) -> None:
    upstream = make_upstream(free_port())
    refusal = await refused(upstream, make_call(method, b"x"))
    assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_DOWN, False)
    failure = upstream.pool.state()["last_failure"]
    assert isinstance(failure, str)
    assert "refused" in failure


async def test_a_name_that_is_none_is_no_connection_either(
    make_upstream: MakeUpstream, make_call: MakeCall
) -> None:
    refusal = await refused(make_upstream(1, host="superlink.invalid"), make_call(Method.PULL_MESSAGES, b"x"))
    assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_DOWN, False)


async def test_a_superlink_that_comes_back_is_found(make_upstream: MakeUpstream, make_call: MakeCall) -> None:
    port = free_port()
    upstream = make_upstream(port)
    await refused(upstream, make_call(Method.PULL_MESSAGES, b"x"))
    async with GrpcSuperLink(port=port):
        async with asyncio.timeout(20):
            while True:
                with suppress(Refusal):
                    await upstream(make_call(Method.PULL_MESSAGES, b"x"))
                    break
                await asyncio.sleep(0.05)
        assert upstream.pool.state()["last_failure"] is None
        assert upstream.pool.state()["connections"] in (1, 2)


async def test_a_call_that_the_superlink_had_when_it_went_may_have_been_carried_out(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    came = asyncio.Event()

    async def answer(_: Asked, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        came.set()
        await asyncio.sleep(60)
        return b""

    superlink.answer = answer
    asking = asyncio.ensure_future(refused(upstream, make_call(Method.PULL_MESSAGES, b"x")))
    await came.wait()
    await superlink.stop()
    refusal = await asking
    assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_DOWN, True)


async def test_a_text_that_speaks_of_no_connection_is_not_believed_on_a_connection(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    says(superlink, "UNAVAILABLE", "failed to connect to all addresses; says a proxy")
    refusal = await refused(upstream, make_call(Method.PULL_MESSAGES, b"x"))
    assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_DOWN, True)


# -- statuses -------------------------------------------------------------------------------------------

DOWN, BAD, REJECTED, BUSY = (
    Reason.UPSTREAM_DOWN,
    Reason.UPSTREAM_BAD_ANSWER,
    Reason.UPSTREAM_REJECTED,
    Reason.OVERLOADED,
)


@pytest.mark.parametrize(
    ("code", "status", "control", "objects"),
    [
        ("UNAVAILABLE", 503, DOWN, DOWN),
        ("CANCELLED", 503, DOWN, DOWN),
        ("RESOURCE_EXHAUSTED", 429, BUSY, BUSY),
        ("INTERNAL", 500, BAD, REJECTED),
        ("UNKNOWN", 500, BAD, REJECTED),
        ("NOT_FOUND", 404, BAD, REJECTED),
        ("ABORTED", 409, BAD, REJECTED),
        ("UNIMPLEMENTED", 501, BAD, REJECTED),
        ("INVALID_ARGUMENT", 400, BAD, REJECTED),
    ],
)
@pytest.mark.parametrize("wire", [Wire.GRPC, Wire.GRPC_ADAPTER, Wire.HTTP_V1])
async def test_a_status_that_would_end_a_node_is_a_refusal(
    upstream: GrpcUpstream,
    superlink: GrpcSuperLink,
    make_call: MakeCall,
    wire: Wire,
    code: str,
    status: int,
    control: Reason,
    objects: Reason,
) -> None:
    says(superlink, code, "why")
    for method in (Method.PULL_MESSAGES, Method.SEND_NODE_HEARTBEAT, Method.PUSH_OBJECT, Method.GET_RUN):
        refusal = await refused(upstream, make_call(method, b"x", wire=wire))
        expected = objects if method.kind in (Kind.PUSH, Kind.FETCH) else control
        assert (refusal.reason, refusal.status, refusal.sent) == (expected, status, True)
        assert code in refusal.detail


@pytest.mark.parametrize(
    ("code", "status"), [("UNAUTHENTICATED", 401), ("PERMISSION_DENIED", 403), ("FAILED_PRECONDITION", 412)]
)
@pytest.mark.parametrize("method", list(Method))
async def test_a_status_that_a_node_understands_is_passed_on_with_its_text(
    upstream: GrpcUpstream,
    superlink: GrpcSuperLink,
    make_call: MakeCall,
    code: str,
    status: int,
    method: Method,
) -> None:
    says(superlink, code, '{"code":2004}', (("x", "1"),))
    call = make_call(method, b"x", wire=Wire.GRPC)
    if method.kind not in PASSES[status]:
        assert (await refused(upstream, call)).status == status
        return
    reply = await upstream(call)
    assert (reply.status, reply.payload.data) == (status, b'{"code":2004}')
    assert reply.metadata == [(b"x", b"1"), (b"content-type", b"application/json")]


@pytest.mark.parametrize(
    ("code", "method"),
    [
        ("PERMISSION_DENIED", Method.PULL_MESSAGES),
        ("UNAUTHENTICATED", Method.SEND_NODE_HEARTBEAT),
        ("PERMISSION_DENIED", Method.CONFIRM_MESSAGE_RECEIVED),
    ],
)
async def test_a_node_behind_the_adapter_is_spared_what_it_would_die_of(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall, code: str, method: Method
) -> None:
    says(superlink, code)
    await refused(upstream, make_call(method, b"x", wire=Wire.GRPC_ADAPTER))


async def test_what_a_superlink_says_of_itself_is_not_logged(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    says(superlink, "INTERNAL", "secret")
    assert "secret" not in str(await refused(upstream, make_call(Method.PULL_MESSAGES, b"x")))


async def test_in_pass_through_any_status_is_a_reply(
    make_upstream: MakeUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    says(superlink, "INTERNAL", "why")
    reply = await make_upstream(superlink.port, judging=False)(make_call(Method.PULL_MESSAGES, b"x"))
    assert (reply.status, reply.payload.data) == (500, b"why")


@pytest.mark.parametrize("data", [b"\xff\xff", b"<html>"])
async def test_garbage_does_not_reach_a_node(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall, data: bytes
) -> None:
    async def answer(_: Asked, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        return data

    superlink.answer = answer
    refusal = await refused(upstream, make_call(Method.PULL_MESSAGES, b"x", wire=Wire.GRPC))
    assert (refusal.reason, refusal.status) == (Reason.UPSTREAM_BAD_ANSWER, 200)


# -- long messages --------------------------------------------------------------------------------------


async def test_an_http_nodes_upload_is_gathered(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    await upstream(make_call(Method.PUSH_OBJECT, body(b"abc", b"def", b"", size=6)))
    assert superlink.asked[0].data == b"abcdef"


async def test_an_upload_that_breaks_off_is_not_sent(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    broken = body(b"abc", Refusal(Reason.MALFORMED, "broke off"), size=6)
    await refused(upstream, make_call(Method.PUSH_OBJECT, broken))
    assert not superlink.asked


@pytest.mark.parametrize("method", [Method.PULL_OBJECT, Method.GET_FAB])
@pytest.mark.parametrize("wire", [Wire.HTTP_V1, Wire.GRPC])
async def test_a_long_object_goes_to_its_node_in_pieces(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall, wire: Wire, method: Method
) -> None:
    long = b"x" * 1_000_000

    async def answer(asked: Asked, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        return long

    superlink.answer = answer
    reply = await upstream(make_call(method, b"x", wire=wire))
    assert (reply.payload.data is None) is (method is Method.PULL_OBJECT)
    assert reply.payload.size == len(long)
    assert await whole(reply) == long
    reply.payload.close()


async def test_a_short_object_is_at_hand(
    upstream: GrpcUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    assert (await upstream(make_call(Method.PULL_OBJECT, b"x"))).payload.data == ANSWER


async def test_an_answer_over_the_limit_is_too_large(
    make_upstream: MakeUpstream, superlink: GrpcSuperLink, make_call: MakeCall
) -> None:
    async def answer(_: Asked, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        return b"x" * 100_001

    superlink.answer = answer
    upstream = make_upstream(superlink.port, max_message=100_000)
    refusal = await refused(upstream, make_call(Method.PULL_OBJECT, b"x", wire=Wire.GRPC))
    assert refusal.reason is Reason.TOO_LARGE


async def test_an_upload_without_an_end_ends(
    make_upstream: MakeUpstream,
    superlink: GrpcSuperLink,
    make_call: MakeCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("relay.upstreams.grpc_fleet.MOST_BYTES", 10_000_000)
    call = make_call(Method.PUSH_OBJECT, Payload(body=Endless(b"x" * 65536)))
    refusal = await refused(make_upstream(superlink.port), call)
    assert refusal.reason is Reason.TOO_LARGE


# -- TLS ------------------------------------------------------------------------------------------------


async def test_tls_checks_the_superlink(
    make_upstream: MakeUpstream, make_call: MakeCall, tmp_path: Path
) -> None:
    certificate, key = make_pair(tmp_path)
    other, _ = make_pair(tmp_path, "other")
    async with GrpcSuperLink(credentials=server_credentials(certificate, key)) as superlink:
        known = make_upstream(superlink.port, tls=Secured(certificate.read_bytes()), host="localhost")
        assert (await known(make_call(Method.PULL_MESSAGES, b"x"))).status == 200
        unknown = make_upstream(superlink.port, tls=Secured(other.read_bytes()), host="localhost")
        refusal = await refused(unknown, make_call(Method.PULL_MESSAGES, b"x"))
        assert (refusal.reason, refusal.sent) == (Reason.UPSTREAM_DOWN, False)


async def test_other_authorities_are_in_force_with_the_next_call_and_cut_none(
    make_upstream: MakeUpstream, make_call: MakeCall, tmp_path: Path
) -> None:
    certificate, key = make_pair(tmp_path)
    other, _ = make_pair(tmp_path, "other")
    came, go = asyncio.Event(), asyncio.Event()

    async def answer(asked: Asked, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        if asked.method is Method.GET_RUN:
            came.set()
            await go.wait()
        return ANSWER

    async with GrpcSuperLink(credentials=server_credentials(certificate, key)) as superlink:
        superlink.answer = answer
        known = Secured(certificate.read_bytes())
        upstream = make_upstream(superlink.port, tls=known, host="localhost")
        under_way = asyncio.ensure_future(upstream(make_call(Method.GET_RUN, b"x")))
        await came.wait()
        upstream.pool.take_up(Secured(other.read_bytes()))
        assert (await refused(upstream, make_call(Method.PULL_MESSAGES, b"x"))).reason is Reason.UPSTREAM_DOWN
        upstream.pool.take_up(known)
        assert (await upstream(make_call(Method.PULL_MESSAGES, b"x"))).status == 200
        go.set()
        assert (await under_way).status == 200
