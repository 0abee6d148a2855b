"""What one node, or many of them, may cost a worker: sizes, rates and connections.

The numbers are the settings' section `limits`; what stands here is how they are kept. A call that is over a
limit gets an ordinary Refusal, so that the dialect decides what its node is told.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from relay.fleet import MAX_REQUEST, Method
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.call import Call, Ending
    from relay.fleet import Kind

MAX_BODY = 4 << 30


def bodies(max_body: int = MAX_BODY, bounded: Mapping[Kind, int] = MAX_REQUEST) -> Mapping[Method, int]:
    """Return the longest request of each method, in bytes.

    Args:
        max_body: for the methods that carry messages and objects, and never less than for any other.
        bounded: for the kinds of the other methods.
    """
    return {method: min(max_body, bounded.get(method.kind, max_body)) for method in Method}


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one listener. See `relay.settings_limits.Limits` for what each is good for.

    Attributes:
        bodies: longest request of each method, in bytes.
        header_count, header_size, head_size: most headers of a request, longest one, longest head, in bytes.
        head_timeout: seconds from the first byte of a head to its last.
        min_rate: bytes per second that a node must send or take at least; 0 for no such bound.
        rate_window: seconds over which that is averaged.
        connections: most connections of a worker on this listener; 0 for no such bound.
        connections_per_peer: most connections of one peer; 0 for no such bound.
    """

    bodies: Mapping[Method, int] = field(default_factory=bodies)
    header_count: int = 100
    header_size: int = 16 * 1024
    head_size: int = 32 * 1024
    head_timeout: float = 20.0
    min_rate: int = 1024
    rate_window: float = 60.0
    connections: int = 0
    connections_per_peer: int = 0


class Pace:
    """Whether bytes come, or go, as fast as they must, averaged over windows of the time spent waiting.

    Only time that was spent waiting for the node counts: if nobody reads what it sends, it cannot be slow.
    """

    __slots__ = ("_moved", "_rate", "_waited", "_window")

    def __init__(self, rate: int, window: float) -> None:
        """Ask for `rate` bytes per second in each `window` seconds; a rate of 0 asks for nothing."""
        self._rate = rate
        self._window = window
        self._waited = 0.0
        self._moved = 0

    def holds(self, seconds: float, moved: int) -> bool:
        """Note that `moved` bytes took so many seconds; return False if it was too slow over a window."""
        self._waited += seconds
        self._moved += moved
        if self._waited < self._window:
            return True
        fast_enough = self._moved >= self._rate * self._waited
        self._waited, self._moved = 0.0, 0
        return fast_enough


class Peers:
    """Counts what each peer has here: connections of its own, or calls that come through a trusted proxy.

    A proxy's connections carry the calls of many nodes, so behind one it is the calls in flight that count,
    by the address that the proxy has told.
    """

    def __init__(self, most: int) -> None:
        """Let each peer have `most` at a time."""
        self._most = most
        self._held: Counter[str] = Counter()

    def enter(self, peer: str) -> Refusal | None:
        """Count one more of this peer, in any case; return the refusal for it if that is too many."""
        self._held[peer] += 1
        if self._held[peer] <= self._most:
            return None
        detail = f"{self._held[peer]} of one peer, limits.connections_per_peer is {self._most}"
        return Refusal(Reason.OVERLOADED, detail, by="wire", sent=False)

    def leave(self, peer: str) -> None:
        """Count one less."""
        self._held[peer] -= 1
        if self._held[peer] <= 0:
            del self._held[peer]

    def enter_call(self, call: Call) -> None:
        """Count a call until it has ended; it gets a fault if that is too many."""
        refusal = self.enter(call.peer)
        call.on_end(self._call_ended)
        if call.fault is None:
            call.fault = refusal

    def _call_ended(self, call: Call, _: Ending) -> None:
        self.leave(call.peer)
