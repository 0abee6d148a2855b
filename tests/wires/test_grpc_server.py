"""A gRPC listener as a worker has it: how many connections it takes, their end, and TLS."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography import x509
from grpc import aio

from drills.http2 import GOAWAY, PING, PREFACE, RST_STREAM, SETTINGS, message
from drills.http2 import call as call_of
from relay import dialect
from relay.authority import Authority
from relay.call import Ending, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.limits import Limits
from relay.quota import Quota
from relay.refusal import Reason
from relay.settings import Tls
from relay.tls_files import ListenerTls
from relay.wires import http2_connection
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_fleet import GrpcFront
from relay.wires.grpc_health import SERVING
from relay.wires.grpc_request import Receiver
from relay.wires.grpc_server import GrpcServer
from tests.certificates import make_crl, make_pair
from tests.grpc_ends import OPTIONS, GrpcNode
from tests.security import http2
from tests.sockets import until
from tests.tls_clients import GARBAGE, RawClient, ending, trusting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from relay.call import Call
    from relay.pipeline import Handler

pytestmark = pytest.mark.timeout(60)

REQUEST = b"\x0a\x02\x08\x07"
#: In which a drain is over when no call is under way: each client has a second to hear that it is to leave.
SOON = 4.0


class Slow:
    """A handler that answers when it is told to.

    Attributes:
        came, go: that a call is here, and that it may be answered.
        calls: so far.
        endings: of those that are over.
    """

    def __init__(self, *, go: bool = False) -> None:
        self.came = asyncio.Event()
        self.go = asyncio.Event()
        self.calls: list[Call] = []
        self.endings: list[Ending] = []
        if go:
            self.go.set()

    async def __call__(self, call: Call) -> Reply:
        self.calls.append(call)
        call.on_end(lambda _, ending: self.endings.append(ending))
        if call.fault is not None:
            raise call.fault
        self.came.set()
        await self.go.wait()
        return Reply(Payload(b"answer"), Source.UPSTREAM)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def serve(
    stack: AsyncExitStack,
    handler: Handler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    age: float = 30.0,
    keepalive: float = 75.0,
    files: ListenerTls | None = None,
    idle_timeout: float = 20.0,
    trusted: bool = False,
    **limits: Any,
) -> GrpcServer:
    proxies = Forwarding([ipaddress.ip_network("127.0.0.0/8")] if trusted else [])
    front = GrpcFront(
        {(wire, method): handler for wire in (Wire.GRPC, Wire.GRPC_ADAPTER) for method in Method},
        Receiver(proxies, Limits(dict.fromkeys(Method, 1 << 20), **limits), idle_timeout),
        Quota(1 << 30),
        idle_timeout=idle_timeout,
        on_stray=lambda _: None,
    )
    server = GrpcServer(front, host, port, keepalive=keepalive, age=age, files=files)
    await server.start()
    stack.push_async_callback(server.drain, 0.0)
    return server


async def node_of(stack: AsyncExitStack, server: GrpcServer, **options: Any) -> GrpcNode:
    return await stack.enter_async_context(GrpcNode(server.port, **options))


async def ticking(server: GrpcServer, condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for it, while the server sees to its connections more often than a worker has it do so."""
    async with asyncio.timeout(seconds):
        while not condition():
            server.tick()
            await asyncio.sleep(0.02)


