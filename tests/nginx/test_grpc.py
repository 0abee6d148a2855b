"""nginx before gRPC listeners: what it answers by itself is UNAVAILABLE, and it loses and repeats no call."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio
import pytest

from relay import dialect
from relay.call import Wire
from relay.fleet import Method
from relay.refusal import Reason
from tests.nginx.edge import PULL, request
from tests.relay_process import free_port
from tests.sockets import Listener, connect, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.nginx.edge import Edge

    StartEdge = Callable[..., Edge]
    Answer = Callable[["Relay", bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]

FLEET = "/flwr.proto.Fleet/"
MIB = 1024 * 1024
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
METHODS = [*Method, None]


def path_of(method: Method | None) -> str:
    return FLEET + (method.rpc if method else "OfTomorrow")


async def echo(relay: Relay, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return data


class Relay(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A gRPC server of bytes.

    Attributes:
        port: where it listens.
        seen: path, body and metadata of each call that came.
    """

    def __init__(self, answer: Answer, port: int = 0) -> None:
        self.seen: list[tuple[str, bytes, dict[str, Any]]] = []
        self._answer = answer
        self._server = grpc.aio.server(handlers=[self], options=UNLIMITED)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        path = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata)

        async def handle(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self.seen.append((path, data, metadata))
            return await self._answer(self, data, context)

        return grpc.unary_unary_rpc_method_handler(handle)

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(0)

    async def stop(self, grace: float) -> None:
        """Accept nothing more, and let calls in flight go on for so long."""
        await self._server.stop(grace)


class Node:
    """A client as nodes have one."""

    def __init__(self, edge: Edge, *, tls: bool = False) -> None:
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        if tls:
            roots = grpc.ssl_channel_credentials(edge.certificates.chain.read_bytes())
            address = f"localhost:{edge.grpc_tls_port}"
            self.channel = grpc.aio.secure_channel(address, roots, options=options)
        else:
            self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{edge.grpc_port}", options=options)

    async def ask(
        self, path: str, data: bytes = b"", *, timeout: float = 20, metadata: Any = None
    ) -> tuple[grpc.StatusCode, bytes]:
        """Return how the call ended."""
        call = self.channel.unary_unary(path)
        try:
            return grpc.StatusCode.OK, await call(data, timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code(), (error.details() or "").encode()


@asynccontextmanager
async def node(edge: Edge, *, tls: bool = False) -> AsyncIterator[Node]:
    made = Node(edge, tls=tls)
    try:
        yield made
    finally:
        await made.channel.close()


UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, b"come back later")
each_transport = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


# -- calls that go well -----------------------------------------------------------------------------


@each_transport
async def test_a_call_passes_as_it_is(start_edge: StartEdge, tls: bool) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        sent = (
            ("flwr-public-key-bin", bytes(range(256))),
            ("flwr-timestamp", "now"),
            ("x-request-id", "id-7"),
        )
        async with node(edge, tls=tls) as asking:
            for path in (path_of(Method.PULL_OBJECT), "/flwr.proto.GrpcAdapter/SendReceive"):
                assert await asking.ask(path, b"\x00\x01", metadata=sent) == (grpc.StatusCode.OK, b"\x00\x01")
        for _, _, got in relay.seen:
            assert got["flwr-public-key-bin"] == bytes(range(256))
            assert got["flwr-timestamp"] == "now"
            assert got["x-request-id"] == "id-7"
            assert got["x-forwarded-for"] == "127.0.0.1"
            assert got["x-forwarded-proto"] == ("https" if tls else "http")
        assert edge.errors() == ""


async def test_what_a_node_says_of_itself_is_not_believed(start_edge: StartEdge) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        async with node(edge) as asking:
            await asking.ask(
                FLEET + "GetRun", metadata=(("x-forwarded-for", "6.6.6.6"), ("forwarded", "for=6"))
            )
        _, _, got = relay.seen[0]
        assert (got["x-forwarded-for"], got["forwarded"]) == ("127.0.0.1", "for=127.0.0.1;proto=http")


@each_transport
async def test_a_large_message_passes_both_ways(start_edge: StartEdge, tls: bool) -> None:
    data = bytes(range(256)) * (16 * MIB // 256)
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        async with node(edge, tls=tls) as asking:
            assert await asking.ask(path_of(Method.PUSH_OBJECT), data) == (grpc.StatusCode.OK, data)
        assert edge.spooled() == []
        assert edge.errors() == ""


CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
async def test_what_the_relay_says_passes_as_it_is(start_edge: StartEdge, code: grpc.StatusCode) -> None:
    async def refuse(relay: Relay, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(code, "the relay's words")
        return b""

    async with Relay(refuse) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        async with node(edge) as asking:
            assert await asking.ask(path_of(Method.PULL_MESSAGES)) == (code, b"the relay's words")


async def test_a_held_poll_is_waited_for(start_edge: StartEdge) -> None:
    go = asyncio.Event()

    async def hold(relay: Relay, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await go.wait()
        return b"at last"

    async with Relay(hold) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        async with node(edge) as asking:
            asked = asyncio.create_task(asking.ask(path_of(Method.PULL_MESSAGES)))
            await until(lambda: relay.seen)
            await asyncio.to_thread(edge.reload)
            go.set()
            assert await asked == (grpc.StatusCode.OK, b"at last")


# -- answers of nginx's own -------------------------------------------------------------------------


@each_transport
async def test_no_relay_is_there(start_edge: StartEdge, tls: bool) -> None:
    edge = start_edge(free_port(), grpc=(free_port(), free_port()))
    async with node(edge, tls=tls) as asking:
        for method in METHODS:
            assert await asking.ask(path_of(method), b"x" * 1000) == UNAVAILABLE


@pytest.mark.parametrize("how", ["closes", "resets", "garbage"])
async def test_a_relay_that_is_none_or_dies_before_it_answers(start_edge: StartEdge, how: str) -> None:
    asked = 0
    async with Listener() as listener:

        async def play() -> None:
            nonlocal asked
            while True:
                peer = await listener.accept()
                await peer.reader.read(1)
                asked += 1
                if how == "garbage":
                    peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                if how == "resets":
                    peer.reset()
                else:
                    await peer.close()

        playing = asyncio.create_task(play())
        edge = start_edge(free_port(), grpc=(listener.port,))
        async with node(edge) as asking:
            for method in METHODS:
                assert await asking.ask(path_of(method)) == UNAVAILABLE
        assert asked == len(METHODS)
        playing.cancel()


async def test_a_call_that_was_sent_goes_to_no_other_relay(start_edge: StartEdge) -> None:
    """pull-messages hands a message out once."""
    async with Relay(echo) as other, Listener() as listener:
        edge = start_edge(free_port(), grpc=(listener.port, other.port))
        dropped = 0

        async def play() -> None:
            nonlocal dropped
            while True:
                peer = await listener.accept()
                await peer.reader.read(1)
                dropped += 1
                peer.reset()

        playing = asyncio.create_task(play())
        async with node(edge) as asking:
            ended = Counter([(await asking.ask(path_of(Method.PULL_MESSAGES)))[0] for _ in range(20)])
        playing.cancel()
        assert ended == {grpc.StatusCode.OK: len(other.seen), grpc.StatusCode.UNAVAILABLE: dropped}
        assert len(other.seen) + dropped == 20
        assert dropped


async def test_a_call_that_could_not_be_sent_goes_to_another_relay(start_edge: StartEdge) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(free_port(), relay.port))
        async with node(edge) as asking:
            for _ in range(10):
                assert await asking.ask(path_of(Method.PULL_MESSAGES), b"x") == (grpc.StatusCode.OK, b"x")


async def test_a_relay_that_takes_too_long(start_edge: StartEdge) -> None:
    async def never(relay: Relay, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await asyncio.sleep(60)
        return b""

    async with Relay(never) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,), grpc_server="grpc_read_timeout 300ms;")
        async with node(edge) as asking:
            assert await asking.ask(path_of(Method.PULL_MESSAGES)) == UNAVAILABLE
        assert len(relay.seen) == 1


MADE = (400, 405, 411, 414, 421, 429, 494, 495, 496, 497, 500, 501, 502, 503, 504, 505, 507)


@pytest.mark.parametrize("code", MADE)
async def test_every_error_of_nginx_is_one_that_a_node_survives(start_edge: StartEdge, code: int) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,), grpc_server=f"if ($uri) {{ return {code}; }}")
        async with node(edge) as asking:
            for method in METHODS:
                assert await asking.ask(path_of(method), b"x" * 100) == UNAVAILABLE
        assert relay.seen == []


