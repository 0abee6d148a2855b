"""The settings become addresses, each with what it needs, and nothing that it does not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.call import Wire
from relay.fleet import Method
from relay.policies.shed import Shed
from relay.refusal import Refusal
from relay.settings import load
from relay.stores.upstreams import OPEN, UpstreamTable
from relay.superlink import budgets, shed, sheds_each, superlink
from relay.tls_files import UpstreamTls
from relay.upstreams.breaker import Breaker
from relay.upstreams.http import HttpUpstream
from relay.upstreams.pool import Pool
from tests.certificates import make_pair
from tests.grpc_ends import GrpcSuperLink, server_credentials
from tests.sockets import Listener, response, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from relay.call import Call, Reply
    from relay.settings import Settings
    from relay.upstreams.balance import Balance

#: Sooner than an idle connection is retired by itself.
_SOON = 2.0


def settings(**environ: str) -> Settings:
    return load(None, {f"RELAY_{name}": value for name, value in environ.items()})


def made(table: UpstreamTable | None = None, **environ: str) -> Balance:
    return superlink(settings(**environ), table or UpstreamTable(), None)


async def test_one_address_has_a_breaker_and_is_not_checked() -> None:
    balance = made()
    (address,) = balance.addresses
    assert address.name == "127.0.0.1:8000"
    assert isinstance(balance.handler, Breaker)
    assert address.check is None
    assert address.resolver is None
    balance.tick()
    await balance.close()


async def test_without_a_breaker_calls_go_to_the_upstream_itself() -> None:
    balance = made(BREAKER__ENABLED="false")
    assert isinstance(balance.handler, HttpUpstream)
    assert balance.breakers() == {}
    await balance.close()


async def test_an_emergency_switches_the_breaker_off() -> None:
    balance = made(MODE="pass_through")
    assert isinstance(balance.handler, HttpUpstream)
    await balance.close()


async def test_a_name_is_resolved_and_an_address_is_not() -> None:
    balance = made(
        UPSTREAM__URL="http://superlink:1",
        UPSTREAM__ADDRESSES="[http://10.0.0.1:1]",
        UPSTREAM__SHARED_STATE="true",
    )
    name, address = balance.addresses
    assert name.resolver is not None
    assert isinstance(name.pool, Pool)
    assert name.pool.resolver is name.resolver
    assert address.resolver is None
    assert all(each.check is not None for each in balance.addresses)
    await balance.close()


@pytest.mark.parametrize("wire", ["http_v1", "rest_v0"])
async def test_several_addresses_are_checked_with_what_their_wire_answers(wire: str) -> None:
    path, status = {
        "http_v1": (b"/health", b"200 OK"),
        "rest_v0": (b"/api/v0/fleet/pull-messages", b"405 No"),
    }[wire]
    table = UpstreamTable()
    async with Listener() as first, Listener() as second:
        balance = made(
            table,
            UPSTREAM__URL=f"http://127.0.0.1:{first.port}",
            UPSTREAM__STANDBY=f"[http://127.0.0.1:{second.port}]",
            UPSTREAM__WIRE=wire,
        )
        balance.tick()
        for listener in (first, second):
            peer = await listener.accept()
            assert (await peer.message()).start == b"GET %b HTTP/1.1" % path
            await peer.send_all(response(status=status))
        names = [address.name for address in balance.addresses]
        await until(lambda: all(table.get(name).checked for name in names))
        assert not any(table.get(name).misses for name in names)
        await balance.close()


async def test_a_breaker_that_opens_lets_go_of_idle_connections() -> None:
    """They may be dead without anybody knowing, and the probe must not wait for one of them."""
    table = UpstreamTable()
    async with Listener() as listener:
        balance = made(table, UPSTREAM__URL=f"http://127.0.0.1:{listener.port}")
        pool = balance.addresses[0].pool
        assert isinstance(pool, Pool)
        pool.give_back(await pool.acquire())
        assert pool.state()["connections"] == 1
        table.change(pool.name, lambda state: state._replace(breaker=OPEN))
        balance.tick()
        await until(lambda: pool.state()["connections"] == 0, _SOON)
        await balance.close()


async def test_a_connection_that_was_lent_when_the_pool_was_renewed_ends_when_it_comes_back() -> None:
    async with Listener() as listener:
        balance = made(UPSTREAM__URL=f"http://127.0.0.1:{listener.port}")
        pool = balance.addresses[0].pool
        assert isinstance(pool, Pool)
        old = await pool.acquire()
        pool.renew()
        new = await pool.acquire()
        pool.give_back(old)
        pool.give_back(new)
        assert await pool.acquire() is new
        await until(lambda: pool.state()["connections"] == 1, _SOON)
        await asyncio.sleep(0)
        assert not pool._old
        await balance.close()


# -- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        (
            {"UPSTREAM__ADDRESSES": "[http://b:1]"},
            r"upstream.addresses = http://b:1: needs upstream.shared_state",
        ),
        (
            {"UPSTREAM__STANDBY": "[http://b:1]", "UPSTREAM__SHARED_STATE": "true"},
            r"upstream.standby = http://b:1: cannot be used with upstream.shared_state",
        ),
        (
            {"UPSTREAM__STANDBY": "[https://b:1]"},
            r"upstream.standby\[0\] = https://b:1: must begin with http://",
        ),
        (
            {"UPSTREAM__STANDBY": "[http://b:1, http://127.0.0.1:8000]"},
            r"upstream.standby\[1\] = http://127.0.0.1:8000: is the address of upstream.url as well",
        ),
        (
            {"UPSTREAM__HEALTH__EJECTION": "2m"},
            r"upstream.health.ejection = 120s: must be at most upstream.health.max_ejection, which is 60s",
        ),
        ({"SHED__MIN_LIMIT": "129"}, r"shed.min_limit = 129: must be at most shed.limit, which is 128"),
        ({"SHED__MIN_LIMIT": "3"}, r"shed.min_limit = 3: must be at least 4"),
        ({"SHED__QUEUE_TIMEOUT": "4s"}, r"shed.queue_timeout = '4s': must be shorter than 4s"),
        ({"BREAKER__FAILURES": "0"}, r"breaker.failures = 0: must be at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_what_does_not_fit_together_is_named(environ: dict[str, str], problem: str) -> None:
    from relay.settings import SettingsError  # noqa: PLC0415

    with pytest.raises(SettingsError, match=problem):
        settings(**environ)


@pytest.mark.parametrize(("mode", "first"), [("adaptive", 16), ("fixed", 128), ("off", None)])
def test_the_mode_of_shedding_is_the_limit_that_it_has(mode: str, first: int | None) -> None:
    policy = shed(settings(SHED__MODE=mode).shed)
    assert isinstance(policy, Shed)
    assert (policy._limit.value if policy._limit is not None else None) == first


STANDBY = {"UPSTREAM__STANDBY": "[http://b:1]"}
SHARED = {"UPSTREAM__ADDRESSES": "[http://b:1, http://c:1]", "UPSTREAM__SHARED_STATE": "true"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        (STANDBY, True),
        (SHARED, True),
        (SHARED | {"SHED__MODE": "off"}, False),
        (SHARED | {"MODE": "pass_through"}, False),
    ],
)
async def test_each_of_several_addresses_has_a_limit_of_its_own(
    environ: dict[str, str], *, expected: bool
) -> None:
    chosen = settings(**environ)
    assert sheds_each(chosen) is expected
    limited: list[object] = []

    def limit(handler: Callable[[Call], Awaitable[Reply]]) -> Callable[[Call], Awaitable[Reply]]:
        limited.append(handler)
        return handler

    balance = superlink(chosen, UpstreamTable(), None, limit)
    several = len(balance.addresses) > 1
    assert limited == ([address.handler for address in balance.addresses] if several else [])
    await balance.close()


@pytest.mark.parametrize(
    ("environ", "calls"),
    [
        (STANDBY, {"127.0.0.1:8000": 5, "b:1": 5}),
        (SHARED, {"127.0.0.1:8000": 15, "b:1": 15, "c:1": 15}),
        ({}, {}),
    ],
)
def test_each_of_several_addresses_has_its_share_of_the_repeats(
    environ: dict[str, str], calls: dict[str, int]
) -> None:
    """A repeat for every so many calls of the worker."""
    made = budgets(settings(**environ, RETRY__BUDGET="0.2", RETRY__FLOOR="0.001"))
    assert list(made) == list(calls)
    for name, budget in made.items():
        assert budget.withdraw()  # what is saved up
        for _ in range(calls[name] - 1):
            budget.deposit()
        assert not budget.withdraw()
        for _ in range(2):
            budget.deposit()
        assert budget.withdraw()


async def test_a_grpc_superlink_is_checked_by_the_authorities_that_the_file_holds_now(
    tmp_path: Path, make_call: Callable[..., Call]
) -> None:
    certificate, key = make_pair(tmp_path)
    other, _ = make_pair(tmp_path, "other")
    authorities = tmp_path / "ca.pem"
    authorities.write_bytes(other.read_bytes())
    async with GrpcSuperLink(credentials=server_credentials(certificate, key)) as asked:
        chosen = settings(
            UPSTREAM__URL=f"https://localhost:{asked.port}",
            UPSTREAM__WIRE="grpc",
            UPSTREAM__CA_FILE=str(authorities),
            BREAKER__ENABLED="false",
        )
        files = UpstreamTls(chosen.upstream)
        balance = superlink(chosen, UpstreamTable(), files)
        with pytest.raises(Refusal):
            await balance.handler(make_call(Method.PULL_MESSAGES, b"x", wire=Wire.GRPC))
        authorities.write_bytes(certificate.read_bytes())
        assert files.tick() == "taken"
        reply = await balance.handler(make_call(Method.PULL_MESSAGES, b"x", wire=Wire.GRPC))
        assert reply.status == 200
        await balance.close()
