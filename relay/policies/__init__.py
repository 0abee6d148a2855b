"""The policies between wire and upstream, one behaviour per file.

ORDER is the order in which a call meets them:

    metrics      outermost: whatever happens further in is counted and timed once
    access_log   likewise written down once, with the refusal and its original
    maintenance  nothing but the two above happens to a call while the SuperLink is worked on
    validate     before anything acts on a call that the wire found to be broken
    repair       outside of retry: it judges what came out of all attempts
    retry        an attempt is one exchange with the upstream
    signing      innermost: each attempt gets a signature that is good at that time. It stays in `mode:
                 pass_through`, where the nodes that need it would get nothing but 401
"""

from relay.policies.access_log import AccessLog
from relay.policies.maintenance import Maintenance
from relay.policies.metrics import Metrics
from relay.policies.repair import Repair
from relay.policies.retry import Budget, Retry
from relay.policies.signing import Signing
from relay.policies.validate import Validate

__all__ = [
    "BRIDGES",
    "OBSERVERS",
    "ORDER",
    "AccessLog",
    "Budget",
    "Maintenance",
    "Metrics",
    "Repair",
    "Retry",
    "Signing",
    "Validate",
]

ORDER = (Metrics, AccessLog, Maintenance, Validate, Repair, Retry, Signing)

#: What stays in `mode: pass_through`.
OBSERVERS = (Metrics, AccessLog)

#: What stays there as well, and stands behind the guards: without it some nodes could not be served at all.
BRIDGES = (Signing,)
