"""Refuse a call that the wire found to be broken, so that it is counted and logged like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from relay.call import Call, Reply, View

if TYPE_CHECKING:
    from relay.fleet import Method
    from relay.pipeline import Handler


class Validate:
    """Raises the fault of a call, if it has one."""

    name: ClassVar[str] = "validate"
    sees: ClassVar[View] = View.HEAD

    def applies(self, method: Method) -> bool:
        """Every call may be broken."""
        return True

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on, or raise its fault (a Refusal)."""
        if call.fault is not None:
            raise call.fault
        return await next(call)
