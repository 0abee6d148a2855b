"""The tasks in which gRPC runs its handlers, and how one of them outlasts its call.

When the node of a call has left, gRPC cancels the task of the handler. A second task that is shielded from
that would cost each call three more turns of the loop. So the loop makes gRPC's tasks of a kind that can be
asked first.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

#: The coroutines of grpcio (`_cython/_cygrpc/aio/server.pyx.pxi`) that run a handler, and that cancel it.
_HANDLES = "_handle_exceptions"
_CANCELS = "_schedule_rpc_coro"


class RpcTask(asyncio.Task[Any]):
    """The task of one call.

    Attributes:
        outlasts: asked when gRPC cancels it because its node has left; True lets it go on.
    """

    outlasts: Callable[[], bool] | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel it, unless it is gRPC that wants it and it goes on."""
        if self.outlasts is not None and _is_grpc() and self.outlasts():
            return False
        return super().cancel(msg)


def _is_grpc() -> bool:
    """Return whether gRPC is at work at this moment; a timeout cancels from no task at all."""
    task = asyncio.current_task()
    return task is not None and getattr(task.get_coro(), "__name__", "") == _CANCELS


def _make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
    kind = RpcTask if getattr(coro, "__name__", "") == _HANDLES else asyncio.Task
    return kind(coro, loop=loop, **options)


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Have `loop` make such tasks; by its own factory, if it has one, all others."""
    if loop.get_task_factory() is None:
        loop.set_task_factory(_make)
