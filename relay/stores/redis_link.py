"""Questions to Redis that must not hold up a call, and changes that are told to it in the background.

Who asks waits until a time that he names. Whoever got no answer, or an error, has this worker ask nothing for
OFF seconds. Changes are told one after the other, by one task; those that come soon after a failure, or when
MOST_WAITING bytes wait already, are left out. Whoever uses this must be able to live with that. What is owed,
because a question may have had an effect that nobody knows of, is told when Redis answers again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import structlog
from prometheus_client import Counter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    T = TypeVar("T")

log = structlog.get_logger("relay.stores.redis_link")

ASKED = Counter(
    "relay_redelivery_redis",
    "What redelivery asked or told Redis, by what came of it; skipped: soon after a failure, or too much",
    ["outcome"],
)

#: Seconds for which nothing is asked after a failure.
OFF = 1.0
#: Most bytes that wait to be told.
MOST_WAITING = 8 << 20
MOST_OWED = 256
#: Seconds for what is still to be told when the worker ends.
_AT_END = 1.0
#: What a change holds beside its bytes.
_OVERHEAD = 500


class OutageError(Exception):
    """Redis does not answer, or with an error; the text names its kind."""


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended; not for long, whatever they do."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_AT_END)


class _Change(NamedTuple):
    tell: Callable[[], Awaitable[None]]
    size: int
    force: bool


class RedisLink:
    """How one worker is doing with one Redis server."""

    def __init__(self, name: str) -> None:
        """Call the server `name` in logs. The rest is to be called in the event loop."""
        self._name = name
        self._off_until = 0.0
        self._failing = False
        self._waiting: deque[_Change] = deque()
        self._waiting_bytes = 0
        self._telling: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[Any]] = set()
        self._owed: deque[Callable[[], Awaitable[None]]] = deque(maxlen=MOST_OWED)

    async def ask(self, question: Coroutine[Any, Any, T], by: float, late: Callable[[], None]) -> T:
        """Return the answer.

        Args:
            question: raises OutageError if there is none.
            by: when it is not waited for any longer, by the clock of the event loop.
            late: called when the question ends for which nobody has waited, or to which there was no answer.

        Raises:
            OutageError: there is none by then, or nothing is asked.
        """
        loop = asyncio.get_running_loop()
        left = by - loop.time()
        if left <= 0 or loop.time() < self._off_until:
            question.close()
            ASKED.labels("skipped").inc()
            raise OutageError
        task = loop.create_task(question)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

        def ended(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                failed = task.exception() is not None
                late()
                if not failed:
                    self._pay()

        try:
            done, _ = await asyncio.wait({task}, timeout=left)
        except BaseException:
            task.add_done_callback(ended)
            raise
        if not done:
            task.add_done_callback(ended)
            self.failed("no answer in time")
            raise OutageError
        try:
            answer = task.result()
        except OutageError as error:
            self.failed(str(error))
            late()
            raise
        self._answered()
        return answer

    def later(self, tell: Callable[[], Awaitable[None]], size: int = 0, *, force: bool = False) -> None:
        """Have Redis told something.

        Args:
            tell: does it; raises OutageError if it could not.
            size: bytes that are held for that.
            force: try it also soon after a failure.
        """
        loop = asyncio.get_running_loop()
        size += _OVERHEAD
        off = loop.time() < self._off_until and not force
        if off or self._waiting_bytes + size > MOST_WAITING:
            ASKED.labels("skipped").inc()
            return
        self._waiting.append(_Change(tell, size, force))
        self._waiting_bytes += size
        if self._telling is None:
            self._telling = loop.create_task(self._tell())

    def owe(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Have Redis told something small as soon as it answers; only the last MOST_OWED are remembered."""
        self._owed.append(tell)

    def failed(self, problem: str) -> None:
        """Ask nothing for OFF seconds."""
        ASKED.labels("failed").inc()
        self._off_until = asyncio.get_running_loop().time() + OFF
        if not self._failing:
            self._failing = True
            text = "redelivery does not reach Redis; this host goes by what it keeps itself"
            log.warning(text, store=self._name, problem=problem)

    async def close(self) -> None:
        """Tell what is still to be told, if that is possible soon, and end all questions."""
        if self._telling is not None:
            await asyncio.wait({self._telling}, timeout=_AT_END)
        self._waiting.clear()
        await end(*self._asking, *([] if self._telling is None else [self._telling]))

    def _answered(self) -> None:
        ASKED.labels("answered").inc()
        if self._failing:
            self._failing = False
            log.info("redelivery reaches Redis again", store=self._name)
        self._pay()

    def _pay(self) -> None:
        while self._owed:
            self.later(self._owed.popleft(), force=True)

    async def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                tell, size, force = self._waiting.popleft()
                self._waiting_bytes -= size
                if loop.time() < self._off_until and not force:
                    ASKED.labels("skipped").inc()
                    continue
                try:
                    await tell()
                except OutageError as error:
                    self.failed(str(error))
                else:
                    self._answered()
        finally:
            self._telling = None
