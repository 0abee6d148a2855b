"""A SuperLink of flwr 1.23 to 1.32 with `--fleet-api-type rest`: HTTP under /api/v0/fleet/.

It has no status that means anything to its nodes: they treat all but 200 alike, and most of them die
of it. So no other status is passed on, save on a push, where the node drops the message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.call import Wire
from relay.upstreams.check import Question
from relay.upstreams.http import HttpUpstream, Nodes, Timeouts

if TYPE_CHECKING:
    from relay.upstreams.pool import Pool

PREFIX = "/api/v0/fleet/"

#: What it answers by itself, without a trace in it: it has no health check, but refuses a GET of a method.
QUESTION = Question("/api/v0/fleet/pull-messages", 405)

#: A node does not survive an answer that breaks off after its head, nor any status.
NODES = Nodes({}, survive_cuts=False)


def upstream(pool: Pool, timeouts: Timeouts, *, judging: bool = True) -> HttpUpstream:
    """Return the handler for this SuperLink; it passes any answer on unless it is `judging`."""
    return HttpUpstream(pool, PREFIX, timeouts, dict.fromkeys(Wire, NODES), judging=judging)
