"""Remember which key the SuperLink accepts for which node id, for the policies that answer calls themselves.

It stands innermost, so that it sees what the SuperLink itself answered to this very proof and this very id:
an answer of a cache, or one that was made here, cannot pass for it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, ClassVar

from relay.call import Call, Reply, Source, View
from relay.fleet import Kind, Method
from relay.proof import ProofError
from relay.wireformat import uint

if TYPE_CHECKING:
    from relay.pipeline import Handler
    from relay.stores.accepted import AcceptedPairs

#: Seconds after which a worker writes a pair again, and the most pairs for which it remembers that.
_AGAIN = 60.0
_MOST = 8192


class Accepted:
    """Writes pairs of key and node id down when the SuperLink has answered 200."""

    name: ClassVar[str] = "accepted"
    sees: ClassVar[View] = View.PEEK

    def __init__(self, *, enabled: bool, pairs: AcceptedPairs) -> None:
        """Write to `pairs` if `enabled`, else leave no trace in the chain."""
        self._enabled = enabled
        self._pairs = pairs
        self._written: OrderedDict[tuple[bytes, int], float] = OrderedDict()

    def applies(self, method: Method) -> bool:
        """Whatever carries a node id, or is answered with one."""
        return self._enabled and method is not Method.REGISTER_NODE

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on, and learn from the answer."""
        reply = await next(call)
        if reply.status == 200 and reply.source is Source.UPSTREAM:
            self._learn(call, reply)
        return reply

    def _learn(self, call: Call, reply: Reply) -> None:
        try:
            proof = call.proof
        except ProofError:
            return
        if proof is None or call.payload.data is None:
            return
        if call.method.kind is Kind.JOIN:
            node_id = uint(reply.payload.data or b"", 1)
        else:
            node_id = call.ids_at_hand().node_id
        if not node_id:
            return
        pair = (proof.public_key, node_id)
        if call.method is Method.UNREGISTER_NODE:
            self._written.pop(pair, None)
            self._pairs.forget(*pair)
            return
        now = time.monotonic()
        written = self._written.get(pair)
        if written is not None and now - written < _AGAIN:
            return
        self._pairs.accept(*pair)
        self._written[pair] = now
        self._written.move_to_end(pair)
        if len(self._written) > _MOST:
            self._written.popitem(last=False)
