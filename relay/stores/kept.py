"""Pull answers that their nodes may not have got, kept for all workers of a host in one `HostRecords`.

Layout: records of PIECE bytes. A node has an index record, under "node" and its id; each answer has as many
pieces as it needs, under its token and their number. The index, in native byte order:

    online   8 bytes: `time.monotonic()` until which the SuperLink takes the node for available
    entry    one for each answer, the oldest first, at most PER_NODE:
      token       8 random bytes: the name of the pieces, and of the entry
      message    16 bytes: the first of the SHA-256 of the message id
      holder      8 bytes: who pulled it
      expires     8 bytes: `time.monotonic()` at which the message has outlived its TTL
      busy        8 bytes: `time.monotonic()` until which a delivery is under way
      size        4 bytes: of the answer
      deliveries  1 byte

Every change of an index is one `HostRecords.update`, so a claim is made by one worker only, and a worker that
is killed in it leaves nothing locked. What it had claimed is free again after LEASE seconds. Pieces are
written before their entry and never changed; without an entry they end by themselves.

An answer is gone when the TTL of its message is over or its node is not available any more. Its records
stay for LINGER seconds longer, so that the next call of the node finds and counts it. A full bucket loses the
record that would have ended first, and with it the older answers; one that lacks a piece is counted as
evicted when it is needed, one that lacks its index is not.

Measured: `has` takes 0.6 us, any other method 15 us, and a piece 7 us when it is written and when it goes.
"""

from __future__ import annotations

import enum
import hashlib
import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from relay.stores.records import BusyError, HostRecords, Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

PIECE = 1024
#: A node deals with one message at a time, so that more than one is kept only after losses.
PER_NODE = 4
#: Seconds after which a claim of a worker that never said how it ended does not count any more.
LEASE = 10.0
LINGER = 60.0

_ONLINE = struct.Struct("=d")
_ENTRY = struct.Struct("=8s16s8sddIB")


class Outcome(enum.Enum):
    """What became of an answer. The value is its label in the metric."""

    KEPT = "kept"
    REDELIVERED = "redelivered"
    CONFIRMED = "confirmed"
    REFUSED = "refused"
    EXPIRED = "expired"
    EXHAUSTED = "exhausted"
    EVICTED = "evicted"
    TOO_LARGE = "too_large"
    BUSY = "busy"


class Claim(NamedTuple):
    """An answer that a worker may deliver.

    Attributes:
        token: its name.
        body: its bytes.
        delivery: which delivery of it this is; the SuperLink's own is the first.
        message: the digest of its message.
        expires, online: as they were said when it was kept.
    """

    token: bytes
    body: bytes
    delivery: int
    message: bytes
    expires: float
    online: float


