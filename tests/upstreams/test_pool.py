"""The pool of connections to an upstream: reuse, retirement, queue, and what cancellation leaves behind."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from relay.call import Payload
from relay.refusal import Reason, Refusal
from relay.tls import client_context
from tests.certificates import make_pair
from tests.sockets import PATIENCE, Listener, Peer, response, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relay.upstreams.connection import Connection
    from relay.upstreams.pool import Pool

    MakePool = Callable[..., Pool]

EMPTY = b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n"

pytestmark = pytest.mark.timeout(20)


async def ask(pool: Pool) -> bytes:
    """Carry one exchange through the pool."""
    connection = await pool.acquire()
    await connection.exchange(EMPTY, Payload(), PATIENCE)
    pieces = []
    while piece := await connection.read():
        pieces.append(piece)
    return b"".join(pieces)


async def answer_for_ever(listener: Listener, answer: bytes, delay: float = 0.0) -> None:
    """Answer every request of every connection."""

    async def part(peer: Peer) -> None:
        while True:
            await peer.message()
            await asyncio.sleep(delay)
            await peer.send_all(answer)

    await listener.play(part)


def opened(pool: Pool) -> int:
    return pool.state()["connections"]  # type: ignore[return-value]


# -- lending and taking back ----------------------------------------------------------------------------


async def test_calls_one_after_the_other_use_one_connection(make_pool: MakePool, upstream: Listener) -> None:
    pool = make_pool()
    serving = asyncio.ensure_future(upstream.serve(*[response(b"x")] * 5))
    for _ in range(5):
        assert await ask(pool) == b"x"
    await serving
    assert len(upstream.peers) == 1
    assert opened(pool) == 1


async def test_the_connection_used_last_is_lent_first(make_pool: MakePool, upstream: Listener) -> None:
    """So that the others grow old and are retired when there is less to do."""
    pool = make_pool()
    first, second = await pool.acquire(), await pool.acquire()
    serving = [asyncio.ensure_future(upstream.serve(response(), response())) for _ in range(2)]
    await first.exchange(EMPTY, Payload(), PATIENCE)
    await second.exchange(EMPTY, Payload(), PATIENCE)
    second.take()
    first.take()
    assert await pool.acquire() is first
    assert await pool.acquire() is second
    for task in serving:
        task.cancel()


async def test_parallel_calls_have_a_connection_each(make_pool: MakePool, upstream: Listener) -> None:
    pool = make_pool()
    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x"), delay=0.01))
    assert await asyncio.gather(*(ask(pool) for _ in range(8))) == [b"x"] * 8
    assert len(upstream.peers) == 8
    assert await asyncio.gather(*(ask(pool) for _ in range(8))) == [b"x"] * 8
    assert len(upstream.peers) == 8
    serving.cancel()


async def test_an_idle_connection_is_retired_with_a_fin_before_the_upstream_would(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(keepalive=0.2)
    serving = asyncio.ensure_future(upstream.serve(response()))
    await ask(pool)
    await serving
    started = asyncio.get_running_loop().time()
    assert await upstream.peers[0].rest() == (b"", "closed")
    assert asyncio.get_running_loop().time() - started > 0.15
    await until(lambda: opened(pool) == 0)
    assert pool._sweeper is None or not pool._idle


async def test_use_keeps_a_connection_alive(make_pool: MakePool, upstream: Listener) -> None:
    pool = make_pool(keepalive=1.5)
    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x")))
    for _ in range(6):
        await ask(pool)
        await asyncio.sleep(0.4)
    assert len(upstream.peers) == 1
    serving.cancel()


async def test_only_the_connections_that_are_not_needed_are_retired(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(keepalive=1.5)
    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x"), delay=0.01))
    await asyncio.gather(*(ask(pool) for _ in range(4)))
    assert opened(pool) == 4
    for _ in range(6):
        await asyncio.sleep(0.4)
        await ask(pool)
    assert opened(pool) == 1
    assert len(upstream.peers) == 4
    serving.cancel()


async def test_an_aged_connection_is_not_lent_even_if_nobody_swept_it_yet(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(keepalive=10.0)
    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x")))
    await ask(pool)
    pool._idle[0].idle_since -= 10.0
    await ask(pool)
    assert len(upstream.peers) == 2
    await until(lambda: opened(pool) == 1)
    serving.cancel()


@pytest.mark.parametrize("how", ["close", "reset", "garbage"])
async def test_a_connection_that_the_upstream_ended_is_not_lent(
    make_pool: MakePool, upstream: Listener, how: str
) -> None:
    pool = make_pool()
    serving = asyncio.ensure_future(upstream.serve(response(b"x")))
    await ask(pool)
    await serving
    peer = upstream.peers[0]
    if how == "close":
        await peer.close()
    elif how == "reset":
        peer.reset()
    else:
        peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    await until(lambda: opened(pool) == 0)
    serving = asyncio.ensure_future(upstream.serve(response(b"y")))
    assert await ask(pool) == b"y"
    await serving


# -- opening --------------------------------------------------------------------------------------------


async def test_a_refused_connection_is_an_upstream_that_is_down_and_recovers(
    make_pool: MakePool, upstream: Listener
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    pool = make_pool(port=port)
    with pytest.raises(Refusal) as caught:
        await pool.acquire()
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert not caught.value.sent
    assert caught.value.by == f"127.0.0.1:{port}"
    state = pool.state()
    assert state["connections"] == 0
    assert "connect" in str(state["last_failure"]).lower()
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
    connection = await pool.acquire()
    assert pool.state()["last_failure"] is None
    connection.abort()
    server.close()


async def test_a_name_that_does_not_resolve_is_an_upstream_that_is_down(make_pool: MakePool) -> None:
    pool = make_pool(host="no-such-host.invalid")
    with pytest.raises(Refusal) as caught:
        await pool.acquire()
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert opened(pool) == 0


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".invalid"], ids=["empty-label", "long-label"])
async def test_a_name_that_is_none_is_an_upstream_that_is_down(make_pool: MakePool, host: str) -> None:
    pool = make_pool(host=host)
    with pytest.raises(Refusal) as caught:
        await pool.acquire()
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert opened(pool) == 0


async def test_a_handshake_that_does_not_end_is_given_up_in_time(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(tls=ssl.create_default_context(), connect_timeout=0.1)
    started = asyncio.get_running_loop().time()
    with pytest.raises(Refusal) as caught:
        await pool.acquire()
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert asyncio.get_running_loop().time() - started < PATIENCE - 1
    assert opened(pool) == 0
    peer = await upstream.accept()
    await peer.rest()  # nothing stays open behind it


def serving_context(directory: Path, name: str, host: str = "localhost") -> tuple[ssl.SSLContext, Path]:
    """Return the context of a server with a certificate of its own, and the file that trusts it."""
    certificate, key = make_pair(directory, name, host=host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


async def test_tls_is_spoken_to_an_upstream_whose_certificate_is_trusted(
    make_pool: MakePool, tmp_path: Path
) -> None:
    server, trusted = serving_context(tmp_path, "sl")
    async with Listener(tls=server) as listener:
        pool = make_pool(host="localhost", port=listener.port, tls=client_context(trusted))
        serving = asyncio.ensure_future(listener.serve(*[response(b"x" * 100_000)] * 2))
        for _ in range(2):
            assert await ask(pool) == b"x" * 100_000
        await serving
        assert opened(pool) == 1
        peer = listener.peers[0].writer
        assert peer.get_extra_info("ssl_object").selected_alpn_protocol() in (None, "http/1.1")
        await pool.close()


@pytest.mark.parametrize("fault", ["authority", "host", "plain", "closed", "reset"])
async def test_an_upstream_whose_tls_is_wrong_is_down(
    make_pool: MakePool, tmp_path: Path, fault: str
) -> None:
    server, trusted = serving_context(tmp_path, "sl", "example.org" if fault == "host" else "localhost")
    if fault == "authority":
        _, trusted = serving_context(tmp_path, "other")
    plain = fault in ("plain", "closed", "reset")
    async with Listener(tls=None if plain else server) as listener:
        pool = make_pool(host="localhost", port=listener.port, tls=client_context(trusted))
        opening = asyncio.ensure_future(pool.acquire())
        if plain:
            peer = await listener.accept()
            if fault == "plain":
                peer.send(response(b"no tls here"))
            elif fault == "closed":
                await peer.close()
            else:
                peer.reset()
        with pytest.raises(Refusal) as caught:
            await opening
        assert caught.value.reason is Reason.UPSTREAM_DOWN
        assert not caught.value.sent
        assert opened(pool) == 0


# -- the queue ------------------------------------------------------------------------------------------


async def test_calls_over_the_limit_are_told_so_in_time(make_pool: MakePool, upstream: Listener) -> None:
    pool = make_pool(max_connections=2, queue_timeout=0.05)
    lent = [await pool.acquire() for _ in range(2)]
    started = asyncio.get_running_loop().time()
    refusals = await asyncio.gather(*(pool.acquire() for _ in range(5)), return_exceptions=True)
    assert 0.04 < asyncio.get_running_loop().time() - started < PATIENCE - 1
    for refusal in refusals:
        assert isinstance(refusal, Refusal)
        assert refusal.reason is Reason.OVERLOADED
        assert not refusal.sent
    assert opened(pool) == 2
    assert not pool._queue
    for connection in lent:
        connection.abort()
    await until(lambda: opened(pool) == 0)


async def test_a_queue_that_nobody_serves_does_not_grow(make_pool: MakePool, upstream: Listener) -> None:
    pool = make_pool(max_connections=1, queue_timeout=0.001)
    await pool.acquire()
    for _ in range(50):
        with pytest.raises(Refusal):
            await pool.acquire()
    assert not pool._queue


async def test_waiting_calls_are_served_in_the_order_in_which_they_came(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1)
    served: list[int] = []

    async def one(number: int) -> None:
        await ask(pool)
        served.append(number)

    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x"), delay=0.002))
    await asyncio.gather(*(one(number) for number in range(20)))
    assert served == list(range(20))
    assert len(upstream.peers) == 1
    serving.cancel()


async def test_a_lost_connection_makes_room_for_the_call_that_waits_longest(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1)
    connection = await pool.acquire()
    order: list[str] = []

    async def wait(name: str) -> Connection:
        given = await pool.acquire()
        order.append(name)
        return given

    first = asyncio.ensure_future(wait("first"))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(wait("second"))
    await asyncio.sleep(0)
    connection.abort()
    (await first).abort()
    (await second).abort()
    assert order == ["first", "second"]
    await until(lambda: opened(pool) == 0)


async def test_a_newcomer_does_not_take_the_place_of_a_call_that_waits(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1)
    await pool.acquire()
    order: list[str] = []

    async def wait(name: str) -> None:
        connection = await pool.acquire()
        order.append(name)
        connection.abort()

    waiting = asyncio.ensure_future(wait("waiting"))
    await asyncio.sleep(0)
    (held,) = pool._connections
    newcomers: list[asyncio.Task[None]] = []
    lost = held._on_lost

    def lost_and_newcomer(connection: Connection) -> None:
        lost(connection)  # the waiting call is told, and runs in the loop's next turn
        newcomers.append(asyncio.get_running_loop().create_task(pool_first()))

    async def pool_first() -> None:
        await wait("newcomer")

    held._on_lost = lost_and_newcomer
    # the newcomer's task is made in the same turn of the loop, and another one before that
    early = asyncio.get_running_loop().create_task(asyncio.sleep(0))
    held.abort()
    await waiting
    await early
    await asyncio.gather(*newcomers)
    assert order == ["waiting", "newcomer"]


async def test_a_call_that_comes_while_a_place_is_handed_over_waits_its_turn(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1, queue_timeout=0.2)
    await pool.acquire()
    waiting = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    (held,) = pool._connections
    pool._lost(held)  # hands the place over; `waiting` has not run yet
    held._on_lost = lambda _: None
    with pytest.raises(Refusal):
        await pool.acquire()  # runs before `waiting` does, and must not find the place free
    (await waiting).abort()
    held.abort()
    await until(lambda: opened(pool) == 0)


async def test_no_more_connections_than_allowed_are_ever_open(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=3)
    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x")))
    most = 0

    async def one() -> None:
        nonlocal most
        await ask(pool)
        most = max(most, len([peer for peer in upstream.peers if not peer.reader.at_eof()]))

    await asyncio.gather(*(one() for _ in range(100)))
    assert most == 3
    assert len(upstream.peers) == 3
    serving.cancel()


# -- cancellation ---------------------------------------------------------------------------------------


async def settled(pool: Pool) -> None:
    """Check that the books of a pool balance, and that nothing but idle connections is left."""
    await until(lambda: opened(pool) == len(pool._connections) == len(pool._idle))
    assert not pool._queue


@pytest.mark.parametrize("transport", ["plain", "tls"])
async def test_a_call_cancelled_at_any_step_leaves_no_connection_and_no_count(
    make_pool: MakePool, tmp_path: Path, transport: str
) -> None:
    """Step means: turn of the event loop, so every await in acquire, dial, handshake, exchange and read."""
    tls = transport == "tls"
    server, trusted = serving_context(tmp_path, "sl")
    async with Listener(tls=server if tls else None) as listener:
        context = client_context(trusted) if tls else None
        serving = asyncio.ensure_future(answer_for_ever(listener, response(b"x" * 1000)))
        finished = 0
        for steps in range(200):
            pool = make_pool(host="localhost", port=listener.port, tls=context)
            call = asyncio.ensure_future(ask(pool))
            for _ in range(steps):
                await asyncio.sleep(0)
            if call.done():
                finished += 1
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await settled(pool)
            await pool.close()
            await until(lambda pool=pool: opened(pool) == 0)  # type: ignore[misc]
            if finished > 3:
                break
        assert finished > 3  # the steps went past the end of a call
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_a_waiting_call_cancelled_at_any_step_passes_its_turn_on(
    make_pool: MakePool, upstream: Listener
) -> None:
    serving = asyncio.ensure_future(answer_for_ever(upstream, response(b"x")))
    for steps in range(40):
        pool = make_pool(max_connections=1)
        first = asyncio.ensure_future(ask(pool))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(ask(pool))
        third = asyncio.ensure_future(ask(pool))
        for _ in range(steps):
            await asyncio.sleep(0)
        second.cancel()
        assert await first == b"x"
        assert await third == b"x"
        await asyncio.gather(second, return_exceptions=True)
        await settled(pool)
        await pool.close()
        await until(lambda pool=pool: opened(pool) == 0)  # type: ignore[misc]
    serving.cancel()


async def test_a_waiting_call_cancelled_as_its_place_is_handed_over_passes_it_on(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1)
    held = await pool.acquire()
    second = asyncio.ensure_future(pool.acquire())
    third = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    lost = held._on_lost

    def lost_and_cancel(connection: Connection) -> None:
        lost(connection)
        second.cancel()  # told, but has not run

    held._on_lost = lost_and_cancel
    held.abort()
    (await third).abort()
    with pytest.raises(asyncio.CancelledError):
        await second
    await until(lambda: opened(pool) == 0)


async def test_a_waiting_call_cancelled_as_a_connection_is_handed_over_passes_it_on(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1)
    held = await pool.acquire()
    serving = asyncio.ensure_future(upstream.serve(response()))
    second = asyncio.ensure_future(pool.acquire())
    third = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    await held.exchange(EMPTY, Payload(), PATIENCE)
    held.take()
    second.cancel()
    assert await third is held
    with pytest.raises(asyncio.CancelledError):
        await second
    await serving
    held.abort()
    await until(lambda: opened(pool) == 0)


async def test_a_connection_that_dies_as_it_is_handed_over_is_replaced(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool(max_connections=1)
    held = await pool.acquire()
    serving = asyncio.ensure_future(upstream.serve(response()))
    second = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    await held.exchange(EMPTY, Payload(), PATIENCE)
    held.take()
    held.abort()
    given = await second
    assert given is not held
    assert given.usable
    await serving
    given.abort()
    await until(lambda: opened(pool) == 0)


async def test_calls_cancelled_at_random_leave_the_books_balanced(
    make_pool: MakePool, upstream: Listener
) -> None:
    rng = random.Random(1)
    pool = make_pool(max_connections=4, queue_timeout=0.02, keepalive=0.05)
    answer = response(b"x" * 200)

    async def moody(peer: Peer) -> None:
        while True:
            await peer.message()
            mood = rng.random()
            if mood < 0.1:
                return peer.reset()
            if mood < 0.2:
                return await peer.close()
            if mood < 0.3:
                peer.send(answer[:100])
                return await peer.close()
            await asyncio.sleep(rng.random() * 0.004)
            await peer.send_all(answer + (b"unasked" if mood > 0.95 else b""))

    serving = asyncio.ensure_future(upstream.play(moody))
    outcomes: dict[str, int] = {}

    async def one() -> None:
        call = asyncio.ensure_future(ask(pool))
        if rng.random() < 0.5:
            asyncio.get_running_loop().call_later(rng.random() * 0.01, call.cancel)
        try:
            assert await call == b"x" * 200
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
        except Refusal as refusal:
            outcome = refusal.reason.value
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    async def some() -> None:
        for _ in range(40):
            await one()

    await asyncio.gather(*(some() for _ in range(25)))
    assert sum(outcomes.values()) == 1000
    # On a busy machine most calls find no place in time; some of each must have been.
    assert outcomes["ok"] > 20
    assert outcomes["cancelled"] > 20
    assert outcomes["upstream_down"] > 3
    assert set(outcomes) <= {"ok", "cancelled", "upstream_down", "overloaded"}
    await settled(pool)
    await until(lambda: opened(pool) == 0)  # idle ones are retired
    serving.cancel()


async def test_after_a_renewal_no_connection_of_before_is_lent(
    make_pool: MakePool, upstream: Listener
) -> None:
    """It leads to where the SuperLink was, or shows a certificate that has ended."""
    pool = make_pool()
    serving = asyncio.ensure_future(upstream.serve(response(b"idle")))
    assert await ask(pool) == b"idle"
    await serving
    (idle,) = upstream.peers
    pool.renew()
    assert await idle.rest() == (b"", "closed")
    call = asyncio.ensure_future(ask(pool))
    lent = await upstream.accept()
    await lent.message()
    pool.renew()
    lent.send(response(b"lent"))
    assert await call == b"lent", "a call that is under way ends as it would have"
    assert await lent.rest() == (b"", "closed")
    assert len(upstream.peers) == 2
    await until(lambda: opened(pool) == 0)


# -- closing --------------------------------------------------------------------------------------------


async def test_a_closed_pool_retires_its_idle_connections_and_stops_its_clock(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool()
    serving = asyncio.ensure_future(upstream.serve(response()))
    await ask(pool)
    await serving
    await pool.close()
    assert await upstream.peers[0].rest() == (b"", "closed")
    await until(lambda: opened(pool) == 0)
    assert pool._sweeper is None or pool._sweeper.cancelled()


async def test_a_closed_pool_lets_a_call_end_and_retires_its_connection(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool()
    call = asyncio.ensure_future(ask(pool))
    peer = await upstream.accept()
    await peer.message()
    await pool.close()
    peer.send(response(b"last"))
    assert await call == b"last"
    assert await peer.rest() == (b"", "closed")
    await until(lambda: opened(pool) == 0)


async def test_a_pool_closed_while_it_dials_keeps_nothing_open_afterwards(
    make_pool: MakePool, upstream: Listener
) -> None:
    pool = make_pool()
    call = asyncio.ensure_future(ask(pool))
    await asyncio.sleep(0)
    await pool.close()
    peer = await upstream.accept()
    await peer.message()
    peer.send(response(b"x"))
    assert await call == b"x"
    await until(lambda: opened(pool) == 0)
