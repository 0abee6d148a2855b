"""API keys in Redis, for relays on several hosts.

    flwr-relay:keys          a hash: id of a key -> its record (`relay/credentials/keys/record.py`)
    flwr-relay:keys:version  `<count>:<random text>`: the number of keys, and another text after each change

A change is one transaction that fails if another one came between. Workers ask for the version and the number
of keys once a second, and for the hash if the version is not the one they know. A server without a version
holds no keys *that anybody put there*: it lost them, or is the wrong one. One whose keys do not fit their
number lost some of them: Redis evicts one of the two without the other. Either is a fault of the store, and
the keys of before stay in force.

The user of a relay needs `GET`, `HLEN`, `HGETALL`, `MULTI` and `EXEC` on `flwr-relay:keys*`, that of
`flwr-relay keys` also `WATCH`, `UNWATCH`, `HSET`, `HDEL` and `SET`.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from redis.exceptions import RedisError, WatchError

from relay.credentials.keys.record import KeyRecord, RecordError, from_json
from relay.credentials.keys.stores import Records, StoreError
from relay.stores.redis import connect

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = "flwr-relay:keys"
VERSION = "flwr-relay:keys:version"
#: Changes by others that may come between before a change is given up.
ATTEMPTS = 100
_MOST_FAULTS = 20
#: A version without a number is of a release that wrote none.
_COUNT = re.compile(rb"([0-9]{1,9}):")


class RedisKeys:
    """The keys of one Redis server."""

    def __init__(self, url: str, shown: str) -> None:
        """Use the server at `url`, which `shown` names without a password; nothing is opened yet."""
        self.name = f"redis {shown}"
        self._shown = shown
        self._seen: bytes | None = None
        self._known: dict[bytes, KeyRecord] = {}
        self._client = connect(url)

    def poll(self) -> Records | None:
        """See `KeyStore.poll`."""
        try:
            with self._client.pipeline(transaction=True) as both:
                both.get(VERSION)
                both.hlen(KEYS)
                version, held = both.execute()
            if version is not None and version == self._seen:
                self._check(version, held)
                return None
            with self._client.pipeline(transaction=True) as both:
                both.get(VERSION)
                both.hgetall(KEYS)
                version, rows = both.execute()
        except (RedisError, OSError, UnicodeError) as error:  # UnicodeError: no DNS name
            raise self._down(error) from None
        records = self._parse(rows)
        self._check(version, len(rows))
        self._seen = version
        return records

    def change(self, change: Callable[[Records], None], *, init: bool = False) -> None:
        """See `KeyStore.change`."""
        try:
            for _ in range(ATTEMPTS):
                with self._client.pipeline(transaction=True) as step:
                    step.watch(VERSION, KEYS)  # type: ignore[no-untyped-call]
                    version, rows = step.get(VERSION), step.hgetall(KEYS)
                    if step.get(VERSION) != version:
                        continue  # they are of before and after another change
                    before = self._parse(rows)  # type: ignore[arg-type]  # at once, not awaited
                    if version is not None or not init:
                        self._check(version, len(before))  # type: ignore[arg-type]
                    after = dict(before)
                    change(after)
                    step.multi()
                    for key_id, record in after.items():
                        if before.get(key_id) != record:
                            step.hset(KEYS, key_id, record.to_json())
                    for key_id in before.keys() - after.keys():
                        step.hdel(KEYS, key_id)
                    step.set(VERSION, f"{len(after)}:{secrets.token_hex(8)}")
                    try:
                        step.execute()
                    except WatchError:
                        continue
                    return
        except (RedisError, OSError, UnicodeError) as error:
            raise self._down(error) from None
        raise StoreError(f"{self._shown}: {ATTEMPTS} other changes came between; try again")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _check(self, version: bytes | None, held: int) -> None:
        """Raise StoreError if `held` keys are not what this version stands for."""
        if version is None:
            raise StoreError(
                f"{self._shown} holds {held} keys and no {VERSION}: restore it, and have it evict nothing"
                " (maxmemory-policy noeviction); if they are all that there were, flwr-relay keys create"
                " --init makes another one beside them"
                if held
                else f"{self._shown} holds no keys: restore what it lost; if it never held any, make one with"
                " flwr-relay keys create --init"
            )
        count = _COUNT.match(version)
        if held != int(count[1]) if count else not held:
            raise StoreError(
                f"{self._shown} holds {held} keys where there were {int(count[1]) if count else 'some'}:"
                " restore what it lost, and have it evict nothing (maxmemory-policy noeviction); if they are"
                f" lost for good, delete {KEYS} and {VERSION} there, and begin anew with flwr-relay keys"
                " create --init"
            )

    def _down(self, error: Exception) -> StoreError:
        return StoreError(f"{self._shown} does not answer: {error or type(error).__name__}")

    def _parse(self, rows: dict[bytes, bytes]) -> Records:
        known, self._known = self._known, {}
        records: Records = {}
        faults: list[str] = []
        for field, line in rows.items():
            try:
                record = known.get(line) or from_json(line)
                if record.id.encode() != field:
                    raise RecordError("has another id than its field")
            except RecordError as error:
                faults.append(f"{self._shown}: field {field[:20]!r} of {KEYS}: {error}")
                if len(faults) >= _MOST_FAULTS:
                    break
                continue
            records[record.id] = self._known[line] = record
        if faults:
            self._known = known
            raise StoreError(*faults)
        return records
