"""gRPC's tasks are asked before gRPC ends them, and only then; no other task differs."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import uvloop

from relay.call import Payload, Reply, Source
from relay.fleet import Method
from relay.wires import grpc_tasks
from relay.wires.grpc_tasks import RpcTask
from tests.grpc_served import serve_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from relay.call import Call

pytestmark = pytest.mark.timeout(60)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


async def _handle_exceptions() -> str:
    """By its name a call of grpcio's."""
    await asyncio.sleep(0.01)
    return "done"


async def _schedule_rpc_coro(task: asyncio.Task[str]) -> None:
    task.cancel()


def make() -> RpcTask:
    loop = asyncio.get_running_loop()
    grpc_tasks.install(loop)
    task = loop.create_task(_handle_exceptions(), name="HandleExceptions")
    assert isinstance(task, RpcTask)
    assert task.get_name() == "HandleExceptions"
    return task


async def test_a_task_that_says_so_goes_on_when_grpc_would_end_it() -> None:
    task = make()
    task.outlasts = lambda: True
    await asyncio.sleep(0)
    await _schedule(task)
    assert await task == "done"


async def _schedule(task: asyncio.Task[str]) -> None:
    await asyncio.get_running_loop().create_task(_schedule_rpc_coro(task))


@pytest.mark.parametrize("outlasts", [None, lambda: False], ids=["nobody_asks", "it_does_not"])
async def test_any_other_is_ended(outlasts: Callable[[], bool] | None) -> None:
    task = make()
    task.outlasts = outlasts
    await _schedule(task)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_is_not_grpc_ends_it() -> None:
    task = make()
    task.outlasts = lambda: True
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_timeout_within_it_is_one() -> None:
    loop = asyncio.get_running_loop()
    grpc_tasks.install(loop)

    async def _handle_exceptions() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(20)
        except TimeoutError:
            return "timed out"
        return "slept"

    task = loop.create_task(_handle_exceptions())
    assert isinstance(task, RpcTask)
    task.outlasts = lambda: True
    assert await task == "timed out"


async def test_other_tasks_are_ordinary_ones() -> None:
    grpc_tasks.install(asyncio.get_running_loop())
    task = asyncio.create_task(asyncio.sleep(0))
    assert type(task) is asyncio.Task
    await task


async def test_grpc_runs_its_handlers_in_them() -> None:
    """Were its names others, each pull would end with its node."""
    kinds = []

    async def look(_: Call) -> Reply:
        kinds.append(type(asyncio.current_task()))
        return Reply(Payload(b""), Source.UPSTREAM)

    async with AsyncExitStack() as stack:
        served = await serve_grpc(stack, look)
        await served.node.ask(Method.PULL_MESSAGES)
    assert kinds == [RpcTask]