async def test_a_limit_is_answered_so_that_a_node_survives_it(start_edge: StartEdge) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(
            free_port(),
            grpc=(relay.port,),
            http="limit_req_zone $binary_remote_addr zone=few:1m rate=1r/m;",
            grpc_server="limit_req zone=few burst=2 nodelay; limit_req_status 503;",
        )
        async with node(edge) as asking:
            ended = [await asking.ask(path_of(Method.PULL_MESSAGES)) for _ in range(6)]
        assert ended == [(grpc.StatusCode.OK, b"")] * 3 + [UNAVAILABLE] * 3


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.rpc if method else "unknown")
async def test_a_message_over_a_limit_of_the_operators(start_edge: StartEdge, method: Method | None) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,), grpc_server="client_max_body_size 1k;")
        async with node(edge) as asking:
            code, _ = await asking.ask(path_of(method), b"x" * 5000)
        assert relay.seen == []
        told = dialect.answer(Wire.GRPC, Reason.TOO_LARGE, method)
        # Nothing but a status can be made by nginx; where the relay would say "nothing", the node comes back.
        wanted = told.code if isinstance(told, dialect.Abort) else "UNAVAILABLE"
        assert code.name == wanted


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.rpc if method else "unknown")
async def test_what_nginx_says_is_what_the_relay_would_say(
    start_edge: StartEdge, method: Method | None
) -> None:
    told = dialect.answer(Wire.GRPC, Reason.OVERLOADED, method)
    assert told in (dialect.Abort("UNAVAILABLE"), dialect.Empty())


