"""Answer everything here while the SuperLink is being worked on: nodes live on and come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from relay.call import Call, Reply, View
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from relay.fleet import Method
    from relay.pipeline import Handler


class Maintenance:
    """Refuses every call with DRAINING while `mode: maintenance` is set."""

    name: ClassVar[str] = "maintenance"
    sees: ClassVar[View] = View.HEAD

    def __init__(self, *, enabled: bool) -> None:
        """Refuse if `enabled`, else leave no trace in the chain."""
        self._enabled = enabled

    def applies(self, method: Method) -> bool:
        """Every call, while enabled."""
        return self._enabled

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Raise the Refusal."""
        raise Refusal(Reason.DRAINING, "mode: maintenance", by=self.name, sent=False)
