"""The same with the command `flower-supernode` and Flower's own pace, for a choice of answers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from relay.call import Wire
from relay.fleet import Method
from tests.contract.conftest import Release
from tests.contract.faults import Case, faults
from tests.contract.nodes import Outcome, environment, observe
from tests.contract.superlink import SuperLink

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.contract.nodes import Observation

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

#: Seconds for all that one node does, while a dozen of them start at once.
PATIENCE = 75.0


class Try(NamedTuple):
    """What a node is told, and what should become of it.

    Attributes:
        clientapp: whether there is a ClientApp, in processes of its own. A node without one trusts nobody's
            apps: it answers each message with an error, before it would fetch the objects.
        seconds: how long to watch a node that does nothing more.
    """

    case: Case
    outcome: Outcome
    detail: str = ""
    clientapp: bool = False
    seconds: float = PATIENCE


TRIES = {
    Wire.HTTP_V1: [
        Try(Case(Method.ACTIVATE_NODE, "503"), Outcome.CONTINUES),
        Try(Case(Method.SEND_NODE_HEARTBEAT, "503"), Outcome.CONTINUES),
        Try(Case(Method.PULL_MESSAGES, "empty"), Outcome.CONTINUES),
        Try(Case(Method.GET_RUN, "403"), Outcome.DROPS),
        Try(Case(Method.CONFIRM_MESSAGE_RECEIVED, "empty"), Outcome.CONTINUES, clientapp=True),
        Try(Case(Method.PUSH_OBJECT, "403"), Outcome.DROPS),
        Try(Case(Method.PULL_MESSAGES, "401"), Outcome.EXITS, "exit code 0"),
        Try(Case(Method.DEACTIVATE_NODE, "503"), Outcome.LEAVES, "exit code 0"),
        # Its loop has ended, but its process lives, so that nothing restarts it.
        Try(Case(Method.PULL_MESSAGES, "500"), Outcome.SILENT, seconds=30.0),
    ],
    Wire.REST_V0: [
        Try(Case(Method.REGISTER_NODE, "drop"), Outcome.CONTINUES),
        Try(Case(Method.SEND_NODE_HEARTBEAT, "503"), Outcome.CONTINUES),
        Try(Case(Method.PULL_MESSAGES, "hold"), Outcome.CONTINUES),
        Try(Case(Method.GET_RUN, "drop"), Outcome.CONTINUES),
        Try(Case(Method.PULL_OBJECT, "drop"), Outcome.CONTINUES, clientapp=True),
        Try(Case(Method.PUSH_OBJECT, "403"), Outcome.DROPS),
        Try(Case(Method.PULL_MESSAGES, "401"), Outcome.EXITS, "exit code 0"),
        Try(Case(Method.DEACTIVATE_NODE, "drop"), Outcome.LEAVES, "exit code 0"),
        Try(Case(Method.PULL_MESSAGES, "500"), Outcome.EXITS, "exit code 0"),
    ],
    Wire.GRPC: [
        Try(Case(Method.ACTIVATE_NODE, "UNAVAILABLE"), Outcome.CONTINUES),
        Try(Case(Method.SEND_NODE_HEARTBEAT, "UNAVAILABLE"), Outcome.CONTINUES),
        Try(Case(Method.PULL_MESSAGES, "hold"), Outcome.CONTINUES),
        Try(Case(Method.GET_RUN, "PERMISSION_DENIED"), Outcome.DROPS),
        Try(Case(Method.CONFIRM_MESSAGE_RECEIVED, "empty"), Outcome.CONTINUES, clientapp=True),
        Try(Case(Method.PUSH_OBJECT, "PERMISSION_DENIED"), Outcome.DROPS),
        Try(Case(Method.PULL_MESSAGES, "UNAUTHENTICATED"), Outcome.EXITS, "exit code 0"),
        Try(Case(Method.DEACTIVATE_NODE, "UNAVAILABLE"), Outcome.LEAVES, "exit code 0"),
        Try(Case(Method.PULL_MESSAGES, "INTERNAL"), Outcome.SILENT, seconds=30.0),
    ],
}
#: The newest of each wire.
NEWEST = [Release("flwr==1.42.0", Wire.HTTP_V1), Release("flwr[rest]==1.32.1", Wire.REST_V0)]
NEWEST += [Release("flwr==1.39.0", Wire.GRPC)]


class Commands:
    """Starts nodes with `flower-supernode`."""

    def __init__(self, commands: Path, wire: Wire, directory: Path, *, clientapp: bool) -> None:
        self._commands = commands
        self._wire = wire
        self._directory = directory
        self._clientapp = clientapp
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._waiting: set[asyncio.Task[None]] = set()

    def start(self, name: str, address: str, listener: Callable[[dict[str, Any]], None]) -> None:
        home = self._directory / name
        home.mkdir()
        options = ["--insecure", *self._addresses(address)]
        if not self._clientapp:
            (home / "trusted.yaml").write_text(f"fpk_nobody: {_public_key()}\n")
            options += ["--isolation", "process", "--trusted-entities", str(home / "trusted.yaml")]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [self._commands / "flower-supernode", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment(home), "PATH": f"{self._commands}{os.pathsep}{os.environ['PATH']}"},
                start_new_session=True,
            )
        self._processes[name] = process
        task = asyncio.create_task(self._tell(process, listener))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    def signal(self, name: str, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self._processes[name].pid, number)  # with the ClientApp's processes
            else:
                self._processes[name].send_signal(number)

    def log(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")[-3000:]

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _addresses(self, superlink: str) -> list[str]:
        if self._wire is Wire.REST_V0:
            return [
                "--rest",
                "--superlink",
                f"http://{superlink}",
                "--clientappio-api-address",
                "127.0.0.1:0",
            ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return ["--superlink", superlink, "--host", "127.0.0.1", "--port", str(port)]

    async def _tell(
        self, process: subprocess.Popen[bytes], listener: Callable[[dict[str, Any]], None]
    ) -> None:
        while process.poll() is None:
            await asyncio.sleep(0.05)
        listener({"exit": process.returncode})


def _public_key() -> str:
    key = Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


async def _try(attempt: Try, release: Release, commands: Path, directory: Path) -> Observation:
    case = attempt.case
    nodes = Commands(commands, release.wire, directory, clientapp=attempt.clientapp)
    superlink = SuperLink(release.wire, case.method, faults(release.wire)[case])
    observation = await observe(nodes, f"{case.method.rpc}-{case.answer}", superlink, attempt.seconds)
    assert superlink.faults, f"{case} was not asked for\n{observation.log}"
    ended = attempt.outcome in (Outcome.SILENT, Outcome.EXITS, Outcome.LEAVES)
    assert bool(superlink.asked[Method.DEACTIVATE_NODE]) is ended, observation
    return observation


@pytest.mark.parametrize("release", NEWEST, ids=str)
def test_real_supernodes_do_what_was_observed(
    flower: Callable[[str], Path],
    leftovers: Callable[[], list[str]],
    tmp_path: Path,
    release: Release,
) -> None:
    tries = TRIES[release.wire]
    commands = flower(release.requirement)

    async def all_at_once() -> list[Observation]:
        return await asyncio.gather(*(_try(attempt, release, commands, tmp_path) for attempt in tries))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(all_at_once())
    surprises = [
        f"{attempt.case}: {observation.outcome}, {observation.detail}\n{observation.log}"
        for attempt, observation in zip(tries, seen, strict=True)
        if observation.outcome is not attempt.outcome or attempt.detail not in observation.detail
    ]
    assert not surprises, "\n\n".join(surprises)
    assert leftovers() == []
