"""A SuperLink of flwr >= 1.40: HTTP under /v1/fleet/, with statuses that nodes understand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.call import Wire
from relay.fleet import Kind
from relay.upstreams.check import Question
from relay.upstreams.http import HttpUpstream, Nodes, Timeouts

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
    401: frozenset(Kind),
    403: frozenset({Kind.PULL, Kind.FETCH, Kind.PUSH, Kind.LEAVE}),
    412: frozenset({Kind.JOIN}),
}

#: A legacy node survives no status on a fetch or a pull. 401 is for the policy `signing`, which has signed
#: the call, and 412 for `repair`; a node that is not let in for good exits, as it would without a relay.
LEGACY = Nodes({401: PASSES[401], 412: PASSES[412]}, survive_cuts=False)

#: A node behind the adapter takes no status for what it means, and dies of any on a pull or a heartbeat.
ADAPTER = Nodes(
    {
        401: PASSES[401] - {Kind.HEARTBEAT, Kind.CONFIRM},
        403: PASSES[403] - {Kind.PULL},
        412: PASSES[412],
    }
)

NODES = dict.fromkeys(Wire, Nodes(PASSES)) | {Wire.REST_V0: LEGACY, Wire.GRPC_ADAPTER: ADAPTER}


def upstream(pool: Pool, timeouts: Timeouts, *, judging: bool = True) -> HttpUpstream:
    """Return the handler for this SuperLink; it passes any answer on unless it is `judging`."""
    return HttpUpstream(pool, PREFIX, timeouts, NODES, judging=judging)
