"""The section of the settings about nodes that cannot sign, and when they are served."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relay.call import Wire
from relay.settings_files import SigningDirectory
from relay.settings_section import Section
from relay.settings_source import Found, Key, dotted, show
from relay.settings_types import Flag, Seconds

if TYPE_CHECKING:
    from relay.settings_tree import Listener, Settings


class Signing(Section):
    """Signatures for nodes that cannot sign: those of `rest_v0` before a SuperLink of another wire, which
    demands them. Without this section, such nodes are not served. The relay holds a key pair for each node,
    and signs for it only when the caller is the one who registered it."""

    directory: SigningDirectory
    """Directory of the secret that all key pairs are derived from, and of a small file per node; it is made
    at the first start, for the user of the relay alone. Keep it: without it the nodes have to be restarted.
    To part with a node, remove its file in `nodes`; the node exits within a minute. Several relays share the
    directory, or have the same `secret` in it while each node stays with one relay."""

    unauthenticated: Flag = False
    """Also sign for callers who are not asked who they are. Whoever knows a node id can then act as that
    node: for closed networks and tests."""

    forget_after: Seconds = 30 * 24 * 3600.0
    """Time after which a node that was not heard of is forgotten. To come back, it has to be restarted."""


def signed_for(wire: Wire, upstream: Wire) -> bool:
    """Whether nodes of `wire` need the relay's signature before a SuperLink that speaks `upstream`."""
    return wire is Wire.REST_V0 and upstream is not Wire.REST_V0


def conflicts(settings: "Settings") -> Iterator[Found]:
    """Yield what does not fit together."""
    signing, spoken = settings.signing, settings.upstream.wire
    if signing is not None and spoken is Wire.REST_V0:
        message = "has no effect, because upstream.wire is rest_v0, which has no signatures: leave it out"
        keys: tuple[Key, ...] = (("signing", "directory"), ("upstream", "wire"))
        yield keys, show(str(signing.directory)), message
    for index, listener in enumerate(settings.listeners):
        for wire in listener.wires:
            if not signed_for(wire, spoken):
                continue
            key: Key = ("listeners", index, "wires")
            if signing is None:
                message = (
                    f"cannot be served, because upstream.wire is {spoken.value}, whose SuperLink demands"
                    " signatures that these nodes do not make: set signing.directory, or do not serve it"
                )
                yield (key, ("upstream", "wire"), ("signing",)), wire.value, message
            elif not signing.unauthenticated and not asks(listener):
                message = (
                    "cannot be served to callers who are not asked who they are, because the relay would sign"
                    f" for whoever knows a node id: set {dotted((*key[:-1], 'auth', 'accept'))}, or"
                    " signing.unauthenticated: true in a closed network"
                )
                yield (key, ("signing", "unauthenticated")), wire.value, message


def asks(listener: "Listener") -> bool:
    """Return whether nobody gets in on this port without a proof of who he is."""
    auth = getattr(listener, "auth", None)
    return auth is not None and bool(auth.accept) and bool(auth.enforce)
