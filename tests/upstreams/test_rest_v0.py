"""A SuperLink of REST v0: where it is asked, and that none of its error statuses reaches a node."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.fleet import Kind, Method
from relay.refusal import Reason, Refusal
from relay.upstreams import rest_v0
from relay.upstreams.http import Timeouts
from relay.wireformat import encode_bytes
from tests.sockets import PATIENCE, chunked, response

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Call
    from relay.upstreams.pool import Pool
    from tests.sockets import Listener

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("method", list(Method))
async def test_a_good_answer_reaches_the_node(
    make_pool: Callable[..., Pool], upstream: Listener, make_call: Callable[..., Call], method: Method
) -> None:
    handler = rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    task = asyncio.ensure_future(handler(make_call(method, b"ask")))
    peer = await upstream.accept()
    request = await peer.message()
    assert request.start == f"POST /api/v0/fleet/{method.path} HTTP/1.1".encode()
    assert request.body == b"ask"
    peer.send(response(b"\x08\x01"))
    reply = await task
    assert (reply.status, reply.payload.data) == (200, b"\x08\x01")


@pytest.mark.parametrize(
    "status", [b"401 Unauthorized", b"403 Forbidden", b"412 Precondition Failed", b"404 Not Found"]
)
@pytest.mark.parametrize("method", list(Method))
async def test_no_other_status_reaches_the_node(
    make_pool: Callable[..., Pool],
    upstream: Listener,
    make_call: Callable[..., Call],
    method: Method,
    status: bytes,
) -> None:
    handler = rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    serving = asyncio.ensure_future(upstream.serve(response(b"x", status=status)))
    with pytest.raises(Refusal) as caught:
        await handler(make_call(method))
    of_a_message = method.kind in (Kind.FETCH, Kind.PUSH, Kind.CONFIRM)
    assert caught.value.reason is (Reason.UPSTREAM_REJECTED if of_a_message else Reason.UPSTREAM_BAD_ANSWER)
    await serving


async def test_an_object_that_breaks_off_is_a_refusal_and_never_half_an_answer(
    make_pool: Callable[..., Pool], upstream: Listener, make_call: Callable[..., Call]
) -> None:
    handler = rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    size = 5 * 1024 * 1024
    task = asyncio.ensure_future(handler(make_call(Method.PULL_OBJECT, b"ask")))
    peer = await upstream.accept()
    await peer.message()
    peer.send(response(b"\x08\x01" + b"x" * 1000, size=size))
    await asyncio.sleep(0.05)
    assert not task.done()
    await peer.close()
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert handler._awaited == 0


@pytest.mark.parametrize("sized", [True, False])
async def test_an_object_is_awaited_for_as_long_as_it_comes(
    make_pool: Callable[..., Pool], upstream: Listener, make_call: Callable[..., Call], *, sized: bool
) -> None:
    """Its node waits without limit, and survives neither half of it nor a status."""
    handler = rest_v0.upstream(make_pool(idle_timeout=1.5), Timeouts(1.5, 1.5))
    task = asyncio.ensure_future(handler(make_call(Method.PULL_OBJECT, b"ask")))
    peer = await upstream.accept()
    await peer.message()
    content = encode_bytes(3, b"x" * 300_000)
    parts = [content[:100_000], content[100_000:200_000], content[200_000:]]
    peer.send(response(size=len(content)) if sized else chunked(last=b""))
    for part in parts:
        peer.send(part if sized else b"%x\r\n%b\r\n" % (len(part), part))
        await asyncio.sleep(0.6)  # each is in time, the whole is not
        assert task.done() == (sized and part is parts[-1])
    if not sized:
        peer.send(b"0\r\n\r\n")
    assert (await task).payload.data == content


@pytest.mark.parametrize("ending", ["silence", "cut"])
@pytest.mark.parametrize("sized", [True, False])
async def test_an_object_that_stops_is_a_refusal_whatever_its_framing(
    make_pool: Callable[..., Pool],
    upstream: Listener,
    make_call: Callable[..., Call],
    ending: str,
    *,
    sized: bool,
) -> None:
    idle_timeout = PATIENCE if ending == "cut" else 0.1
    handler = rest_v0.upstream(make_pool(idle_timeout=idle_timeout), Timeouts(PATIENCE, PATIENCE))
    task = asyncio.ensure_future(handler(make_call(Method.PULL_OBJECT, b"ask")))
    peer = await upstream.accept()
    await peer.message()
    half = b"x" * 100_000
    peer.send(response(half, size=200_000) if sized else chunked(half, last=b""))
    if ending == "cut":
        await asyncio.sleep(0.02)
        await peer.close()
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is (Reason.UPSTREAM_DOWN if ending == "cut" else Reason.UPSTREAM_TIMEOUT)
    assert handler._awaited == 0


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.SEND_NODE_HEARTBEAT, Method.GET_RUN])
async def test_chunks_that_break_off_never_reach_the_node(
    make_pool: Callable[..., Pool], upstream: Listener, make_call: Callable[..., Call], method: Method
) -> None:
    handler = rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    task = asyncio.ensure_future(handler(make_call(method, b"ask")))
    peer = await upstream.accept()
    await peer.message()
    peer.send(chunked(b"\x0a\x02\x0a\x00", last=b""))
    await asyncio.sleep(0.02)
    await peer.close()
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.UPSTREAM_DOWN


async def test_what_is_awaited_whole_is_bounded(
    make_pool: Callable[..., Pool],
    upstream: Listener,
    make_call: Callable[..., Call],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("relay.upstreams.http.AWAITED", 100_000)
    handler = rest_v0.upstream(make_pool(), Timeouts(PATIENCE, PATIENCE))
    task = asyncio.ensure_future(handler(make_call(Method.PULL_OBJECT, b"ask")))
    peer = await upstream.accept()
    await peer.message()
    peer.send(response(b"\x08\x01", size=100_001))
    reply = await task
    assert reply.payload.data is None
    reply.payload.close()
