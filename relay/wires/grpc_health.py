"""The standard health service of gRPC, `grpc.health.v1.Health`, without a look at what is asked.

All services of a listener are as well as it is, so the name in the question decides nothing, and is not even
read.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from relay.wires.grpc_message import PREFIX
from relay.wires.grpc_status import HEAD, OK
from relay.wires.http2 import Code

if TYPE_CHECKING:
    from relay.wires.http2_stream import Stream

#: HealthCheckResponse with this status.
SERVING = b"\x08\x01"
NOT_SERVING = b"\x08\x02"

CHECK = b"/grpc.health.v1.Health/Check"
WATCH = b"/grpc.health.v1.Health/Watch"


class Health:
    """Says whether calls are welcome. Must be made inside the running loop."""

    def __init__(self, watch_seconds: float) -> None:
        """Begin with SERVING; end each watch after so many seconds, or nobody's connection could."""
        self._watch_seconds = watch_seconds
        self._status = SERVING
        self._news = asyncio.Event()
        self._closed = asyncio.Event()

    def leave(self) -> None:
        """Say NOT_SERVING from here on."""
        self._status = NOT_SERVING
        self._news.set()

    def close(self) -> None:
        """End the watches: each would hold its connection for ever."""
        self._closed.set()
        self._news.set()

    def check(self, stream: Stream) -> None:
        """Tell the status."""
        # One that only asks on would fill the memory.
        if stream.connection.full or not stream.answer(HEAD, _message(self._status), OK):
            stream.reset(Code.REFUSED_STREAM)

    async def watch(self, stream: Stream) -> None:
        """Tell the status, and the next one when it comes."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is a coroutine
        if stream.gone:
            return
        stream.on_gone = task.cancel
        end = asyncio.get_running_loop().time() + self._watch_seconds
        stream.head(HEAD)
        if not stream.tell(_message(told := self._status)):
            return
        await _wait(self._news, end)
        if self._status != told:
            stream.tell(_message(self._status))
        await _wait(self._closed, end)
        stream.on_gone = None
        if not stream.gone:
            stream.head(OK, last=True)


def _message(status: bytes) -> bytes:
    return PREFIX.pack(0, len(status)) + status


async def _wait(event: asyncio.Event, end: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout_at(end):
            await event.wait()
