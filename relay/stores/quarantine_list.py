"""The list of who is in quarantine. A line:

    node|key|identity VALUE [SINCE] [REASON...]

`node` is a node id in decimal, `key` the fingerprint of a node's public key as `ssh-keygen -lf` prints it,
`identity` a name that a credential gives (API key, certificate, allowed node key), with `TENANT/` before it
if it has one. SINCE is ISO 8601, REASON the rest of the line. `#` begins a comment line.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from relay.stores import lists

if TYPE_CHECKING:
    from relay.call import Identity

KINDS = ("node", "key", "identity")

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_MOST_NODES = 1 << 64
#: Control characters, and what Python makes of bytes on a command line that are no UTF-8.
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Entry(NamedTuple):
    """Who is in quarantine, since when (ISO 8601, "" if unknown) and why."""

    kind: str
    value: str
    since: str = ""
    reason: str = ""


class QuarantineList:
    """Everybody who is in quarantine, by what they can be known by."""

    __slots__ = ("entries", "identities", "keys", "nodes")

    def __init__(self, entries: tuple[Entry, ...] = ()) -> None:
        """Hold these entries."""
        self.entries = entries
        self.nodes = {int(entry.value): entry for entry in entries if entry.kind == "node"}
        self.keys = {entry.value: entry for entry in entries if entry.kind == "key"}
        self.identities = {entry.value: entry for entry in entries if entry.kind == "identity"}

    def find(
        self, *, node_id: int | None = None, fingerprint: str = "", identity: Identity | None = None
    ) -> Entry | None:
        """Return the entry for what is known of a caller; None if it is not in quarantine."""
        if node_id is not None and (found := self.nodes.get(node_id)):
            return found
        if fingerprint and (found := self.keys.get(fingerprint)):
            return found
        if identity is not None and self.identities:
            return self.identities.get(
                f"{identity.tenant}/{identity.name}" if identity.tenant else identity.name
            )
        return None


def parse(text: str) -> QuarantineList:
    """Return the list that a file holds; an empty one is one.

    Raises:
        ListError: a line is wrong.
    """
    return QuarantineList(tuple(entry for _, entry in lists.parse(text, _entry)))


def numbered(text: str) -> list[tuple[int, Entry]]:
    """Return the entries of a list with the numbers of their lines. Raises ListError."""
    return list(lists.parse(text, _entry))


def line(entry: Entry) -> str:
    """Return the line of an entry; what is not printable in its reason becomes spaces."""
    value = quote(entry.value, safe="/:@+ .,=()~").replace(" ", "%20")
    reason = "".join(character if character.isprintable() else " " for character in entry.reason)
    return " ".join(filter(None, (entry.kind, value, entry.since, reason.strip())))


def target(text: str) -> Entry:
    """Read who is meant on a command line: an id, a fingerprint, else a name; or any after its kind and `:`.

    Raises:
        ValueError: it is none of them; the text says what would be right.
    """
    kind, colon, value = text.partition(":")
    if not colon or kind not in KINDS:
        value = text
        kind = "node" if text.isdecimal() else "key" if _FINGERPRINT.fullmatch(text) else "identity"
    return _checked(Entry(kind, value))


def _entry(text: str) -> Entry:
    kind, _, rest = text.partition(" ")
    value, _, rest = rest.strip().partition(" ")
    if kind not in KINDS or not value:
        raise ValueError(f"must be {', '.join(KINDS[:-1])} or {KINDS[-1]} and a value, such as `node 17 why`")
    since, _, reason = rest.strip().partition(" ")
    try:
        dt.datetime.fromisoformat(since)
    except ValueError:
        since, reason = "", rest
    return _checked(Entry(kind, unquote(value), since, reason.strip()))


def _checked(entry: Entry) -> Entry:
    if entry.kind == "node":
        if not (entry.value.isascii() and entry.value.isdecimal() and int(entry.value[:24]) < _MOST_NODES):
            raise ValueError("must have a node id: a whole number below 2**64")
        return entry._replace(value=str(int(entry.value)))
    if entry.kind == "key" and not _FINGERPRINT.fullmatch(entry.value):
        raise ValueError("must have a fingerprint such as SHA256:..., as `flwr-relay nodes` shows it")
    if not entry.value or len(entry.value) > 256 or _UNWRITABLE.search(entry.value):
        raise ValueError("must have a name of 1 to 256 printable characters")
    return entry
