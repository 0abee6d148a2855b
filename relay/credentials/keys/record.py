"""What is kept of an API key: one JSON object on one line, in a file and in Redis alike.

    {"id": "3fGhQ0zL", "name": "hospital-a", "tenant": "north", "labels": {"site": "a"},
     "hash": "sha256:<64 hex digits>", "created": "2026-03-01T08:00:00Z", "expires": "2026-06-01T08:00:00Z"}

    id          the public part of the key
    name        who has it: letters, digits, dot, hyphen and underscore; also the user name of HTTP Basic
    tenant      the group that the caller is of; left out if there is one only
    labels      what the operator wants to know of it; left out if nothing
    hash        of the secret part: `sha256:<hex>`, or `hmac-sha256:<pepper>:<hex>` where <pepper> names, and
                does not tell, the secret of `keys.pepper_file`
    created     when; the times are ISO 8601 with a time zone, to the second
    not_before  left out if it was valid at once
    expires     left out if it does not
    revoked     when it was revoked; left out if it was not

An unknown field is refused, and one that is there twice: a mistyped `expires`, or one that is overruled by
another, would make a key that never does.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from relay.credentials.keys.key import ID

#: A name or a tenant fits into a URL and a log line.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NAME_RIGHT = "must be 1 to 63 letters, digits, dots, hyphens and underscores, the first a letter or a digit"
_HASH = re.compile(r"sha256:([0-9a-f]{64})|hmac-sha256:([0-9a-f]{8}):([0-9a-f]{64})")
_FIELDS = ("id", "name", "tenant", "labels", "hash", "created", "not_before", "expires", "revoked")
_REQUIRED = ("id", "name", "hash", "created")
#: More would make every identity a burden.
MOST_LABELS = 32
LONGEST_LABEL = 256


class RecordError(ValueError):
    """A record that cannot be; the text says what is wrong and what would be right, and repeats no hash."""


class KeyRecord(NamedTuple):
    """One key. Times are seconds since 1970.

    Attributes:
        digest: of its secret, 32 bytes.
        pepper: the name of the pepper that `digest` was made with; "" if none.
    """

    id: str
    name: str
    digest: bytes
    created: int
    tenant: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    pepper: str = ""
    not_before: int | None = None
    expires: int | None = None
    revoked: int | None = None

    def state(self, now: float) -> str:
        """Return `valid`, `revoked`, `expired` or `not_yet_valid`."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and now >= self.expires:
            return "expired"
        return "not_yet_valid" if self.not_before is not None and now < self.not_before else "valid"

    def public(self) -> dict[str, Any]:
        """Return what anybody may see of it, with the names and the writing of the file."""
        shown: dict[str, Any] = {"id": self.id, "name": self.name}
        if self.tenant:
            shown["tenant"] = self.tenant
        if self.labels:
            shown["labels"] = dict(self.labels)
        for name in ("created", "not_before", "expires", "revoked"):
            seconds = getattr(self, name)
            if seconds is not None:
                shown[name] = show_time(seconds)
        return shown

    def to_json(self) -> str:
        """Return its line, without the end of line."""
        scheme = f"hmac-sha256:{self.pepper}" if self.pepper else "sha256"
        return json.dumps({**self.public(), "hash": f"{scheme}:{self.digest.hex()}"}, sort_keys=True)


def from_json(line: bytes) -> KeyRecord:
    """Read one line. Raises RecordError."""
    try:
        fields = json.loads(line, object_pairs_hook=_each_once)
    except RecordError:
        raise
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise RecordError("is no JSON object on one line: was it cut off or edited by hand?") from None
    if not isinstance(fields, dict):
        raise RecordError("must be a JSON object")
    for name in fields:
        if name not in _FIELDS:
            raise RecordError(f"has an unknown field {name[:40]!r}: known are {', '.join(_FIELDS)}")
    for name in _REQUIRED:
        if name not in fields:
            raise RecordError(f"has no field {name!r}")
    key_id = fields["id"]
    if not isinstance(key_id, str) or not ID.fullmatch(key_id):
        raise RecordError("has an id that is not 8 letters and digits")
    digest, pepper = _hash(fields["hash"])
    return KeyRecord(
        id=key_id,
        name=checked_name("name", fields["name"]),
        digest=digest,
        created=_time("created", fields["created"]),
        tenant=checked_name("tenant", fields["tenant"]) if fields.get("tenant", "") != "" else "",
        labels=checked_labels(fields.get("labels", {})),
        pepper=pepper,
        not_before=_time_or_none("not_before", fields),
        expires=_time_or_none("expires", fields),
        revoked=_time_or_none("revoked", fields),
    )


def checked_name(what: str, value: object) -> str:
    """Return a name or a tenant that may be one. Raises RecordError."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise RecordError(f"has the {what} {str(value)[:80]!r}: it {_NAME_RIGHT}")
    return value


def checked_labels(value: object) -> tuple[tuple[str, str], ...]:
    """Return labels, sorted by their names. Raises RecordError."""
    right = (
        f"labels must map at most {MOST_LABELS} names to at most {LONGEST_LABEL} printable characters each"
    )
    if not isinstance(value, dict) or len(value) > MOST_LABELS:
        raise RecordError(right)
    for name, text in value.items():
        checked_name("label", name)
        if not isinstance(text, str) or len(text) > LONGEST_LABEL or not text.isprintable():
            raise RecordError(right)
    return tuple(sorted(value.items()))


def hashed(secret: bytes, pepper: bytes) -> bytes:
    """Return what is kept of a secret. `pepper` is b"" if there is none."""
    # A secret of 256 random bits needs no slow hash: there is nothing to guess.
    return hmac.digest(pepper, secret, "sha256") if pepper else hashlib.sha256(secret).digest()


def pepper_name(pepper: bytes) -> str:
    """Return a name of the pepper that does not tell it; "" for none."""
    return hmac.digest(pepper, b"flwr-relay pepper", "sha256")[:4].hex() if pepper else ""


def show_time(seconds: int) -> str:
    """Write a time as records do."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_time(text: str) -> int:
    """Read a time with a time zone, to the second. Raises ValueError."""
    when = datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise ValueError("no time zone")
    seconds = int(when.timestamp())
    # The writing has four digits for the year.
    if not _FIRST <= seconds <= _LAST:
        raise ValueError("out of range")
    return seconds


_FIRST = int(datetime(1000, 1, 2, tzinfo=UTC).timestamp())
_LAST = int(datetime(9999, 12, 30, tzinfo=UTC).timestamp())


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RecordError("has a field twice: leave one of them out")
    return found


def _hash(value: object) -> tuple[bytes, str]:
    match = _HASH.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise RecordError("has a hash that is not sha256:<64 hex digits> or hmac-sha256:<8>:<64 hex digits>")
    return bytes.fromhex(match[1] or match[3]), match[2] or ""


def _time_or_none(name: str, fields: dict[str, Any]) -> int | None:
    return None if fields.get(name) is None else _time(name, fields[name])


def _time(name: str, value: object) -> int:
    try:
        if isinstance(value, str):
            return read_time(value)
    except (ValueError, OverflowError):
        pass
    raise RecordError(f"has {name} = {str(value)[:40]!r}: write a time such as 2026-03-01T08:00:00Z")