# -- how many -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_OBJECT, Method.SEND_NODE_HEARTBEAT])
@pytest.mark.parametrize("limit", ["connections", "connections_per_peer"])
async def test_calls_on_one_connection_too_many_are_told_to_come_back(
    stack: AsyncExitStack, limit: str, method: Method
) -> None:
    limits: dict[str, Any] = {limit: 2}
    server = await serve(stack, Slow(go=True), **limits)
    first, second, third, fourth = [await node_of(stack, server) for _ in range(4)]
    for node in (first, second):
        assert (await node.ask(method, REQUEST)).data == b"answer"
    told = dialect.answer(Wire.GRPC, Reason.OVERLOADED, method)
    answered = await third.ask(method, REQUEST)
    assert answered.code == (told.code if isinstance(told, dialect.Abort) else "OK")
    assert answered.data == b""
    assert (await first.ask(method, REQUEST)).data == b"answer", "still served"
    await second.channel.close()
    await until(lambda: len(server.connections) == 2)
    await third.channel.close()
    await until(lambda: len(server.connections) == 1)
    assert (await fourth.ask(method, REQUEST)).data == b"answer"


async def test_the_place_of_a_connection_too_many_is_soon_free(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2_connection, "TO_HEAR", 0.05)
    server = await serve(stack, Slow(go=True), connections=1)
    first, second = [await node_of(stack, server) for _ in range(2)]
    assert (await first.ask(Method.GET_RUN, REQUEST)).code == "OK"
    assert (await second.ask(Method.GET_RUN, REQUEST)).code == "UNAVAILABLE"
    await ticking(server, lambda: len(server.connections) == 1, 5.0)
    assert (await first.ask(Method.GET_RUN, REQUEST)).code == "OK"


async def test_far_too_many_connections_are_reset_at_once(stack: AsyncExitStack) -> None:
    server = await serve(stack, Slow(go=True), connections=3)
    with ExitStack() as sockets:
        nodes = [
            sockets.enter_context(socket.create_connection(("127.0.0.1", server.port), 5)) for _ in range(10)
        ]
        await until(lambda: len(server.connections) == 6)
        assert [await asyncio.to_thread(ending, node) for node in nodes[6:]] == [(b"", "reset")] * 4
        nodes[0].sendall(PREFACE + call_of(Method.PULL_MESSAGES, REQUEST))
        came = b""
        while message(b"answer") not in came:
            came += await asyncio.to_thread(nodes[0].recv, 4096)


async def test_behind_a_trusted_proxy_the_calls_in_flight_of_each_node_count(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler, connections_per_peer=2, trusted=True)
    proxies = [await node_of(stack, server) for _ in range(2)]

    def ask(proxy: int, address: str) -> asyncio.Task[Any]:
        metadata: list[tuple[str, str | bytes]] = [("x-forwarded-for", address)]
        return asyncio.ensure_future(proxies[proxy].ask(Method.PUSH_OBJECT, REQUEST, metadata))

    asking = [ask(0, "192.0.2.1"), ask(1, "192.0.2.1")]
    await until(lambda: len(handler.calls) == 2)
    assert (await ask(0, "192.0.2.1")).details == "overloaded"
    asking.append(ask(1, "192.0.2.2"))
    await until(lambda: len(handler.calls) == 4)
    handler.go.set()
    assert {answered.data for answered in await asyncio.gather(*asking)} == {b"answer"}
    assert (await ask(0, "192.0.2.1")).data == b"answer"
    assert server.front.peers is not None
    await until(lambda: not server.front.peers._held)  # type: ignore[union-attr]


# -- connections that end before the listener does ------------------------------------------------------


async def test_idle_connections_are_told_to_close(stack: AsyncExitStack) -> None:
    server = await serve(stack, Slow(go=True), keepalive=0.3)
    node = await node_of(stack, server)
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    (before,) = server.connections
    await ticking(server, lambda: not server.connections)
    assert before.streams == {}
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"  # it opens another


async def test_a_connection_with_a_call_is_not_idle(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler, keepalive=0.2)
    node = await node_of(stack, server)
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, REQUEST))
    await handler.came.wait()
    (before,) = server.connections
    end = time.monotonic() + 1.0
    await ticking(server, lambda: time.monotonic() > end)
    assert server.connections == {before}
    handler.go.set()
    assert (await asking).data == b"answer"
    await ticking(server, lambda: not server.connections)


