"""One call of gRPC's: what it holds, and how it ends.

A pull that is with the SuperLink when its node leaves goes on without its node, as over HTTP/1.1: the
SuperLink gives each message out once, so its answer has to be seen, and kept for another delivery.
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
from relay.quota import Share
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from relay.call import Payload
    from relay.wires.grpc_fleet import GrpcFront
    from relay.wires.http2_stream import Stream

#: Pulls without a node that a worker sees to their end at a time; whoever opens and leaves more cuts them.
MOST_LEFT = 256


class Rpc:
    """What becomes of a call, and what it holds until that is over.

    Attributes:
        stream: which brought it.
        call: None until it is known to be one.
        reply: None before there is one.
        left: whether its node has left, and it goes on.
        answering: whether its answer is on its way.
    """

    __slots__ = ("_front", "_share", "_task", "_timer", "answering", "call", "left", "reply", "stream")

    def __init__(self, front: GrpcFront, stream: Stream, task: asyncio.Task[None]) -> None:
        """Stand for the call that `task` answers."""
        self._front = front
        self._task = task
        self._share: Share | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.stream = stream
        self.call: Call | None = None
        self.reply: Reply | None = None
        self.left = self.answering = False

    def begin(self, call: Call) -> None:
        """Take it for a call, which is counted until it is over."""
        self.call = call
        self._front.in_flight += 1

    # -- its share of the quota ---------------------------------------------------------------------

    @property
    def share(self) -> Share:
        """What the call holds of the quota; nothing before it was taken."""
        if self._share is None:
            self._share = Share(self._front.held)
        return self._share

    async def grow(self, call: Call, size: int) -> None:
        """Have a share of so many bytes, if it is smaller.

        Raises:
            Refusal: OVERLOADED if there is none for as long as the node can wait.
        """
        if not self.share.grow_at_once(size):
            await self._wait(call, self.share.grow(size))

    def growing(self, call: Call, payload: Payload) -> Growing:
        """Return a body of `call`, which may not have begun, whose share grows while `payload` comes."""
        return Growing(payload, self.share, partial(self._wait, call))

    async def _wait(self, call: Call, taking: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(call.deadline - time.monotonic()):
                await taking
        except TimeoutError:
            detail = "limits.max_held bytes are held already"
            raise Refusal(Reason.OVERLOADED, detail, by="wire", sent=False) from None

    # -- its end ------------------------------------------------------------------------------------

    def gone(self) -> None:
        """Take note that the node has left: the task ends, but for a pull that is with the SuperLink."""
        call, front = self.call, self._front
        if (
            call is None
            or call.method.kind is not Kind.PULL
            or call.payload.data is None
            or self.answering
            or front.cutting
            or len(front.left) >= MOST_LEFT
        ):
            self._task.cancel()
            return
        seconds, call.deadline = call.deadline - time.monotonic(), -math.inf  # who waits must not be sent
        self._timer = asyncio.get_running_loop().call_later(seconds, self._task.cancel)
        self.left = True
        front.left.add(self._task)

    def end(self, outcome: str, *, sent: int = 0, refusal: Refusal | None = None, lost: bool = False) -> None:
        """Tell everybody how the call ended; `lost`: an answer that was there did not reach its node."""
        call, reply = self.call, self.reply
        if call is None:
            return
        if self.left:
            outcome, sent, lost = "node_gone", 0, reply is not None
        source = reply.source if reply is not None else None
        call.end(
            Ending(
                "cancelled" if self._front.cutting and outcome == "node_gone" else outcome,
                seconds=time.monotonic() - call.started,
                source=source,
                sent=sent,
                refusal=refusal,
                lost=lost and source is Source.UPSTREAM,
            )
        )

    def close(self) -> None:
        """Give everything back."""
        if self._timer is not None:
            self._timer.cancel()
        if self.left:
            self._front.left.discard(self._task)
        if self._share is not None:
            self._share.give()
        if self.call is not None:
            self._front.in_flight -= 1
            self.call.payload.close()
            self.call = None
        if self.reply is not None:
            self.reply.payload.close()
            self.reply = None
