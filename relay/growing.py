"""A body of unknown length that is gathered, and is read on only when there is room for more of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.quota import STEP, Share

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.call import Payload


class Growing:
    """See `relay.call.Body`."""

    __slots__ = ("_payload", "_share", "_wait")

    def __init__(
        self, payload: Payload, share: Share, wait: Callable[[Awaitable[None]], Awaitable[None]]
    ) -> None:
        """Read `payload`.

        Args:
            payload: what brings it.
            share: what it holds of the quota.
            wait: waits for more of that, or raises Refusal.
        """
        self._payload = payload
        self._share = share
        self._wait = wait

    async def read(self) -> bytes:
        """Return the next piece, once there is room for it. Raises what `wait` raises, or what comes."""
        piece = await anext(self._payload, b"")
        size, share = self._payload.passed, self._share
        if size > share.size and not share.grow_at_once(size + STEP):
            await self._wait(share.grow(size + STEP))
        return piece

    def close(self) -> None:
        """Give up what has not been read."""
        self._payload.close()
