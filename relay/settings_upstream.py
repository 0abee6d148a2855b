"""The sections of the settings about the SuperLink's addresses, the circuit breaker and load shedding."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from relay.call import Wire
from relay.settings_section import Section
from relay.settings_source import Found, Key, dotted
from relay.settings_tls import off
from relay.settings_types import BaseUrl, Bytes, Doc, Flag, Seconds, below, show_seconds

if TYPE_CHECKING:
    from relay.settings_tree import Settings

_Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000), Doc("whole number above 0")]


class Health(Section):
    """Which of several addresses of the SuperLink are out. With one address nothing is checked: there is
    nothing to choose."""

    interval: Seconds = 5.0
    """How often each address is checked, by one worker of the host, a fifth sooner or later: `GET /health` in
    `http_v1`, in `rest_v0` a GET of a method, which a SuperLink answers with 405. Checks come at most once a
    second."""

    timeout: Seconds = 2.0
    """How long a check waits for its answer."""

    failures: _Count = 3
    """Failures in a row after which an address is out: checks that fail, or with `upstream.shared_state`
    calls of one worker that get no connection, no answer in time, or 502, 503 or 504."""

    ejection: Seconds = 5.0
    """How long an address is left out because of calls, doubled each time in a row. The last one never is."""

    max_ejection: Seconds = 60.0
    """Longest time that an address is left out because of calls."""


class Breaker(Section):
    """The circuit breaker: while the SuperLink is out, calls are refused at once, and one at a time on the
    host finds out whether it is back. Nodes are told what they are told in an outage."""

    enabled: Flag = True
    """Whether there is one for each address."""

    failures: _Count = 5
    """Calls of one worker in a row that get no connection, no answer in time, or 502, 503 or 504, after which
    the breaker opens for all workers."""

    open_seconds: Annotated[Seconds, below(60.001, "a node without a heartbeat for 60 s is given up")] = 2.0
    """How long it stays open before the next call may try. Short, so that no more time is lost than the
    outage took. A try without an answer has failed after 4 s."""


class Shed(Section):
    """Load shedding: how many calls each worker sends to the SuperLink at a time. What would wait for too
    long is refused, pulls first ("nothing now"), heartbeats last. All numbers are for each address of it."""

    mode: Annotated[Literal["adaptive", "fixed", "off"], BeforeValidator(off)] = "adaptive"
    """`adaptive` finds the number of calls from how long the SuperLink takes, between `min_limit` and
    `limit`; `fixed` is `limit`."""

    limit: _Count = 128
    """Most calls of one worker that the SuperLink is given at a time. It takes 7 to 9 ms for one and does one
    after the other, so more of them only wait longer: 16 are many for `fixed`, and `adaptive` stays near
    that by itself unless answers come within 10 ms."""

    min_limit: Annotated[int, Field(strict=True, ge=4), Doc("whole number, at least 4")] = 4
    """Fewest calls to which `adaptive` goes down, at most `shed.limit`."""

    queue: _Count = 1024
    """Most calls of one worker that wait for their turn."""

    queue_timeout: Annotated[Seconds, below(4, "a node gives up on a heartbeat after 5 s")] = 2.0
    """How long a call waits for its turn."""

    max_bytes: Annotated[Bytes, Field(ge=1 << 20)] = 2 << 30
    """Most bytes of bodies above 64 KiB that one worker passes on at a time, by the sizes that they announce;
    it holds far fewer of them in memory. A body that is longer than that passes alone."""


def conflicts(settings: "Settings") -> Iterator[Found]:
    """Yield what does not fit together."""
    yield from _addresses(settings)
    health, shed = settings.upstream.health, settings.shed
    if health.ejection > health.max_ejection:
        most = show_seconds(health.max_ejection)
        message = f"must be at most upstream.health.max_ejection, which is {most}"
        keys: tuple[Key, ...] = (("upstream", "health", "ejection"), ("upstream", "health", "max_ejection"))
        yield keys, show_seconds(health.ejection), message
    if shed.min_limit > shed.limit:
        message = f"must be at most shed.limit, which is {shed.limit}"
        yield (("shed", "min_limit"), ("shed", "limit")), str(shed.min_limit), message


def _addresses(settings: "Settings") -> Iterator[Found]:
    upstream = settings.upstream
    if upstream.wire is Wire.GRPC:
        for name in ("addresses", "standby"):
            if urls := getattr(upstream, name):
                message = "cannot be used with upstream.wire: grpc, which has one address: leave it out"
                yield (("upstream", name), ("upstream", "wire")), _texts(urls), message
        for name in ("certificate", "server_name"):
            if (value := getattr(upstream, name)) is not None:
                message = "cannot be used with upstream.wire: grpc: leave it out"
                yield (("upstream", name), ("upstream", "wire")), str(value), message
    shared: Key = ("upstream", "shared_state")
    if upstream.addresses and not upstream.shared_state:
        message = (
            "needs upstream.shared_state: true: SuperLinks that do not share their state answer each other's"
            " nodes with 401, which ends them; a SuperLink that stands by belongs into upstream.standby"
        )
        yield (("upstream", "addresses"), shared), _texts(upstream.addresses), message
    if upstream.standby and upstream.shared_state:
        message = "cannot be used with upstream.shared_state: write them into upstream.addresses"
        yield (("upstream", "standby"), shared), _texts(upstream.standby), message
    known: dict[tuple[str, int], Key] = {(upstream.url.host, upstream.url.port): ("upstream", "url")}
    for name in ("addresses", "standby"):
        for index, url in enumerate(getattr(upstream, name)):
            key: Key = ("upstream", name, index)
            if url.tls != upstream.url.tls:
                message = f"must begin with {upstream.url.scheme}://, as upstream.url does"
                yield (key, ("upstream", "url")), str(url), message
            where = (url.host, url.port)
            if where in known:
                message = f"is the address of {dotted(known[where])} as well: write each once"
                yield (key, known[where]), str(url), message
            known.setdefault(where, key)


def _texts(urls: tuple[BaseUrl, ...]) -> str:
    return ", ".join(map(str, urls))
