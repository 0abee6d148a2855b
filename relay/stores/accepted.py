"""Which node key the SuperLink has accepted for which node id, in memory that the workers of a host share.

A SuperLink checks on each signed call that the key which signed it belongs to the node id in it (flwr 1.42
`superlink/routers/fleet/node_auth.py`). A pair is written when it has answered such a call with 200, and at
no other time; so whoever proves to hold the key is that node, without asking the SuperLink again. A record of
HostRecords holds the SHA-256 of the pair (32 bytes): its 8-byte key alone could be met on purpose.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress

from relay.stores.records import BusyError, HostRecords

#: How long a pair is believed after the last call that showed it; a node that polls shows it every 3 s.
SECONDS = 3600.0


class AcceptedPairs:
    """A bounded set of pairs of key and node id."""

    def __init__(self, slots: int = 16384) -> None:
        """Map room for so many pairs; to be called before the workers are forked. May raise OSError."""
        self._records = HostRecords(slots, 32)

    def accept(self, public_key: bytes, node_id: int) -> None:
        """Write down that the SuperLink accepted this key (as it came, PEM) for this node id."""
        digest = _digest(public_key, node_id)
        with suppress(BusyError):  # the next call writes it
            self._records.put(digest, digest, SECONDS)

    def forget(self, public_key: bytes, node_id: int) -> None:
        """Take a pair away: the node has left for good."""
        with suppress(BusyError):  # it ends by itself, and the SuperLink knows of it anyway
            self._records.delete(_digest(public_key, node_id))

    def accepted(self, public_key: bytes, node_id: int) -> bool:
        """Return whether the SuperLink has accepted this key for this node id within the last hour."""
        digest = _digest(public_key, node_id)
        return self._records.get(digest) == digest


def _digest(public_key: bytes, node_id: int) -> bytes:
    return hashlib.sha256(b"%d:%b" % (node_id, public_key)).digest()
