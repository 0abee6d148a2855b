"""Legacy REST: SuperNodes of flwr 1.23 to 1.32 started with --rest, POST /api/v0/fleet/<method>."""

from relay.call import Wire
from relay.dialect import HOLD_SECONDS
from relay.wires.http_request import Spec

#: requests.post with `timeout=None` (flwr/client/rest_client/connection.py): these nodes would wait for ever,
#: so the patience is ours.
REST_V0 = Spec(Wire.REST_V0, "/api/v0/fleet/", patience=(HOLD_SECONDS, HOLD_SECONDS))
