"""The policies between wire and upstream, one behaviour per file.

ORDER is the order in which a call meets them:

    metrics      outermost: whatever happens further in is counted and timed once
    access_log   likewise written down once, with the refusal and its original
    inventory    likewise: what its node was refused belongs to what is known of it
    maintenance  nothing but what stands above happens to a call while the SuperLink is worked on
    auth         before anything looks at what a stranger sent; it stays in `mode: pass_through`
    validate     before anything acts on a call that the wire found to be broken
    quarantine   after both, so that it knows who calls and can read the ids; it stays in `mode: pass_through`
    redelivery   outside of repair and retry: it keeps what came out of them, and nothing that was made here
    repair       outside of retry: it judges what came out of all attempts
    retry        outside of one exchange with the upstream, which is one attempt
    held         inside of retry: who waits for a repeat holds nothing; outside of shed: who waits for memory
                 must not hold a place in the SuperLink's queue. It stays in `mode: pass_through`
    shed         inside of retry: who waits for a repeat must not hold a place in the SuperLink's queue
    signing      each attempt gets a signature that is good at that time. It stays in `mode:
                 pass_through`, where the nodes that need it would get nothing but 401
    accepted     innermost: only what the SuperLink itself answered counts
"""

from relay.policies.accepted import Accepted
from relay.policies.access_log import AccessLog
from relay.policies.auth import Auth
from relay.policies.held import Held
from relay.policies.inventory import Inventory
from relay.policies.maintenance import Maintenance
from relay.policies.metrics import Metrics
from relay.policies.quarantine import Quarantine
from relay.policies.redelivery import Redelivery
from relay.policies.repair import Repair
from relay.policies.retry import Budget, Retry
from relay.policies.shed import Shed
from relay.policies.signing import Signing
from relay.policies.validate import Validate

__all__ = [
    "BRIDGES",
    "GUARDS",
    "OBSERVERS",
    "ORDER",
    "Accepted",
    "AccessLog",
    "Auth",
    "Budget",
    "Held",
    "Inventory",
    "Maintenance",
    "Metrics",
    "Quarantine",
    "Redelivery",
    "Repair",
    "Retry",
    "Shed",
    "Signing",
    "Validate",
]

ORDER = (
    Metrics,
    AccessLog,
    Inventory,
    Maintenance,
    Auth,
    Validate,
    Quarantine,
    Redelivery,
    Repair,
    Retry,
    Held,
    Shed,
    Signing,
    Accepted,
)

#: What stays in `mode: pass_through`.
OBSERVERS = (Metrics, AccessLog, Inventory)

#: What stays there as well: an emergency must not open a port to strangers, nor to what is no sound call.
GUARDS = (Auth, Validate, Quarantine)

#: And behind those: without it some nodes could not be served at all.
BRIDGES = (Held, Signing)
