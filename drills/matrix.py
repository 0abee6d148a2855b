"""The matrix of drills: in which configurations each is run, and why it is left out of the others."""

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from relay.call import Wire

#: Wires that the drills know how to break.
WIRES = (Wire.HTTP_V1, Wire.REST_V0, Wire.GRPC)


class Edge(enum.Enum):
    """What the SuperNodes connect to."""

    DIRECT = "direct"
    NGINX = "nginx"


class Setup(enum.Enum):
    """How the SuperLink runs. In each its state is in a database."""

    OUTSIDE = "ServerApps are started by a SuperExec beside the SuperLink, and outlive it"
    INSIDE = "ServerApps are children of the SuperLink, and die with it"
    TWO_WAYS = "as OUTSIDE, and the relay has two addresses of the SuperLink, through a proxy each"
    CUTTABLE = "as OUTSIDE, and SuperNodes reach the relay through a proxy that can cut their connections"


@dataclass(frozen=True, slots=True)
class Configuration:
    """One column of the matrix.

    Attributes:
        wire: what SuperNodes speak.
        tls: whether SuperNodes use TLS. The SuperLink does not; nginx ends it where there is one.
        edge: what the SuperNodes connect to.
        keys: whether the relay lets nobody in without an API key.
        grpc_superlink: whether the SuperLink speaks gRPC; for nodes that do.
    """

    wire: Wire
    tls: bool
    edge: Edge
    keys: bool = False
    grpc_superlink: bool = False

    def __str__(self) -> str:
        keys = ", keys" if self.keys else ""
        wire = f"{self.wire.value} to {self.upstream.value}" if self.grpc_superlink else self.wire.value
        return f"{wire}, {'TLS' if self.tls else 'plain'}, {self.edge.value}{keys}"

    @property
    def upstream(self) -> Wire:
        """What the SuperLink speaks: HTTP v1 to gRPC nodes, too, because a fault proxy cannot read gRPC."""
        if self.grpc_superlink:
            return Wire.GRPC
        return Wire.HTTP_V1 if self.wire.grpc else self.wire


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drill needs to make sense, and how the SuperLink runs in it.

    Attributes:
        tls: that nodes use it.
        readable: that a proxy before the relay can read what nodes are told, or guess it (gRPC).
        calls: that the proxy before the SuperLink can tell one call from another.
        edge: what they connect to; None for either.
        setup: of the SuperLink.
        not_direct: why a wire cannot live through it without something before the relay.
    """

    tls: bool = False
    readable: bool = False
    calls: bool = False
    edge: Edge | None = None
    setup: Setup = Setup.OUTSIDE
    not_direct: tuple[tuple[Wire, str], ...] = ()

    def missing(self, configuration: Configuration) -> str | None:
        """Return why a drill with these needs is left out of a configuration; None when it is not."""
        if self.tls and not configuration.tls:
            return "it is about TLS handshakes"
        if self.readable and configuration.tls and not configuration.wire.grpc:
            return "the proxy before the relay has to read what nodes are told"
        if self.calls and configuration.upstream.grpc:
            return "the proxy before the SuperLink has to read its calls"
        if self.edge is not None and self.edge is not configuration.edge:
            return f"it is about {self.edge.value}"
        if configuration.edge is Edge.DIRECT:
            return dict(self.not_direct).get(configuration.wire)
        return None


def configurations(
    wires: Sequence[Wire] = WIRES,
    tls: Sequence[bool] = (False, True),
    edges: Sequence[Edge] = tuple(Edge),
    *,
    keys: bool = False,
    grpc_superlink: bool = False,
) -> list[Configuration]:
    """Return every combination. No node can present an API key over gRPC, and only gRPC nodes meet gRPC."""
    return [
        Configuration(*chosen, keys=keys, grpc_superlink=grpc_superlink)
        for chosen in product(wires, tls, edges)
        if not (keys if chosen[0].grpc else grpc_superlink)
    ]


@dataclass(frozen=True, slots=True)
class Left:
    """A cell of the matrix that is not run."""

    drill: str
    configuration: Configuration
    why: str


def left_out(needs: Iterable[tuple[str, Needs]], columns: Sequence[Configuration]) -> Iterator[Left]:
    """Yield every cell that makes no sense; `needs` are the drills' names with what they need."""
    for name, need in needs:
        for configuration in columns:
            why = need.missing(configuration)
            if why is not None:
                yield Left(name, configuration, why)
