"""What a node of each wire is told for each reason: the one table that decides whether nodes live.

A SuperNode survives very few answers, and each generation other ones (measured with real processes;
docs/flower-compatibility.md). The rules below follow from these facts:

HTTP v1 (flwr >= 1.40): 502, 503, 504 and a closed connection are retried for ever. 404, 413, 429 and
500 end the node on a pull, drop the message in the object phase and kill the heartbeat thread. 401
shuts the node down. 403 drops the message at hand, but not on a confirm, and kills the heartbeat thread.

REST v0 (flwr 1.23 to 1.32): no status but 200 is survived on a pull, nor on register and activate; on
an object fetch it makes the node stop polling. Only a closed connection is retried, except on a
heartbeat: there a close kills the thread, and any status is retried.

gRPC (flwr 1.23 to 1.39): UNAVAILABLE is retried for ever, and no other status is. UNAUTHENTICATED shuts the
node down. PERMISSION_DENIED drops the message at hand, and kills the heartbeat thread. The rest ends the
node on a pull and on the way to it, and drops the message in the object phase. There is no time-out but
the 5 s of a heartbeat.

gRPC adapter (flwr 1.23 to 1.39 with --grpc-adapter): nothing is retried but a heartbeat after UNAVAILABLE,
not even a broken connection. Any status ends the node on a pull, on the way to it, and on get-run and
get-fab; later it drops the message.

All: a pull answered with no bytes means "nothing for you now", and the node polls again in 3 s,
also one that was started with --max-retries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, assert_never

from relay.call import Wire
from relay.fleet import Kind, Method
from relay.refusal import Reason


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this HTTP status and a short plain text."""

    code: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection without an answer."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Answer 200 (gRPC: OK) with zero bytes of application/protobuf: an empty message of any type."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the call waiting for the upstream for as long as this, counted from its start; then answer Empty.

    The waiting is the policy `retry`'s; a call that may have reached the SuperLink is not held, since it
    cannot be asked again, and is answered Empty at once.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class Abort:
    """End the gRPC call with the status of this name and a short text, which never speaks of a handshake."""

    code: str


Answer = Status | Drop | Empty | Hold | Abort

#: Legacy REST and gRPC nodes have no timeout on a pull; one held for 75 s was measured to be harmless.
HOLD_SECONDS = 60.0


class Cell(NamedTuple):
    """One cell of the table: the answer, and why this one."""

    answer: Answer
    why: str


def answer(wire: Wire, reason: Reason, method: Method | None) -> Answer:
    """Return what a node of this wire is told.

    Args:
        wire: the wire that the node speaks.
        reason: why there is no answer of the SuperLink's.
        method: what it had asked; None for a Fleet method that we do not know.
    """
    return TABLE[wire, reason, method].answer


_NOTHING_NOW = Cell(Empty(), "nothing for you now: polled again in 3 s by every generation")
_RETRIED_503 = Cell(Status(503), "retried with backoff, without limit")
_HEARTBEAT_503 = Cell(
    Status(503), "the next heartbeat comes; any other status but 502 and 504 kills the thread"
)
_KICK_401 = Cell(Status(401), "the wish is that this node goes: it deactivates and exits")
_DROP_MESSAGE_403 = Cell(Status(403), "the node gives this message up and polls on; a retry would not help")
_HELD = Cell(Hold(HOLD_SECONDS), "it waits without harm, and polls less than if told at once")
_CLOSE = Cell(Drop(), "a closed connection is retried; a status would end the node")
_SILENCE = Cell(Drop(), "a stranger learns nothing; a node with a credential that is mended lives on")
_LEAVING = "the node asks once, ignores what comes, and is gone"

# Reasons that end by themselves when the upstream comes back.
_OUTAGE = frozenset({Reason.UPSTREAM_DOWN, Reason.BREAKER_OPEN})

# Reasons whose cause lies in this one call, so that the same bytes again would fare no better.
_LASTING = frozenset({Reason.FORBIDDEN, Reason.TOO_LARGE, Reason.UPSTREAM_REJECTED})


def _http_v1(reason: Reason, kind: Kind | None) -> Cell:
    if reason is Reason.UNAUTHENTICATED:
        return _KICK_401
    if reason is Reason.STRANGER and kind is not Kind.HEARTBEAT:
        return _SILENCE
    match kind:
        case Kind.PULL:
            return _NOTHING_NOW
        case Kind.HEARTBEAT:
            return _HEARTBEAT_503
        case Kind.CONFIRM if reason in _LASTING:
            return Cell(
                Empty(), "the node goes on; after a 403 its last reply would wait for the next message"
            )
        case Kind.FETCH | Kind.PUSH if reason in _LASTING:
            return _DROP_MESSAGE_403
        case Kind.LEAVE:
            return Cell(Status(503), _LEAVING)
        case Kind.JOIN | Kind.FETCH | Kind.PUSH | Kind.CONFIRM | None:
            return _RETRIED_503
        case _:
            assert_never(kind)


