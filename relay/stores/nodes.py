"""The nodes that the workers of a host have seen: one record each, in memory that they share.

A record of HostRecords is keyed by the node id (or, for a call that has none, by the fingerprint of the key
that it shows), and holds, native byte order:

    node_id        8   0 if it is not known
    first, last    8+8 `time.monotonic()` of the first and the last call
    refused_at     8   of the last call that was refused; 0 if none was
    calls          8   how many calls ended
    refusals       8   how many of them were refused, by the relay or by the SuperLink
    skew           4   float: its clock minus ours, seconds, smoothed; NaN if its calls carry no time
    method, wire   1+1 of the last call: places in METHODS and WIRES; 255 if there is none
    refused_method 1   of the last refused call
    accepted       1   whether the SuperLink has accepted a call of it
    key            32  SHA-256 of its public key in OpenSSH's binary form; zeros if it shows none
    version 32, peer 46, identity 64, tenant 32, refusal 40: the longest of each, UTF-8; a byte of length
    before

What a call says of its node (wire, version, address, identity, key, clock) is believed, and kept, if the
SuperLink accepted the call; before it has accepted any, what was said last is kept. So nobody who knows a
node id can change what is shown of the node, but for the time of the last call, the counts and the last
refusal. Records of nodes that were never accepted go after STRANGER_SECONDS, and first of a full table.

A lost record costs nothing but what it shows. A note that finds its bucket locked (for longer than 20 ms, see
`relay.stores.records`) is left to the next. A note costs about 10 us, and a worker makes at most one a second
for each node that is not refused.
"""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.call import Wire
from relay.fleet import Method
from relay.stores.accepted import AcceptedPairs
from relay.stores.records import BusyError, HostRecords, Kept

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

METHODS = tuple(Method)
WIRES = tuple(Wire)
#: Most bytes of each text, in the order of the record.
LIMITS = {"version": 32, "peer": 46, "identity": 64, "tenant": 32, "refusal": 40}

#: How long a record of a node is kept that the SuperLink never accepted, or that has left for good.
STRANGER_SECONDS = 600.0
#: Share of the newest measurement in the smoothed clock skew, and the jump from which it is taken as it is.
_NEWEST = 0.2
_JUMP = 5.0

_HEAD = struct.Struct("=QdddQQfBBBB32s")
_SIZE = _HEAD.size + sum(1 + most for most in LIMITS.values())
_NONE = 255
_NO_KEY = bytes(32)
_PLACE_OF_METHOD = {method: place for place, method in enumerate(METHODS)}
_PLACE_OF_WIRE = {wire: place for place, wire in enumerate(WIRES)}


@dataclass(slots=True)
class Facts:
    """What one call said of its node. `skew` is NaN, and a text is "", where it said nothing."""

    wire: Wire
    version: str = ""
    peer: str = ""
    identity: str = ""
    tenant: str = ""
    key: bytes = _NO_KEY
    skew: float = math.nan
    accepted: bool = False


@dataclass(slots=True)
class Refused:
    """The last refused call: why (`reason` or `reason:cause`), asking what, when (`time.monotonic()`)."""

    why: str
    method: Method
    at: float


