"""The standard health service of gRPC, `grpc.health.v1.Health`, without a look at what is asked.

All services of a listener are as well as it is, so the name in the question decides nothing. It is not even
received: grpcio-health-checking would take 2 GiB of it from anybody.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: HealthCheckResponse with this status.
SERVING = b"\x08\x01"
NOT_SERVING = b"\x08\x02"


class Health(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Says whether calls are welcome. Must be made inside the running loop."""

    def __init__(self, watch_seconds: float) -> None:
        """Begin with SERVING; end each watch after so many seconds, or nobody's connection could."""
        self._watch_seconds = watch_seconds
        self._status = SERVING
        self._news = asyncio.Event()
        self._closed = asyncio.Event()
        self._methods = {
            "/grpc.health.v1.Health/Check": grpc.stream_unary_rpc_method_handler(self._check),
            "/grpc.health.v1.Health/Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return what serves this path; None if it is not of this service."""
        return self._methods.get(details.method)

    def leave(self) -> None:
        """Say NOT_SERVING from here on."""
        self._status = NOT_SERVING
        self._news.set()

    def close(self) -> None:
        """End the watches: each would hold its connection for ever."""
        self._closed.set()
        self._news.set()

    # What is asked would be received by reading its context, or the iterator, and only then.

    async def _check(self, _: AsyncIterator[bytes], __: object) -> bytes:
        return self._status

    async def _watch(self, _: AsyncIterator[bytes], __: object) -> AsyncIterator[bytes]:
        """Tell the status, and the next one when it comes."""
        end = asyncio.get_running_loop().time() + self._watch_seconds
        yield (told := self._status)
        await _wait(self._news, end)
        if self._status != told:
            yield self._status
        await _wait(self._closed, end)


async def _wait(event: asyncio.Event, end: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout_at(end):
            await event.wait()
