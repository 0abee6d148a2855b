"""The settings: one frozen tree, from a YAML file and RELAY_ environment variables (a variable wins).

Unknown keys are refused, and every problem is reported at once. The tree itself is in `settings_tree`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from relay import (
    settings_auth,
    settings_nodes,
    settings_signing,
    settings_tls,
    settings_unused,
    settings_upstream,
)
from relay.settings_auth import Auth, Keys
from relay.settings_limits import Limits
from relay.settings_nodes import Inventory, NodeKeys, Quarantine
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
from relay.settings_tls import CertificateRule, ClientCertificates, Pair, Tls
from relay.settings_tree import (
    CARRIES,
    Admin,
    Drain,
    Listener,
    Log,
    Redelivery,
    Repair,
    Retry,
    Settings,
    Upstream,
    carried,
)
from relay.settings_types import BaseUrl, Doc, HostPort, RedisUrl, show_bytes, show_seconds
from relay.settings_upstream import Breaker, Health, Shed

__all__ = [
    "CARRIES",
    "Admin",
    "Auth",
    "BaseUrl",
    "Breaker",
    "CertificateRule",
    "ClientCertificates",
    "Drain",
    "Health",
    "HostPort",
    "Inventory",
    "Keys",
    "Limits",
    "Listener",
    "Log",
    "NodeKeys",
    "Pair",
    "Problem",
    "Quarantine",
    "Redelivery",
    "RedisUrl",
    "Repair",
    "Retry",
    "Settings",
    "SettingsError",
    "Shed",
    "Tls",
    "Upstream",
    "load",
]

# What would be right instead, for each type of error that pydantic knows, without pydantic's vocabulary.
_RIGHT: Final[Mapping[str, str]] = {
    "value_error": "{error}",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "model_type": "must be a mapping with any of the keys {keys}",
}


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
            broken.add(_to_leave_out(fault["loc"]))
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
    yield from _of_two_kinds(settings)
    yield from (_Conflict(*found) for found in settings_signing.conflicts(settings))
    yield from (_Conflict(*found) for found in settings_auth.conflicts(settings))
    yield from (_Conflict(*found) for found in settings_tls.conflicts(settings))
    yield from (_Conflict(*found) for found in settings_nodes.conflicts(settings))
    yield from (_Conflict(*found) for found in settings_upstream.conflicts(settings))
    yield from (_Conflict(*found) for found in settings_unused.conflicts(settings))
    limits = settings.limits
    if limits.header_size > limits.head_size:
        message = f"must be at most limits.head_size, which is {show_bytes(limits.head_size)}"
        size = show_bytes(limits.header_size)
        yield _Conflict((("limits", "header_size"), ("limits", "head_size")), size, message)
    retry, drain = settings.retry, settings.drain
    if retry.base > retry.cap:
        message = f"must be at most retry.cap, which is {show_seconds(retry.cap)}"
        yield _Conflict((("retry", "base"), ("retry", "cap")), show_seconds(retry.base), message)
    redelivery = settings.redelivery
    if redelivery.max_size > redelivery.memory // 4:
        most = show_bytes(redelivery.memory // 4)
        message = f"must be at most redelivery.memory / 4, which is {most}"
        yield _Conflict(
            (("redelivery", "max_size"), ("redelivery", "memory")), show_bytes(redelivery.max_size), message
        )
    if redelivery.redis is not None and not redelivery.enabled:
        message = "has no effect while redelivery.enabled is false: leave one of them out"
        yield _Conflict(
            (("redelivery", "redis"), ("redelivery", "enabled")), show(str(redelivery.redis)), message
        )
    if drain.idle_grace >= drain.timeout:
        message = f"must be shorter than drain.timeout, which is {show_seconds(drain.timeout)}"
        yield _Conflict(
            (("drain", "idle_grace"), ("drain", "timeout")), show_seconds(drain.idle_grace), message
        )


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
                can = carried(spoken, signing=settings.signing is not None)
                right = ", ".join(other.value for other in can)
                message = (
                    f"cannot be served, because upstream.wire is {spoken.value} and bridging between them is"
                    f" not available: serve {right}, or change upstream.wire"
                )
                yield _Conflict((("listeners", index, "wires"), ("upstream", "wire")), wire.value, message)


def _of_two_kinds(settings: Settings) -> Iterator[_Conflict]:
    for index, listener in enumerate(settings.listeners):
        key: Key = ("listeners", index)
        kinds = {wire.grpc for wire in listener.wires}
        if len(kinds) > 1:
            message = "cannot be served on one port, which speaks either HTTP or gRPC: add a listener"
            wires = ", ".join(wire.value for wire in listener.wires)
            yield _Conflict(((*key, "wires"),), wires, message)
        if kinds == {True} and listener.address.port == 0:
            message = "must have a port, because each worker opens it for gRPC by itself: write 1 to 65535"
            yield _Conflict(((*key, "address"), (*key, "wires")), str(listener.address), message)


def _problem(fault: ErrorDetails, source: Source) -> Problem:
    key = fault["loc"]
    if fault["type"] == "extra_forbidden":
        section = annotation_at(Settings, key[:-1])
        hint = closest(str(key[-1]), list(section.model_fields))
        return Problem(dotted(key), None, f"is not a setting; {hint}", source.origin(key))
    if fault["type"] == "missing":
        message = f"is missing, and has no default: {dotted(key[:-1])} needs it"
        return Problem(dotted(key), None, message, source.origin_of_section(key[:-1]))
    context = fault.get("ctx", {})
    if fault["type"] == "model_type":
        context = {"keys": ", ".join(annotation_at(Settings, key).model_fields)}
    template = _RIGHT.get(fault["type"])
    message = template.format_map(context) if template else fault["msg"]
    value = None if _is_secret(key) else show(fault["input"])
    return Problem(dotted(key), value, message, source.origin(key))


def _to_leave_out(key: Key) -> Key:
    """`key`, or the nearest part of the tree around it that can be left out."""
    # Never an entry of a list: taking it out would renumber the others.
    while isinstance(key[-1], int) or _is_required(key):
        key = key[:-1]
    return key


def _is_secret(key: Key) -> bool:
    section = annotation_at(Settings, key[:-1])
    field = getattr(section, "model_fields", {}).get(key[-1])
    return field is not None and any(isinstance(entry, Doc) and entry.secret for entry in field.metadata)


def _is_required(key: Key) -> bool:
    section = annotation_at(Settings, key[:-1])
    field = section.model_fields.get(key[-1])
    return field is not None and field.is_required()


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
