"""Composition root: Settings become a relay that is ready to serve. The one module that knows all parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.call import Call, Reply, Wire
from relay.fleet import Method
from relay.pipeline import Chain, Handler, Policy, compose
from relay.policies import (
    BRIDGES,
    OBSERVERS,
    ORDER,
    AccessLog,
    Budget,
    Maintenance,
    Metrics,
    Repair,
    Retry,
    Signing,
    Validate,
    metrics,
)
from relay.quota import Quota
from relay.stores.host import HostTable
from relay.stores.node_signers import NodeSigners
from relay.tls import client_context
from relay.upstreams import http_v1 as upstream_http_v1
from relay.upstreams import rest_v0 as upstream_rest_v0
from relay.upstreams.http import Timeouts
from relay.upstreams.pool import Pool, Target
from relay.wires.forwarded import Forwarding
from relay.wires.http import Front, Route
from relay.wires.http_request import Receiver
from relay.wires.http_v1 import HTTP_V1
from relay.wires.rest_v0 import REST_V0

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from relay.settings import Listener, Settings
    from relay.upstreams.channels import Channels
    from relay.wires.grpc_fleet import GrpcFront

SPECS = {spec.wire: spec for spec in (HTTP_V1, REST_V0)}
UPSTREAMS = {Wire.HTTP_V1: upstream_http_v1.upstream, Wire.REST_V0: upstream_rest_v0.upstream}

#: Most bytes that are held of a body for a policy that needs it whole.
BUFFER_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Relay:
    """A composed relay, inside the event loop of one worker.

    Attributes:
        fronts: one per listener, in the order of the settings.
        pool: connections to the SuperLink.
        tick: to be called once a second, and at the end.
    """

    fronts: tuple[Front | GrpcFront, ...]
    pool: Pool | Channels
    tick: Callable[[], None]


def build(settings: Settings, table: HostTable) -> Relay:
    """Compose the relay. Call it inside the running event loop.

    Args:
        settings: the whole tree.
        table: what the workers of the host remember for each other.

    Raises:
        OSError: `upstream.ca_file` cannot be read.
    """
    held = Quota(settings.limits.max_held)
    pool, upstream = _upstream(settings, held)
    counting = Metrics()
    chosen = policies(settings, table, counting)
    fronts = tuple(
        _grpc_front(settings, listener, chosen, upstream, held)
        if listener.speaks_grpc
        else _front(settings, listener, chosen, upstream)
        for listener in settings.listeners
    )
    return Relay(fronts, pool, counting.sample)


def _front(settings: Settings, listener: Listener, chosen: tuple[Policy, ...], upstream: Handler) -> Front:
    return Front(
        _routes(settings, listener, chosen, upstream),
        Receiver(
            Forwarding(listener.trusted_proxies),
            settings.limits.max_body,
            settings.upstream.idle_timeout,
        ),
        idle_timeout=settings.upstream.idle_timeout,
        on_stray=metrics.stray,
    )


def _grpc_front(
    settings: Settings, listener: Listener, chosen: tuple[Policy, ...], upstream: Handler, held: Quota
) -> GrpcFront:
    from relay.wires.grpc_fleet import GrpcFront  # noqa: PLC0415 - gRPC is imported where it is spoken

    handlers = {
        (wire, method): _chain(settings, chosen, upstream, method).handler
        for wire in listener.wires
        for method in Method
    }
    return GrpcFront(
        handlers,
        Forwarding(listener.trusted_proxies),
        held,
        bodies=dict.fromkeys(Method, settings.limits.max_body),
        tls=listener.tls is not None,
        on_stray=metrics.stray,
    )


def policies(settings: Settings, table: HostTable, counting: Metrics) -> tuple[Policy, ...]:
    """Return the policies that these settings ask for, each with its own section alone, in ORDER."""
    retry, repair = settings.retry, settings.repair
    made: dict[type, Policy] = {
        Metrics: counting,
        AccessLog: AccessLog(debug=settings.log.level == "debug"),
        Maintenance: Maintenance(enabled=settings.mode == "maintenance"),
        Validate: Validate(),
        Repair: Repair(lost_answers=repair.lost_answers, reactivate=repair.reactivate, table=table),
        Retry: Retry(
            enabled=retry.enabled,
            base=retry.base,
            cap=retry.cap,
            budget=Budget(retry.budget, retry.floor),
        ),
        Signing: _signing(settings),
    }
    order = (*OBSERVERS, *BRIDGES) if settings.mode == "pass_through" else ORDER
    return tuple(made[policy] for policy in order)


def _signing(settings: Settings) -> Signing:
    section = settings.signing
    if section is None:
        return Signing(None)
    return Signing(
        NodeSigners(section.directory, section.forget_after), unauthenticated=section.unauthenticated
    )


def chains(settings: Settings) -> Iterator[tuple[Listener, Wire, Method, Chain]]:
    """Yield what `flwr-relay explain` prints: each chain as `build` composes it, but for its upstream."""
    chosen = policies(settings, HostTable(1), Metrics())
    for listener in settings.listeners:
        for wire in listener.wires:
            for method in Method:
                yield listener, wire, method, _chain(settings, chosen, _unreachable, method)


async def _unreachable(_: Call) -> Reply:
    raise AssertionError("an explained chain is not called")


def _chain(settings: Settings, chosen: tuple[Policy, ...], upstream: Handler, method: Method) -> Chain:
    name = f"{settings.upstream.wire.value} {settings.upstream.url}"
    return compose(chosen, upstream, method, upstream_name=name, buffer_limit=BUFFER_LIMIT)


def _routes(
    settings: Settings, listener: Listener, chosen: tuple[Policy, ...], upstream: Handler
) -> dict[str, Route]:
    return {
        SPECS[wire].prefix + method.path: Route(
            SPECS[wire], method, _chain(settings, chosen, upstream, method).handler
        )
        for wire in listener.wires
        for method in Method
    }


def _upstream(settings: Settings, held: Quota) -> tuple[Pool | Channels, Handler]:
    """Return what leads to the SuperLink, and the handler that asks it."""
    section = settings.upstream
    timeouts = Timeouts(section.response_timeout, section.heartbeat_timeout)
    judging = settings.mode != "pass_through"
    if section.wire is not Wire.GRPC:
        pool = _pool(settings)
        return pool, UPSTREAMS[section.wire](pool, timeouts, judging=judging)
    from relay.upstreams.channels import Channels, Secured  # noqa: PLC0415 - see `_grpc_front`
    from relay.upstreams.grpc_fleet import GrpcUpstream  # noqa: PLC0415

    channels = Channels(
        section.url.host,
        section.url.port,
        Secured.by(section.ca_file) if section.url.tls else None,
        connect_timeout=section.connect_timeout,
        max_message=settings.limits.max_body,
    )
    asking = GrpcUpstream(channels, timeouts, held, queue_timeout=section.queue_timeout, judging=judging)
    return channels, asking


def _pool(settings: Settings) -> Pool:
    section = settings.upstream
    tls = client_context(section.ca_file) if section.url.tls else None
    return Pool(
        Target(section.url.host, section.url.port, section.url.authority, tls),
        connect_timeout=section.connect_timeout,
        idle_timeout=section.idle_timeout,
        keepalive=section.keepalive,
        max_connections=section.max_connections,
        queue_timeout=section.queue_timeout,
    )
