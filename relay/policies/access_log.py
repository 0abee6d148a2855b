"""Write down how each call ended: at debug if all is well, at info if refused, louder if lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import structlog

from relay.call import Call, Ending, Reply, Source, View

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from relay.fleet import Method
    from relay.pipeline import Handler

log = structlog.get_logger("relay.access")


class AccessLog:
    """One line per call. The ids in it are read from the bytes at hand, and only if the line is written."""

    name: ClassVar[str] = "access_log"
    sees: ClassVar[View] = View.PEEK

    def __init__(self, *, debug: bool) -> None:
        """Write every call if `debug`, else only what did not go well."""
        self._debug = debug

    def applies(self, method: Method) -> bool:
        """Every call is written down."""
        return True

    def handle(self, call: Call, next: Handler) -> Awaitable[Reply]:  # noqa: A002
        """Pass the call on; the line is written when it has ended."""
        call.on_end(self._write)  # before the look at the body, which may end the call
        # A long body will be gone by then. gRPC's stays, and is not to be received before `auth`.
        if (self._debug or call.payload.data is None) and not call.wire.grpc:
            return self._with_ids(call, next)
        return next(call)

    async def _with_ids(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on when its ids are here."""
        await call.ids()
        return await next(call)

    def _write(self, call: Call, ending: Ending) -> None:
        if ending.outcome == "ok":
            if self._debug:
                log.debug("call", **_fields(call, ending))
        elif ending.lost:
            # The SuperLink has answered and the node does not know: for pull-messages a message is at stake.
            log.warning("answer lost", **_fields(call, ending))
        elif ending.refusal is not None:
            log.info("call refused", **_fields(call, ending))
        else:
            log.info("call", **_fields(call, ending))


def _fields(call: Call, ending: Ending) -> dict[str, Any]:
    ids = call.ids_at_hand()
    fields: dict[str, Any] = {
        "method": call.method.rpc,
        "wire": call.wire.value,
        "outcome": ending.outcome,
        "source": (ending.source or Source.LOCAL).value,
        "peer": call.peer,
        "node_id": ids.node_id,
        "run_id": ids.run_id,
        "bytes_in": call.payload.passed,
        "bytes_out": ending.sent,
        "ms": round(ending.seconds * 1000, 2),
        "request_id": call.request_id,
    }
    if call.identity is not None:
        fields["identity"] = call.identity.name
        fields["tenant"] = call.identity.tenant
    if ending.refusal is not None:
        fields["detail"] = ending.refusal.detail
        fields["by"] = ending.refusal.by
        if ending.refusal.cause:
            fields["cause"] = ending.refusal.cause
    return fields