@dataclass(slots=True)
class _Entry:
    token: bytes
    message: bytes
    holder: bytes
    expires: float
    busy: float
    size: int
    deliveries: int

    def pieces(self) -> list[bytes]:
        """Return the keys of its pieces."""
        return [self.token + number.to_bytes(4, "big") for number in range(-(-self.size // PIECE))]


@dataclass(slots=True)
class _Index:
    """What is kept for a node, and what has just been taken out of it."""

    online: float
    entries: list[_Entry]
    gone: list[tuple[_Entry, Outcome]]

    def take(self, entry: _Entry, why: Outcome) -> None:
        self.entries.remove(entry)
        self.gone.append((entry, why))

    def end(self) -> float:
        """Return when the last entry is gone."""
        return max(min(entry.expires, self.online) for entry in self.entries)


class KeptAnswers:
    """The answers that are kept on this host, as one worker sees them. Nothing here waits or raises."""

    def __init__(
        self,
        records: HostRecords,
        tell: Callable[[Outcome], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep in `records`, of PIECE bytes each; `tell` is called with what becomes of each answer."""
        self._records = records
        self._tell = tell
        self._now = now

    def has(self, node: int) -> bool:
        """Return whether anything may be kept for the node."""
        return self._records.get(_key(node)) is not None

    def keep(
        self, node: int, body: bytes, *, message: str, holder: bytes, expires: float, online: float
    ) -> bytes:
        """Keep an answer that is being delivered for the first time, and return its token.

        Args:
            node: who pulled it.
            body: its bytes, at least one.
            message: the id of its message.
            holder: 8 bytes that say who pulled it; only the same may have it again.
            expires: `time.monotonic()` at which the TTL of the message is over.
            online: `time.monotonic()` until which the SuperLink takes the node for available.
        """
        now = self._now()
        entry = _Entry(os.urandom(8), digest(message), holder, expires, now + LEASE, len(body), 1)
        if not self._write(entry, body, min(expires, online) - now + LINGER):
            return entry.token

        def edit(index: _Index) -> None:
            index.online = online
            for known in list(index.entries):
                if known.message == entry.message:  # the SuperLink has handed it out again
                    index.entries.remove(known)
                    index.gone.append((known, Outcome.KEPT))
                    entry.deliveries = min(known.deliveries + 1, 255)
            while len(index.entries) >= PER_NODE:
                index.take(index.entries[0], Outcome.EVICTED)
            index.entries.append(entry)

        if self._change(node, edit):
            self._tell(Outcome.KEPT)
        return entry.token

    def claim(self, node: int, holder: bytes, most: int) -> Claim | None:
        """Take the node's oldest answer that may be delivered again; nobody else can before it is settled.

        Args:
            node: who pulls.
            holder: who pulls, as it was said when the answer was kept.
            most: deliveries of an answer; one that has had them is dropped.
        """
        while True:
            chosen: list[_Entry] = []
            online = 0.0

            def edit(index: _Index, chosen: list[_Entry] = chosen) -> None:
                nonlocal online
                now, online = self._now(), index.online
                for entry in list(index.entries):
                    if entry.busy > now or entry.holder != holder:
                        continue
                    if entry.deliveries >= most:
                        index.take(entry, Outcome.EXHAUSTED)
                        continue
                    entry.deliveries += 1
                    entry.busy = now + LEASE
                    chosen.append(entry)
                    return

            if not self._change(node, edit) or not chosen:
                return None
            body = self._read(chosen[0])
            if body is not None:
                entry = chosen[0]
                return Claim(entry.token, body, entry.deliveries, entry.message, entry.expires, online)
            self.take(node, chosen[0].token, Outcome.EVICTED)

    def settle(self, node: int, token: bytes, *, delivered: bool) -> None:
        """End a delivery: the answer may be claimed again. One that certainly was none does not count."""

        def edit(index: _Index) -> None:
            for entry in index.entries:
                if entry.token == token:
                    entry.busy = 0.0
                    entry.deliveries -= not delivered

        self._change(node, edit)

    def take(self, node: int, token: bytes, why: Outcome) -> None:
        """Drop one answer."""

        def edit(index: _Index) -> None:
            for entry in list(index.entries):
                if entry.token == token:
                    index.take(entry, why)

        self._change(node, edit)

    def drop(self, node: int, holder: bytes, messages: Collection[str] | None, why: Outcome) -> bool:
        """Drop the answers with these messages, or all of the node, as far as they are the holder's.

        Returns:
            Whether there were any.
        """
        wanted = None if messages is None else {digest(message) for message in messages}
        found = False

        def edit(index: _Index) -> None:
            nonlocal found
            for entry in list(index.entries):
                if entry.holder == holder and (wanted is None or entry.message in wanted):
                    index.take(entry, why)
                    found = True

        return self._change(node, edit) and found

    def end(self, node: int, message: bytes) -> None:
        """Drop the answer with the message of this digest; somebody else has counted what became of it."""

        def edit(index: _Index) -> None:
            for entry in list(index.entries):
                if entry.message == message:
                    index.take(entry, Outcome.KEPT)

        self._change(node, edit)

    def available(self, node: int, online: float) -> None:
        """Note until when the SuperLink takes the node for available."""
        left: list[_Entry] = []

        def edit(index: _Index) -> None:
            index.online = online
            left[:] = index.entries

        if self._change(node, edit):
            now = self._now()
            for entry in left:
                self._prolong(entry, min(entry.expires, online) - now + LINGER)

    # -- inside -------------------------------------------------------------------------------------

    def _change(self, node: int, edit: Callable[[_Index], None]) -> bool:
        """Edit the index of a node in one step, and clear up behind it; return whether that was possible."""
        gone: list[tuple[_Entry, Outcome]] = []

        def change(old: bytes | None) -> Kept | None:
            index = _unpack(old or b"", gone)
            now = self._now()
            for entry in list(index.entries):
                if min(entry.expires, index.online) <= now:
                    index.take(entry, Outcome.EXPIRED)
            edit(index)
            if not index.entries:
                return None
            return Kept(_pack(index), max(index.end() - now, 0.0) + LINGER)

        try:
            self._records.update(_key(node), change)
        except BusyError:
            self._tell(Outcome.BUSY)
            return False
        for entry, why in gone:
            for key in entry.pieces():
                with suppress(BusyError):
                    self._records.delete(key)
            if why is not Outcome.KEPT:
                self._tell(why)
        return True

    def _write(self, entry: _Entry, body: bytes, seconds: float) -> bool:
        try:
            for number, key in enumerate(entry.pieces()):
                piece = body[number * PIECE : (number + 1) * PIECE]
                self._records.put(key, piece, seconds)
        except BusyError:
            self._tell(Outcome.BUSY)
            return False
        return True

    def _read(self, entry: _Entry) -> bytes | None:
        body = b""
        with suppress(BusyError):
            body = b"".join(self._records.get(key) or b"" for key in entry.pieces())
        return body if len(body) == entry.size else None

    def _prolong(self, entry: _Entry, seconds: float) -> None:
        def change(old: bytes | None) -> Kept | None:
            return None if old is None else Kept(old, seconds)

        for key in entry.pieces():
            with suppress(BusyError):
                self._records.update(key, change)


def _key(node: int) -> bytes:
    return b"node" + node.to_bytes(8, "big")


def digest(message: str) -> bytes:
    """Return by which 16 bytes a message id is known here."""
    return hashlib.sha256(message.encode()).digest()[:16]


def _pack(index: _Index) -> bytes:
    return _ONLINE.pack(index.online) + b"".join(
        _ENTRY.pack(e.token, e.message, e.holder, e.expires, e.busy, e.size, e.deliveries)
        for e in index.entries
    )


def _unpack(data: bytes, gone: list[tuple[_Entry, Outcome]]) -> _Index:
    online: float = _ONLINE.unpack_from(data)[0] if data else 0.0
    entries = [_Entry(*values) for values in _ENTRY.iter_unpack(data[_ONLINE.size :])]
    return _Index(online, entries, gone)
