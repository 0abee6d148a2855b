"""Keys in a real relay with several workers: a change reaches all in 2 s, an outage none of the nodes.

Who answered is told by the request id, which begins with what its worker drew at its start.
"""

from __future__ import annotations

import base64
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import pytest
import yaml
from click.testing import CliRunner
from typer.main import get_command

from relay.__main__ import app
from relay.call import Call, Payload, Reply, Source
from relay.credentials.keys.redis import KEYS
from tests.redis_server import RedisServer
from tests.relay_process import RelayProcess
from tests.served import Served

WORKERS = 3
#: The promise.
EFFECTIVE = 2.0
#: Long enough for every worker to have answered some calls.
WATCH = 1.0
COMMAND = get_command(app)
PULL, HEARTBEAT = "/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat"


class Answer(NamedTuple):
    """What a call got, when it was sent (`time.monotonic()`), and from which worker."""

    status: int
    at: float
    worker: str


def call(port: int, key: str, path: str = PULL) -> Answer:
    """Make one call on a connection of its own."""
    at = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        headers = {
            "content-type": "application/protobuf",
            "authorization": "Basic " + base64.b64encode(f"node-a:{key}".encode()).decode(),
        }
        connection.request("POST", path, b"\x0a\x02\x08\x07", headers)
        answer = connection.getresponse()
        answer.read()
        return Answer(answer.status, at, answer.headers["x-request-id"].partition("-")[0])
    finally:
        connection.close()


class Calling:
    """Calls without a pause, from a few threads, until it is left; raises what went wrong."""

    def __init__(self, port: int, key: str) -> None:
        self.answers: list[Answer] = []
        self._errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(port, key)) for _ in range(3)]

    def _call(self, port: int, key: str) -> None:
        try:
            while not self._stop.is_set():
                self.answers.append(call(port, key))
                self._stop.wait(0.005)
        except Exception as error:  # noqa: BLE001 - told in the test's own thread
            self._errors.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._errors == []

    def statuses(self, since: float, until: float) -> dict[str, Counter[int]]:
        """Return what each worker answered to calls that were sent in this time."""
        found: dict[str, Counter[int]] = {}
        for answer in list(self.answers):
            if since <= answer.at < until:
                found.setdefault(answer.worker, Counter())[answer.status] += 1
        return found


def keys(relay: RelayProcess, *arguments: str, code: int = 0) -> str:
    """Run `flwr-relay keys` with the relay's settings; return what it prints."""
    relay.write()
    result = CliRunner().invoke(COMMAND, ["keys", *arguments, "--config", str(relay.config)])
    assert result.exit_code == code, result.output
    return result.stdout.strip()


async def nothing_new(call: Call) -> Reply:
    metadata = [(b"content-type", b"application/protobuf")]
    return Reply(Payload(), Source.UPSTREAM, metadata=metadata)


@pytest.fixture
def superlink() -> Iterator[Served]:
    with Served(nothing_new) as served:
        yield served


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, password="hunter2hunter2")
    yield server
    server.thaw_and_kill()


@pytest.fixture
def prepared(tmp_path: Path, superlink: Served) -> Iterator[Callable[..., RelayProcess]]:
    """A function that returns a relay, not yet started, with its keys in a file or in Redis."""
    relays = []

    def prepare(store: str) -> RelayProcess:
        relay = RelayProcess(
            tmp_path,
            superlink.port,
            workers=WORKERS,
            keys=yaml.safe_load(store),
            limits={"check_calls": False},
        )
        relay.settings["listeners"][0]["auth"] = {"accept": ["api_key"]}
        relays.append(relay)
        return relay

    yield prepare
    for relay in relays:
        relay.end()


