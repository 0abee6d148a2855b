"""The sections of the settings about nodes: their keys, quarantine, and what is known of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from relay.call import Wire
from relay.credentials import allowed_keys
from relay.settings_files import StoreFile
from relay.settings_section import Section
from relay.settings_source import Found, Key, show
from relay.settings_types import Doc, Flag, RedisServer, Seconds
from relay.stores import lists, quarantine_list

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.settings_tree import Settings


def _readable(parse: "Callable[[str], object]") -> AfterValidator:
    """A check of a list: that it can be used, if it is there. The command line makes it when it is needed."""

    def check(path: Path) -> Path:
        try:
            parse(lists.read(path))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        except lists.ListError as error:
            raise ValueError(str(error)) from None
        return path

    return AfterValidator(check)


class NodeKeys(Section):
    """The keys with which nodes of flwr 1.40 and newer sign their calls: what `node_signature` in
    `listeners[].auth.accept` asks for."""

    allow: Annotated[Annotated[StoreFile, _readable(allowed_keys.parse)] | None, Doc("path")] = None
    """File with the public keys that are allowed, one a line as in OpenSSH's `authorized_keys`; made by
    `flwr-relay nodes allow FILE` for the owner of its directory alone, and a change is effective within 2 s.
    Without it any key is. As long as it is not there, nodes are told to come back later."""

    verify: Literal["always", "local"] = "always"
    """`always` verifies the signature of each call, which takes a third of a millisecond, so that a wrong one
    never reaches the SuperLink. `local` verifies it only where the relay answers itself with something that
    is worth protecting; else it looks at key and timestamp alone, and leaves the signature to the SuperLink,
    which verifies it in any case. What a limit or a log knows of the caller may then be somebody else's
    name."""

    window: Seconds = 300.0
    """How old a signature may be, apart from `node_keys.ahead`. A SuperLink takes 300 s; a shorter time
    keeps out nodes with a slow clock or line; none is shut down for it."""

    ahead: Seconds = 5.0
    """By how much the clock of a node may be wrong. A SuperLink takes 5 s."""


class Quarantine(Section):
    """Nodes that are kept out without being ended: they wait, and go on when they are released."""

    file: Annotated[Annotated[StoreFile, _readable(quarantine_list.parse)] | None, Doc("path")] = None
    """File with the node ids, key fingerprints and identities that are in quarantine; made by `flwr-relay
    nodes quarantine` for the owner of its directory alone, and a change is effective within 2 s."""

    enforce: Flag = True
    """`false` counts the calls that would be refused, and lets them pass."""


class Inventory(Section):
    """What is known of each node: `flwr-relay nodes`, and `/nodes` on the admin port."""

    enabled: Flag = True
    """Whether nodes are written down at all."""

    nodes: Annotated[int, Field(strict=True, ge=64, le=500_000), Doc("whole number, 64 to 500000")] = 16384
    """Nodes that there is room for, at 400 bytes each, taken as it is needed. Twice as many as there are
    nodes lose nearly none. A restart changes it, a reload does not."""

    keep: Seconds = 86400.0
    """How long a node is kept after its last call. One that the SuperLink never accepted is kept for 10
    minutes at most."""

    redis: Annotated[RedisServer | None, Doc("URL", secret=True)] = None
    """Redis for relays on several hosts, as in `keys.redis`: each writes its nodes there every 10 s, and
    shows those of all. Without it a host shows the nodes that called it."""


def conflicts(settings: "Settings") -> Iterator[Found]:
    """Yield what does not fit together."""
    asked = False
    for index, listener in enumerate(settings.listeners):
        accept = listener.auth.accept
        asked = asked or any("node_signature" in names for names in accept)
        if accept and all("node_signature" in names for names in accept) and Wire.REST_V0 in listener.wires:
            at: Key = ("listeners", index)
            message = (
                "cannot be asked of rest_v0 nodes, which sign nothing and would all end: accept api_key"
                " or certificate as well, or serve them on another port"
            )
            yield ((*at, "auth", "accept"), (*at, "wires")), "node_signature", message
    allow = settings.node_keys.allow
    if allow is not None and not asked:
        message = (
            "has no effect, because no listener asks for a signature: add node_signature to"
            " listeners[0].auth.accept"
        )
        yield (("node_keys", "allow"), ("listeners",)), show(str(allow)), message
    quarantine = settings.quarantine.file
    if quarantine is not None and quarantine == allow:
        message = "cannot be the file of node_keys.allow as well: write another path"
        yield (("quarantine", "file"), ("node_keys", "allow")), show(str(quarantine)), message
