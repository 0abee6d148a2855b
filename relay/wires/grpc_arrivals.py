"""Holds the messages of gRPC calls to what was granted them while they come.

gRPC receives a message whole once it is asked for, says nothing of its length, and cannot be stopped but by
the end of the call. What comes on the connection the kernel counts, so this looks at the connections on which
messages are awaited, many times a second: a message that outgrows its share of the quota takes more, or its
call ends. Of several messages on one connection nobody can say which it is that grows; the oldest is taken
for it. Nor can anybody say, where there is more than one, that a message is too long: what would be put off
by mistake comes again, and what would be refused for good would be lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from relay.quota import STEP
from relay.refusal import Reason, Refusal
from relay.wires.grpc_sockets import Connections

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from relay.wires.grpc_message import Incoming

log = structlog.get_logger("relay.wires.grpc")

#: Seconds between two looks; what comes meanwhile comes unseen.
_EVERY = 0.02
#: Looks take at most this share of the time.
_SHARE = 0.05
#: Seconds between two complaints of looks that fail.
_COMPLAIN_SECONDS = 60.0
#: What a connection may bring beyond: messages that nobody asks for, framing, and what is on its way.
SLACK = 1024 * 1024
#: What gRPC takes of a message unasked.
UNASKED = 256 * 1024
#: What of a head counts as such, and frames beside it. Compressed, it may have come as less, which would hide
#: the growth of a message; nodes have shorter ones.
_MOST_HEAD = 2048
_FRAMES = 64
#: TLS and HTTP/2 make a message longer by less than one part in so many.
_FRAMING = 64


class _Connection:
    """What a connection had brought at first, and what came since of heads and whole messages."""

    __slots__ = ("base", "done")

    def __init__(self, base: int) -> None:
        self.base = base
        self.done = 0


class Arrivals:
    """Looks at the connections of one listener while messages are awaited there."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._sockets = Connections()
        self._known: dict[str, _Connection] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: Iterable[Incoming] = ()
        self._unasked: Counter[str] = Counter()
        self._complain_at = 0.0

    def watch(self, waiting: Iterable[Incoming]) -> None:
        """Look at these, until there are none; harmless when repeated."""
        if self._timer is None:
            self._waiting = waiting
            self._timer = asyncio.get_running_loop().call_later(_EVERY, self._look)

    def came(self, peer: str, size: int) -> None:
        """Note that a message of so many bytes is here, or will not come."""
        known = self._known.get(peer)
        if known is not None:
            known.done += size

    def head(self, peer: str, size: int) -> None:
        """Note that the head of a call came, with so many bytes of metadata."""
        known = self._known.get(peer)
        if known is not None:
            known.done += min(size, _MOST_HEAD) + _FRAMES

    @contextmanager
    def unasked(self, peer: str) -> Iterator[None]:
        """Note that a message comes that is not awaited yet, of which gRPC takes the beginning."""
        self._unasked[peer] += 1
        try:
            yield
        finally:
            self._unasked[peer] -= 1
            if not self._unasked[peer]:
                del self._unasked[peer]

    def _look(self) -> None:
        self._timer = None
        groups: dict[str, list[Incoming]] = {}
        for each in self._waiting:
            groups.setdefault(each.peer, []).append(each)
        for peer in self._known.keys() - groups.keys():
            del self._known[peer]
        if not groups:
            return
        began = time.perf_counter()
        try:
            for peer, brought in self._sockets.brought(groups).items():
                known = self._known.get(peer)
                if known is None:
                    self._known[peer] = _Connection(brought)
                else:
                    self._check(known, groups[peer], brought)
        except Exception:
            # Without another look nothing would hold messages to their shares.
            if began >= self._complain_at:
                self._complain_at = began + _COMPLAIN_SECONDS
                log.exception("no look at what comes over gRPC")
        took = time.perf_counter() - began
        self._timer = asyncio.get_running_loop().call_later(max(_EVERY, took / _SHARE), self._look)

    def _check(self, known: _Connection, group: list[Incoming], brought: int) -> None:
        """Have the messages that are awaited on one connection keep to what was granted them."""
        # Less than nothing cannot be under way: it must not let as much come unseen later.
        known.done = min(known.done, brought - known.base)
        pending = brought - known.base - known.done
        pending -= pending // _FRAMING
        others = self._unasked.get(group[0].peer, 0)
        room = SLACK + others * UNASKED + sum(each.room for each in group)
        if pending <= room:
            return
        long = sorted((each for each in group if each.long), key=lambda each: each.started)
        growing = next((each for each in long if each.room < each.limit), None)
        if growing is None:
            # Whose it is, is known of one alone, on whose connection nothing else came, or next to nothing.
            if len(group) == 1 and not others and known.done <= (SLACK if long else 0):
                self._too_large(group[0])
            else:
                for each in group:
                    self._put_off(each, pending)
        elif not growing.grow_at_once(pending - room + STEP):
            for each in long:
                self._put_off(each, pending)
        elif growing.alone:
            for each in long:
                if each is not growing:
                    self._put_off(each, pending)

    @staticmethod
    def _too_large(message: Incoming) -> None:
        detail = f"at most {message.limit} bytes"
        message.refuse(Refusal(Reason.TOO_LARGE, detail, by="wire", sent=False))

    @staticmethod
    def _put_off(message: Incoming, size: int) -> None:
        if message.long:
            message.expect(2 * size)
        detail = "more came than has a share of limits.max_held, of it or beside it"
        message.refuse(Refusal(Reason.OVERLOADED, detail, by="wire", sent=False))
