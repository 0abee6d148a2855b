"""HTTP v1: SuperNodes of flwr >= 1.40, POST /v1/fleet/<method>."""

from relay.call import Wire
from relay.wires.http_request import Spec

#: httpx with a read timeout of 30 s, and 5 s for a heartbeat (flwr/supernode/fleet_http_client.py).
HTTP_V1 = Spec(Wire.HTTP_V1, "/v1/fleet/", patience=(5.0, 30.0))