async def test_connections_that_are_old_enough_are_left_without_the_loss_of_a_call(
    stack: AsyncExitStack,
) -> None:
    server = await serve(stack, Slow(go=True), age=0.2)
    nodes = [await node_of(stack, server) for _ in range(4)]
    seen: set[object] = set()
    codes: set[str] = set()
    end = time.monotonic() + 3.0

    async def ask(node: GrpcNode) -> None:
        while time.monotonic() < end:
            codes.add((await node.ask(Method.PUSH_OBJECT, REQUEST)).code)

    asking = asyncio.gather(*map(ask, nodes))

    def look() -> bool:
        seen.update(server.connections)
        return asking.done()

    await ticking(server, look)
    await asking
    assert codes == {"OK"}
    assert len(seen) > 3 * len(nodes)


async def test_who_watches_leaves_as_others_do(stack: AsyncExitStack) -> None:
    server = await serve(stack, Slow(), age=0.5)
    node = await node_of(stack, server)
    watching = node.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
    assert await watching.read() == SERVING
    assert len(server.connections) == 1
    ended = asyncio.ensure_future(watching.read())
    await ticking(server, lambda: ended.done() and not server.connections)
    assert await ended is aio.EOF


# -- the end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::"])
async def test_a_drain_loses_no_call_and_takes_no_new_one(stack: AsyncExitStack, host: str) -> None:
    handler = Slow()
    server = await serve(stack, handler, host=host)
    node, late = await node_of(stack, server), await node_of(stack, server)
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    drained = asyncio.ensure_future(server.drain(20.0))
    await asyncio.sleep(0.1)
    assert (await late.ask(Method.PULL_MESSAGES)).code == "UNAVAILABLE"
    await asyncio.sleep(1.5)
    assert not drained.done(), "its connection was told to leave, and its call goes on"
    handler.go.set()
    assert (await asking).data == b"answer"
    async with asyncio.timeout(SOON):
        await drained
    assert [ending.outcome for ending in handler.endings] == ["ok"]


async def test_a_drain_loses_no_call_of_nodes_that_never_pause(stack: AsyncExitStack) -> None:
    """They are told in the middle of it, and go on with another worker."""
    first = await serve(stack, Slow(go=True))
    nodes = [await node_of(stack, first) for _ in range(8)]
    for node in nodes:
        assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    second = await serve(stack, Slow(go=True), port=first.port)
    answers: list[str] = []

    async def ask(node: GrpcNode) -> None:
        while not over.is_set():
            answers.append((await node.ask(Method.PUSH_OBJECT, b"x" * 100_000)).code)

    over = asyncio.Event()
    asking = asyncio.gather(*map(ask, nodes))
    await asyncio.sleep(0.2)
    before = len(answers)
    async with asyncio.timeout(SOON):
        await first.drain(1000.0)
    await asyncio.sleep(0.2)
    over.set()
    await asking
    assert set(answers) == {"OK"}
    assert len(answers) > before > 0
    assert len(second.connections) == len(nodes)


async def test_a_drain_loses_no_long_answer(stack: AsyncExitStack) -> None:
    """Not even one that its node takes slowly, after the last call of its connection."""

    async def answer(call: Call) -> Reply:
        return Reply(Payload(b"x" * 3_000_000), Source.UPSTREAM)

    server = await serve(stack, answer)
    node = await node_of(stack, server)
    asking = [asyncio.ensure_future(node.ask(Method.PULL_OBJECT, REQUEST)) for _ in range(10)]
    await until(lambda: server.front.in_flight)
    async with asyncio.timeout(SOON):
        await server.drain(1000.0)
    assert {len(answered.data) for answered in await asyncio.gather(*asking)} == {3_000_000}


