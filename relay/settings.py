"""The settings: one frozen tree, from a YAML file and RELAY_ environment variables (a variable wins).

Unknown keys are refused, and every problem is reported at once. `docs/configuration.md` is made from here.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from relay.call import Wire
from relay.settings_source import (
    Key,
    Problem,
    SettingsError,
    Source,
    annotation_at,
    closest,
    dotted,
    read,
    show,
)
from relay.settings_types import (
    Address,
    BaseUrl,
    Bytes,
    CaFile,
    Doc,
    HostPort,
    Network,
    Seconds,
    Url,
    below,
)

__all__ = [
    "CARRIES",
    "Admin",
    "BaseUrl",
    "Drain",
    "HostPort",
    "Limits",
    "Listener",
    "Log",
    "Problem",
    "Settings",
    "SettingsError",
    "Upstream",
    "load",
]

CARRIES: Final[Mapping[Wire, tuple[Wire, ...]]] = {
    Wire.HTTP_V1: (Wire.HTTP_V1,),
    Wire.REST_V0: (Wire.REST_V0,),
}
"""For each wire that a SuperLink speaks, the wires of nodes whose calls can be carried to it."""

_T = TypeVar("_T")

_MOST_WORKERS_BY_DEFAULT = 4

# What would be right instead, for each type of error that pydantic knows, without pydantic's vocabulary.
_RIGHT: Final[Mapping[str, str]] = {
    "value_error": "{error}",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "model_type": "must be a mapping with any of the keys {keys}",
}


def _usable_cores() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS_BY_DEFAULT)


def _some(entries: tuple[_T, ...]) -> tuple[_T, ...]:
    # Not Field(min_length=1): that counts the valid entries alone, and so complains twice about a wrong one.
    if not entries:
        raise ValueError("must have at least one entry")
    return entries


def _each_once(wires: tuple[Wire, ...]) -> tuple[Wire, ...]:
    if len(set(wires)) < len(wires):
        raise ValueError("must name each wire once")
    return wires


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_all_defaults(cls, value: object) -> object:
        """A section whose every key is commented out is null in YAML."""
        return {} if value is None else value


class Listener(_Section):
    """One port that SuperNodes connect to."""

    address: Address = HostPort("0.0.0.0", 8080)  # noqa: S104 - nodes come from other hosts
    """Address to listen on. `:8080` is every IPv4 interface, `[::]:8080` every IPv6 one; port 0 is any free
    port."""

    wires: Annotated[
        tuple[Wire, ...],
        AfterValidator(_some),
        AfterValidator(_each_once),
        Doc("list of `http_v1`, `rest_v0`", default="every wire that `upstream.wire` carries"),
    ] = ()
    """Wires (generations of Flower's Fleet API) served on this port: `http_v1` is spoken by nodes of flwr
    1.40 and newer, `rest_v0` by nodes of flwr 1.23 to 1.32 started with `--rest`."""

    trusted_proxies: Annotated[tuple[Network, ...], Doc("list of networks")] = ()
    """Networks of the proxies in front of the relay. `Forwarded` and `X-Forwarded-*` are believed from these
    alone; from any other peer they are ignored."""

    keepalive: Seconds = 75.0
    """Idle time after which a node's connection is closed. Keep it longer than that of a load balancer in
    front, so that the balancer never sends a call into a connection that is closing."""


class Upstream(_Section):
    """The SuperLink, and how calls travel to it."""

    url: Url = BaseUrl("http", "127.0.0.1", 8000)
    """Where the SuperLink listens: `http` or `https`, host and port (80 or 443 when left out), no path."""

    wire: Annotated[Wire, Doc("`http_v1` or `rest_v0`", lambda wire: wire.value)] = Wire.HTTP_V1
    """Wire that the SuperLink speaks: `http_v1` for flwr 1.40 and newer, `rest_v0` for flwr 1.23 to 1.32 that
    was started with `--fleet-api-type rest`."""

    ca_file: Annotated[CaFile | None, Doc("path")] = None
    """PEM file of the certificate authorities that an `https` SuperLink is checked against, relative to the
    working directory; without one, the system's authorities are used."""

    connect_timeout: Seconds = 3.0
    """How long opening a connection to the SuperLink may take, the TLS handshake included."""

    response_timeout: Annotated[Seconds, below(30, "an HTTP v1 node gives up on a call after 30 s")] = 25.0
    """How long the SuperLink may take to begin its answer once it has the call. Below 30 s, when a node gives
    up."""

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


class Limits(_Section):
    """What a call may cost."""

    max_body: Annotated[Bytes, Field(ge=1)] = 4 << 30
    """Largest body of a call or of its answer, in bytes or with a unit (`KiB`, `MiB`, `GiB`, `TiB`). It must
    hold the largest object of a run: one array of a model and about 300 bytes."""


class Admin(_Section):
    """The port of health checks and metrics. It is not for nodes."""

    address: Address = HostPort("127.0.0.1", 9100)
    """Address to listen on. Set `:9100` when the checks or Prometheus come from other hosts, and keep nodes
    away from it with a firewall."""


class Drain(_Section):
    """How the relay stops."""

    timeout: Seconds = 120.0
    """How long calls in flight may go on after the relay was told to stop. Whoever stops it must wait longer
    before killing it (Kubernetes: `terminationGracePeriodSeconds`)."""


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

    upstream: Upstream = Upstream()
    # After `upstream`: what a listener serves by default depends on it.
    listeners: Annotated[tuple[Listener, ...], AfterValidator(_some), Field(validate_default=True)] = (
        Listener(),
    )
    limits: Limits = Limits()
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
        carried = {"wires": CARRIES[upstream.wire]}
        return tuple(
            listener if listener.wires else listener.model_copy(update=carried) for listener in listeners
        )


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read the settings from the YAML file at `path` (None: no file) and the RELAY_ variables of `environ`.

    Raises SettingsError with every problem of both sources.
    """
    source = read(path, environ, Settings)
    problems = list(source.problems)
    broken: set[Key] = set()
    try:
        settings = Settings.model_validate(source.tree)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            problems.append(_problem(fault, source))
            broken.add(_nearest_name(fault["loc"]))
        # What is left without the broken keys is still checked for conflicts: one start shows everything.
        settings = Settings.model_validate(_without(source.tree, broken))
    if source.complete:
        problems += (
            Problem(
                dotted(conflict.keys[0]), conflict.value, conflict.message, source.origin(conflict.keys[0])
            )
            for conflict in _conflicts(settings)
            if not any(_touches(key, broken) for key in conflict.keys)
        )
    if problems:
        raise SettingsError(tuple(problems))
    return settings


@dataclass(frozen=True, slots=True)
class _Conflict:
    """Two values that are right alone and wrong together. The first key is the one that is reported."""

    keys: tuple[Key, ...]
    value: str
    message: str


def _conflicts(settings: Settings) -> Iterator[_Conflict]:
    yield from _overlaps(settings)
    yield from _uncarried(settings)
    upstream = settings.upstream
    if upstream.ca_file is not None and not upstream.url.tls:
        message = f"has no effect, because upstream.url is {upstream.url}: use https, or leave it out"
        yield _Conflict((("upstream", "ca_file"), ("upstream", "url")), show(str(upstream.ca_file)), message)


def _overlaps(settings: Settings) -> Iterator[_Conflict]:
    addresses: list[tuple[Key, HostPort]] = [
        (("listeners", index, "address"), listener.address)
        for index, listener in enumerate(settings.listeners)
    ]
    addresses.append((("admin", "address"), settings.admin.address))
    for (key, address), (other_key, other) in combinations(addresses, 2):
        if address.overlaps(other):
            message = f"cannot be listened on beside {dotted(other_key)}, which is {other}: use another port"
            yield _Conflict((key, other_key), str(address), message)


def _uncarried(settings: Settings) -> Iterator[_Conflict]:
    spoken = settings.upstream.wire
    for index, listener in enumerate(settings.listeners):
        for wire in listener.wires:
            if wire not in CARRIES[spoken]:
                right = ", ".join(carried.value for carried in CARRIES[spoken])
                message = (
                    f"cannot be served, because upstream.wire is {spoken.value} and bridging between them is"
                    f" not available: serve {right}, or change upstream.wire"
                )
                yield _Conflict((("listeners", index, "wires"), ("upstream", "wire")), wire.value, message)


def _problem(fault: ErrorDetails, source: Source) -> Problem:
    key = fault["loc"]
    if fault["type"] == "extra_forbidden":
        section = annotation_at(Settings, key[:-1])
        hint = closest(str(key[-1]), list(section.model_fields))
        return Problem(dotted(key), None, f"is not a setting; {hint}", source.origin(key))
    context = fault.get("ctx", {})
    if fault["type"] == "model_type":
        context = {"keys": ", ".join(annotation_at(Settings, key).model_fields)}
    template = _RIGHT.get(fault["type"])
    message = template.format_map(context) if template else fault["msg"]
    return Problem(dotted(key), show(fault["input"]), message, source.origin(key))


def _nearest_name(key: Key) -> Key:
    """`key` without trailing indexes: taking an entry out of a list would renumber the others."""
    while isinstance(key[-1], int):
        key = key[:-1]
    return key


def _touches(key: Key, broken: set[Key]) -> bool:
    return any(key[: len(known)] == known for known in broken)


def _without(node: Any, broken: set[Key], at: Key = ()) -> Any:
    if isinstance(node, dict):
        return {
            name: _without(child, broken, (*at, name))
            for name, child in node.items()
            if (*at, name) not in broken
        }
    if isinstance(node, list):
        return [_without(child, broken, (*at, index)) for index, child in enumerate(node)]
    return node
