"""A SuperLink of flwr >= 1.40: HTTP under /v1/fleet/, with statuses that nodes understand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.fleet import Kind
from relay.upstreams.check import Question
from relay.upstreams.http import HttpUpstream, Timeouts

if TYPE_CHECKING:
    from relay.upstreams.pool import Pool

PREFIX = "/v1/fleet/"

#: What it answers by itself, without a trace in it.
QUESTION = Question("/health", 200)

#: 401 ends a node and only the SuperLink may wish that. 403 says that a run has ended; on a heartbeat it
#: would silence the node, and on a confirmation have it hold back its last reply, neither of which the
#: SuperLink means. 412 refuses to register or activate a node: it exits and says why, and asking again
#: cannot help.
PASSES = {
    401: set(Kind),
    403: {Kind.PULL, Kind.FETCH, Kind.PUSH, Kind.LEAVE},
    412: {Kind.JOIN},
}


def upstream(pool: Pool, timeouts: Timeouts, *, judging: bool = True) -> HttpUpstream:
    """Return the handler for this SuperLink; it passes any answer on unless it is `judging`."""
    return HttpUpstream(pool, PREFIX, timeouts, PASSES, judging=judging)