async def test_a_drain_ends_soon_when_nothing_is_under_way(stack: AsyncExitStack) -> None:
    """With idle nodes, one that says nothing, one that says nothing of a call, and one that watches."""
    server = await serve(stack, Slow(go=True))
    nodes = [await node_of(stack, server) for _ in range(4)]
    for node in nodes:
        assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    with ExitStack() as sockets:
        silent = sockets.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        sockets.enter_context(http2.Connection(server.port))
        watching = sockets.enter_context(http2.Connection(server.port))
        watching.call("/grpc.health.v1.Health/Watch", body=message(b""))
        await until(lambda: len(server.connections) == 7)
        async with asyncio.timeout(SOON):
            await server.drain(1000.0)
        assert not server.connections
        silent.settimeout(5)
        while await asyncio.to_thread(silent.recv, 4096):
            pass  # its greeting


async def test_nodes_that_hear_that_they_are_to_leave_are_waited_for_no_longer(
    stack: AsyncExitStack,
) -> None:
    server = await serve(stack, Slow(go=True))
    node = await node_of(stack, server)
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    async with asyncio.timeout(0.9):  # less than for one that does not answer
        await server.drain(1000.0)


async def test_a_client_is_told_to_leave_twice_so_that_no_call_on_its_way_is_lost(
    stack: AsyncExitStack,
) -> None:
    """First without a last call, and when it has answered a ping with the last one that was here."""
    handler = Slow()
    server = await serve(stack, handler)
    with http2.Connection(server.port) as node:
        node.call(Method.PUSH_OBJECT.grpc, (), message(REQUEST))
        await handler.came.wait()
        drained = asyncio.ensure_future(server.drain(20.0))
        late = node.call(Method.PUSH_OBJECT.grpc, (), message(REQUEST))  # it has not heard of it
        await until(lambda: len(handler.calls) == 2)
        handler.go.set()
        frames = await asyncio.to_thread(node.read, 99)
        told = [frame.payload for frame in frames if frame.head.kind == GOAWAY]
        assert [int.from_bytes(each[:4], "big") for each in told] == [(1 << 31) - 1, late]
        assert {each[4:] for each in told} == {bytes(4)}, "no fault, which a node might not survive"
        assert [frame.head.kind for frame in frames].count(PING) == 2  # and one behind the last answer
        assert sum(frame.payload == message(b"answer") for frame in frames) == 2
        assert not any(frame.head.kind == RST_STREAM for frame in frames)
    await drained


async def test_a_drain_waits_for_a_message_no_longer_than_it_may_stall(stack: AsyncExitStack) -> None:
    async def read(call: Call) -> Reply:
        return Reply(Payload(await call.payload.peek(1)), Source.UPSTREAM)

    server = await serve(stack, read, idle_timeout=1.0)
    with http2.Connection(server.port) as waiting:
        waiting.call(Method.PULL_MESSAGES.grpc, end=False)
        await until(lambda: server.front.in_flight == 1)
        started = time.monotonic()
        async with asyncio.timeout(SOON):
            await server.drain(1000.0)
        assert time.monotonic() - started > 0.7
    assert server.front.in_flight == 0


async def test_a_drain_cuts_what_does_not_end(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler)
    node = await node_of(stack, server)
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    await server.drain(0.3)
    assert (await asking).code == "UNAVAILABLE"
    assert [ending.outcome for ending in handler.endings] == ["cancelled"]
    assert server.front.in_flight == 0
    assert not server.connections


async def test_a_drain_waits_for_calls_however_old_their_connection_is(stack: AsyncExitStack) -> None:
    handler = Slow()
    server = await serve(stack, handler, age=0.3)
    node = await node_of(stack, server)
    asking = asyncio.ensure_future(node.ask(Method.PUSH_OBJECT, b"x"))
    await handler.came.wait()
    drained = asyncio.ensure_future(server.drain(1000.0))
    await asyncio.sleep(3.5)
    assert not drained.done()
    handler.go.set()
    assert (await asking).data == b"answer"
    async with asyncio.timeout(SOON):
        await drained