def _rest_v0(reason: Reason, kind: Kind | None) -> Cell:
    match kind:
        case Kind.HEARTBEAT:
            return Cell(Status(503), "any status is retried; a close would kill the heartbeat thread")
        case _ if reason is Reason.STRANGER:
            return _SILENCE
        case Kind.PULL | Kind.JOIN if reason is Reason.UNAUTHENTICATED:
            return Cell(Status(401), "the wish is that this node goes: it exits on any status but 200")
        case Kind.PULL if reason in _OUTAGE:
            return _HELD
        case Kind.PULL:
            return _NOTHING_NOW
        case Kind.PUSH if reason in _LASTING or reason is Reason.UNAUTHENTICATED:
            return _DROP_MESSAGE_403
        case Kind.LEAVE:
            return Cell(Drop(), _LEAVING)
        case Kind.CONFIRM if reason in _LASTING:
            return Cell(Empty(), "the node goes on; after a status it would never poll again")
        case Kind.FETCH | Kind.CONFIRM:
            return Cell(Drop(), "a closed connection is retried; after a status the node never polls again")
        case Kind.JOIN | Kind.PUSH | None:
            return _CLOSE
        case _:
            assert_never(kind)


def _grpc(reason: Reason, kind: Kind | None) -> Cell:
    if reason is Reason.UNAUTHENTICATED and kind is not Kind.LEAVE:
        return Cell(Abort("UNAUTHENTICATED"), _KICK_401.why)
    match kind:
        case Kind.PULL if reason is Reason.STRANGER:
            return Cell(Abort("UNAVAILABLE"), _SILENCE.why)
        case Kind.PULL if reason in _OUTAGE:
            return _HELD
        case Kind.PULL:
            return _NOTHING_NOW
        case Kind.HEARTBEAT:
            return Cell(Abort("UNAVAILABLE"), "the next heartbeat comes; any other status kills the thread")
        case Kind.CONFIRM if reason in _LASTING:
            return Cell(Empty(), "the node goes on; after a status it would drop the message that it has")
        case Kind.FETCH | Kind.PUSH if reason in _LASTING:
            return Cell(Abort("PERMISSION_DENIED"), _DROP_MESSAGE_403.why)
        case Kind.LEAVE:
            return Cell(Abort("UNAVAILABLE"), _LEAVING)
        case Kind.JOIN | Kind.FETCH | Kind.PUSH | Kind.CONFIRM | None:
            return Cell(Abort("UNAVAILABLE"), _RETRIED_503.why)
        case _:
            assert_never(kind)


def _grpc_adapter(reason: Reason, kind: Kind | None) -> Cell:
    match kind:
        case Kind.HEARTBEAT:
            return Cell(Abort("UNAVAILABLE"), "the next heartbeat comes; any other status kills the thread")
        case Kind.PULL | Kind.JOIN if reason is Reason.UNAUTHENTICATED:
            return Cell(Abort("UNAUTHENTICATED"), "the wish is that this node goes: any status ends it")
        case Kind.PULL if reason in _OUTAGE:
            return _HELD
        case Kind.PULL:
            return _NOTHING_NOW
        case Kind.CONFIRM:
            return Cell(Empty(), "the node goes on with the message that it has; a status would drop it")
        case Kind.FETCH | Kind.PUSH if reason in _LASTING or reason is Reason.UNAUTHENTICATED:
            return Cell(Abort("PERMISSION_DENIED"), "as without a relay; this node survives no status here")
        case Kind.LEAVE:
            return Cell(Abort("UNAVAILABLE"), _LEAVING)
        case Kind.JOIN | Kind.FETCH | Kind.PUSH | None:
            return Cell(Abort("UNAVAILABLE"), "there is no better answer: this node repeats no call")
        case _:
            assert_never(kind)


def _cell(wire: Wire, reason: Reason, kind: Kind | None) -> Cell:
    match wire:
        case Wire.HTTP_V1:
            return _http_v1(reason, kind)
        case Wire.REST_V0:
            return _rest_v0(reason, kind)
        case Wire.GRPC:
            return _grpc(reason, kind)
        case Wire.GRPC_ADAPTER:
            return _grpc_adapter(reason, kind)
        case _:
            assert_never(wire)


#: Every cell; `method` None stands for a Fleet method that we do not know.
TABLE: dict[tuple[Wire, Reason, Method | None], Cell] = {
    (wire, reason, method): _cell(wire, reason, method.kind if method else None)
    for wire in Wire
    for reason in Reason
    for method in (*Method, None)
}
