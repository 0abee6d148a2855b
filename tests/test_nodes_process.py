"""Whole relays with two workers: what one learns of a node the other shows, and both obey the lists."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from relay.credentials.node_keys import read_key
from relay.fleet import Method
from tests.load import superlink
from tests.redis_server import RedisServer
from tests.relay_process import RelayProcess
from tests.served import request
from tests.signing import Node
from tests.sockets import connect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(100), pytest.mark.xdist_group("relay-processes")]

#: A change is effective on all workers within this. The promise is 2 s; the rest is for a busy machine.
PROMISE = 2.0
SLACK = 3.0
#: Calls in a row, each on a connection of its own, after which both workers have been asked.
BOTH = 16


def headers(node: Node, version: bytes = b"1.42.0") -> bytes:
    lines = [b"%b: %b\r\n" % pair for pair in [*node.headers(), (b"flwr-package-version", version)]]
    return b"".join(lines)


async def pull(relay: RelayProcess, node: Node, *, signed: bool = True) -> tuple[int, bytes]:
    """Ask for messages on a new connection; return status and body. The SuperLink sends back what it got."""
    peer = await connect(relay.port)
    try:
        peer.send(request(Method.PULL_MESSAGES, node.body, more=headers(node) if signed else b""))
        answer = await peer.message()
        return int(answer.start.split()[1]), answer.body
    finally:
        peer.writer.transport.abort()
        await asyncio.sleep(0)


async def until_all(relay: RelayProcess, node: Node, expected: tuple[int, bytes]) -> float:
    """Ask until BOTH answers in a row are this; return how long it took until the first of them."""
    started = first = time.monotonic()
    row = 0
    while row < BOTH:
        answer = await pull(relay, node)
        if answer == expected:
            first = first if row else time.monotonic()
            row += 1
        else:
            row = 0
        assert time.monotonic() < started + PROMISE + SLACK + 10, f"still {answer}, never {expected}"
    return first - started


async def nodes(relay: RelayProcess, *words: str) -> str:
    """Run `flwr-relay nodes` beside the relay."""
    command = [sys.executable, "-W", "ignore", "-m", "relay", "nodes", *words, "-c", str(relay.config)]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_lists(directory: Path, upstream: int, **more: Any) -> RelayProcess:
    settings: dict[str, Any] = {
        "node_keys": {"allow": str(directory / "node-keys")},
        "quarantine": {"file": str(directory / "quarantine")},
        **more,
    }
    relay = RelayProcess(directory, upstream, **settings)
    relay.settings["listeners"][0]["auth"] = {"accept": ["node_signature"]}
    return relay


async def test_allowed_keys_are_effective_on_all_workers_and_strangers_never_pass(tmp_path: Path) -> None:
    node, other = Node(17), Node(18)
    public = tmp_path / "node.pub"
    public.write_text(f"{node.ssh} site-b\n")
    (tmp_path / "node-keys").write_text(f"{other.ssh} other\n")
    async with superlink() as (upstream, seen):
        with with_lists(tmp_path, upstream) as relay:
            refused = (401, b"unauthenticated")
            assert [await pull(relay, node) for _ in range(BOTH)] == [refused] * BOTH
            assert await pull(relay, other, signed=False) == refused
            assert not seen, "a stranger's call reached the SuperLink"
            assert await pull(relay, other) == (200, other.body)
            await nodes(relay, "allow", str(public))
            assert await until_all(relay, node, (200, node.body)) < PROMISE + SLACK
            # A list that breaks, or goes, lets nobody out who was in.
            (tmp_path / "node-keys").write_text("broken\n")
            await asyncio.sleep(PROMISE)
            assert [await pull(relay, node) for _ in range(BOTH)] == [(200, node.body)] * BOTH
            (tmp_path / "node-keys").unlink()
            await asyncio.sleep(PROMISE)
            assert [await pull(relay, node) for _ in range(BOTH)] == [(200, node.body)] * BOTH
            (tmp_path / "node-keys").write_text(f"{node.ssh} site-b\n{other.ssh} other\n")
            await asyncio.sleep(PROMISE)
            await nodes(relay, "disallow", "site-b")
            assert await until_all(relay, node, refused) < PROMISE + SLACK
            assert await pull(relay, other) == (200, other.body)
            assert (
                relay.metric("relay_auth_refusals_total", cause="not_allowed", action="refused") >= 2 * BOTH
            )
            assert relay.metric("relay_list_reads_total", list="node_keys", outcome="refused") >= 2
            text = relay.log.read_text()
            assert all(value.decode() not in text for _, value in node.headers()[:1])


async def test_quarantine_is_effective_on_all_workers_and_is_survived(tmp_path: Path) -> None:
    node, other = Node(17), Node(18)
    (tmp_path / "node-keys").write_text(f"{node.ssh} site-b\n{other.ssh} other\n")
    key = read_key(node.ssh.encode())[0].fingerprint
    async with superlink() as (upstream, seen):
        with with_lists(tmp_path, upstream) as relay:
            for target in ("17", key, "site-b"):
                assert await until_all(relay, node, (200, node.body)) < PROMISE + SLACK
                await nodes(relay, "quarantine", target, "--reason", "a test")
                assert await until_all(relay, node, (200, b"")) < PROMISE + SLACK
                before = seen[node.body]
                assert await pull(relay, node) == (200, b"")
                assert seen[node.body] == before, "a node in quarantine reached the SuperLink"
                assert await pull(relay, other) == (200, other.body)
                assert "IN QUARANTINE; forbidden PullMessages" in await nodes(relay, "list")
                await nodes(relay, "release", target)
            assert await until_all(relay, node, (200, node.body)) < PROMISE + SLACK
            assert relay.metric("relay_quarantined_total", method="PullMessages", enforced="true") >= 3 * BOTH


async def test_each_worker_shows_the_nodes_of_all(tmp_path: Path) -> None:
    many = [Node(number) for number in range(1, 21)]
    async with superlink() as (upstream, _):
        with RelayProcess(tmp_path, upstream) as relay:
            for node in many:
                assert await pull(relay, node) == (200, node.body)
            workers = {relay.workers()[0].pid, relay.workers()[1].pid}
            assert len(workers) == 2
            for _ in range(8):  # whichever worker answers
                status, text = await asyncio.to_thread(relay.get, "/nodes?limit=100&accepted=true")
                assert status == 200
                assert text.count('"node_id"') == 20
                assert (await asyncio.to_thread(relay.get, "/nodes/7"))[0] == 200
            assert (
                await asyncio.to_thread(relay.metric, "relay_nodes", wire="http_v1", flwr_version="1.42")
                == 20
            )
            for worker in relay.workers():
                worker.kill()
            await asyncio.to_thread(relay.until, lambda: relay.count("worker serves") >= 4)
            assert (await asyncio.to_thread(relay.get, "/nodes?limit=0"))[1].count('"total": 20') == 1
            shown = await nodes(relay, "show", "7")
            assert '"version": "1.42.0"' in shown


async def test_each_host_shows_the_nodes_of_all(tmp_path: Path) -> None:
    """Two relays stand for two hosts; what one is called by, the other shows when it was written to Redis."""
    node = Node(17)
    for name in ("one", "other", "redis"):
        (tmp_path / name).mkdir()
    with RedisServer(tmp_path / "redis") as redis:
        async with superlink() as (port, _):
            shared: dict[str, Any] = {"inventory": {"redis": redis.url}}
            one = RelayProcess(tmp_path / "one", port, workers=1, **shared)
            other = RelayProcess(tmp_path / "other", port, workers=1, **shared)
            try:
                await asyncio.to_thread(one.start)
                await asyncio.to_thread(other.start)
                assert (await pull(one, node))[0] == 200
                await asyncio.to_thread(other.until, lambda: other.get("/nodes/17")[0] == 200, 30)
                redis.kill()
                assert (await asyncio.to_thread(one.get, "/nodes/17"))[0] == 200
                assert (await asyncio.to_thread(other.get, "/nodes/17"))[0] == 404
                assert (await pull(other, node))[0] == 200
            finally:
                for relay in (one, other):
                    await asyncio.to_thread(relay.end)
