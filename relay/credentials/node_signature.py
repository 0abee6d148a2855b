"""A node's own key as a credential: the signature that SuperNodes of flwr 1.40 and newer put on each call.

Legacy REST nodes sign nothing; a listener that asks them for a signature is refused with the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from relay.call import Identity
from relay.refusal import Refusal

if TYPE_CHECKING:
    from relay.call import Call
    from relay.credentials.node_keys import NodeKeys


class NodeSignature:
    """Asks for a node's signature."""

    name: ClassVar[str] = "node_signature"

    def __init__(self, keys: NodeKeys, *, always: bool) -> None:
        """Ask `keys`; verify each signature if `always`, else leave that to the SuperLink.

        A call that is forwarded is verified by the SuperLink in any case. What the relay answers itself, and
        is worth protecting, is protected by `NodeKeys.ensure_verified` in the policy that answers.
        """
        self._look = keys.ensure_verified if always else keys.ensure_allowed

    async def check(self, call: Call) -> Identity | None:
        """Return the node's identity; None if it signed nothing. See `Credential.check`."""
        try:
            owner = self._look(call)
        except Refusal as refusal:
            if refusal.cause == "missing":
                return None
            raise
        return Identity(owner.name, owner.tenant, owner.labels, (self.name,))
