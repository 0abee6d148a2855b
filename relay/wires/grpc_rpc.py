"""One call of gRPC's: what it holds, and how it ends.

gRPC cancels the handler of a call whose node has left. A pull that is with the SuperLink by then goes on
without its node, as over HTTP: the SuperLink gives each message out once, so its answer has to be seen, and
kept for another delivery.
"""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial
from typing import TYPE_CHECKING

from relay.call import Call, Ending, Reply, Source
from relay.fleet import Kind
from relay.growing import Growing
from relay.quota import GUESS, Share
from relay.refusal import Reason, Refusal
from relay.wires.grpc_tasks import RpcTask

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from grpc import aio

    from relay.call import Payload
    from relay.wires.grpc_fleet import GrpcFront

#: Pulls without a node that a worker sees to their end at a time; whoever opens and leaves more cuts them.
MOST_LEFT = 256


class Rpc:
    """What becomes of a call, and what it holds until that is over.

    Attributes:
        call: None until it is known to be one.
        reply, refusal, outcome, sent: what became of it so far.
        started: `time.monotonic()` at its head.
        patient: whether its node has set it no end.
        left: whether its node has left, and it goes on.
    """

    __slots__ = (
        "_front",
        "_share",
        "_task",
        "_timer",
        "call",
        "left",
        "outcome",
        "patient",
        "refusal",
        "reply",
        "sent",
        "started",
    )

    def __init__(self, front: GrpcFront, context: aio.ServicerContext[bytes, bytes]) -> None:
        """Stand for the call of `context`."""
        self._front = front
        self._share: Share | None = None
        self._task: RpcTask | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.left = False
        self.call: Call | None = None
        self.outcome = ""
        self.refusal: Refusal | None = None
        self.reply: Reply | None = None
        self.sent = 0
        self.started = time.monotonic()
        self.patient = True
        context.add_done_callback(self._done)

    def begin(self, call: Call) -> None:
        """Take it for a call, which is counted until it is over."""
        self.call = call
        self._front.in_flight += 1

    def received(self, size: int, waited: float) -> None:
        """Note that the message of the call is here, and took so many seconds."""
        call = self.call
        if call is None:
            return
        if self.patient:
            call.deadline += waited  # a node's patience begins when it has sent its call
        if call.method.kind is Kind.PUSH:
            self.settle(size)

    # -- its share of the quota ---------------------------------------------------------------------

    @property
    def share(self) -> Share:
        """What the call holds of the quota; nothing before it was taken."""
        if self._share is None:
            self._share = Share(self._front.held)
        return self._share

    async def take(self, size: int = GUESS) -> None:
        """Take a share of the quota, until the call is over.

        Raises:
            Refusal: OVERLOADED if there is none for as long as the node can wait.
        """
        if not self.share.take_at_once(size):
            await self._wait(self.share.take(size))

    async def grow(self, size: int) -> None:
        """Have a share of so many bytes, if it is smaller. Raises what `take` raises."""
        if not self.share.grow_at_once(size):
            await self._wait(self.share.grow(size))

    def growing(self, payload: Payload) -> Growing:
        """Return a body whose share grows while `payload` comes."""
        return Growing(payload, self.share, self._wait)

    def settle(self, size: int) -> None:
        """Hold as much as there really is."""
        self.share.settle(size)

    async def _wait(self, taking: Awaitable[None]) -> None:
        patience = self.call.deadline - time.monotonic() if self.call is not None else None
        try:
            async with asyncio.timeout(patience):
                await taking
        except TimeoutError:
            detail = "limits.max_held bytes are held already"
            raise Refusal(Reason.OVERLOADED, detail, by="wire", sent=False) from None

    # -- its end ------------------------------------------------------------------------------------

    def outlast(self, call: Call) -> None:
        """Have the task that runs go on when the node leaves, once the call has been received."""
        task = asyncio.current_task()
        if isinstance(task, RpcTask):
            task.outlasts = partial(self._leave, call, task)
            self._task = task

    def _leave(self, call: Call, task: RpcTask) -> bool:
        front = self._front
        # A message that has not come will not come any more, and what has been answered is over.
        if call.payload.data is None or self.outcome or front.cutting or len(front.left) >= MOST_LEFT:
            return False
        seconds, call.deadline = call.deadline - time.monotonic(), -math.inf  # who waits must not be sent
        self._timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
        self.left = True
        front.left.add(task)
        task.add_done_callback(front.left.discard)
        return True

    def _done(self, context: aio.ServicerContext[bytes, bytes]) -> None:
        if self.call is None:
            self._give()
            if not context.done():
                self._front.stray("node_gone")  # no chain has run that would count it
        else:
            self._end(self.call, sent=context.done() and not self.left)

    def _end(self, call: Call, *, sent: bool) -> None:
        """Tell how the call ended; `sent`: gRPC has its status, and sees to the rest."""
        self._give()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.outlasts = None
            self._task = None
        self._front.in_flight -= 1
        reply, outcome, lost = self.reply, self.outcome or Reason.INTERNAL.value, False
        if not sent:
            outcome = "cancelled" if self._front.cutting else "node_gone"
            lost = reply is not None and reply.source is Source.UPSTREAM
        call.end(
            Ending(
                outcome,
                seconds=time.monotonic() - self.started,
                source=reply.source if reply is not None else None,
                sent=0 if lost else self.sent,
                refusal=self.refusal,
                lost=lost,
            )
        )
        # gRPC and the callback hold each other, and this object, until somebody looks for cycles.
        self.call = self.reply = self.refusal = None

    def _give(self) -> None:
        if self._share is not None:
            self._share.give()
