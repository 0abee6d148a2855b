"""What the workers of a host share about a SuperLink's addresses, in memory mapped before the first fork.

Three parts, each of which a killed worker leaves in order:

    records   a `HostRecords`: the `State` of each address, choices (texts), and turns
    version   8 bytes: changes whenever a state or a choice does, so that a worker that keeps a copy has to
              compare one number (0.2 us) instead of reading a record (2 us)
    claims    POSIX record locks on a file of no content, one byte for each name: the kernel takes them from a
              process that ends, however it ends, and at that moment; no lease has to run out
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from relay.stores.records import BusyError, HostRecords, Kept

if TYPE_CHECKING:
    from collections.abc import Callable

#: States and choices are kept for as long as anybody could want them.
_FOR_EVER = 10 * 365 * 86400.0
_STATE = struct.Struct("=BddIIBBd")
_VERSION = struct.Struct("@Q")
_UNTIL = struct.Struct("=d")
_SIZE = 256

CLOSED, HALF_OPEN, OPEN = range(3)


class State(NamedTuple):
    """What is known of one address. Times are `time.monotonic()`, the same clock for all of a host.

    Attributes:
        breaker: CLOSED, HALF_OPEN or OPEN.
        turned: when the breaker changed last.
        ejected_until: when it may be chosen again.
        ejections: how many times in a row it was ejected.
        misses: how many active checks in a row failed.
        checked: whether an active check was ever made.
        down: whether so many failed that it counts as down.
        down_since: since when it does.
    """

    breaker: int = CLOSED
    turned: float = 0.0
    ejected_until: float = 0.0
    ejections: int = 0
    misses: int = 0
    checked: bool = False
    down: bool = False
    down_since: float = 0.0


class UpstreamTable:
    """The shared memory; to be made before the workers are forked."""

    def __init__(self) -> None:
        """Map it. Raises OSError if there is no memory for it."""
        self._records = HostRecords(512, _SIZE)
        self._version = mmap.mmap(-1, _VERSION.size)
        self._claims = os.memfd_create("flwr-relay-claims", os.MFD_CLOEXEC)
        self._claimed: set[int] = set()

    @property
    def version(self) -> int:
        """A number that changes with every change of a state or a choice."""
        number: int = _VERSION.unpack_from(self._version)[0]
        return number

    def get(self, address: str) -> State:
        """Return what is known of `address`."""
        return _unpack(self._records.get(_key("state", address)))

    def change(self, address: str, change: Callable[[State], State]) -> tuple[State, State]:
        """Change what is known of `address`, as one step for all workers.

        Returns:
            What it was, and what it is. Both are the same if another process, which was stopped in the middle
            of a change, keeps the record: then nothing was changed.
        """
        before = after = State()

        def apply(value: bytes | None) -> Kept:
            nonlocal before, after
            before = _unpack(value)
            after = change(before)
            return Kept(_STATE.pack(*after), _FOR_EVER)

        try:
            self._records.update(_key("state", address), apply)
        except BusyError:
            return before, before
        if after != before:
            self._changed()
        return before, after

    # -- choices: one text for all workers ----------------------------------------------------------

    def choice(self, name: str) -> str | None:
        """Return what was chosen under `name`; None if nothing was."""
        value = self._records.get(_key("choice", name))
        return value.decode() if value is not None else None

    def choose(self, name: str, value: str, *, instead_of: str | None) -> bool:
        """Choose `value`, unless another worker has chosen differently meanwhile; return whether it holds.

        Args:
            name: what the choice is about.
            value: at most 256 bytes.
            instead_of: what the caller believes to be chosen.
        """
        wanted = value.encode()

        def apply(known: bytes | None) -> Kept:
            expected = instead_of.encode() if instead_of is not None else None
            return Kept(wanted if known == expected else known or wanted, _FOR_EVER)

        try:
            held = self._records.update(_key("choice", name), apply)
        except BusyError:
            return False
        self._changed()
        return held == wanted

    # -- turns: what one worker of the host shall do now and then ----------------------------------

    def turn(self, name: str, seconds: float) -> bool:
        """Return whether it is the caller's turn; then it is nobody's for so many seconds."""
        mine = False

        def apply(value: bytes | None) -> Kept:
            nonlocal mine
            now = time.monotonic()
            left = _UNTIL.unpack(value)[0] - now if value is not None else 0.0
            mine = left <= 0.0
            return Kept(_UNTIL.pack(now + seconds), seconds) if mine else Kept(value or b"", left)

        key = _key("turn", name)
        if self._records.get(key) is not None:
            return False
        try:
            self._records.update(key, apply)
        except BusyError:
            return False
        return mine

    # -- claims: what one worker of the host may do at a time --------------------------------------

    def claim(self, name: str) -> bool:
        """Take the claim; return whether it was free. It is held until `release`, or the process ends."""
        at = _place(name)
        if at in self._claimed:
            return False
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        self._claimed.add(at)
        return True

    def release(self, name: str) -> None:
        """Give the claim back; harmless if it is not held."""
        at = _place(name)
        if at in self._claimed:
            self._claimed.discard(at)
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, at)

    def _changed(self) -> None:
        # Not a count: two workers that count at once would lose one, and a reader could miss both.
        _VERSION.pack_into(self._version, 0, time.monotonic_ns())


def _unpack(value: bytes | None) -> State:
    if value is None or len(value) != _STATE.size:
        return State()
    breaker, turned, until, ejections, misses, checked, down, since = _STATE.unpack(value)
    return State(breaker, turned, until, ejections, misses, bool(checked), bool(down), since)


def _key(kind: str, name: str) -> bytes:
    return f"{kind} {name}".encode()


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
