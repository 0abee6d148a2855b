"""The policies between wire and upstream, one behaviour per file.

ORDER is the order in which a call meets them:

    metrics      outermost: whatever happens further in is counted and timed once
    access_log   likewise written down once, with the refusal and its original
    validate     before anything acts on a call that the wire found to be broken
"""

from relay.policies.access_log import AccessLog
from relay.policies.metrics import Metrics
from relay.policies.validate import Validate

__all__ = ["ORDER", "AccessLog", "Metrics", "Validate"]

ORDER = (Metrics, AccessLog, Validate)
