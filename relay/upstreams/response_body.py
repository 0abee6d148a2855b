"""The body of a response that its reader takes piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.upstreams.connection import Connection


class ResponseBody:
    """What is to come of the body of one response; see `relay.call.Body`.

    Its end parts it from the connection, which may carry another exchange by then: reading on takes nothing
    from that one, and closing does not end it.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        """Stand for what `connection` has not yet given of its response."""
        self._connection: Connection | None = connection

    async def read(self) -> bytes:
        """Return the next piece; b"" at the end. Raises what `Connection.read` does."""
        if self._connection is None:
            return b""
        piece = await self._connection.read()
        if not piece:
            self._connection = None
        return piece

    def close(self) -> None:
        """Give up what has not been read."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
