"""What the admin port says: alive, ready unless the whole relay stops, and the metrics of all workers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from relay import __version__, admin
from relay.app import Relay
from relay.exposition import exposition
from relay.policies.metrics import stray
from relay.shared import Shared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from relay.upstreams.balance import Balance

STATE: dict[str, object] = {"address": "superlink:8000", "connections": 2, "last_failure": None}

#: What a worker process does: count two requests that were no calls, then report how many calls it has.
WORKER = """
from relay.policies.metrics import IN_FLIGHT, stray
stray("404")
stray("404")
IN_FLIGHT.labels("http_v1").inc()
"""


class FakePool:
    """A pool in the state that the test gives it."""

    def __init__(self) -> None:
        self.given = dict(STATE)

    def state(self) -> dict[str, object]:
        return self.given


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def shared() -> Shared:
    return Shared()


@pytest.fixture
async def client(pool: FakePool, shared: Shared) -> AsyncIterator[TestClient[Any, Any]]:
    relay = Relay(fronts=(), pool=cast("Balance", pool), tick=lambda: None)
    async with TestClient(TestServer(admin.application(relay, shared))) as client:
        yield client


async def test_a_worker_that_answers_is_alive(client: TestClient[Any, Any]) -> None:
    answer = await client.get("/livez")
    assert (answer.status, await answer.text()) == (200, "ok\n")


async def test_a_relay_that_serves_is_ready_and_says_what_it_is(client: TestClient[Any, Any]) -> None:
    answer = await client.get("/readyz")
    assert answer.status == 200
    assert await answer.json() == {
        "ready": True,
        "reason": "serving",
        "version": __version__,
        "generation": 0,
        "serving": 0,
        "reloads_refused": 0,
        "upstream": STATE,
    }


async def test_a_reload_that_goes_on_is_shown_and_a_generation_serves_when_it_has_ended(
    client: TestClient[Any, Any], shared: Shared
) -> None:
    shared.begin()
    shared.reloaded(accepted=True)
    shared.serves(1, 3)
    said = await (await client.get("/readyz")).json()
    assert (said["generation"], said["serving"], said["reloading"]) == (1, 0, True)
    shared.end(1)
    said = await (await client.get("/readyz")).json()
    assert (said["generation"], said["serving"], "reloading" in said) == (1, 1, False)


async def test_a_relay_that_stops_is_alive_and_not_ready(
    client: TestClient[Any, Any], shared: Shared
) -> None:
    shared.stop()
    answer = await client.get("/readyz")
    assert answer.status == 503
    assert await answer.json() == {
        "ready": False,
        "reason": "draining",
        "version": __version__,
        "generation": 0,
        "serving": 0,
        "reloads_refused": 0,
        "upstream": STATE,
    }
    assert (await client.get("/livez")).status == 200


async def test_an_outage_of_the_superlink_is_a_detail_and_makes_nobody_unready(
    client: TestClient[Any, Any], pool: FakePool
) -> None:
    pool.given = STATE | {"connections": 0, "last_failure": "no connection: refused"}
    answer = await client.get("/readyz")
    assert answer.status == 200
    assert (await answer.json())["upstream"]["last_failure"] == "no connection: refused"


async def test_metrics_are_in_the_format_that_prometheus_asks_for(client: TestClient[Any, Any]) -> None:
    stray("404")
    answer = await client.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(await answer.text())}
    (sample,) = [
        sample
        for sample in families["relay_strays"].samples
        if sample.name == "relay_strays_total" and sample.labels == {"answer": "404"}
    ]
    assert sample.value >= 1


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("HEAD", "/livez", 200),
        ("HEAD", "/readyz", 200),
        ("POST", "/readyz", 405),
        ("GET", "/", 404),
        ("POST", "/v1/fleet/pull-messages", 404),
    ],
)
async def test_the_port_answers_questions_and_serves_no_nodes(
    client: TestClient[Any, Any], verb: str, path: str, status: int
) -> None:
    assert (await client.request(verb, path)).status == status


# -- the metrics of all workers -----------------------------------------------------------------------


def work(directory: Path) -> None:
    """Run one worker to its end."""
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", WORKER], env=environ, check=True, timeout=60)


@pytest.fixture
def value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], float | None]:
    """Return a function from the start of a line of the exposition to the number in it."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def value(start: str) -> float | None:
        lines = [line for line in exposition().decode().splitlines() if line.startswith(start)]
        return float(lines[0].rpartition(" ")[2]) if lines else None

    return value


def test_the_metrics_of_all_workers_add_up(tmp_path: Path, value: Callable[[str], float | None]) -> None:
    assert value("relay_strays_total") is None
    for workers in (1, 2):
        work(tmp_path)
        assert value('relay_strays_total{answer="404"}') == 2 * workers


def test_calls_in_flight_on_a_worker_that_died_are_forgotten_and_its_counters_are_not(
    tmp_path: Path, value: Callable[[str], float | None]
) -> None:
    from prometheus_client import multiprocess  # noqa: PLC0415

    work(tmp_path)
    (gauges,) = tmp_path.glob("gauge_livesum_*.db")
    assert value("relay_calls_in_flight") == 1
    multiprocess.mark_process_dead(gauges.stem.rpartition("_")[2])  # type: ignore[no-untyped-call]
    assert value("relay_calls_in_flight") is None
    assert value("relay_strays_total") == 2
