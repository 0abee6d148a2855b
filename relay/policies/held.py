"""Hold no more of HTTP nodes' messages than there is room for, where the SuperLink speaks gRPC.

gRPC takes and gives a message whole, so what an HTTP node sends or gets in pieces is held here meanwhile. Its
share of the quota is taken before the call asks for a place in the SuperLink's queue (`shed`): whoever waits
for memory must not keep others from the SuperLink. It is given back when the call has ended.

The messages of gRPC nodes are their wire's to hold: it receives them whole, whatever the SuperLink speaks.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from relay.call import Call, Ending, Reply, View
from relay.fleet import Kind, Method
from relay.quota import GUESS, Quota
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from relay.pipeline import Handler


class Held:
    """Takes the share of a long message, and gives it back."""

    name: ClassVar[str] = "held"
    sees: ClassVar[View] = View.HEAD

    def __init__(self, quota: Quota | None, *, queue_timeout: float = 0.0) -> None:
        """Take shares of `quota`; None, as before an HTTP SuperLink, leaves no trace in the chain.

        Args:
            quota: bytes of messages of this worker.
            queue_timeout: seconds that a call waits for its share.
        """
        self._quota = quota
        self._queue_timeout = queue_timeout

    def applies(self, method: Method) -> bool:
        """What carries an object, or messages."""
        return self._quota is not None and (method.kind is Kind.PUSH or method is Method.PULL_OBJECT)

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on when it has its share.

        Raises:
            Refusal: OVERLOADED if it got none, or what comes from further in.
        """
        data, quota = call.payload.data, self._quota
        if quota is None or call.wire.grpc or (data is not None and call.method is not Method.PULL_OBJECT):
            return await next(call)
        size = call.payload.size if data is None else GUESS
        taken = await self._take(quota, GUESS if size is None else size)
        try:
            reply = await next(call)
        except BaseException:
            quota.give(taken)
            raise
        if reply.payload.data is not None:
            quota.give(taken)
        else:
            if reply.payload.size is not None:
                taken = quota.settle(taken, reply.payload.size)
            call.on_end(partial(self._give, quota, taken))
        return reply

    async def _take(self, quota: Quota, size: int) -> int:
        if not quota.take_at_once(size):
            try:
                async with asyncio.timeout(self._queue_timeout):
                    await quota.take(size)
            except TimeoutError:
                detail = "limits.max_held bytes are held already"
                raise Refusal(Reason.OVERLOADED, detail, by=self.name, sent=False) from None
        return size

    @staticmethod
    def _give(quota: Quota, taken: int, _: Call, __: Ending) -> None:
        quota.give(taken)
