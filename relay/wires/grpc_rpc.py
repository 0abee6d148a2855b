"""One call of gRPC's: what it holds, and how it ends.

gRPC cancels the handler of a call whose node has left. A pull that is with the SuperLink by then goes on
without its node, as over HTTP: the SuperLink gives each message out once, so its answer has to be seen, and
kept for another delivery.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from relay import quota
from relay.call import Call, Ending, Reply, Source
from relay.fleet import Kind
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from grpc import aio

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
    """

    __slots__ = (
        "_front",
        "_left",
        "_taken",
        "call",
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
        self._taken = 0
        self._left = False
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

    async def take(self, size: int = quota.GUESS) -> None:
        """Take a share of the quota, until the call is over.

        Raises:
            Refusal: OVERLOADED if there is none for as long as the node can wait.
        """
        held = self._front.held
        if not held.take_at_once(size):
            patience = self.call.deadline - time.monotonic() if self.call is not None else None
            try:
                async with asyncio.timeout(patience):
                    await held.take(size)
            except TimeoutError:
                detail = "limits.max_held bytes are held already"
                raise Refusal(Reason.OVERLOADED, detail, by="wire", sent=False) from None
        self._taken = size

    def settle(self, size: int) -> None:
        """Hold as much as there really is."""
        self._taken = self._front.held.settle(self._taken, size)

    # -- its end ------------------------------------------------------------------------------------

    async def outlast(self, call: Call, asking: Coroutine[None, None, bytes]) -> bytes:
        """Return what `asking` returns; should the node leave first, see it to its end without the node."""
        task = asyncio.get_running_loop().create_task(asking)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                front = self._front
                # A message that has not come will not come any more, and who waits must not be sent.
                if call.payload.data is None or front.cutting or len(front.left) >= MOST_LEFT:
                    task.cancel()
                else:
                    self._leave(call, task)
            raise

    def _leave(self, call: Call, task: asyncio.Task[bytes]) -> None:
        seconds, call.deadline = call.deadline - time.monotonic(), -math.inf
        timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
        self._left = True
        self._front.left.add(task)

        def over(_: asyncio.Task[bytes]) -> None:
            timer.cancel()
            self._front.left.discard(task)
            if not task.cancelled() and isinstance(error := task.exception(), Refusal):
                self.refusal = error
            self._end(call, sent=False)

        task.add_done_callback(over)

    def _done(self, context: aio.ServicerContext[bytes, bytes]) -> None:
        if self.call is None:
            self._give()
            if not context.done():
                self._front.stray("node_gone")  # no chain has run that would count it
        elif not self._left:
            self._end(self.call, sent=context.done())

    def _end(self, call: Call, *, sent: bool) -> None:
        """Tell how the call ended; `sent`: gRPC has its status, and sees to the rest."""
        self._give()
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
        if self._taken:
            self._front.held.give(self._taken)
            self._taken = 0
