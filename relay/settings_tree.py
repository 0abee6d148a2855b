"""The sections of the settings and their defaults: one frozen tree.

What stands below a key is its documentation: `docs/configuration.md` is made from it.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from relay.call import Wire
from relay.settings_auth import Auth, Keys
from relay.settings_files import CaFile, CertificateFile, KeyFile, PidFile
from relay.settings_limits import Limits
from relay.settings_nodes import Inventory, NodeKeys, Quarantine
from relay.settings_section import Section as _Section
from relay.settings_signing import Signing, signed_for
from relay.settings_tls import ClientCertificates, ServerName, Tls, off
from relay.settings_types import (
    Address,
    BaseUrl,
    Bytes,
    Doc,
    Flag,
    HostPort,
    Network,
    Rate,
    RedisServer,
    Seconds,
    SecondsOrZero,
    Share,
    Url,
    below,
)
from relay.settings_upstream import Breaker, Health, Shed

CARRIES: Final[Mapping[Wire, tuple[Wire, ...]]] = {
    Wire.HTTP_V1: (Wire.HTTP_V1, Wire.REST_V0, Wire.GRPC, Wire.GRPC_ADAPTER),
    Wire.REST_V0: (Wire.REST_V0,),
    Wire.GRPC: (Wire.GRPC, Wire.GRPC_ADAPTER, Wire.HTTP_V1, Wire.REST_V0),
}
"""For each wire that a SuperLink speaks, the wires of nodes whose calls can be carried to it."""


def carried(upstream: Wire, *, signing: bool) -> tuple[Wire, ...]:
    """Return the wires of nodes whose calls can be carried to `upstream`; `signing`: the section is there."""
    return tuple(wire for wire in CARRIES[upstream] if signing or not signed_for(wire, upstream))


_T = TypeVar("_T")

_MOST_WORKERS_BY_DEFAULT = 4


def _usable_cores() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS_BY_DEFAULT)


def _of_superlink(wire: Wire) -> Wire:
    if wire not in CARRIES:
        right = ", ".join(one.value for one in CARRIES)
        raise ValueError(f"is a wire of nodes alone: write one of {right}")
    return wire


def _some(entries: tuple[_T, ...]) -> tuple[_T, ...]:
    # Not Field(min_length=1): that counts the valid entries alone, and so complains twice about a wrong one.
    if not entries:
        raise ValueError("must have at least one entry")
    return entries


def _each_once(wires: tuple[Wire, ...]) -> tuple[Wire, ...]:
    if len(set(wires)) < len(wires):
        raise ValueError("must name each wire once")
    return wires


class Listener(_Section):
    """One port that SuperNodes connect to."""

    address: Address = HostPort("0.0.0.0", 8080)  # noqa: S104 - nodes come from other hosts
    """Address to listen on. `:8080` is every IPv4 interface, `[::]:8080` every IPv6 one; port 0 is any free
    port, for HTTP alone."""

    wires: Annotated[
        tuple[Wire, ...],
        AfterValidator(_some),
        AfterValidator(_each_once),
        Doc(
            "list of `http_v1` and `rest_v0`, or of `grpc` and `grpc_adapter`",
            default="every wire of the kind that `upstream.wire` is, HTTP or gRPC",
        ),
    ] = ()
    """Wires (generations of Flower's Fleet API) served on this port: `http_v1` is spoken by nodes of flwr
    1.40 and newer, `rest_v0` by nodes of flwr 1.23 to 1.32 started with `--rest`, `grpc` by nodes of flwr
    1.23 to 1.39, `grpc_adapter` by those of them started with `--grpc-adapter`. A port speaks either HTTP or
    gRPC. Before a SuperLink that speaks another wire, `rest_v0` needs the section `signing`."""

    trusted_proxies: Annotated[tuple[Network, ...], Doc("list of networks")] = ()
    """Networks of the proxies in front of the relay. `Forwarded` and `X-Forwarded-*` are believed from these
    alone; from any other peer they are ignored."""

    client_certificate_header: Annotated[
        Literal["off", "Client-Cert", "X-SSL-Client-Cert", "X-Forwarded-Client-Cert"], BeforeValidator(off)
    ] = "off"
    """Header in which `trusted_proxies` that terminate TLS pass a node's certificate on: `Client-Cert` of
    RFC 9440, `X-SSL-Client-Cert` with nginx's `$ssl_client_escaped_cert`, or `X-Forwarded-Client-Cert` of
    Envoy. The proxy must have verified it, and must take the header off what nodes send. None of these
    headers is ever sent on to the SuperLink."""

    keepalive: Seconds = 75.0
    """Idle time after which a node's connection is closed. Keep it longer than that of a load balancer in
    front, so that the balancer never sends a call into a connection that is closing. A gRPC connection is
    told to leave after half a minute in any case, which loses no call."""

    tls: Tls | None = None
    auth: Auth = Auth()

    @property
    def speaks_grpc(self) -> bool:
        """Whether this port speaks gRPC, and not HTTP."""
        return any(wire.grpc for wire in self.wires)


class Upstream(_Section):
    """The SuperLink, and how calls travel to it."""

    url: Url = BaseUrl("http", "127.0.0.1", 8000)
    """Where the SuperLink listens: `http` or `https`, host and port (80 or 443 when left out), no path."""

    wire: Annotated[
        Wire,
        AfterValidator(_of_superlink),
        Doc("`http_v1`, `rest_v0` or `grpc`", lambda wire: wire.value),
    ] = Wire.HTTP_V1
    """Wire that the SuperLink speaks: `http_v1` for flwr 1.40 and newer, `grpc` for flwr 1.23 to 1.39,
    `rest_v0` for flwr 1.23 to 1.32 that was started with `--fleet-api-type rest`."""

    ca_file: Annotated[CaFile | None, Doc("path")] = None
    """PEM file of the certificate authorities that an `https` SuperLink is checked against, relative to the
    working directory; without one, the system's authorities are used."""

    certificate: Annotated[CertificateFile | None, Doc("path")] = None
    """PEM file of a certificate that the relay shows to an `https` SuperLink, or to a proxy before it, that
    asks for one; followed by those of the authorities between it and the one that is trusted there."""

    key: Annotated[KeyFile | None, Doc("path")] = None
    """PEM file of the private key of `upstream.certificate`, not encrypted."""

    server_name: Annotated[ServerName | None, Doc("host name")] = None
    """Name that the SuperLink's certificate must be made for, and that it is asked for by SNI, where that is
    not the host of `upstream.url`."""

    connect_timeout: Seconds = 3.0
    """How long opening a connection to the SuperLink may take, the TLS handshake included."""

    response_timeout: Annotated[Seconds, below(30, "an HTTP v1 node gives up on a call after 30 s")] = 25.0
    """How long the SuperLink may take to answer once it has the call; to begin its answer, if that is an
    object or longer than 64 KiB. Below 30 s, when a node gives up."""

    heartbeat_timeout: Annotated[Seconds, below(5, "a node gives up on a heartbeat after 5 s")] = 4.0
    """How long the SuperLink may take to answer a heartbeat. Below 5 s, when a node gives up on one."""

    idle_timeout: Seconds = 25.0
    """Longest pause between two pieces of a body, from the node or from the SuperLink, before the call is
    ended."""

    keepalive: Annotated[Seconds, below(5, "the SuperLink closes an idle connection after 5 s")] = 4.0
    """Idle time after which a connection to the SuperLink is closed. Below 5 s, when the SuperLink closes it:
    a call sent at that moment would be lost."""

    max_connections: Annotated[int, Field(strict=True, ge=1), Doc("whole number")] = 256
    """Most connections that one worker opens to the SuperLink."""

    queue_timeout: Seconds = 2.0
    """How long a call waits for a free connection to the SuperLink before the node is told to come back
    later."""

    addresses: Annotated[tuple[Url, ...], Doc("list of URLs")] = ()
    """Further addresses of the same SuperLink, only with `upstream.shared_state: true`. Calls go to the one
    with the fewest in flight."""

    shared_state: Flag = False
    """Whether whatever listens at `upstream.addresses`, and behind a name with several IP addresses, has the
    same state. flwr's own SuperLinks do not: each answers the nodes of another with 401, which shuts them
    down. So only a proxy or several ways to one SuperLink are a reason to set it. Without it, of several IP
    addresses of a name one is used for as long as it takes connections."""

    standby: Annotated[tuple[Url, ...], Doc("list of URLs")] = ()
    """SuperLinks that stand by. One takes over when the one in use has been down for `standby_after`, and
    stays, through reloads as well, while it is among the addresses. A restart of the relay begins with
    `upstream.url`, so write there first which one is in use: it is logged at each start and change. It must
    have the database of the other, and nobody else may be using that: a SuperLink that does not know the
    nodes ends them all."""

    standby_after: Seconds = 30.0
    """How long the SuperLink in use must be down, by active checks and calls alike, before one that stands by
    takes over. Longer than a restart takes."""

    resolve_interval: Seconds = 30.0
    """How often a host that is a name is resolved again. If it takes no connection, once a second."""

    health: Health = Health()


class Retry(_Section):
    """Repeats of calls that failed on their way to the SuperLink. What is repeated is decided for each Fleet
    method: `pull-messages` and `push-object` only if they cannot have reached the SuperLink."""

    enabled: Flag = True
    """Whether calls are repeated at all."""

    base: Seconds = 0.1
    """Longest wait before the first repeat, doubled for each further one. The wait is a random part of it, so
    that calls that failed together do not come back together."""

    cap: Seconds = 5.0
    """Longest wait before any repeat, at least `retry.base`."""

    budget: Share = 0.2
    """Repeats as a share of calls: 0.2 is one for every five. It keeps an outage from being answered with a
    multiple of the normal load. Each address of the SuperLink has its own share."""

    floor: Rate = 10.0
    """Repeats per second that a worker may make at each address whatever the budget says."""


class Repair(_Section):
    """What the relay mends, so that it costs no message and no node."""

    lost_answers: Flag = True
    """Mend `register-node` and `push-object` when the SuperLink's answer was lost: it has done what was
    asked, and would refuse the repeat."""

    reactivate: Flag = True
    """Let a node back in that crashed and returns while the SuperLink still holds it ONLINE: it is
    deactivated first, with its own fresh proof. Otherwise it is refused, and exits."""


class Redelivery(_Section):
    """Messages whose pull answer a node may not have got are kept, and handed out again when it pulls before
    it has confirmed. The SuperLink itself hands each message out once."""

    enabled: Flag = True
    """Whether anything is kept. The SuperLink is asked before each further delivery, so that no message is
    handed out again that a node has confirmed. Switch it off for ClientApps that keep a state and must not
    see a message twice even if the SuperLink refused its confirmation."""

    deliveries: Annotated[int, Field(strict=True, ge=2, le=100), Doc("whole number, 2 to 100")] = 3
    """How often a message is handed out at most, the first time included."""

    max_size: Annotated[Bytes, Field(ge=1024)] = 256 << 10
    """Longest pull answer that is kept, at most a quarter of `redelivery.memory`. It holds no arrays, only
    about 70 bytes for each piece of one and 500 for the rest."""

    memory: Annotated[Bytes, Field(ge=64 << 10, le=4 << 30)] = 16 << 20
    """Memory for kept answers of all workers, taken as it is needed. A node that fetches a message needs 1
    KiB and the size of its pull answer, rounded up to KiB. Set twice what all nodes need at a time. A restart
    changes it, a reload does not."""

    redis: Annotated[RedisServer | None, Doc("URL", secret=True)] = None
    """Redis for relays on several hosts, as in `keys.redis`: what one keeps another hands out, as often in
    all. While it does not answer, each host goes by what it keeps itself. Let nobody else write there."""


class Admin(_Section):
    """The port of health checks, metrics and `/nodes`. It is not for nodes, and asks nobody who he is."""

    address: Address = HostPort("127.0.0.1", 9100)
    """Address to listen on. Set `:9100` when the checks or Prometheus come from other hosts, and keep nodes
    away from it with a firewall."""


class Drain(_Section):
    """How the relay stops."""

    delay: SecondsOrZero = 0.0
    """How long the relay still accepts connections after it was told to stop and reports that it is not
    ready: the time that a balancer needs to notice (Kubernetes: to take the pod out of the endpoints)."""

    timeout: Seconds = 120.0
    """How long calls in flight may go on once `drain.delay` is over. Whoever stops the relay must wait longer
    than both together before killing it (Kubernetes: `terminationGracePeriodSeconds`)."""

    idle_grace: Seconds = 5.0
    """Idle time after which a node's connection is closed during a drain. Longer than the 3 s between two
    polls of a node, and shorter than `drain.timeout`. A proxy in front must close its own idle connections to
    the relay sooner than this, or it may send a call into one that is closing. Over gRPC clients are told to
    leave, and none of this is waited for."""


class Log(_Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""

    format: Literal["json", "console", "auto"] = "auto"
    """`json` is one object a line, `console` is for people, `auto` is `console` on a terminal and `json`
    elsewhere."""


class Settings(_Section):
    """The whole tree."""

    workers: Annotated[
        int,
        Field(strict=True, ge=1, le=256),
        Doc("whole number, 1 to 256", default=f"usable cores, at most {_MOST_WORKERS_BY_DEFAULT}"),
    ] = Field(default_factory=_usable_cores)
    """Processes that serve calls. One keeps one core busy; more of them than there are cores is waste."""

    mode: Literal["normal", "maintenance", "pass_through"] = "normal"
    """In `maintenance` the relay answers every call itself, in the way its node survives, and nothing reaches
    the SuperLink. `pass_through` is for emergencies: nothing but counting, logging and what says who may
    call (`auth`, `quarantine`), and `signing`, stands between nodes and SuperLink, and its answers pass as
    they are, even those that end nodes. A reload changes it."""

    pid_file: Annotated[PidFile | None, Doc("path")] = None
    """File that the master writes its process id to, for `flwr-relay reload`, in a directory that exists and
    can be written to."""

    upstream: Upstream = Upstream()
    signing: Signing | None = None
    # After `upstream` and `signing`: what a listener serves by default depends on them.
    listeners: Annotated[tuple[Listener, ...], AfterValidator(_some), Field(validate_default=True)] = (
        Listener(),
    )
    keys: Keys = Keys()
    client_certificates: ClientCertificates = ClientCertificates()
    node_keys: NodeKeys = NodeKeys()
    quarantine: Quarantine = Quarantine()
    inventory: Inventory = Inventory()
    limits: Limits = Limits()
    retry: Retry = Retry()
    repair: Repair = Repair()
    redelivery: Redelivery = Redelivery()
    breaker: Breaker = Breaker()
    shed: Shed = Shed()
    admin: Admin = Admin()
    drain: Drain = Drain()
    log: Log = Log()

    @field_validator("listeners")
    @classmethod
    def _serve_what_is_carried(
        cls, listeners: tuple[Listener, ...], info: ValidationInfo
    ) -> tuple[Listener, ...]:
        upstream: Upstream | None = info.data.get("upstream")  # None: refused, and that is reported already
        if upstream is None:
            return listeners
        can = carried(upstream.wire, signing=info.data.get("signing") is not None)
        default = {"wires": tuple(wire for wire in can if wire.grpc is upstream.wire.grpc)}
        return tuple(
            listener if listener.wires else listener.model_copy(update=default) for listener in listeners
        )
