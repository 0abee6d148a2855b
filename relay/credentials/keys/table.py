"""The keys as one worker knows them, read from their store once a second.

What cannot be read changes nothing: the keys of before stay in force, for `stale` seconds if the store can be
down (0: for ever). Without any, nobody can be told right from wrong, and calls are deferred.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import structlog
from prometheus_client import Counter

from relay.call import Identity
from relay.credentials.keys.record import hashed, pepper_name
from relay.credentials.keys.stores import StoreError
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.credentials.keys.record import KeyRecord
    from relay.credentials.keys.stores import KeyStore, Records

log = structlog.get_logger("relay.credentials.keys")

READS = Counter(
    "relay_keys_reads",
    "Reads of the API keys by workers: `changed` if others were found, `failed`",
    ["outcome"],
)


#: A reading that takes longer is a fault, which is told while it lasts.
LATE_SECONDS = 10.0
#: How long a worker waits for its keys before it serves: the master kills one that is silent for 20 s.
START_SECONDS = 5.0


class Entry(NamedTuple):
    """A key, and whom it stands for."""

    record: KeyRecord
    user: bytes
    identity: Identity


class KeyTable:
    """Looks keys up, and keeps itself up to date."""

    def __init__(
        self,
        store: KeyStore | None,
        *,
        pepper: bytes = b"",
        stale: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read from `store`; None: there are no keys, and nobody asks.

        Args:
            store: where keys are kept.
            pepper: what their hashes depend on; b"" if nothing.
            stale: seconds for which keys stay in force that could not be read again; 0 is for ever.
            now: seconds of a clock that only goes forward.
        """
        self._store = store
        self._pepper = pepper
        self._pepper_name = pepper_name(pepper)
        self._stale = stale
        self._now = now
        self._entries: dict[bytes, Entry] | None = None
        self._read_at = 0.0
        self._complaint = ""
        self._refreshing: asyncio.Task[None] | None = None
        self._began = 0.0

    def find(self, key_id: bytes) -> Entry | None:
        """Return the key of this id, None if there is none.

        Raises:
            Refusal: UPSTREAM_DOWN if the keys are not known, or not since too long.
        """
        entries = self._entries
        if entries is None or (self._stale and self._now() - self._read_at > self._stale):
            raise Refusal(
                Reason.UPSTREAM_DOWN,
                "the keys could not be read" if entries is None else "the keys were not read for too long",
                by="api_key",
                sent=False,
                cause="keys_unavailable",
            )
        return entries.get(key_id)

    def hash(self, secret: bytes, record: KeyRecord) -> bytes:
        """Return what `record` would hold of this secret."""
        return hashed(secret, self._pepper if record.pepper else b"")

    def tick(self) -> None:
        """Read the keys anew, beside everything else; to be called once a second in the event loop."""
        if self._store is None:
            return
        if self._refreshing is not None and not self._refreshing.done():
            if self._now() - self._began > LATE_SECONDS:
                self._failed(self._store, f"no answer for {LATE_SECONDS:g} s")
            return
        self._began = self._now()
        self._refreshing = asyncio.get_running_loop().create_task(self.refresh())

    async def prepare(self) -> None:
        """Read the keys for the first time; go on without them if that takes long. Never raises."""
        self.tick()
        if self._refreshing is not None:
            await asyncio.wait({self._refreshing}, timeout=START_SECONDS)

    async def refresh(self) -> None:
        """Read the keys anew. Never raises: what went wrong is counted, and logged when it is news."""
        store = self._store
        if store is None:
            return
        try:
            records = await asyncio.to_thread(store.poll)
            entries = None if records is None else await asyncio.to_thread(self._prepared, records)
        except StoreError as error:
            self._failed(store, str(error))
            return
        except Exception as error:
            # Whatever it is, it must not end the reading for good.
            log.exception("keys cannot be read", store=store.name)
            self._failed(store, repr(error))
            return
        self._read_at = self._now()
        if self._complaint:
            log.info("keys can be read again", store=store.name)
            self._complaint = ""
        if entries is not None:
            self._entries = entries
            READS.labels("changed").inc()
            log.info("keys read", store=store.name, keys=len(entries))

    async def close(self) -> None:
        """Read no more."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            with suppress(asyncio.CancelledError):
                await self._refreshing
        if self._store is not None:
            self._store.close()

    def _failed(self, store: KeyStore, complaint: str) -> None:
        READS.labels("failed").inc()
        if complaint != self._complaint:
            self._complaint = complaint
            known = (
                "those of before stay in force" if self._entries is not None else "none are known: calls wait"
            )
            log.error("keys cannot be read", store=store.name, problem=complaint, keys=known)

    def _prepared(self, records: Records) -> dict[bytes, Entry]:
        before = self._entries or {}
        entries: dict[bytes, Entry] = {}
        for record in records.values():
            if record.pepper not in ("", self._pepper_name):
                raise StoreError(foreign_pepper(record, self._pepper_name))
            key = record.id.encode()
            old = before.get(key)
            if old is not None and old.record is record:
                entries[key] = old
                continue
            identity = Identity(record.name, record.tenant, record.labels, ("api_key",))
            entries[key] = Entry(record, record.name.encode(), identity)
        return entries


def foreign_pepper(record: KeyRecord, ours: str) -> str:
    """Say that a key cannot be checked here, and what to do."""
    has = f"keys.pepper_file holds the pepper {ours}" if ours else "keys.pepper_file is not set"
    return (
        f"key {record.id} ({record.name}) was made with the pepper {record.pepper}, and {has}: restore that"
        " file, or make the key anew"
    )
