"""The addresses of the SuperLink with all that belongs to each, made from the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.call import Wire
from relay.concurrency import AdaptiveLimit, FixedLimit
from relay.policies.retry import Budget
from relay.policies.shed import Shed
from relay.upstreams import http_v1, rest_v0
from relay.upstreams.balance import Address, Balance
from relay.upstreams.breaker import Breaker
from relay.upstreams.check import Check
from relay.upstreams.health import Health
from relay.upstreams.http import Timeouts
from relay.upstreams.pool import Pool, Target
from relay.upstreams.resolve import Resolver, is_name

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from relay.pipeline import Handler
    from relay.policies.shed import Limit
    from relay.settings import BaseUrl, Settings, Upstream
    from relay.settings import Shed as ShedSection
    from relay.stores.upstreams import UpstreamTable
    from relay.tls_files import UpstreamTls

#: Calls that a worker sends at a time before it knows how fast the SuperLink is.
_FIRST_LIMIT = 16

UPSTREAMS = {Wire.HTTP_V1: http_v1.upstream, Wire.REST_V0: rest_v0.upstream}
QUESTIONS = {Wire.HTTP_V1: http_v1.QUESTION, Wire.REST_V0: rest_v0.QUESTION}


def urls(section: Upstream) -> tuple[BaseUrl, ...]:
    """Return all addresses, the one that is used first first."""
    return (section.url, *section.addresses, *section.standby)


def budgets(settings: Settings) -> dict[str, Budget]:
    """Return a budget of repeats for each of several addresses, by its name, with its share of the calls."""
    section, retry = settings.upstream, settings.retry
    several = urls(section)
    if len(several) == 1:
        return {}
    share = retry.budget / (len(several) if section.shared_state else 1)
    return {f"{url.host}:{url.port}": Budget(share, retry.floor) for url in several}


def sheds_each(settings: Settings) -> bool:
    """Return whether each address limits its own calls: of several, one says nothing about the others."""
    several = len(urls(settings.upstream)) > 1
    return several and settings.shed.mode != "off" and settings.mode != "pass_through"


def shed(section: ShedSection, *, elsewhere: bool = False) -> Shed:
    """Return the policy that these settings ask for; one that leaves no trace if it is done `elsewhere`."""
    limit: Limit | None = None
    if section.mode == "fixed" and not elsewhere:
        limit = FixedLimit(section.limit)
    elif section.mode == "adaptive" and not elsewhere:
        limit = AdaptiveLimit(first=_FIRST_LIMIT, least=section.min_limit, most=section.limit)
    return Shed(
        limit=limit,
        queue=section.queue,
        queue_timeout=section.queue_timeout,
        max_bytes=section.max_bytes,
    )


def superlink(
    settings: Settings,
    table: UpstreamTable,
    tls: UpstreamTls | None,
    limited: Callable[[Handler], Handler] | None = None,
) -> Balance:
    """Make the way to the SuperLink. Call it inside the running event loop.

    Args:
        settings: the whole tree.
        table: what the workers of the host share about addresses.
        tls: its files, for https.
        limited: put before the handler of each address, if there are several.
    """
    section = settings.upstream
    if section.wire is Wire.GRPC:
        return _over_grpc(settings, table, tls)
    balance: Balance

    def reconsider() -> None:
        balance.reconsider()

    several = len(urls(section)) > 1
    made = []
    for url in urls(section):
        pool = _pool(section, url, tls.context if tls is not None else None)
        if is_name(url.host):
            pool.resolver = Resolver(
                url.host,
                url.port,
                table,
                interval=section.resolve_interval,
                spread=section.shared_state,
                on_change=pool.renew,
            )
        timeouts = Timeouts(section.response_timeout, section.heartbeat_timeout)
        upstream = UPSTREAMS[section.wire](pool, timeouts, judging=settings.mode != "pass_through")
        handler, breaker = _broken(settings, pool.name, upstream, table, pool.renew)
        health, check = section.health, None
        if several:
            check = Check(
                pool,
                table,
                QUESTIONS[section.wire],
                interval=health.interval,
                timeout=health.timeout,
                failures=health.failures,
                on_result=reconsider,
            )
            handler = limited(handler) if limited is not None else handler
        limits = _health(settings, pool.name, table)
        made.append(Address(pool, handler, limits, breaker=breaker, resolver=pool.resolver, check=check))
    balance = Balance(made, table, shared_state=section.shared_state, standby_after=section.standby_after)
    return balance


def _over_grpc(settings: Settings, table: UpstreamTable, tls: UpstreamTls | None) -> Balance:
    """The same for a SuperLink that speaks gRPC, which has one address, and looks names up by itself."""
    from relay.upstreams.channels import Channels, Secured  # noqa: PLC0415 - imported where it is spoken
    from relay.upstreams.grpc_fleet import GrpcUpstream  # noqa: PLC0415

    section = settings.upstream
    channels = Channels(
        section.url.host,
        section.url.port,
        Secured(tls.authorities) if tls is not None else None,
        connect_timeout=section.connect_timeout,
        max_message=settings.limits.max_body,
    )
    if tls is not None:
        files = tls
        files.on_taken = lambda: channels.take_up(Secured(files.authorities))
    upstream = GrpcUpstream(
        channels,
        Timeouts(section.response_timeout, section.heartbeat_timeout),
        judging=settings.mode != "pass_through",
    )
    handler, breaker = _broken(settings, channels.name, upstream, table, channels.renew)
    address = Address(channels, handler, _health(settings, channels.name, table), breaker=breaker)
    return Balance([address], table, shared_state=False, standby_after=section.standby_after)


def _broken(
    settings: Settings, name: str, upstream: Handler, table: UpstreamTable, on_open: Callable[[], None]
) -> tuple[Handler, Breaker | None]:
    """Put a breaker before the handler of an address, if there shall be one."""
    if settings.mode == "pass_through" or not settings.breaker.enabled:
        return upstream, None
    breaker = Breaker(
        name,
        upstream,
        table,
        failures=settings.breaker.failures,
        open_seconds=settings.breaker.open_seconds,
        on_open=on_open,
    )
    return breaker, breaker


def _health(settings: Settings, name: str, table: UpstreamTable) -> Health:
    section = settings.upstream.health
    return Health(
        name,
        table,
        failures=section.failures,
        ejection=section.ejection,
        max_ejection=section.max_ejection,
    )


def _pool(section: Upstream, url: BaseUrl, tls: ssl.SSLContext | None) -> Pool:
    return Pool(
        Target(url.host, url.port, url.authority, tls),
        connect_timeout=section.connect_timeout,
        idle_timeout=section.idle_timeout,
        keepalive=section.keepalive,
        max_connections=section.max_connections,
        queue_timeout=section.queue_timeout,
    )
