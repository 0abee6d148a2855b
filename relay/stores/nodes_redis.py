"""What all hosts know of nodes: each host writes its own records to Redis, and who is asked reads them all.

    flwr-relay:nodes:<host>   hash: the node id in decimal -> the record of `relay.stores.nodes`, whose times
                              are seconds since 1970 here. Written whole by its host every PUSH_SECONDS; gone
                              `keep` seconds after the last time.

Only nodes that the SuperLink has accepted are written. Of a node that is known to several hosts the newest
record counts, with the counts of all. Nothing here is asked or told within a call; without Redis a host
shows what it knows itself. Rights that are needed: HSET, DEL, EXPIRE, HGETALL and SCAN on
`flwr-relay:nodes:*`.
"""

from __future__ import annotations

import asyncio
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from redis import RedisError

from relay.stores.nodes import NodeRecord
from relay.stores.redis import connect

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from relay.stores.host import HostTable
    from relay.stores.nodes import Nodes

log = structlog.get_logger("relay.stores.nodes")

PUSH_SECONDS = 10.0
PREFIX = "flwr-relay:nodes:"
_TURN = b"nodes were written"


class NodesAcrossHosts:
    """The nodes of this host and of all others. All but `tick` wait for Redis: not for the event loop."""

    def __init__(self, nodes: Nodes, url: str, shown: str, *, host: str, keep: float) -> None:
        """Share `nodes`.

        Args:
            nodes: of this host.
            url, shown: of Redis, and without its password.
            host: name of this host; no other may have it.
            keep: seconds for which the records of a host stay that writes no more.
        """
        self._nodes = nodes
        self._client = connect(url)
        self._shown = shown
        self._key = PREFIX + host
        self._keep = max(1, int(keep))
        self._failing = False

    def tick(self, table: HostTable) -> None:
        """Write the records if no worker of this host has done so of late; to be called in the event loop."""
        now = int(time.monotonic())
        last = table.get(_TURN)
        if last is None or now - last >= PUSH_SECONDS:
            table.put(_TURN, now)
            asyncio.get_running_loop().run_in_executor(None, self.push)

    def push(self) -> None:
        """Write the records of this host."""
        rows = {
            str(record.node_id): _shifted(record, time.time() - time.monotonic()).pack()
            for record in self._nodes.all()
            if record.node_id and record.facts is not None and record.facts.accepted
        }
        try:
            with self._client.pipeline(transaction=True) as step:
                step.delete(self._key)
                if rows:
                    step.hset(self._key, mapping=rows)  # type: ignore[arg-type]
                    step.expire(self._key, self._keep)
                step.execute()
        except (RedisError, OSError, UnicodeError) as error:
            self._failed(error)
        else:
            self._failing = False

    def all(self) -> Iterator[NodeRecord]:
        """Yield the nodes of all hosts; those of this one if Redis does not answer."""
        try:
            others = [
                row
                for key in self._client.scan_iter(match=f"{PREFIX}*")
                if key != self._key.encode()
                for row in self._client.hgetall(key).values()
            ]
        except (RedisError, OSError, UnicodeError) as error:
            self._failed(error)
            others = []
        yield from merged([*self._nodes.all(), *_readable(others)])

    def get(self, node_id: int) -> NodeRecord | None:
        """Return what is known of a node anywhere."""
        return next((record for record in self.all() if record.node_id == node_id), None)

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.warning("nodes are not shared", store=self._shown, problem=type(error).__name__)


def merged(records: Iterable[NodeRecord]) -> list[NodeRecord]:
    """Return one record of each node: the newest, with the counts of all."""
    found: dict[int, NodeRecord] = {}
    strangers: list[NodeRecord] = []
    for record in records:
        known = found.get(record.node_id)
        if not record.node_id:
            strangers.append(record)
        elif known is None:
            found[record.node_id] = record
        else:
            newest = record if record.last > known.last else known
            found[record.node_id] = replace(
                newest,
                first=min(record.first, known.first),
                calls=record.calls + known.calls,
                refusals=record.refusals + known.refusals,
            )
    return [*found.values(), *strangers]


def _readable(rows: Iterable[Any]) -> Iterator[NodeRecord]:
    for row in rows:
        try:
            record = NodeRecord.unpack(row)
        except (struct.error, IndexError, ValueError):
            continue  # whatever another version has written
        yield _shifted(record, time.monotonic() - time.time())


def _shifted(record: NodeRecord, by: float) -> NodeRecord:
    """Return the record with its times moved from one clock to another."""
    refused = record.refused
    return replace(
        record,
        first=record.first + by,
        last=record.last + by,
        refused=replace(refused, at=refused.at + by) if refused else None,
    )
