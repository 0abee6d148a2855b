"""The sections of the settings about what a call may cost."""

from typing import Annotated

from pydantic import Field

from relay.fleet import MAX_REQUEST, Kind
from relay.settings_section import Section
from relay.settings_types import Bytes, BytesOrZero, Doc, Flag, Seconds

_CountOrZero = Annotated[int, Field(strict=True, ge=0), Doc("whole number, or 0")]


class Requests(Section):
    """Longest body of the calls that carry ids and keys alone. `push-messages` and `push-object` carry what a
    model is made of: for them `limits.max_body` counts."""

    join: Bytes = MAX_REQUEST[Kind.JOIN]
    """`register-node` and `activate-node`, which carry a public key."""

    leave: Bytes = MAX_REQUEST[Kind.LEAVE]
    """`deactivate-node` and `unregister-node`."""

    heartbeat: Bytes = MAX_REQUEST[Kind.HEARTBEAT]
    """`send-node-heartbeat`."""

    pull: Bytes = MAX_REQUEST[Kind.PULL]
    """`pull-messages`."""

    fetch: Bytes = MAX_REQUEST[Kind.FETCH]
    """`get-run`, `get-fab` and `pull-object`."""

    confirm: Bytes = MAX_REQUEST[Kind.CONFIRM]
    """`confirm-message-received`."""


class Limits(Section):
    """What a call may cost. A call over a limit is answered in the way its node survives."""

    max_body: Annotated[Bytes, Field(ge=1)] = 4 << 30
    """Largest body of a call, and with a gRPC SuperLink of its answer, in bytes or with a unit (`KiB`, `MiB`,
    `GiB`, `TiB`). It must hold the largest object of a run: one array of a model and about 300 bytes.
    Flower's gRPC carries up to 2 GiB."""

    header_count: Annotated[int, Field(strict=True, ge=20), Doc("whole number, at least 20")] = 100
    """Most headers of a call; over gRPC, most metadata."""

    header_size: Annotated[Bytes, Field(ge=1024)] = 16 * 1024
    """Longest header of a call, with its name, and longest first line. A proxy that passes the certificates
    of nodes on in a header may need more."""

    head_size: Annotated[Bytes, Field(ge=1024)] = 32 * 1024
    """Longest first line and headers of a call together, at least `limits.header_size`."""

    head_timeout: Seconds = 20.0
    """Longest time from the first byte of a call to the end of its headers; then the connection is closed. On
    gRPC ports also the longest time for a client to say that it speaks HTTP/2."""

    min_rate: BytesOrZero = 1024
    """Bytes per second that a node must send of a body, or take of an answer, while the relay waits for it;
    0 for no such bound. Raise it if your slowest site has a better line: who keeps to this rate may hold a
    connection to the SuperLink for as long as the body lasts."""

    rate_window: Seconds = 60.0
    """Time over which `limits.min_rate` is averaged: a line that stalls may catch up."""

    connections: _CountOrZero = 0
    """Most connections of a worker on one port, 0 for any number. The calls on a connection beyond that are
    told to come back later, and it is closed; beyond twice that number it is closed at once. A gRPC node has
    one connection, and for a moment two of them each half minute."""

    connections_per_peer: _CountOrZero = 0
    """Most connections of a worker from one address, 0 for any number. Nodes behind one NAT share an address.
    Behind a proxy of `trusted_proxies` it is the calls in flight that count, by the address that the proxy
    tells."""

    check_calls: Flag = True
    """Refuse a call that is not what any SuperNode sends: protobuf, with the ids that its method needs.
    `false` counts such calls, and lets them pass."""

    requests: Requests = Requests()
    max_held: Annotated[Bytes, Field(ge=1)] = 256 << 20
    """Bytes of messages that one worker holds at a time where it cannot pass them on piece by piece: to and
    from a gRPC SuperLink, from nodes of `grpc_adapter`, and answers to gRPC nodes of which nobody says how
    long they are. Further ones wait, and their nodes are told to come again if that takes too long. One whose
    length is not known takes 8 MiB, and more as it grows. One at a time may exceed the bound, so that it
    comes to its end: a worker holds at most `max_held` and the longest message. Answers of a gRPC SuperLink
    count 8 MiB each until they are here. For a moment a message takes up to three times as much memory as it
    has bytes."""
