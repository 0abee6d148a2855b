"""Why a call got no answer from the SuperLink: a closed set of reasons, and the exception that carries one.

A policy or an upstream names a reason; only the dialect knows what a node of each wire is told.
"""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """Why a call was refused. The value is its name in logs and metrics.

    Attributes:
        RATE_LIMITED: its caller asks more often than it may.
        OVERLOADED: too many calls, connections or bytes are here, or the SuperLink said so (429).
        UPSTREAM_DOWN: the SuperLink cannot be reached, or broke off, or passes for being away (502 to 504).
        UPSTREAM_TIMEOUT: it did not answer in time.
        UPSTREAM_BAD_ANSWER: it gave one that a node would not understand, or not survive.
        UPSTREAM_REJECTED: it said no to one message of a run.
        BREAKER_OPEN: it is not asked, since it has failed again and again.
        DRAINING: nothing is passed on for a while, by the operator's wish.
        UNAUTHENTICATED: the caller has not proved who it is, and shall go.
        STRANGER: the same, and it shall learn nothing.
        FORBIDDEN: it is known, and may not do this at this time.
        TOO_LARGE: the call is longer than it may be.
        MALFORMED: it is broken, or came too slowly.
        UNSUPPORTED: it is none of a wire and a method that are served.
        INTERNAL: the relay has a bug.
    """

    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    UPSTREAM_DOWN = "upstream_down"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    UPSTREAM_BAD_ANSWER = "upstream_bad_answer"
    UPSTREAM_REJECTED = "upstream_rejected"
    BREAKER_OPEN = "breaker_open"
    DRAINING = "draining"
    UNAUTHENTICATED = "unauthenticated"
    STRANGER = "stranger"
    FORBIDDEN = "forbidden"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    UNSUPPORTED = "unsupported"
    INTERNAL = "internal"

    __hash__ = object.__hash__


class Refusal(Exception):  # noqa: N818 - the vocabulary's name: it is an answer, not an error of ours
    """Raised by a policy or an upstream instead of a Reply; caught once, at the wire.

    Attributes:
        reason: what the dialect renders.
        detail: for the log only, never for the node: what happened, with the original.
        by: the policy or upstream that said it.
        sent: whether a byte of the call may have reached the upstream.
        status: what the upstream answered, if it did.
        cause: one of few words, so that it can be counted: what is wrong with a credential that is refused,
            or what this host wants for where the SuperLink is not at fault.
    """

    def __init__(
        self,
        reason: Reason,
        detail: str = "",
        *,
        by: str = "relay",
        sent: bool = True,
        status: int | None = None,
        cause: str = "",
    ) -> None:
        super().__init__(f"{reason.value} by {by}: {detail}" if detail else f"{reason.value} by {by}")
        self.reason = reason
        self.detail = detail
        self.by = by
        self.sent = sent
        self.status = status
        self.cause = cause

    def forget(self) -> None:
        """Let go of the frames that it came through; to be called when the call has ended.

        They hold the call, which holds how it ended, which holds this. When calls are refused by the
        thousand, memory would grow until the collector of cycles looks at old objects.
        """
        error: BaseException = self
        while True:
            error.__traceback__ = None
            before = error.__cause__ or error.__context__
            if before is None or before.__traceback__ is None:  # never raised, or seen: a chain may be a ring
                return
            error = before


class NodeGone(Exception):  # noqa: N818 - it names the event
    """The node closed its connection before its request was complete or its answer written.

    There is nobody left to answer; what was under way for it is given up.
    """
