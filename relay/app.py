"""Composition root: Settings become a relay that is ready to serve. The one module that knows all parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from socket import gethostname
from typing import TYPE_CHECKING

from relay import admission
from relay.call import Call, Reply, Wire
from relay.credentials.keys.table import KeyTable
from relay.credentials.node_keys import NodeKeys
from relay.fleet import MAX_REQUEST, Method
from relay.limits import Limits, bodies
from relay.pipeline import Chain, Handler, Policy, compose
from relay.policies import (
    BRIDGES,
    GUARDS,
    OBSERVERS,
    ORDER,
    Accepted,
    AccessLog,
    Auth,
    Budget,
    Held,
    Inventory,
    Maintenance,
    Metrics,
    Quarantine,
    Redelivery,
    Repair,
    Retry,
    Shed,
    Signing,
    Validate,
    metrics,
)
from relay.quota import Quota
from relay.stores.host import HostTable
from relay.stores.kept import PIECE
from relay.stores.node_signers import NodeSigners
from relay.stores.nodes import Nodes
from relay.stores.records import HostRecords
from relay.stores.upstreams import UpstreamTable
from relay.superlink import budgets, shed, sheds_each, superlink, urls
from relay.tls_files import ListenerTls, UpstreamTls
from relay.tls_metrics import NO_TLS, Handshakes, Tls
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_fleet import GrpcFront
from relay.wires.grpc_request import Receiver as GrpcReceiver
from relay.wires.http import Front, Route
from relay.wires.http_request import Receiver
from relay.wires.http_v1 import HTTP_V1
from relay.wires.rest_v0 import REST_V0

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from relay import settings as settings_of
    from relay.settings import Listener, Settings
    from relay.stores.kept_hosts import Redis
    from relay.stores.nodes_redis import NodesAcrossHosts
    from relay.upstreams.balance import Balance

SPECS = {spec.wire: spec for spec in (HTTP_V1, REST_V0)}

#: Most bytes that are held of a body for a policy that needs it whole.
BUFFER_LIMIT = 64 * 1024 * 1024


async def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Relay:
    """A composed relay, inside the event loop of one worker.

    Attributes:
        fronts: one per listener, in the order of the settings.
        pool: the addresses of the SuperLink, and connections to them.
        tick: to be called once a second, and at the end.
        tls: what its listeners and its upstream have of TLS.
        prepare: to be awaited before calls are served; never raises.
        close: to be awaited at the end.
        across: the nodes of all hosts, if they are shared.
    """

    fronts: tuple[Front | GrpcFront, ...]
    pool: Balance
    tick: Callable[[], None]
    tls: Tls = NO_TLS
    prepare: Callable[[], Awaitable[None]] = _nothing
    close: Callable[[], Awaitable[None]] = _nothing
    across: NodesAcrossHosts | None = None


def build(
    settings: Settings,
    table: HostTable,
    kept: HostRecords | None = None,
    nodes: Nodes | None = None,
    upstreams: UpstreamTable | None = None,
) -> Relay:
    """Compose the relay. Call it inside the running event loop.

    Args:
        settings: the whole tree.
        table: what the workers of the host remember for each other.
        kept: what they keep for another delivery; by default this relay does so alone.
        nodes: what they know of nodes; likewise.
        upstreams: what they know of the SuperLink's addresses; likewise.

    Raises:
        OSError: `keys.pepper_file`, or a file of TLS, cannot be read; ValueError: or used.
    """
    held = Quota(settings.limits.max_held)
    tls = _tls(settings, table)
    sheds: list[Shed] = []

    def limited(handler: Handler) -> Handler:
        sheds.append(shed(settings.shed))
        return partial(sheds[-1].handle, next=handler)

    pool = superlink(
        settings, upstreams or UpstreamTable(), tls.upstream, limited if sheds_each(settings) else None
    )
    counting = Metrics()
    keys = admission.key_table(settings.keys)
    node_keys = admission.node_keys(settings.node_keys)
    chosen = policies(settings, table, counting, kept, nodes, held=held)
    known = admission.credentials(settings, keys, node_keys)
    asking = [admission.auth(listener.auth, known) for listener in settings.listeners]
    ticks: list[Callable[[], None]] = [counting.sample, keys.tick, *(auth.sample for auth in asking)]
    ticks += [node_keys.tick, *(policy.tick for policy in chosen if isinstance(policy, Quarantine))]
    ticks += [policy.sample for policy in chosen if isinstance(policy, Inventory)]
    sheds += [policy for policy in chosen if isinstance(policy, Shed)]
    ticks.append(partial(Shed.sample, sheds))
    ticks += [tls.tick, pool.tick]
    across = _across(settings, nodes)
    if across is not None:
        ticks.append(partial(across.tick, table))
    sharing = [policy for policy in chosen if isinstance(policy, Redelivery)]
    limits = _limits(settings.limits)
    fronts = tuple(
        _grpc_front(settings, listener, _with(chosen, auth), pool.handler, limits, held=held, auth=auth)
        if listener.speaks_grpc
        else _front(settings, listener, _with(chosen, auth), pool.handler, limits)
        for listener, auth in zip(settings.listeners, asking, strict=True)
    )

    def tick() -> None:
        for each in ticks:
            each()

    async def prepare() -> None:
        for policy in sharing:
            policy.start()
        await keys.prepare()

    async def close() -> None:
        for policy in sharing:
            await policy.close()
        await keys.close()
        await pool.close()

    return Relay(fronts, pool, tick, tls, prepare, close, across)


def _front(
    settings: Settings, listener: Listener, chosen: tuple[Policy, ...], upstream: Handler, limits: Limits
) -> Front:
    return Front(
        _routes(settings, listener, chosen, upstream),
        Receiver(
            Forwarding(listener.trusted_proxies, _certificate_header(listener)),
            limits,
            settings.upstream.idle_timeout,
            admission.withheld(listener.auth),
        ),
        idle_timeout=settings.upstream.idle_timeout,
        on_stray=metrics.stray,
    )


def _grpc_front(
    settings: Settings,
    listener: Listener,
    chosen: tuple[Policy, ...],
    upstream: Handler,
    limits: Limits,
    *,
    held: Quota,
    auth: Auth,
) -> GrpcFront:
    handlers = {
        (wire, method): _chain(settings, chosen, upstream, method).handler
        for wire in listener.wires
        for method in Method
    }
    return GrpcFront(
        handlers,
        GrpcReceiver(
            Forwarding(listener.trusted_proxies, _certificate_header(listener)),
            limits,
            settings.upstream.idle_timeout,
            admission.withheld(listener.auth),
        ),
        held,
        idle_timeout=settings.upstream.idle_timeout,
        on_stray=metrics.stray,
        admit=auth.admit if listener.auth.accept else None,
    )


def _kept_redis(section: settings_of.Redelivery) -> Redis | None:
    if not section.enabled or section.redis is None:
        return None
    from relay.stores.kept_redis import KeptRedis  # noqa: PLC0415 - imports a library that few need

    return KeptRedis(section.redis.text, str(section.redis))


def _across(settings: Settings, nodes: Nodes | None) -> NodesAcrossHosts | None:
    section = settings.inventory
    if not section.enabled or section.redis is None or nodes is None:
        return None
    from relay.stores.nodes_redis import NodesAcrossHosts  # noqa: PLC0415 - few share them

    # Several relays may run on one host.
    host = f"{gethostname()}:{settings.admin.address.port}"
    return NodesAcrossHosts(nodes, section.redis.text, str(section.redis), host=host, keep=section.keep)


def _with(chosen: tuple[Policy, ...], auth: Auth) -> tuple[Policy, ...]:
    """Return the policies of one listener: all share them, but for whom they let in."""
    return tuple(auth if isinstance(policy, Auth) else policy for policy in chosen)


def policies(
    settings: Settings,
    table: HostTable,
    counting: Metrics,
    kept: HostRecords | None = None,
    nodes: Nodes | None = None,
    *,
    held: Quota | None = None,
) -> tuple[Policy, ...]:
    """Return the policies that these settings ask for, each with its own section alone, in ORDER.

    What stands for `auth` among them asks for nothing: each listener puts its own in that place.
    """
    retry, repair, redelivery = settings.retry, settings.repair, settings.redelivery
    nodes = nodes or Nodes(settings.inventory.nodes)
    # Legacy SuperLinks verify no signature: what they accept proves nothing.
    signed = settings.upstream.wire is not Wire.REST_V0 and any(
        "node_signature" in names for listener in settings.listeners for names in listener.auth.accept
    )
    made: dict[type, Policy] = {
        Metrics: counting,
        AccessLog: AccessLog(debug=settings.log.level == "debug"),
        Inventory: Inventory(enabled=settings.inventory.enabled, nodes=nodes, keep=settings.inventory.keep),
        Maintenance: Maintenance(enabled=settings.mode == "maintenance"),
        Auth: Auth(),
        Validate: Validate(check_calls=settings.limits.check_calls and settings.mode != "pass_through"),
        Quarantine: admission.quarantine(settings.quarantine),
        Redelivery: Redelivery(
            enabled=redelivery.enabled,
            max_size=redelivery.max_size,
            deliveries=redelivery.deliveries,
            records=HostRecords(redelivery.memory // PIECE, PIECE) if kept is None else kept,
            table=table,
            redis=_kept_redis(redelivery),
        ),
        Repair: Repair(
            lost_answers=repair.lost_answers,
            reactivate=repair.reactivate,
            table=table,
            rest=settings.upstream.wire is Wire.REST_V0,
        ),
        Retry: Retry(
            enabled=retry.enabled,
            base=retry.base,
            cap=retry.cap,
            budget=Budget(retry.budget, retry.floor),
            budgets=budgets(settings),
        ),
        Held: Held(
            (held or Quota(settings.limits.max_held)) if settings.upstream.wire is Wire.GRPC else None,
            queue_timeout=settings.upstream.queue_timeout,
        ),
        Shed: shed(settings.shed, elsewhere=sheds_each(settings)),
        Signing: _signing(settings),
        Accepted: Accepted(enabled=signed, pairs=nodes.pairs),
    }
    order = (*OBSERVERS, *GUARDS, *BRIDGES) if settings.mode == "pass_through" else ORDER
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
    known = admission.credentials(settings, KeyTable(None), NodeKeys())
    for listener in settings.listeners:
        here = _with(chosen, admission.auth(listener.auth, known))
        for wire in listener.wires:
            for method in Method:
                yield listener, wire, method, _chain(settings, here, _unreachable, method)


async def _unreachable(_: Call) -> Reply:
    raise AssertionError("an explained chain is not called")


def _chain(settings: Settings, chosen: tuple[Policy, ...], upstream: Handler, method: Method) -> Chain:
    name = f"{settings.upstream.wire.value} " + " | ".join(map(str, urls(settings.upstream)))
    if sheds_each(settings):
        name = f"shed of each of {name}"
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


def _limits(section: settings_of.Limits) -> Limits:
    requests = {kind: getattr(section.requests, kind.value) for kind in MAX_REQUEST}
    return Limits(
        bodies(section.max_body, requests),
        header_count=section.header_count,
        header_size=section.header_size,
        head_size=section.head_size,
        head_timeout=section.head_timeout,
        min_rate=section.min_rate,
        rate_window=section.rate_window,
        connections=section.connections,
        connections_per_peer=section.connections_per_peer,
    )


def _tls(settings: Settings, table: HostTable) -> Tls:
    counting = Handshakes()
    listeners = [
        ListenerTls(
            str(listener.address),
            listener.tls,
            counting,
            protocol="h2" if listener.speaks_grpc else "http/1.1",
        )
        if listener.tls is not None
        else None
        for listener in settings.listeners
    ]
    return Tls(listeners, UpstreamTls(settings.upstream) if settings.upstream.url.tls else None, table)


def _certificate_header(listener: Listener) -> bytes:
    header = listener.client_certificate_header
    return b"" if header == "off" else header.lower().encode()
