"""The body of a request as it is written, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from relay.call import Payload

#: A body that is at hand and longer than this is written in pieces, so that the transport copies none of it.
AT_ONCE = 256 * 1024


async def pieces(payload: Payload) -> AsyncIterator[bytes | memoryview]:
    """Yield the body; one that is at hand stays there, so that it can be sent again."""
    data = payload.data
    if data is None:
        async for piece in payload.stream():
            yield piece
    else:
        view = memoryview(data)
        for at in range(0, len(view), AT_ONCE):
            yield view[at : at + AT_ONCE]