@dataclass(slots=True)
class NodeRecord:
    """What is known of a node; the fields are those of the record."""

    node_id: int
    first: float
    last: float
    method: Method | None = None
    calls: int = 0
    refusals: int = 0
    refused: Refused | None = None
    facts: Facts | None = None

    def pack(self) -> bytes:
        """Return the record's bytes; texts that are too long are cut."""
        facts, refused = self.facts, self.refused
        head = _HEAD.pack(
            self.node_id,
            self.first,
            self.last,
            refused.at if refused else 0.0,
            self.calls,
            self.refusals,
            facts.skew if facts else math.nan,
            _PLACE_OF_METHOD[self.method] if self.method else _NONE,
            _PLACE_OF_WIRE[facts.wire] if facts else _NONE,
            _PLACE_OF_METHOD[refused.method] if refused else _NONE,
            facts.accepted if facts else 0,
            facts.key if facts else _NO_KEY,
        )
        said = (facts.version, facts.peer, facts.identity, facts.tenant) if facts else ("",) * 4
        texts = (*said, refused.why if refused else "")
        return head + b"".join(map(_text, texts, LIMITS.values()))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read what `pack` wrote."""
        (
            node_id, first, last, refused_at, calls, refusals, skew,
            method, wire, refused_method, accepted, key,
        ) = _HEAD.unpack_from(data)  # fmt: skip
        version, peer, identity, tenant, why = _texts(data)
        return cls(
            node_id,
            first,
            last,
            None if method == _NONE else METHODS[method],
            calls,
            refusals,
            None if refused_method == _NONE else Refused(why, METHODS[refused_method], refused_at),
            None
            if wire == _NONE
            else Facts(WIRES[wire], version, peer, identity, tenant, key, skew, bool(accepted)),
        )

    def learn(self, facts: Facts) -> None:
        """Take what a call said, if it is to be believed; see the head of this file."""
        known = self.facts
        if known is None:
            self.facts = facts
            return
        if known.accepted and not facts.accepted:
            return
        if known.accepted and abs(facts.skew - known.skew) < _JUMP:  # NaN compares as false
            facts.skew = known.skew + _NEWEST * (facts.skew - known.skew)
        self.facts = facts


class Nodes:
    """The table of nodes.

    Attributes:
        pairs: which key the SuperLink has accepted for which node.
    """

    def __init__(self, slots: int = 16384) -> None:
        """Map it; to be called before the workers are forked.

        Args:
            slots: how many nodes there is room for, at about 400 bytes each with their pairs.

        Raises:
            OSError: there is no memory for it.
        """
        self._records = HostRecords(slots, _SIZE)
        self.pairs = AcceptedPairs(slots)

    def note(
        self,
        node_id: int,
        method: Method,
        at: float,
        *,
        calls: int = 1,
        refusals: int = 0,
        refused: Refused | None = None,
        facts: Facts | None = None,
        leaves: bool = False,
        keep: float = 86400.0,
    ) -> bool:
        """Add to what is known of a node.

        Args:
            node_id: of the node; 0 if the call has none, then `facts` holds its key.
            method, at: the last call, and its `time.monotonic()`.
            calls, refusals: how many there were since the last note.
            refused: the last one that was refused.
            facts: what the call said of its node.
            leaves: it will not come back under this id.
            keep: seconds after its last call for which it is kept.

        Returns:
            Whether it could be noted: another process may be at it.
        """

        def change(old: bytes | None) -> Kept:
            if old and facts is None and refused is None and not leaves:
                return _counted(old, method, at, calls, keep)
            record = NodeRecord.unpack(old) if old else NodeRecord(node_id, at, at)
            if at >= record.last:
                record.last, record.method = at, method
            record.calls += calls
            record.refusals += refusals
            record.refused = refused or record.refused
            if facts is not None:
                record.learn(facts)
            stays = record.facts is not None and record.facts.accepted and not leaves and node_id
            return Kept(record.pack(), _seconds(stays, keep))

        try:
            self._records.update(_key(node_id, facts), change)
        except BusyError:
            return False
        return True

    def get(self, node_id: int) -> NodeRecord | None:
        """Return what is known of a node; None if nothing is."""
        found = self._records.get(_key(node_id, None))
        return NodeRecord.unpack(found) if found else None

    def all(self) -> Iterator[NodeRecord]:
        """Yield what is known of every node, in no order. Takes milliseconds: not for the event loop."""
        for value in self._records.values():
            yield NodeRecord.unpack(value)


def _counted(old: bytes, method: Method, at: float, calls: int, keep: float) -> Kept:
    """Return a record with these calls added: what nearly every note is, at half the cost."""
    head = list(_HEAD.unpack_from(old))
    if at >= head[2]:
        head[2], head[7] = at, _PLACE_OF_METHOD[method]
    head[4] += calls
    return Kept(_HEAD.pack(*head) + old[_HEAD.size :], _seconds(head[10] and head[0], keep))


def _seconds(stays: object, keep: float) -> float:
    return keep if stays else min(keep, STRANGER_SECONDS)


def wall_clock(at: float) -> float:
    """Return the seconds since 1970 of a `time.monotonic()`."""
    return time.time() - (time.monotonic() - at)


def _key(node_id: int, facts: Facts | None) -> bytes:
    if node_id or facts is None:
        return b"node:%d" % node_id
    return b"key:" + facts.key


def _text(text: str, most: int) -> bytes:
    data = text.encode("utf-8", "replace")
    if len(data) > most:
        data = data[:most].decode("utf-8", "ignore").encode()  # not within a character
    return bytes((len(data),)) + data


def _texts(data: bytes) -> list[str]:
    texts, at = [], _HEAD.size
    for _ in LIMITS:
        end = at + 1 + data[at]
        texts.append(data[at + 1 : end].decode("utf-8", "replace"))
        at = end
    return texts
