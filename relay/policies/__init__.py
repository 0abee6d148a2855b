"""The policies between wire and upstream, one behaviour per file.

ORDER is the order in which a call meets them:

    metrics      outermost: whatever happens further in is counted and timed once
    access_log   likewise written down once, with the refusal and its original
    maintenance  nothing but the two above happens to a call while the SuperLink is worked on
    validate     before anything acts on a call that the wire found to be broken
    repair       outside of retry: it judges what came out of all attempts
    retry        innermost: an attempt is one exchange with the upstream
"""

from relay.policies.access_log import AccessLog
from relay.policies.maintenance import Maintenance
from relay.policies.metrics import Metrics
from relay.policies.repair import Repair
from relay.policies.retry import Budget, Retry
from relay.policies.validate import Validate

__all__ = [
    "OBSERVERS",
    "ORDER",
    "AccessLog",
    "Budget",
    "Maintenance",
    "Metrics",
    "Repair",
    "Retry",
    "Validate",
]

ORDER = (Metrics, AccessLog, Maintenance, Validate, Repair, Retry)

#: What stays in `mode: pass_through`.
OBSERVERS = (Metrics, AccessLog)
