"""Active checks: whether an address answers, asked by one worker of the host, off the calls' way."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from relay.refusal import Refusal
from relay.upstreams.local_fault import NO_NAME, is_local

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.stores.upstreams import State, UpstreamTable
    from relay.upstreams.pool import Pool

log = structlog.get_logger("relay.upstreams.check")

#: Checks come this much sooner or later than asked for, so that those of many hosts do not come together.
_JITTER = 0.2


class Question(NamedTuple):
    """What a SuperLink of a wire answers by itself: a path to GET, and the status that shows it is one."""

    path: str
    status: int


class Check:
    """Asks one address."""

    def __init__(
        self,
        pool: Pool,
        table: UpstreamTable,
        question: Question,
        *,
        interval: float,
        timeout: float,
        failures: int,
        on_result: Callable[[], None],
    ) -> None:
        """Ask every `interval` seconds, wait for `timeout`; after `failures` in a row the address is down.

        `on_result` is called after each answer, in the worker that asked.
        """
        self._pool = pool
        self._table = table
        self._question = question
        self._interval = interval
        self._timeout = timeout
        self._failures = failures
        self._on_result = on_result
        self._asking: asyncio.Task[None] | None = None

    def tick(self) -> None:
        """Ask if it is time and this worker's turn; to be called once a second."""
        if self._asking is not None:
            return
        jitter = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret
        if self._table.turn(f"check {self._pool.name}", self._interval * jitter):
            self._asking = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _run(self) -> None:
        try:
            try:
                why = await self.ask()
            except Refusal:
                return  # another worker may have the next turn
            if why is None:
                before, _ = self._table.change(self._pool.name, _up)
                if before.down:
                    log.info("upstream address is up", address=self._pool.name)
            else:
                before, after = self._table.change(self._pool.name, self._missed)
                if after.down and not before.down:
                    log.warning("upstream address is down", address=self._pool.name, why=why)
            self._on_result()
        finally:
            self._asking = None

    async def ask(self) -> str | None:
        """Ask once; return what is wrong, None if nothing is.

        Raises:
            Refusal: this worker cannot ask, which says nothing about the address.
        """
        path, status = self._question
        try:
            async with asyncio.timeout(self._timeout):
                found = await self._pool.get(path)
        except TimeoutError:
            return f"no answer within {self._timeout:g} s"
        except Refusal as refusal:
            # A name that stands for nothing is as good as gone: it would be for all.
            if is_local(refusal) and refusal.cause != NO_NAME:
                raise
            return refusal.detail
        return None if found == status else f"GET {path} was answered with {found}"

    def _missed(self, state: State) -> State:
        misses = state.misses + 1
        if state.down or misses < self._failures:
            return state._replace(misses=misses, checked=True)
        return state._replace(misses=misses, checked=True, down=True, down_since=time.monotonic())


def _up(state: State) -> State:
    return state._replace(misses=0, checked=True, down=False, down_since=0.0)