@pytest.mark.parametrize(
    "path", ["/flwr.proto.Control/ListRuns", "/grpc.health.v1.Health/Check", "/docs", "/"]
)
async def test_nothing_but_the_fleet_api_is_reached(start_edge: StartEdge, path: str) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        async with node(edge) as asking:
            code, _ = await asking.ask(path)
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert relay.seen == []


async def test_a_node_of_another_wire_on_the_port(start_edge: StartEdge) -> None:
    """It gets no answer in HTTP/1.1 that could end it: a close, which HTTP nodes retry."""
    edge = start_edge(free_port(), grpc=(free_port(),))
    peer = await connect(edge.grpc_port)
    edge.peers.append(peer)
    peer.send(request(PULL))
    got, _ = await peer.rest()
    assert b"HTTP/1" not in got


@asynccontextmanager
async def cutting(port: int, after: int) -> AsyncIterator[int]:
    """Give the port of a way to `port` that is reset once so many bytes have come back from there."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection("127.0.0.1", port)

        async def forward() -> None:
            while data := await reader.read(65536):
                ahead.write(data)

        forwarding = asyncio.create_task(forward())
        left = after
        while left > 0 and (data := await behind.read(left)):
            writer.write(data)
            await writer.drain()
            left -= len(data)
        await asyncio.sleep(0.05)  # so that nginx has read it
        forwarding.cancel()
        ahead.transport.abort()
        writer.transport.abort()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(("after", "code"), [(20, "UNAVAILABLE"), (60, "UNAVAILABLE"), (2 * MIB, "INTERNAL")])
async def test_an_answer_that_breaks_off(start_edge: StartEdge, after: int, code: str) -> None:
    """Once nginx has passed the head on, it can only reset the stream, and that reads as INTERNAL.

    A node gives up the object that it was fetching. What is polled for comes with its head, in one piece.
    """
    async with Relay(echo) as relay, cutting(relay.port, after) as port:
        edge = start_edge(free_port(), grpc=(port,))
        async with node(edge) as asking:
            got, _ = await asking.ask(path_of(Method.PULL_OBJECT), bytes(4 * MIB))
        assert got.name == code


async def test_the_one_error_of_nginx_that_a_node_does_not_survive(start_edge: StartEdge) -> None:
    """408, after a body that stalled for `client_body_timeout`: nginx resets the stream."""
    edge = start_edge(free_port(), grpc=(free_port(),), grpc_server="if ($uri) { return 408; }")
    async with node(edge) as asking:
        code, _ = await asking.ask(path_of(Method.PUSH_OBJECT))
    assert code is grpc.StatusCode.INTERNAL


# -- restarts ---------------------------------------------------------------------------------------


@each_transport
async def test_a_relay_that_comes_back_is_used_at_once(start_edge: StartEdge, tls: bool) -> None:
    port = free_port()
    edge = start_edge(free_port(), grpc=(port,))
    async with node(edge, tls=tls) as asking:
        for _ in range(2):
            async with Relay(echo, port):
                assert await asking.ask(path_of(Method.PULL_MESSAGES), b"x") == (grpc.StatusCode.OK, b"x")
            assert await asking.ask(path_of(Method.PULL_MESSAGES), b"x") == UNAVAILABLE


async def test_relays_that_drain_in_turn_lose_no_call(start_edge: StartEdge) -> None:
    first, second = free_port(), free_port()
    relays = [await Relay(echo, first).__aenter__(), await Relay(echo, second).__aenter__()]
    edge = start_edge(free_port(), grpc=(first, second))
    ended: Counter[grpc.StatusCode] = Counter()
    stop = asyncio.Event()
    seen = 0

    async def polls(asking: Node) -> None:
        while not stop.is_set():
            ended[(await asking.ask(path_of(Method.PULL_MESSAGES), b"x"))[0]] += 1

    async with node(edge) as one, node(edge) as two:
        polling = asyncio.gather(*(polls(asking) for asking in (one, two) for _ in range(4)))
        for turn in range(4):
            await asyncio.sleep(0.3)
            old = relays[turn % 2]
            await old.stop(5)
            seen += len(old.seen)
            relays[turn % 2] = await Relay(echo, old.port).__aenter__()
        await asyncio.sleep(0.3)
        stop.set()
        await polling
    seen += sum(len(relay.seen) for relay in relays)
    for relay in relays:
        await relay.stop(0)
    # Every call that a relay has seen was answered. grpc's own server cancels what it has read and not begun
    # when it is stopped, also without nginx; and a call that nginx puts on a connection that is closing was
    # not passed on: the node sends it again.
    assert ended.pop(grpc.StatusCode.CANCELLED, 0) < 50
    assert ended.pop(grpc.StatusCode.UNAVAILABLE, 0) < 20
    assert ended == {grpc.StatusCode.OK: seen}
    assert seen > 200


@each_transport
async def test_reloads_of_nginx_lose_no_call(start_edge: StartEdge, tls: bool) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        ended: Counter[tuple[grpc.StatusCode, bytes]] = Counter()
        stop = asyncio.Event()

        async def polls(asking: Node) -> None:
            while not stop.is_set():
                ended[await asking.ask(path_of(Method.PULL_MESSAGES), b"x")] += 1

        async with node(edge, tls=tls) as one, node(edge, tls=tls) as two:
            polling = asyncio.gather(*(polls(asking) for asking in (one, two) for _ in range(3)))
            for _ in range(4):
                await asyncio.sleep(0.2)
                await asyncio.to_thread(edge.reload)
            stop.set()
            await polling
        assert ended.pop((grpc.StatusCode.OK, b"x")) == len(relay.seen) > 100
        # A call that meets a connection which is closing was not passed on, and the node sends it again.
        assert {code for code, _ in ended} <= {grpc.StatusCode.UNAVAILABLE}


async def test_a_stop_of_nginx_is_survived(start_edge: StartEdge) -> None:
    async with Relay(echo) as relay:
        edge = start_edge(free_port(), grpc=(relay.port,))
        async with node(edge) as asking:
            assert (await asking.ask(path_of(Method.PULL_MESSAGES)))[0] is grpc.StatusCode.OK
            edge.process.send_signal(signal.SIGQUIT)
            await asyncio.to_thread(edge.process.wait)
            assert (await asking.ask(path_of(Method.PULL_MESSAGES)))[0] is grpc.StatusCode.UNAVAILABLE