def all_answer(found: dict[str, Counter[int]], status: int) -> bool:
    return len(found) == WORKERS and all(set(statuses) == {status} for statuses in found.values())


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_change_is_effective_on_all_workers_in_two_seconds_while_calls_go_on(
    tmp_path: Path, prepared: Callable[..., RelayProcess], kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        relay = prepared(f"{{redis: '{server.start().url}'}}")
    else:
        relay = prepared(f"{{file: {tmp_path}/keys.jsonl}}")
    old = keys(relay, "create", "node-a", "--init")
    relay.start()
    with Calling(relay.port, old) as calling:
        time.sleep(WATCH)
        now = time.monotonic()
        assert all_answer(calling.statuses(0, now), 200)

        new = keys(relay, "rotate", "node-a")
        rotated = time.monotonic()
        time.sleep(EFFECTIVE)
        with Calling(relay.port, new) as calling_anew:
            time.sleep(WATCH)
        assert all_answer(calling_anew.statuses(0, time.monotonic()), 200)
        assert all_answer(calling.statuses(rotated, time.monotonic()), 200), "the overlap keeps the old key"

        keys(relay, "revoke", "node-a")
        revoked = time.monotonic()
        time.sleep(EFFECTIVE + WATCH)
        end = time.monotonic()
        assert all_answer(calling.statuses(revoked + EFFECTIVE, end), 401)
        before = calling.statuses(0, revoked - 0.5)
        assert all_answer(before, 200), "nobody is refused before"
    assert relay.metric("relay_auth_refusals_total", cause="revoked", action="refused") >= WORKERS
    assert relay.metric("relay_auth_calls_total", credential="api_key") > 0
    text = relay.log.read_text()
    for key in (old, new):
        assert key.rpartition("_")[2] not in text
    assert "hunter2hunter2" not in text


def test_no_outage_of_redis_refuses_a_node_that_was_known(
    prepared: Callable[..., RelayProcess], redis: RedisServer
) -> None:
    relay = prepared(f"{{redis: '{redis.start().url}'}}")
    key = keys(relay, "create", "node-a", "--init")
    relay.start()
    with Calling(relay.port, key) as calling:
        for outage in (redis.freeze, redis.thaw, redis.kill, redis.start):
            outage()
            began = time.monotonic()
            time.sleep(1.5 + WATCH)
            assert all_answer(calling.statuses(began, time.monotonic()), 200), outage
        # It came back empty. Only who says that he begins anew makes the relays forget.
        keys(relay, "create", "node-b", code=1)
        assert call(relay.port, "flwr_00000000_" + "0" * 49).status == 401
        keys(relay, "create", "node-a", "--init")
        time.sleep(EFFECTIVE)
        assert call(relay.port, key).status == 401
    assert relay.metric("relay_keys_reads_total", outcome="failed") > 0
    complaints = {line["event"] for line in relay.complaints()}
    assert complaints == {"keys cannot be read"}


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_relay_that_starts_without_its_keys_refuses_nobody_until_it_has_them(
    tmp_path: Path, prepared: Callable[..., RelayProcess], redis: RedisServer, kind: str
) -> None:
    path = tmp_path / "keys.jsonl"
    relay = prepared(f"{{redis: '{redis.url}'}}" if kind == "redis" else f"{{file: {path}}}")
    path.write_text("cut off")
    relay.start()
    some = "flwr_00000000_" + "0" * 49
    for _ in range(4 * WORKERS):
        assert call(relay.port, some).status == 200  # nothing now
        assert call(relay.port, some, HEARTBEAT).status == 503
    assert relay.metric("relay_auth_refusals_total", cause="keys_unavailable", action="deferred") > 0
    path.unlink()
    if kind == "redis":
        redis.start()
    key = keys(relay, "create", "node-a", "--init")
    time.sleep(EFFECTIVE)
    with Calling(relay.port, key) as calling:
        time.sleep(WATCH)
    assert all_answer(calling.statuses(0, time.monotonic()), 200)
    assert call(relay.port, some).status == 401
    relay.until(lambda: relay.metric("relay_calls_total", outcome="unauthenticated") == 1)


def test_keys_that_redis_evicted_refuse_nobody_and_are_told_of(
    prepared: Callable[..., RelayProcess], redis: RedisServer
) -> None:
    relay = prepared(f"{{redis: '{redis.start().url}'}}")
    key = keys(relay, "create", "node-a", "--init")
    with redis.client() as client:
        kept = client.dump(KEYS)
        client.delete(KEYS)
        relay.start()
        for _ in range(4 * WORKERS):
            assert call(relay.port, key).status == 200  # nothing now
            assert call(relay.port, key, HEARTBEAT).status == 503
        keys(relay, "create", "node-b", "--init", code=1)
        client.restore(KEYS, 0, kept)
        time.sleep(EFFECTIVE)
        assert call(relay.port, "flwr_00000000_" + "0" * 49).status == 401, "they are known"
        client.delete(KEYS)
        began = time.monotonic()
        with Calling(relay.port, key) as calling:
            time.sleep(EFFECTIVE + WATCH)
        assert all_answer(calling.statuses(began, time.monotonic()), 200)
    assert relay.complaints() != []
    assert all("holds 0 keys where there were 1: restore" in line["problem"] for line in relay.complaints())


def test_a_file_that_breaks_keeps_the_keys_of_before_until_it_is_mended(
    tmp_path: Path, prepared: Callable[..., RelayProcess]
) -> None:
    path = tmp_path / "keys.jsonl"
    relay = prepared(f"{{file: {path}}}")
    key = keys(relay, "create", "node-a", "--init")
    relay.start()
    text = path.read_bytes()
    with Calling(relay.port, key) as calling:
        for broken in (text[:-30], b"", None):
            if broken is None:
                path.unlink()
            else:
                path.write_bytes(broken)
            began = time.monotonic()
            time.sleep(1.0 + WATCH)
            assert all_answer(calling.statuses(began, time.monotonic()), 200), broken
        path.write_bytes(text)
        keys(relay, "revoke", "node-a")
        time.sleep(EFFECTIVE)
        assert call(relay.port, key).status == 401