@pytest.mark.parametrize("turns", range(6))
async def test_a_drain_waits_for_what_was_accepted_in_its_last_turn(
    stack: AsyncExitStack, turns: int
) -> None:
    handler = Slow(go=True)
    server = await serve(stack, handler)
    with http2.Connection(server.port) as node:
        stream = node.call(Method.PULL_MESSAGES.grpc, (), message(REQUEST))
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(SOON):
            await server.drain(1000.0)
        ended = len(handler.endings)
        await asyncio.sleep(0.05)
        assert not server.connections
        assert len(handler.endings) == ended, "nothing goes on behind its back"
        frames = await asyncio.to_thread(node.read, stream, 1.0)
        assert any(frame.payload == message(b"answer") for frame in frames) is bool(handler.calls)


async def test_an_end_leaves_nothing_behind(stack: AsyncExitStack) -> None:
    server = await serve(stack, Slow(go=True))
    node = await node_of(stack, server)
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    await server.drain(5.0)
    await node.channel.close()
    tasks = {task for task in asyncio.all_tasks() if "GrpcFront" in repr(task) or "Health" in repr(task)}
    assert not tasks
    assert not server.connections


# -- the port -------------------------------------------------------------------------------------------


async def test_workers_share_a_port(stack: AsyncExitStack) -> None:
    first = await serve(stack, Slow(go=True))
    second = await serve(stack, Slow(go=True), port=first.port)
    assert second.port == first.port
    for _ in range(40):
        node = await node_of(stack, first)
        assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    assert first.connections
    assert second.connections


async def test_a_port_of_another_program_is_not_shared(stack: AsyncExitStack) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            await serve(stack, Slow(), port=other.getsockname()[1])


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", GARBAGE, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rx"],
    ids=["http_1", "garbage", "nearly"],
)
async def test_who_speaks_something_else_is_reset_without_a_word(stack: AsyncExitStack, said: bytes) -> None:
    server = await serve(stack, Slow(go=True))
    with socket.create_connection(("127.0.0.1", server.port), 5) as other:
        await until(lambda: server.connections)
        other.sendall(said)
        data, end = await asyncio.to_thread(ending, other)
    assert end == "reset"
    assert data[3:4] in (b"", bytes([SETTINGS])), "its greeting, and nothing that speaks of an answer"
    node = await node_of(stack, server)
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"


@pytest.mark.parametrize("tls", [False, True])
async def test_who_says_nothing_is_ended(stack: AsyncExitStack, tmp_path: Path, tls: bool) -> None:
    files = listener_files(make_pair(tmp_path)) if tls else None
    server = await serve(stack, Slow(go=True), head_timeout=0.3, files=files)
    if tls:
        client = RawClient(server.port, trusting(tmp_path / "relay.pem"))
        await asyncio.to_thread(client.finish)
        silent = client.socket
    else:
        silent = socket.create_connection(("127.0.0.1", server.port), 5)
    with silent:
        await until(lambda: server.connections)
        await ticking(server, lambda: not server.connections, 5.0)


@pytest.mark.parametrize(
    "path", [b"\xff", b"/flwr.proto.Fleet/\xc1\xff", b"/flwr.proto.Fleet/PullMessages\x80"]
)
async def test_a_path_that_is_no_text_ends_nothing(stack: AsyncExitStack, path: bytes) -> None:
    handler = Slow(go=True)
    server = await serve(stack, handler)
    node = await node_of(stack, server)
    assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    with http2.Connection(server.port) as stranger:
        for _ in range(3):
            number = stranger.call(path, (), message(b""))
            frames = await asyncio.to_thread(stranger.read, number)
            assert frames[-1].head.ends
            assert frames[-1].head.kind != RST_STREAM
            assert (await node.ask(Method.PULL_MESSAGES)).code == "OK"
    assert len(handler.calls) == 4


# -- TLS: more in tests/test_tls*.py --------------------------------------------------------------------


