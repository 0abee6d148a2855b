"""Settings that would have no effect: whoever wrote one believes that it does something.

Only what was written counts, and only if it is another value than the default: a copy of `relay.example.yaml`
is no mistake. What stands beside the switch of its own section (`enabled`, `mode`) may stay when that is
switched off, so that it can be switched on again.

What says who may do what is refused. A measure that nothing goes by is only spoken of: many relays may share
one file, and what is taken out of it by a reload may leave its measures behind.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relay.call import Wire
from relay.settings_section import Section
from relay.settings_signing import asks
from relay.settings_source import Found, Key, dotted
from relay.settings_types import Doc

if TYPE_CHECKING:
    from relay.settings_tree import Settings

#: What is for the connections of HTTP that the relay opens.
_TO_HTTP = ("keepalive", "max_connections", "resolve_interval", "shared_state")
_HEALTH = ("interval", "timeout", "failures", "ejection", "max_ejection")


def conflicts(settings: "Settings") -> Iterator[Found]:
    """Yield what was set to say who may do what, and does not with the rest."""
    yield from _auth(settings)
    yield from _who(settings)
    yield from _signing(settings)


def idle(settings: "Settings") -> list[str]:
    """Return a line for each measure that was set and that nothing goes by."""
    found = (*_limits(settings), *_stores(settings), *_upstream(settings))
    return [f"{dotted(keys[0])} = {value}: {message}" for keys, value, message in found]


def _auth(settings: "Settings") -> Iterator[Found]:
    for index, listener in enumerate(settings.listeners):
        at: Key = ("listeners", index, "auth")
        accept: Key = (*at, "accept")
        if not listener.auth.accept:
            # That nothing is accepted is meant only where it is written beside it.
            names = {"strangers", "enforce"}
            if "accept" not in listener.auth.model_fields_set:
                names = names & listener.auth.model_fields_set
            else:
                names = {name for name in names if _changed(listener.auth, name)}
            message = (
                f"has no effect, because {dotted(accept)} is empty and lets everybody call: name a credential"
                " there, or leave this out"
            )
            for name in sorted(names):
                yield ((*at, name), accept), _shown(listener.auth, name), message


def _limits(settings: "Settings") -> Iterator[Found]:
    limits = settings.limits
    if not limits.min_rate:
        yield from _unused(
            limits, ("limits",), ("rate_window",), "limits.min_rate is 0", (("limits", "min_rate"),)
        )
    if settings.upstream.wire is not Wire.GRPC and not any(
        listener.speaks_grpc for listener in settings.listeners
    ):
        about: tuple[Key, ...] = (("listeners",), ("upstream",))
        yield from _unused(limits, ("limits",), ("max_held",), "nobody speaks gRPC", about)


def _who(settings: "Settings") -> Iterator[Found]:
    listeners: tuple[Key, ...] = (("listeners",),)
    if not any("node_signature" in names for each in settings.listeners for names in each.auth.accept):
        why = "no listener asks for node_signature in auth.accept"
        names = ("verify", "window", "ahead")
        yield from _unused(settings.node_keys, ("node_keys",), names, why, listeners)
    if settings.quarantine.file is None:
        why, file = "quarantine.file is not set", ("quarantine", "file")
        yield from _unused(settings.quarantine, ("quarantine",), ("enforce",), why, (file,))
    for index, listener in enumerate(settings.listeners):
        if not any("certificate" in names for names in listener.auth.accept):
            at: Key = ("listeners", index)
            accept: Key = (*at, "auth", "accept")
            why = f"{dotted(accept)} names no certificate"
            yield from _unused(listener, at, ("client_certificate_header",), why, (accept,))


def _stores(settings: "Settings") -> Iterator[Found]:
    if settings.keys.redis is None:
        why = "keys.redis is not set, and a file is never away"
        yield from _unused(settings.keys, ("keys",), ("stale",), why, (("keys", "redis"),))
    inventory = settings.inventory
    if not inventory.enabled:
        why, switch = "inventory.enabled is false", ("inventory", "enabled")
        yield from _unused(inventory, ("inventory",), ("redis",), why, (switch,))


def _signing(settings: "Settings") -> Iterator[Found]:
    signing, spoken = settings.signing, settings.upstream.wire
    if signing is None or spoken is Wire.REST_V0:
        return
    serving = [listener for listener in settings.listeners if Wire.REST_V0 in listener.wires]
    at: Key = ("signing",)
    if not serving:
        why = "no listener serves rest_v0, whose nodes it is for"
        yield ((*at, "directory"), ("listeners",)), _shown(signing, "directory"), _said(why)
    elif all(map(asks, serving)):
        why = "each listener of rest_v0 asks callers who they are"
        yield from _unused(signing, at, ("unauthenticated",), why, (("listeners",),))


def _upstream(settings: "Settings") -> Iterator[Found]:
    upstream, at = settings.upstream, ("upstream",)
    wire: Key = (*at, "wire")
    if upstream.wire is Wire.GRPC:
        names = tuple(name for name in _TO_HTTP if name != "shared_state" or not upstream.addresses)
        yield from _unused(upstream, at, names, "upstream.wire is grpc", (wire,))
    if not upstream.standby:
        why = "upstream.standby is empty"
        yield from _unused(upstream, at, ("standby_after",), why, ((*at, "standby"),))
    if not upstream.standby and not upstream.addresses:
        why = "upstream.url is the only address, and there is nothing to choose"
        others: tuple[Key, ...] = ((*at, "addresses"), (*at, "standby"))
        yield from _unused(upstream.health, (*at, "health"), _HEALTH, why, others)


def _unused(
    section: Section, at: Key, names: tuple[str, ...], why: str, others: tuple[Key, ...]
) -> Iterator[Found]:
    for name in names:
        if _changed(section, name):
            yield ((*at, name), *others), _shown(section, name), _said(why)


def _said(why: str) -> str:
    return f"has no effect, because {why}: leave it out"


def _changed(section: Section, name: str) -> bool:
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return name in section.model_fields_set and getattr(section, name) != default


def _shown(section: Section, name: str) -> str:
    docs = [entry for entry in type(section).model_fields[name].metadata if isinstance(entry, Doc)]
    value = getattr(section, name)
    return docs[0].show(value) if docs else str(value)
