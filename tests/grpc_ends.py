"""Both ends of gRPC over loopback: a SuperLink that a test plays, and a node that asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from grpc import aio

from relay.fleet import BY_GRPC, Method

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from typing import Self

    Answer = Callable[["Asked", aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
#: Every channel of a test has a connection of its own, and tries again at once.
OPTIONS = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]


class Asked(NamedTuple):
    """A call as it came to the SuperLink."""

    method: Method
    data: bytes
    metadata: list[tuple[str, str | bytes]]
    seconds_left: float | None


class Answered(NamedTuple):
    """What a node got: the data, or a status and its details."""

    data: bytes
    code: str
    details: str
    trailing: dict[str, Any]


def server_credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    """Return what a SuperLink proves with who it is."""
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])


class GrpcSuperLink(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A SuperLink that speaks gRPC, and answers as the test says.

    Attributes:
        asked: the calls that came.
        answer: answers the next ones.
        port: where it listens.
    """

    def __init__(self, *, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.asked: list[Asked] = []
        self.answer: Answer = self._nothing
        self.port = port
        self._credentials = credentials
        self._server: aio.Server

    async def __aenter__(self) -> Self:
        self._server = aio.server(options=[*UNLIMITED, ("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        address = f"127.0.0.1:{self.port}"
        if self._credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self._credentials)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Go at once."""
        await self._server.stop(None)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = BY_GRPC.get(details.method)
        if method is None:
            return None

        async def handle(data: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
            metadata = [tuple(pair) for pair in context.invocation_metadata() or ()]
            asked = Asked(method, data, metadata, context.time_remaining())
            self.asked.append(asked)
            return await self.answer(asked, context)

        return grpc.unary_unary_rpc_method_handler(handle)

    @staticmethod
    async def _nothing(_: Asked, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        return b""


class GrpcNode:
    """A node's channel."""

    def __init__(
        self, port: int, *, roots: bytes | None = None, host: str = "127.0.0.1", name: str = ""
    ) -> None:
        """Connect when first asked; with `roots` over TLS, to what is called `name` or else `host`."""
        target = f"{host}:{port}"
        if roots is None:
            self.channel = aio.insecure_channel(target, OPTIONS)
        else:
            named = [("grpc.ssl_target_name_override", name)] if name else []
            self.channel = aio.secure_channel(target, grpc.ssl_channel_credentials(roots), [*OPTIONS, *named])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def call(
        self,
        method: Method | str,
        data: bytes = b"",
        metadata: list[tuple[str, str | bytes]] | None = None,
        timeout: float | None = 20.0,
    ) -> Any:
        """Start a call."""
        path = method if isinstance(method, str) else method.grpc
        return self.channel.unary_unary(path)(data, metadata=metadata, timeout=timeout)

    async def ask(
        self,
        method: Method | str,
        data: bytes = b"",
        metadata: list[tuple[str, str | bytes]] | None = None,
        timeout: float | None = 20.0,
    ) -> Answered:
        """Call, and return what came of it."""
        call = self.call(method, data, metadata, timeout)
        try:
            answer = await call
        except aio.AioRpcError as error:
            trailing = dict(tuple(pair) for pair in error.trailing_metadata())
            return Answered(b"", error.code().name, error.details() or "", trailing)
        return Answered(answer, "OK", "", dict(tuple(pair) for pair in await call.trailing_metadata()))
