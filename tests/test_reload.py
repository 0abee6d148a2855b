"""`flwr-relay reload`, and what it promises: exit 0 when the new settings serve, else the old ones do."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import pytest

from relay import reload
from relay.settings import Settings, load
from tests.certificates import make_pair
from tests.relay_process import RelayProcess, free_port
from tests.sockets import Listener, Message, Peer, connect, response
from tests.tls_clients import connect_tls, trusting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(60), pytest.mark.xdist_group("relay-processes")]

#: A reload that changes nothing else is seen by this: push-messages is refused by a relay in maintenance.
MAINTENANCE = {"mode": "maintenance"}
off = asyncio.to_thread


def call(method: str = "push-messages", more: bytes = b"") -> bytes:
    """Return the bytes of a call of a node."""
    return (
        b"POST /v1/fleet/%b HTTP/1.1\r\nHost: relay\r\nContent-Type: application/protobuf\r\n"
        b"%bContent-Length: 0\r\n\r\n" % (method.encode(), more)
    )


async def answer_all(peer: Peer) -> None:
    """Play a SuperLink that answers every call with nothing."""
    while True:
        await peer.message()
        peer.send(response())


class Node(Protocol):
    """Opens a connection to a relay."""

    async def __call__(self, port: int, context: ssl.SSLContext | None = None) -> Peer: ...


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    nodes: list[Peer] = []

    async def node(port: int, context: ssl.SSLContext | None = None) -> Peer:
        nodes.append(await (connect_tls(port, context) if context else connect(port)))
        return nodes[-1]

    yield node
    for peer in nodes:
        peer.writer.transport.abort()
    await asyncio.sleep(0.01)


async def ask(port: int, method: str = "push-messages", context: ssl.SSLContext | None = None) -> Message:
    """Make one call on a connection of its own."""
    peer = await (connect_tls(port, context) if context else connect(port))
    try:
        peer.send(call(method))
        return await peer.message()
    finally:
        peer.writer.transport.abort()
        await asyncio.sleep(0)


async def is_refused(port: int) -> bool:
    """Return whether nobody listens."""
    try:
        peer = await connect(port)
    except ConnectionRefusedError:
        return True
    peer.writer.transport.abort()
    return False


async def eventually(condition: Callable[[], Any], patience: float = 20.0) -> None:
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.05)


def command(relay: RelayProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `flwr-relay` with the settings file of a relay."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RELAY_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "relay", *arguments, "-c", str(relay.config)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environ,
    )


def change(relay: RelayProcess, **settings: Any) -> None:
    relay.settings.update(settings)
    relay.write()


async def take_over(relay: RelayProcess, **settings: Any) -> str:
    """Change the settings, and do what `flwr-relay reload` does; return what it would print."""
    change(relay, **settings)
    return await off(reload.reload, load(relay.config, {}))


async def hang_up(relay: RelayProcess, **settings: Any) -> None:
    """Change the settings, send SIGHUP by hand, and wait until they serve."""
    served = (await off(state, relay))["serving"]
    change(relay, **settings)
    relay.signal(signal.SIGHUP)
    await eventually(lambda: state(relay)["serving"] > served)


def state(relay: RelayProcess) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(relay.get("/readyz")[1])
    return said


@asynccontextmanager
async def relay_to(directory: Path, superlink: int, **settings: Any) -> AsyncIterator[RelayProcess]:
    """Run a relay of one worker that has a pid file; whatever happens, nothing of it is left."""
    chosen: dict[str, Any] = {"workers": 1, "pid_file": str(directory / "relay.pid"), **settings}
    relay = RelayProcess(directory, superlink, **chosen)
    try:
        await off(relay.start)
        yield relay
    finally:
        await off(relay.end)


@asynccontextmanager
async def served(directory: Path, **settings: Any) -> AsyncIterator[RelayProcess]:
    """Run a relay in front of a SuperLink that answers everything with nothing."""
    async with Listener() as upstream, asyncio.TaskGroup() as tasks:
        playing = tasks.create_task(upstream.play(answer_all))
        async with relay_to(directory, upstream.port, **settings) as relay:
            yield relay
        playing.cancel()


def encrypted(relay: RelayProcess, pair: tuple[Path, Path], port: int | None = None) -> dict[str, Any]:
    """Return the settings of a TLS listener."""
    tls = {"certificate": str(pair[0]), "key": str(pair[1])}
    return {"address": f"127.0.0.1:{port or relay.port}", "tls": tls}


# -- taken over ----------------------------------------------------------------------------------------


async def test_the_new_settings_serve_when_the_command_has_ended(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        assert (await ask(relay.port)).status == 200
        for generation, (mode, status) in enumerate((("maintenance", 503), ("normal", 200)), start=1):
            change(relay, mode=mode)
            done = await off(command, relay, "reload")
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(f"generation {generation} serves;")
            assert (await ask(relay.port)).status == status
        said = await off(state, relay)
        assert (said["generation"], said["serving"], said["reloads_refused"]) == (2, 2, 0)
        assert await off(relay.stop) == 0
        assert not (tmp_path / "relay.pid").exists()


async def test_a_node_that_stays_connected_is_told_to_connect_anew_by_the_next_answer(
    tmp_path: Path, node: Node
) -> None:
    async with served(tmp_path, drain={"timeout": 20, "idle_grace": 10}) as relay:
        old = await node(relay.port)
        old.send(call())
        assert (await old.message()).all(b"connection") == []
        await take_over(relay, **MAINTENANCE)
        old.send(call())
        last = await old.message()
        assert (last.status, last.one(b"connection")) == (200, b"close")
        assert await old.rest() == (b"", "closed")
        assert (await ask(relay.port)).status == 503


async def test_the_number_of_workers_can_be_changed(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        for number in (3, 1, 2):
            old = {worker.pid for worker in relay.workers()}
            await take_over(relay, workers=number)
            await eventually(lambda: old.isdisjoint(pids(relay)))  # noqa: B023 - called at once
            assert len(pids(relay)) == number
            assert (await ask(relay.port)).status == 200
        assert relay.complaints() == []


def pids(relay: RelayProcess) -> set[int]:
    return {worker.pid for worker in relay.workers()}


async def test_listeners_come_and_go_and_change_places(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        first, second, third = relay.port, free_port(), free_port()

        async def listen(*ports: int) -> None:
            addresses = [{"address": f"127.0.0.1:{port}"} for port in ports]
            await take_over(relay, listeners=addresses)
            for port in ports:
                assert (await ask(port)).status == 200
            for port in {first, second, third} - set(ports):
                async with asyncio.timeout(10):  # the old workers close their sockets when they hear of it
                    while not await is_refused(port):
                        await asyncio.sleep(0.05)

        await listen(first, second)
        await listen(second, first)
        await listen(third, second)
        await listen(first)
        assert (await off(relay.get, "/readyz"))[0] == 200
        assert relay.complaints() == []


async def test_the_admin_port_can_be_moved(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        old, relay.admin = relay.admin, free_port()
        for number, port in enumerate((relay.admin, old), start=1):
            change(relay, admin={"address": f"127.0.0.1:{port}"})
            done = await off(command, relay, "reload")
            assert done.stdout.startswith(f"generation {number} serves;"), done.stderr
            relay.admin = port
            assert (await off(state, relay))["serving"] == number
        assert await off(relay.stop) == 0
        assert list(tmp_path.glob("relay.pid*")) == []


async def test_each_of_several_reloads_at_once_serves_its_own_settings_when_it_has_ended(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as relay:
        modes = ["normal", "maintenance"] * 3
        for one, other in pairwise(modes):
            change(relay, mode=one)
            first = asyncio.create_task(off(reload.reload, load(relay.config, {})))
            await asyncio.sleep(0.2)
            await take_over(relay, mode=other)
            assert (await ask(relay.port)).status == (503 if other == "maintenance" else 200)
            await first


async def test_two_reloads_at_once_both_succeed_and_the_last_settings_serve(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        await take_over(relay, **MAINTENANCE)
        one = asyncio.create_task(take_over(relay, mode="normal"))
        await asyncio.sleep(0.05)
        other = asyncio.create_task(take_over(relay, mode="pass_through"))
        assert "serves" in await one
        assert "serves" in await other
        await eventually(lambda: len(pids(relay)) == 1)
        assert (await ask(relay.port)).status == 200
        assert [line["mode"] for line in relay.lines() if line.get("event") == "worker serves"][
            -1
        ] == "pass_through"


# -- a certificate that is replaced --------------------------------------------------------------------


async def test_a_renewed_certificate_is_used_for_new_connections_and_ends_no_old_one(
    tmp_path: Path, node: Node
) -> None:
    pair = make_pair(tmp_path)
    old_trust = trusting(pair[0])
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        await hang_up(relay, listeners=[encrypted(relay, pair)])
        before = await node(relay.port, old_trust)
        before.send(call())
        superlink = await upstream.accept()
        await superlink.message()

        make_pair(tmp_path)
        new_trust = trusting(pair[0])
        await take_over(relay)
        with pytest.raises(ssl.SSLCertVerificationError):
            await node(relay.port, old_trust)
        after = await node(relay.port, new_trust)
        after.send(call())

        superlink.send(response())
        last = await before.message()
        assert (last.status, last.one(b"connection")) == (200, b"close")
        assert await before.rest() == (b"", "closed")
        superlink = await upstream.accept()
        await superlink.message()
        superlink.send(response())
        assert (await after.message()).status == 200


async def test_a_renewed_certificate_without_its_key_is_refused_and_the_old_pair_serves_on(
    tmp_path: Path,
) -> None:
    pair = make_pair(tmp_path)
    trust = trusting(pair[0])
    async with served(tmp_path) as relay:
        await hang_up(relay, listeners=[encrypted(relay, pair)])
        (tmp_path / "other").mkdir()
        pair[0].write_bytes(make_pair(tmp_path / "other")[0].read_bytes())
        done = await off(command, relay, "reload")
        assert done.returncode == 2
        assert "is not the key of the first certificate" in done.stderr
        assert (await ask(relay.port, context=trust)).status == 200


async def test_a_port_that_is_no_longer_encrypted_closes_its_connections_in_good_order(
    tmp_path: Path, node: Node
) -> None:
    """TLS ports have their connections born to be reset: a plain one must not inherit that."""
    async with served(tmp_path) as relay:
        plain = relay.settings["listeners"]
        await hang_up(relay, listeners=[encrypted(relay, make_pair(tmp_path))])
        await hang_up(relay, listeners=plain)
        for _ in range(5):
            peer = await node(relay.port)
            peer.send(call(more=b"Connection: close\r\n"))
            assert (await peer.message()).status == 200
            assert await peer.rest() == (b"", "closed")


async def test_a_port_becomes_encrypted(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    async with served(tmp_path) as relay:
        await take_over(relay, listeners=[encrypted(relay, pair)])
        assert (await ask(relay.port, context=trusting(pair[0]))).status == 200
        with closing(socket.create_connection(("127.0.0.1", relay.port), timeout=5)) as sock:
            sock.sendall(call())
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


# -- not taken over ------------------------------------------------------------------------------------


async def test_wrong_settings_are_told_by_exit_2_and_nobody_is_disturbed(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        workers = pids(relay)
        change(relay, mode="maintenence", workers=0)
        done = await off(command, relay, "reload")
        assert (done.returncode, done.stdout) == (2, "")
        assert "mode = 'maintenence'" in done.stderr
        assert "workers = 0" in done.stderr
        said = await off(state, relay)
        assert (said["generation"], said["reloads_refused"]) == (0, 0)
        assert pids(relay) == workers
        assert (await ask(relay.port)).status == 200


async def test_what_the_relay_alone_finds_wrong_is_told_by_exit_1_and_it_serves_on(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        workers = pids(relay)
        good = relay.settings["listeners"]
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = {"address": f"127.0.0.1:{taken.getsockname()[1]}"}
            change(relay, listeners=[*good, address], **MAINTENANCE)
            done = await off(command, relay, "reload")
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr
            == "not reloaded: the relay refused the settings and keeps the old ones; its log says why\n"
        )
        assert pids(relay) == workers
        assert (await ask(relay.port)).status == 200
        said = await off(state, relay)
        assert (said["generation"], said["reloads_refused"]) == (0, 1)
        # The next one, with settings that are right, is not mistaken for the one that was refused.
        await take_over(relay, listeners=good)
        assert (await ask(relay.port)).status == 503


async def test_a_pid_file_that_belongs_to_another_process_is_a_refused_reload(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        other = tmp_path / "other.pid"
        other.write_text(f"{os.getpid()}\n")
        change(relay, pid_file=str(other), **MAINTENANCE)
        relay.signal(signal.SIGHUP)
        await eventually(lambda: state(relay)["reloads_refused"] == 1)
        assert any(str(other) in line.get("problem", "") for line in relay.lines())
        assert (await ask(relay.port)).status == 200
        assert other.read_text() == f"{os.getpid()}\n"


def test_a_relay_does_not_start_with_the_pid_file_of_another_process(tmp_path: Path) -> None:
    (tmp_path / "relay.pid").write_text(f"{os.getpid()}\n")
    relay = RelayProcess(tmp_path, 1, pid_file=str(tmp_path / "relay.pid"))
    try:
        relay.start(ready=False)
        assert relay.exit_code() == 1
    finally:
        relay.end()
    (line,) = relay.lines()
    assert (line["event"], line["level"]) == ("not started", "error")
    assert line["problem"] == f"{tmp_path}/relay.pid is the pid file of process {os.getpid()}"
    assert (tmp_path / "relay.pid").read_text() == f"{os.getpid()}\n"


async def test_a_pid_file_that_its_relay_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    gone = await asyncio.create_subprocess_exec("/bin/true")
    await gone.wait()
    (tmp_path / "relay.pid").write_text(f"{gone.pid}\n")
    async with relay_to(tmp_path, 1) as relay:
        assert int((tmp_path / "relay.pid").read_text()) == relay.process.pid


async def test_a_pid_file_moves_with_the_settings(tmp_path: Path) -> None:
    async with served(tmp_path) as relay:
        new = tmp_path / "new.pid"
        await hang_up(relay, pid_file=str(new), **MAINTENANCE)
        assert int(new.read_text()) == relay.process.pid
        assert not (tmp_path / "relay.pid").exists()
        await take_over(relay, mode="normal")


# -- while old workers drain ---------------------------------------------------------------------------


async def test_a_new_worker_that_dies_is_replaced_though_an_old_one_still_drains(
    tmp_path: Path, node: Node
) -> None:
    """A worker that drains takes no calls, so it must not pass for one that serves."""
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        held = await node(relay.port)
        held.send(call())
        superlink = await upstream.accept()
        await superlink.message()
        old = pids(relay)
        await hang_up(relay, **MAINTENANCE)
        for _ in range(2):
            (new,) = [worker for worker in relay.workers() if worker.pid not in old]
            new.kill()
            async with asyncio.timeout(10):
                assert (await ask(relay.port)).status == 503
        assert old < pids(relay)
        assert len(pids(relay)) == 2
        superlink.send(response())
        assert (await held.message()).status == 200


async def test_a_worker_that_is_sent_another_signal_than_to_stop_still_counts(tmp_path: Path) -> None:
    async with served(tmp_path, workers=2) as relay:
        workers = pids(relay)
        relay.signal(signal.SIGUSR1)  # is passed on to the workers
        relay.signal(signal.SIGWINCH)
        for worker in relay.workers():
            worker.send_signal(signal.SIGINT)  # as a terminal does
        await asyncio.sleep(1.5)  # the master looks after its workers once a second
        assert pids(relay) == workers
        assert (await ask(relay.port)).status == 200


async def test_a_stop_while_old_workers_drain_waits_for_their_calls_and_for_nothing_else(
    tmp_path: Path, node: Node
) -> None:
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        held = await node(relay.port)
        held.send(call())
        superlink = await upstream.accept()
        await superlink.message()
        await take_over(relay, **MAINTENANCE)
        relay.signal(signal.SIGTERM)
        await eventually(lambda: len(pids(relay)) == 1)
        assert await held.is_silent(0.3)
        superlink.send(response())
        assert (await held.message()).status == 200
        begun = time.monotonic()
        assert await off(relay.exit_code) == 0
        assert time.monotonic() - begun < 15  # of 20


@pytest.mark.parametrize("pause", [0.0, 0.01, 0.1])
async def test_a_stop_right_after_a_reload_is_not_missed_by_workers_that_have_just_begun(
    tmp_path: Path, pause: float
) -> None:
    """A worker that missed it would be waited for until `drain.timeout` and 10 s are over."""
    async with relay_to(tmp_path, 1, workers=4) as relay:
        relay.signal(signal.SIGHUP)
        await asyncio.sleep(pause)
        relay.signal(signal.SIGTERM)
        begun = time.monotonic()
        assert await off(relay.exit_code, 40) == 0
        assert time.monotonic() - begun < 28  # of 30; on a quiet machine it is 1
        assert relay.complaints() == []


# -- while it is told to stop --------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["a reload", "a worker that ends"])
async def test_the_delay_of_a_stop_is_kept_whatever_happens_in_it(tmp_path: Path, event: str) -> None:
    drain = {"delay": 6, "timeout": 10, "idle_grace": 0.1}
    async with served(tmp_path, workers=2, drain=drain) as relay:
        begun = time.monotonic()
        relay.signal(signal.SIGTERM)
        await eventually(lambda: relay.get("/readyz")[0] == 503, 5)
        if event == "a reload":
            relay.signal(signal.SIGHUP)
        else:
            relay.workers()[0].kill()
        while time.monotonic() - begun < 4:
            assert (await ask(relay.port)).status == 200
            await asyncio.sleep(0.1)
        assert await off(relay.exit_code) == 0
        assert time.monotonic() - begun >= 6
        assert await is_refused(relay.port)


# -- mode: pass_through --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [b"500 Internal Server Error", b"404 Not Found", b"429 Too Many Requests"])
async def test_in_pass_through_what_the_superlink_says_is_passed_on_as_it_is(
    tmp_path: Path, node: Node, status: bytes
) -> None:
    async with Listener() as upstream, relay_to(tmp_path, upstream.port) as relay:
        await take_over(relay, mode="pass_through")
        peer = await node(relay.port)
        for method in ("pull-messages", "push-object"):
            peer.send(call(method))
            superlink = upstream.peers[0] if upstream.peers else await upstream.accept()
            await superlink.message()
            superlink.send(
                response(
                    b'{"code": 1}',
                    status=status,
                    content_type=b"application/json",
                    more=b"Retry-After: 7\r\n",
                )
            )
            answer = await peer.message()
            assert answer.start == b"HTTP/1.1 " + status
            assert (answer.one(b"content-type"), answer.body) == (b"application/json", b'{"code": 1}')
            assert answer.one(b"retry-after") == b"7"


async def test_in_pass_through_no_policy_is_left_but_observers_and_guards(tmp_path: Path) -> None:
    relay = RelayProcess(tmp_path, 1)
    left = ["metrics", "access_log", "inventory", "validate"]
    for mode, between in (("normal", None), ("pass_through", left)):
        relay.settings["mode"] = mode
        relay.write()
        said = (await off(command, relay, "explain")).stdout.splitlines()[1:]
        assert len(said) == 12
        for line in said:
            *steps, last = line.split(maxsplit=1)[1].split(" -> ")
            assert last == "http_v1 http://127.0.0.1:1"
            if between is None:
                assert "validate" in steps
            else:
                assert steps == between


# -- the command, against relays that are not there or not well ----------------------------------------


class Admin(http.server.BaseHTTPRequestHandler):
    """An admin port that says what the test wants it to say."""

    said: list[bytes | None]

    def do_GET(self) -> None:
        answer = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if answer is None:
            self.connection.close()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # of a connection that was closed above
            self.close_connection = True


@pytest.fixture
def admin() -> Iterator[Callable[..., int]]:
    """Return a function that starts an admin port: it says one thing after the other, the last for ever."""
    running: list[tuple[http.server.HTTPServer, threading.Thread]] = []

    def start(*said: bytes | None) -> int:
        server = http.server.HTTPServer(("127.0.0.1", 0), type("Said", (Admin,), {"said": [*said]}))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return server.server_port

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def says(generation: int, serving: int, refused: int = 0, *, reloading: bool = False) -> bytes:
    said = {"generation": generation, "serving": serving, "reloads_refused": refused}
    return json.dumps(said | ({"reloading": True} if reloading else {})).encode()


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A process in the place of a relay's master, named by relay.pid; how often it was told to reload."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGHUP, lambda *_: print('hup', flush=True))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    with (
        (tmp_path / "heard").open("wb") as heard,
        subprocess.Popen([sys.executable, "-c", code], stdout=heard) as process,
    ):
        while "ready" not in (tmp_path / "heard").read_text():
            time.sleep(0.01)
        (tmp_path / "relay.pid").write_text(f"{process.pid}\n")
        yield lambda: (tmp_path / "heard").read_text().count("hup")
        process.kill()


def settings(tmp_path: Path, admin: int, host: str = "127.0.0.1") -> Settings:
    chosen = {"pid_file": tmp_path / "relay.pid", "admin": {"address": f"{host}:{admin}"}}
    return Settings.model_validate(chosen)


def test_a_relay_that_was_given_no_pid_file_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(reload.ReloadError, match="pid_file is not set"):
        reload.reload(Settings())


@pytest.mark.parametrize("text", [None, "", "not a number"], ids=["none", "empty", "nonsense"])
def test_without_a_pid_no_relay_is_found(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "relay.pid").write_text(text)
    with pytest.raises(reload.ReloadError, match=r"no relay runs that wrote .*relay\.pid"):
        reload.reload(settings(tmp_path, 1))


@pytest.mark.parametrize(
    "text", ["0", "-1", "99999999999999999999"], ids=["my group", "everybody", "too large"]
)
def test_a_pid_file_that_names_no_single_process_signals_nobody(
    tmp_path: Path, admin: Callable[..., int], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was sent"))
    (tmp_path / "relay.pid").write_text(text)
    with pytest.raises(reload.ReloadError, match="no relay runs that wrote"):
        reload.reload(settings(tmp_path, admin(says(0, 0))))


def test_the_pid_of_a_relay_that_is_gone_is_told(tmp_path: Path, admin: Callable[..., int]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "relay.pid").write_text(f"{gone.pid}\n")
    with pytest.raises(reload.ReloadError, match=rf"process {gone.pid} of .*relay.pid: No such process"):
        reload.reload(settings(tmp_path, admin(says(0, 0))))


@pytest.mark.parametrize("said", [b"{}", b"[]", b"<html>", b"null", None], ids=str)
def test_nobody_is_told_if_what_answers_on_the_admin_port_is_no_relay(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int], said: bytes | None
) -> None:
    with pytest.raises(
        reload.ReloadError, match=r"the admin port 127.0.0.1:\d+ does not answer as a relay's"
    ):
        reload.reload(settings(tmp_path, admin(said)))
    assert master() == 0


def test_nobody_is_told_if_nothing_answers_on_the_admin_port(
    tmp_path: Path, master: Callable[[], int]
) -> None:
    with pytest.raises(reload.ReloadError, match="Connection refused"):
        reload.reload(settings(tmp_path, free_port()))
    assert master() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_waits_until_the_new_settings_serve(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int], host: str
) -> None:
    port = admin(says(4, 4, 1), says(4, 4, 1), says(5, 4, 1), says(5, 4, 1), says(5, 5, 1))
    assert reload.reload(settings(tmp_path, port, host)).startswith("generation 5 serves;")
    assert master() == 1


def test_it_does_not_take_an_earlier_reload_that_still_goes_on_for_its_own(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]
) -> None:
    port = admin(says(5, 4), says(5, 5), says(5, 5), says(6, 6))
    assert reload.reload(settings(tmp_path, port)).startswith("generation 6 serves;")
    assert master() == 1


def test_it_does_not_take_the_success_of_a_reload_that_has_read_its_settings_before_for_its_own(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]
) -> None:
    """The relay has read the settings of before, and has not counted them yet, when it is asked."""
    others = [says(4, 4, reloading=True), says(5, 4, reloading=True), says(5, 5)]
    port = admin(*others, says(5, 5), says(6, 5, reloading=True), says(6, 6))
    assert reload.reload(settings(tmp_path, port)).startswith("generation 6 serves;")
    assert master() == 1


def test_a_refusal_of_another_reload_is_not_its_own(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]
) -> None:
    port = admin(says(4, 4), says(5, 4, 1, reloading=True), says(5, 5, 1))
    assert reload.reload(settings(tmp_path, port)).startswith("generation 5 serves;")
    assert master() == 1


def test_workers_that_could_not_be_started_are_told(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]
) -> None:
    port = admin(says(4, 4), says(5, 4, reloading=True), says(5, 4, 1))
    with pytest.raises(
        reload.ReloadError, match="could start no workers with the settings and keeps the old"
    ):
        reload.reload(settings(tmp_path, port))
    assert master() == 1


def test_a_relay_is_asked_where_it_says_that_its_admin_port_is(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]
) -> None:
    old, new = admin(says(4, 4), says(5, 4)), admin(says(9, 9))
    (tmp_path / "relay.pid.admin").write_text(f"127.0.0.1:{old}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "PATIENCE", 1.0)
        with pytest.raises(reload.ReloadError, match="no worker served"):
            reload.reload(settings(tmp_path, new))
    assert master() == 1


def test_a_refusal_is_told(tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]) -> None:
    port = admin(says(0, 0, 3), says(0, 0, 3), says(0, 0, 4))
    with pytest.raises(reload.ReloadError, match="refused the settings and keeps the old ones"):
        reload.reload(settings(tmp_path, port))
    assert master() == 1


def test_an_admin_connection_that_an_old_worker_takes_with_it_is_asked_again(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int]
) -> None:
    port = admin(says(0, 0), None, b"<html>", says(1, 1))
    assert reload.reload(settings(tmp_path, port)).startswith("generation 1 serves;")
    assert master() == 1


def test_a_relay_that_ends_instead_is_told_at_once(
    tmp_path: Path, admin: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "PATIENCE", 20.0)
    # SIGHUP ends it, also where the tests were started to outlive it (nohup).
    ending = subprocess.Popen(["/usr/bin/env", "--default-signal=HUP", "sleep", "600"])
    threading.Thread(target=ending.wait).start()
    (tmp_path / "relay.pid").write_text(f"{ending.pid}\n")
    begun = time.monotonic()
    with pytest.raises(reload.ReloadError, match="ended"):
        reload.reload(settings(tmp_path, admin(says(0, 0), None)))
    assert time.monotonic() - begun < 10


def test_a_relay_that_does_nothing_is_told_in_the_end(
    tmp_path: Path, admin: Callable[..., int], master: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "PATIENCE", 0.5)
    with pytest.raises(reload.ReloadError, match=r"no worker served the new settings within 0.5 s"):
        reload.reload(settings(tmp_path, admin(says(2, 2))))
    assert master() == 1


def test_a_stranger_who_got_the_pid_of_a_relay_that_is_gone_is_left_in_peace(tmp_path: Path) -> None:
    stranger = psutil.Popen(["/bin/sleep", "600"])  # SIGHUP would end it
    try:
        relay = RelayProcess(tmp_path, 1, pid_file=str(tmp_path / "relay.pid"))
        (tmp_path / "relay.pid").write_text(f"{stranger.pid}\n")
        relay.write()
        done = command(relay, "reload")
        assert done.returncode == 1
        assert done.stderr.startswith("not reloaded: the admin port ")
        with pytest.raises(psutil.TimeoutExpired):
            stranger.wait(0.3)
    finally:
        stranger.kill()
        stranger.wait()
