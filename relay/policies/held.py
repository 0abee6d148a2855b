"""Hold no more of messages than there is room for, where the SuperLink speaks gRPC.

Towards a SuperLink gRPC takes and gives a message whole, so what a node sends or gets in pieces is held here
meanwhile. Its share of the quota is taken before the call asks for a place in the SuperLink's queue (`shed`):
whoever waits for memory must not keep others from the SuperLink. An upload that does not say its length takes
more as it grows, and is read no further meanwhile. The share is given back when the call has ended.

What came in the adapter's containers is its wire's to hold: it needs them whole, whatever the SuperLink
speaks.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from relay.call import Call, Ending, Payload, Reply, View, Wire
from relay.fleet import Kind, Method
from relay.growing import Growing
from relay.quota import GUESS, Quota, Share
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable

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
        if (
            quota is None
            or call.wire is Wire.GRPC_ADAPTER
            or (data is not None and call.method is not Method.PULL_OBJECT)
        ):
            return await next(call)
        size, share, whole = call.payload.size if data is None else GUESS, Share(quota), call.payload
        first = GUESS if size is None else size
        if not share.take_at_once(first):
            await self._wait(share.take(first))
        if size is None:
            call.payload = Payload(body=Growing(whole, share, self._wait))
        try:
            reply = await next(call)
        except BaseException:
            share.give()
            if size is None and not call.payload.passed:
                call.payload = whole  # nothing of it is gone: it may be sent again
            raise
        if reply.payload.data is not None:
            share.give()
        else:
            if reply.payload.size is not None:
                share.settle(reply.payload.size)
            call.on_end(partial(self._give, share))
        return reply

    async def _wait(self, taking: Awaitable[None]) -> None:
        """Wait for a share, or for more of it. Raises Refusal: OVERLOADED if it does not come in time."""
        try:
            async with asyncio.timeout(self._queue_timeout):
                await taking
        except TimeoutError:
            detail = "limits.max_held bytes are held already"
            raise Refusal(Reason.OVERLOADED, detail, by=self.name, sent=False) from None

    @staticmethod
    def _give(share: Share, _: Call, __: Ending) -> None:
        share.give()
