"""A gRPC listener as a worker makes it, in front of a handler, and a line to it that can be slow."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from relay.call import Wire
from relay.fleet import PEEK_BYTES, Method
from relay.limits import Limits
from relay.policies import Held
from relay.quota import Quota
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_fleet import GrpcFront
from relay.wires.grpc_request import Receiver
from relay.wires.grpc_server import GrpcServer
from tests.grpc_ends import GrpcNode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AsyncExitStack

    from relay.call import Call, Ending, Reply
    from relay.pipeline import Handler


class Ended(NamedTuple):
    call: Call
    ending: Ending


class Served:
    """A front that runs, and a node before it.

    Attributes:
        calls: those that the chain got.
        ended: those that have ended.
        strays: what was counted as no call.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ended: list[Ended] = []
        self.strays: list[str] = []
        self.front: GrpcFront
        self.server: GrpcServer
        self.node: GrpcNode
        self.held: Quota

    async def ending(self, count: int = 1) -> Ending:
        """Return the last of `count` endings."""
        await self.until(lambda: len(self.ended) >= count)
        assert len(self.ended) == count
        return self.ended[-1].ending

    async def until(self, condition: Callable[[], object], *, ticks: bool = False) -> None:
        """Wait for it; with `ticks` looking after slow messages meanwhile, as a worker does."""
        async with asyncio.timeout(20):
            while not condition():
                if ticks:
                    self.server.tick()
                await asyncio.sleep(0.01)


async def serve_grpc(
    stack: AsyncExitStack,
    handler: Handler,
    *,
    wires: tuple[Wire, ...] = (Wire.GRPC, Wire.GRPC_ADAPTER),
    max_body: int = 1 << 20,
    held: int = 1 << 30,
    trusted: str | None = None,
    idle_timeout: float = 20.0,
    guard: Callable[[Call], None] | None = None,
    admit: Callable[[Call], Awaitable[None]] | None = None,
    looks: bool = True,
    holds: bool = False,
    **limits: Any,
) -> Served:
    """Serve `handler` until the end of `stack`.

    Args:
        stack: what ends it.
        handler: gets calls that are sound.
        wires: that it carries.
        max_body: of any method.
        held: bytes of messages at a time.
        trusted: a network of proxies.
        idle_timeout: seconds in which something of a message must come.
        guard: gets calls before, as `auth` does, and may raise.
        admit: see `GrpcFront`.
        looks: whether the chain looks at the beginning of each message.
        holds: whether messages take their share of `held` in the chain, as before a gRPC SuperLink.
        limits: further ones.
    """
    served = Served()

    async def handle(call: Call) -> Reply:
        served.calls.append(call)
        call.on_end(lambda call, ending: served.ended.append(Ended(call, ending)))
        if guard is not None:
            guard(call)
        if call.fault is not None:
            raise call.fault
        if looks:
            await call.payload.peek(PEEK_BYTES)
        return await held_handler(call)

    served.held = Quota(held)
    policy = Held(served.held if holds else None, queue_timeout=20.0)

    async def held_handler(call: Call) -> Reply:
        return await (policy.handle(call, handler) if policy.applies(call.method) else handler(call))

    served.front = GrpcFront(
        {(wire, method): handle for wire in wires for method in Method},
        Receiver(
            Forwarding([ipaddress.ip_network(trusted)] if trusted else []),
            Limits(dict.fromkeys(Method, max_body), **limits),
            idle_timeout,
        ),
        served.held,
        idle_timeout=idle_timeout,
        on_stray=served.strays.append,
        admit=admit,
    )
    served.server = GrpcServer(served.front, "127.0.0.1", 0, keepalive=75.0)
    await served.server.start()
    stack.push_async_callback(served.server.drain, 0.0)
    served.node = await stack.enter_async_context(GrpcNode(served.server.port))
    return served


class Line:
    """A line to a port that carries so many bytes a second towards it.

    Attributes:
        port: where it begins.
        carried: bytes so far.
        returned: bytes of answers so far.
    """

    def __init__(self, to: int, rate: float = float("inf")) -> None:
        self._to = to
        self._rate = rate
        self.port = 0
        self.carried = self.returned = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        # Little is under way, so that what was not carried stays with the sender.
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0, limit=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, outer]
        for work in (self._carry(reader, outer), self._return(inner, writer)):
            self._tasks.add(asyncio.ensure_future(work))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        slow = self._rate != float("inf")
        while data := await reader.read(4096 if slow else 65536):
            self.carried += len(data)
            writer.write(data)
            await writer.drain()
            if slow:
                await asyncio.sleep(len(data) / self._rate)
        writer.close()

    async def _return(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.returned += len(data)
            writer.write(data)
        writer.close()
