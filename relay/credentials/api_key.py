"""An API key: `Authorization: Basic` with the key as password, `Authorization: Bearer`, or `X-API-Key`.

The first is what an unmodified SuperNode sends when it is started with `--superlink name:key@host:port`; the
user name must then be the key's name (or empty), so that a proxy that logs it logs the truth.
"""

from __future__ import annotations

import binascii
import hmac
import time
from typing import TYPE_CHECKING, ClassVar

from relay.credentials.keys.key import Key, parse
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Call, Identity, Metadata
    from relay.credentials.keys.table import KeyTable

#: The lengths of `x-api-key` and `authorization`: few other headers have them.
_API_KEY, _AUTHORIZATION = 9, 13


class ApiKey:
    """Knows callers by the key that they present."""

    name: ClassVar[str] = "api_key"

    def __init__(self, table: KeyTable, now: Callable[[], float] = time.time) -> None:
        """Look keys up in `table`; `now` is seconds since 1970."""
        self._table = table
        self._now = now

    async def check(self, call: Call) -> Identity | None:
        """See `relay.credentials.Credential`."""
        shown = _presented(call.metadata)
        if shown is None:
            return None
        user, text = shown
        key = parse(text)
        if key is None:
            raise _wrong("malformed", "it does not look like flwr_<id>_<secret>")
        entry = self._table.find(key.id)
        if entry is None:
            raise _unknown(key)
        record = entry.record
        if not hmac.compare_digest(self._table.hash(key.secret, record), record.digest):
            raise _unknown(key)
        if user and user != entry.user:
            raise _wrong(
                "wrong_name", f"key {record.id} is {record.name!r}'s, and came under another user name"
            )
        state = record.state(self._now())
        if state == "not_yet_valid":
            # It is right, and a matter of time; or this host's clock is behind, and would end the node.
            detail = f"key {record.id} of {record.name!r} is not yet valid by this host's clock"
            raise Refusal(Reason.UPSTREAM_DOWN, detail, by=self.name, sent=False, cause=state)
        if state != "valid":
            raise _wrong(state, f"key {record.id} of {record.name!r} is {state}")
        return entry.identity


def _presented(metadata: Metadata) -> tuple[bytes, bytes] | None:
    """Return the user name (b"" if there is none) and the key that a call presents, unchecked.

    Raises:
        Refusal: what it presents cannot be read, or it presents two that differ.
    """
    found: tuple[bytes, bytes] | None = None
    for name, value in metadata:
        length = len(name)
        if length == _AUTHORIZATION and name.lower() == b"authorization":
            shown = _authorization(value)
        elif length == _API_KEY and name.lower() == b"x-api-key":
            shown = (b"", value.strip())
        else:
            continue
        if shown is None:
            continue
        if found is not None:
            if found[1] != shown[1] or (found[0] and shown[0] and found[0] != shown[0]):
                raise _wrong("malformed", "several are presented, and they differ")
            shown = (found[0] or shown[0], shown[1])
        found = shown
    return found


def _authorization(value: bytes) -> tuple[bytes, bytes] | None:
    """Return user name and key; None for a scheme that carries no key."""
    scheme, _, rest = value.strip().partition(b" ")
    scheme = scheme.lower()
    if scheme == b"bearer":
        return b"", rest.strip()
    if scheme != b"basic":
        return None
    try:
        user, colon, password = binascii.a2b_base64(rest.strip(), strict_mode=True).partition(b":")
    except binascii.Error:
        raise _wrong("malformed", "Authorization: Basic is no base64") from None
    if not colon:
        raise _wrong("malformed", "Authorization: Basic holds no password")
    return user, password


def _unknown(key: Key) -> Refusal:
    # The id may be named only if it is one: what was mistyped may hold a part of the secret.
    if not key.intact:
        return _wrong("malformed", "its checksum is wrong: it was mistyped or cut off")
    return _wrong("unknown_key", f"there is no key {key.id.decode('ascii')} with this secret")


def _wrong(cause: str, detail: str) -> Refusal:
    return Refusal(Reason.UNAUTHENTICATED, detail, by=ApiKey.name, sent=False, cause=cause)
