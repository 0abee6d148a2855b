"""The sections of the settings about who is let in: what a listener asks for, and where API keys are kept."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, PlainValidator

from relay.settings_files import PepperFile, StoreFile
from relay.settings_section import Section
from relay.settings_source import Found, Key, show
from relay.settings_types import Doc, Flag, RedisServer, SecondsOrZero

if TYPE_CHECKING:
    from relay.settings_tree import Settings

CREDENTIALS: Final = ("api_key", "certificate", "node_signature")
"""The ways in which a node can prove who it is."""


def _names(value: object) -> tuple[str, ...]:
    """Read the name of a credential, or several joined by `+`."""
    known = ", ".join(CREDENTIALS)
    right = f"must be one of {known}, or several joined by +, such as {'+'.join(CREDENTIALS[:2])}"
    if isinstance(value, tuple):
        value = "+".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(right)  # noqa: TRY004 - pydantic collects ValueError
    names = tuple(name.strip() for name in value.split("+"))
    if not set(names) <= set(CREDENTIALS):
        raise ValueError(right)
    if len(set(names)) < len(names):
        raise ValueError("must name each credential once")
    return names


def _none_in_vain(accept: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    for index, names in enumerate(accept):
        for other in accept[:index] + accept[index + 1 :]:
            if set(other) <= set(names) and (set(other) < set(names) or accept.index(other) < index):
                raise ValueError(f"needs no {'+'.join(names)}, because {'+'.join(other)} is accepted already")
    return accept


class Auth(Section):
    """Who may call on this port. With nothing in `accept`, everybody may."""

    accept: Annotated[
        tuple[Annotated[tuple[str, ...], PlainValidator(_names)], ...],
        AfterValidator(_none_in_vain),
        Doc("list of `api_key`, `certificate`, `node_signature`, or several of them joined by `+`"),
    ] = ()
    """Credentials that let a node in: any entry is enough, and of an entry such as
    `certificate+node_signature` all are needed."""

    strangers: Literal["refuse", "drop"] = "refuse"
    """What becomes of a call whose credential is missing or wrong. `refuse` answers 401, which shuts a node
    down: the right thing for a key that was revoked. `drop` closes the connection without an answer, so that
    a stranger learns nothing and a node tries again; a heartbeat of a legacy REST node gets 503."""

    forward: Flag = False
    """Whether `Authorization` and `X-API-Key` are sent on to the SuperLink, with or without something in
    `accept`. The proof of a node's own key (`flwr-*` headers) always is."""

    enforce: Flag = True
    """`false` counts the calls that would be refused, and lets them pass."""


class Keys(Section):
    """API keys: where they are kept. `flwr-relay keys` makes them; a change is effective within 2 s."""

    file: Annotated[StoreFile | None, Doc("path")] = None
    """File with the keys of this relay, in a directory that the user of `flwr-relay keys` may write to. It
    holds hashes alone."""

    redis: Annotated[RedisServer | None, Doc("URL", secret=True)] = None
    """Redis server with the keys of all relays, in place of a file: `redis://user:password@host:6379/0`,
    `rediss://` for TLS (`?ssl_ca_certs=PATH` for an authority of your own), or `unix:///path?db=0`."""

    pepper_file: Annotated[PepperFile | None, Doc("path")] = None
    """File with a secret of at least 16 bytes that the hashes of keys depend on, kept apart from them. A key
    is bound to the one it was made with."""

    stale: SecondsOrZero = 3600.0
    """How long keys stay valid as they were last read while Redis does not answer. After that nodes are told
    to come back later, and live on; 0 is for ever."""


def conflicts(settings: "Settings") -> Iterator[Found]:
    """Yield what does not fit together: keys that nobody asks for, or that are asked for and kept nowhere."""
    keys = settings.keys
    stores: tuple[Key, Key] = (("keys", "file"), ("keys", "redis"))
    if keys.file is None:
        stores = (stores[1], stores[0])
    if keys.file is not None and keys.redis is not None:
        message = "cannot be used beside keys.redis: keep one of them"
        yield stores, show(str(keys.file)), message
    kept = keys.file is not None or keys.redis is not None
    if keys.pepper_file is not None and not kept:
        message = "has no effect without keys: set keys.file or keys.redis, or leave it out"
        yield (("keys", "pepper_file"), *stores), show(str(keys.pepper_file)), message
    lists: list[Key] = [("listeners", index, "auth", "accept") for index in range(len(settings.listeners))]
    asking = [
        key
        for key, listener in zip(lists, settings.listeners, strict=True)
        if any("api_key" in names for names in listener.auth.accept)
    ]
    if asking and not kept:
        message = "needs a place where keys are kept: set keys.file or keys.redis"
        for key in asking:
            yield (key, *stores), "api_key", message
    elif kept and not asking:
        message = "has no effect, because no listener asks for a key: add api_key to listeners[0].auth.accept"
        yield (*stores, *lists), show(str(keys.file or keys.redis)), message