def listener_files(*pairs: tuple[Path, Path], **more: Any) -> ListenerTls:
    certificates = [{"certificate": pair[0], "key": pair[1]} for pair in pairs]
    section = Tls.model_validate({**certificates[0], "certificates": certificates[1:], **more})
    return ListenerTls("here:1", section, protocol="h2")


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


async def greeted(port: int, name: str = "localhost", offered: tuple[str, ...] = ("h2",)) -> tuple[int, str]:
    """Return the serial number of the certificate that a client gets, and the protocol that is chosen."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(list(offered))
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    session = writer.get_extra_info("ssl_object")
    der = session.getpeercert(True)
    writer.transport.abort()
    await asyncio.sleep(0)
    return x509.load_der_x509_certificate(der).serial_number, session.selected_alpn_protocol()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_a_node_gets_through_with_each_version(
    stack: AsyncExitStack, tmp_path: Path, version: str
) -> None:
    certificate, key = make_pair(tmp_path)
    files = listener_files((certificate, key), minimum_version=version)
    if version == "1.2":
        files.context.current.maximum_version = ssl.TLSVersion.TLSv1_2
    server = await serve(stack, Slow(go=True), files=files)
    node = await node_of(stack, server, roots=certificate.read_bytes(), host="localhost")
    for size in (0, 10, 700_000):
        assert (await node.ask(Method.PUSH_OBJECT, b"x" * size)).data == b"answer"
    (connection,) = server.connections
    session = connection.transport.get_extra_info("ssl_object")
    assert session.version() == f"TLSv{version}"
    assert connection.tls


async def test_long_answers_are_encrypted_whole(stack: AsyncExitStack, tmp_path: Path) -> None:
    async def answer(call: Call) -> Reply:
        return Reply(Payload(b"0123456789" * 500_000), Source.UPSTREAM)

    certificate, key = make_pair(tmp_path)
    server = await serve(stack, answer, files=listener_files((certificate, key)))
    node = await node_of(stack, server, roots=certificate.read_bytes(), host="localhost")
    asking = [node.ask(Method.PULL_OBJECT, REQUEST) for _ in range(5)]
    assert {answered.data for answered in await asyncio.gather(*asking)} == {b"0123456789" * 500_000}


async def test_http_2_is_what_is_spoken(stack: AsyncExitStack, tmp_path: Path) -> None:
    server = await serve(stack, Slow(), files=listener_files(make_pair(tmp_path)))
    assert (await greeted(server.port, offered=("http/1.1", "h2")))[1] == "h2"


async def test_who_does_not_encrypt_gets_nothing(stack: AsyncExitStack, tmp_path: Path) -> None:
    server = await serve(stack, Slow(go=True), files=listener_files(make_pair(tmp_path)))
    plain = await node_of(stack, server)
    assert (await plain.ask(Method.PULL_MESSAGES, timeout=2.0)).code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    with socket.create_connection(("127.0.0.1", server.port), 5) as other:
        other.sendall(PREFACE)
        assert await asyncio.to_thread(ending, other) == (b"", "reset")


async def test_the_certificate_is_the_one_for_the_name(stack: AsyncExitStack, tmp_path: Path) -> None:
    first = make_pair(tmp_path, "first", host="a.example")
    second = make_pair(tmp_path, "second", host="b.example")
    server = await serve(stack, Slow(go=True), files=listener_files(first, second))
    assert await greeted(server.port, "a.example") == (serial(first[0]), "h2")
    assert await greeted(server.port, "b.example") == (serial(second[0]), "h2")
    assert await greeted(server.port, "c.example") == (serial(first[0]), "h2")
    node = await node_of(stack, server, roots=second[0].read_bytes(), name="b.example")
    assert (await node.ask(Method.PULL_MESSAGES)).data == b"answer"


async def test_a_new_certificate_is_taken_up_and_one_that_cannot_be_used_is_not(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    certificate, key = make_pair(tmp_path)
    files = listener_files((certificate, key))
    server = await serve(stack, Slow(go=True), files=files)
    before = serial(certificate)
    node = await node_of(stack, server, roots=certificate.read_bytes(), host="localhost")
    assert (await node.ask(Method.PULL_MESSAGES)).data == b"answer"
    make_pair(tmp_path)
    after = serial(certificate)
    assert files.tick() == "taken"
    assert (await greeted(server.port))[0] == after != before
    assert (await node.ask(Method.PULL_MESSAGES)).data == b"answer", "on the connection that it has"
    certificate.write_text("no certificate")
    assert files.tick() == "refused"
    assert (await greeted(server.port))[0] == after


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    made.issue_relay(["localhost"])
    for name in ("good", "bad"):
        made.issue_client(name)
    return made


def channel(stack: AsyncExitStack, authority: Authority, port: int, name: str | None) -> aio.Channel:
    roots = authority.files("ca")[0].read_bytes()
    if name is None:
        credentials = grpc.ssl_channel_credentials(roots)
    else:
        certificate, key = authority.files(name)
        credentials = grpc.ssl_channel_credentials(roots, key.read_bytes(), certificate.read_bytes())
    made = aio.secure_channel(f"localhost:{port}", credentials, OPTIONS)
    stack.push_async_callback(made.close)
    return made


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("mode", ["wanted", "needed"])
async def test_calls_carry_the_certificate_of_their_connection(
    stack: AsyncExitStack, authority: Authority, mode: str, version: str
) -> None:
    asks = {"client_ca": authority.files("ca")[0], "client_certificates": mode}
    files = listener_files(authority.files("relay"), minimum_version=version, **asks)
    if version == "1.2":
        files.context.current.maximum_version = ssl.TLSVersion.TLSv1_2
    handler = Slow(go=True)
    server = await serve(stack, handler, files=files)
    node = channel(stack, authority, server.port, "good")
    assert await node.unary_unary(Method.PULL_MESSAGES.grpc)(b"", timeout=20) == b"answer"
    (call,) = handler.calls
    assert call.certificate is not None
    assert call.certificate.subject == "CN=good"
    stranger = channel(stack, authority, server.port, None)
    asking = stranger.unary_unary(Method.PULL_MESSAGES.grpc)(b"", timeout=20)
    if mode == "wanted":
        assert await asking == b"answer"
        assert handler.calls[1].certificate is None
    else:
        with pytest.raises(aio.AioRpcError) as caught:
            await asking
        assert caught.value.code().name == "UNAVAILABLE"
        assert len(handler.calls) == 1


async def test_a_certificate_that_is_revoked_is_worth_nothing_from_then_on(
    stack: AsyncExitStack, authority: Authority, tmp_path: Path
) -> None:
    crl = make_crl(tmp_path, (authority.certificate, authority._key))
    asks = {"client_ca": authority.files("ca")[0], "client_certificates": "needed", "crl": crl}
    files = listener_files(authority.files("relay"), **asks)
    handler = Slow(go=True)
    server = await serve(stack, handler, files=files)
    good, bad = (channel(stack, authority, server.port, name) for name in ("good", "bad"))
    for node in (good, bad):
        assert await node.unary_unary(Method.PULL_MESSAGES.grpc)(b"", timeout=20) == b"answer"
    assert len(server.connections) == 2
    make_crl(tmp_path, (authority.certificate, authority._key), authority.files("bad")[0])
    assert files.tick() == "taken"
    server.tick()
    await until(lambda: len(server.connections) == 1)
    with pytest.raises(aio.AioRpcError) as caught:
        await bad.unary_unary(Method.PULL_MESSAGES.grpc)(b"", timeout=20)
    assert caught.value.code().name == "UNAVAILABLE"
    assert await good.unary_unary(Method.PULL_MESSAGES.grpc)(b"", timeout=20) == b"answer"
    assert len(handler.calls) == 3
