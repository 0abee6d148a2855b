"""What the admin port says of nodes: a list, one node, and how many there are of each kind.

    GET /nodes?silent_for=60s&identity=NAME&tenant=T&version=1.42&wire=http_v1&accepted=true&limit=9&offset=0
    GET /nodes/NODE_ID

All filters may be left out. `silent_for` leaves those that have not called for so long, `version` those whose
version begins so, `accepted` those that the SuperLink has accepted, or has not. The order is that of the ids.
Node ids are strings: they are 64-bit numbers, which JavaScript would round.

The port asks nobody who he is, so nothing can be changed here; it belongs behind a firewall.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import TypeAdapter, ValidationError

from relay.call import Wire
from relay.credentials.allowed_keys import fingerprint
from relay.settings_types import Seconds
from relay.stores.nodes import wall_clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from relay.stores.nodes import NodeRecord, Nodes
    from relay.stores.nodes_redis import NodesAcrossHosts

#: Nodes that are shown of a list unless it is told how many, and at most.
SHOWN, MOST_SHOWN = 1000, 10_000
#: A node that polls is seen every 3 s, one that is at work at every heartbeat, 18 to 23 s.
SEEN_SECONDS = 60.0
#: Most versions that are told apart in the metric.
VERSIONS = 20

_VERSION = re.compile(r"\d{1,3}\.\d{1,3}")
_SECONDS: TypeAdapter[float] = TypeAdapter(Seconds)
_FLAGS = {"true": True, "false": False}


class _QueryError(Exception):
    """A filter cannot be understood; the text says what would be right."""


class _Query(NamedTuple):
    limit: int
    offset: int
    silent_for: float
    accepted: bool | None
    texts: dict[str, str]

    def finds(self, record: NodeRecord, now: float) -> bool:
        """Return whether a node is asked for."""
        facts = record.facts
        if now - record.last < self.silent_for:
            return False
        if self.accepted not in (None, facts is not None and facts.accepted):
            return False
        if not self.texts:
            return True
        if facts is None:
            return False
        known = {"identity": facts.identity, "tenant": facts.tenant, "wire": facts.wire.value}
        return facts.version.startswith(self.texts.get("version", "")) and all(
            known[name] == text for name, text in self.texts.items() if name in known
        )


def add_routes(app: web.Application, nodes: Nodes | NodesAcrossHosts) -> None:
    """Have the admin application answer questions about nodes."""

    async def listed(request: web.Request) -> web.Response:
        try:
            query = _query(request.query)
        except _QueryError as error:
            return web.json_response({"error": str(error)}, status=400)
        # Reading the whole table takes tens of milliseconds, in which a heartbeat would wait.
        return web.json_response(await asyncio.to_thread(_list, nodes, query))

    async def one(request: web.Request) -> web.Response:
        text = request.match_info["node_id"]
        record = None
        if re.fullmatch(r"[0-9]{1,20}", text, re.ASCII):
            record = await asyncio.to_thread(nodes.get, int(text))  # it may be in Redis
        if record is None:
            return web.json_response({"error": f"no node {text[:40]} was seen"}, status=404)
        return web.json_response(describe(record, time.monotonic()))

    app.router.add_get("/nodes", listed)
    app.router.add_get("/nodes/{node_id}", one)


def metrics(nodes: Nodes) -> bytes:
    """Return the metrics about nodes in Prometheus' text format. Not for the event loop."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(nodes))
    return generate_latest(registry)


def describe(record: NodeRecord, now: float) -> dict[str, Any]:
    """Return what is known of a node, for JSON; `now` is `time.monotonic()`."""
    facts, refused = record.facts, record.refused
    return {
        "node_id": str(record.node_id) if record.node_id else None,
        "accepted": facts is not None and facts.accepted,
        "last_call": _iso(record.last),
        "silent_for": round(max(0.0, now - record.last), 1),
        "last_method": record.method.rpc if record.method else None,
        "first_call": _iso(record.first),
        "calls": record.calls,
        "refusals": record.refusals,
        "last_refusal": {"reason": refused.why, "method": refused.method.rpc, "at": _iso(refused.at)}
        if refused
        else None,
        "wire": facts.wire.value if facts else None,
        "version": facts.version if facts else "",
        "address": facts.peer if facts else "",
        "identity": facts.identity if facts else "",
        "tenant": facts.tenant if facts else "",
        "key": fingerprint(facts.key) if facts and any(facts.key) else None,
        "clock_skew": round(facts.skew, 3) if facts and math.isfinite(facts.skew) else None,
    }


class _Collector:
    """Counts the nodes that were seen, when somebody asks."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield self._family()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        since = time.monotonic() - SEEN_SECONDS
        seen: Counter[tuple[str, str]] = Counter()
        versions: Counter[str] = Counter()
        for record in self._nodes.all():
            facts = record.facts
            # A stranger may call himself whatever he likes, as often as he likes.
            if record.last >= since and facts is not None and facts.accepted:
                match = _VERSION.match(facts.version) if facts.wire is not Wire.REST_V0 else None
                told = match[0] if match else "unknown"
                seen[facts.wire.value, told] += 1
                versions[told] += 1
        shown = sorted(versions, key=lambda version: (-versions[version], version))[:VERSIONS]
        counts: Counter[tuple[str, str]] = Counter()
        for (wire, version), count in seen.items():
            counts[wire, version if version in shown else "other"] += count
        family = self._family()
        for labels, count in sorted(counts.items()):
            family.add_metric(labels, count)
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "relay_nodes",
            "Nodes that the SuperLink has accepted and that called this host within the last minute",
            labels=["wire", "flwr_version"],
        )


def _list(nodes: Nodes | NodesAcrossHosts, query: _Query) -> dict[str, Any]:
    now = time.monotonic()
    found = [record for record in nodes.all() if query.finds(record, now)]
    found.sort(key=lambda record: (record.node_id, record.first))  # the pages of a list must fit together
    shown = found[query.offset : query.offset + query.limit]
    return {
        "total": len(found),
        "offset": query.offset,
        "limit": query.limit,
        "nodes": [describe(record, now) for record in shown],
    }


def _query(given: Mapping[str, str]) -> _Query:
    texts = {name: given[name] for name in ("identity", "tenant", "version", "wire") if name in given}
    known = {*texts, "silent_for", "accepted", "limit", "offset"}
    if unknown := sorted(set(given) - known):
        raise _QueryError(f"{unknown[0][:40]!r} is no filter")
    wires = [wire.value for wire in Wire]
    if texts.get("wire", wires[0]) not in wires:
        raise _QueryError(f"wire must be one of {', '.join(wires)}")
    if (accepted := given.get("accepted")) not in (None, *_FLAGS):
        raise _QueryError("accepted must be true or false")
    try:
        silent_for = _SECONDS.validate_python(given["silent_for"]) if "silent_for" in given else 0.0
    except ValidationError:
        raise _QueryError("silent_for must be a duration such as 60s or 5m") from None
    return _Query(
        _whole(given, "limit", SHOWN, MOST_SHOWN),
        _whole(given, "offset", 0, 1 << 32),
        silent_for,
        None if accepted is None else _FLAGS[accepted],
        texts,
    )


def _whole(given: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or int(text) > most:
        raise _QueryError(f"{name} must be a whole number up to {most}")
    return int(text)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(wall_clock(at), UTC).isoformat(timespec="milliseconds")
