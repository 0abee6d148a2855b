"""A Flower federation of real processes on this machine: a SuperLink, the relay before it, SuperNodes, runs.

    with Federation(flwr_bin, nodes=2) as federation:
        federation.up()
        result = federation.run({"num-server-rounds": 3})

Every piece is a `Process` of its own (`superlink`, `relay`, `supernodes`), so that a fault drill can stop,
kill, freeze and start each of them. Leaving the `with` ends them all, and so does the end of this program,
whatever ended it.
"""

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import yaml

from relay.call import Wire
from relay.demo import flower, sweeper
from relay.demo.flower import Ports, RunConfig
from relay.demo.processes import LOOPBACK, POLL, Process, get, listens, reserve_port, stop_all, wait_ready

RUN_SECONDS = 300.0
_CODE = Path(__file__).parents[2]  # the directory that holds the package `relay`


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a run, as the ServerApp reported it."""

    number: int
    train_loss: float
    evaluate_loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind.

    Attributes:
        returncode: the exit code of `flwr run`; it is 0 even where the ServerApp failed.
        seconds: from the start of `flwr run` to its end.
        rounds: the rounds that were finished.
        arrays: the final arrays as the bytes of an .npz file; None when the run did not come to its end.
    """

    returncode: int
    seconds: float
    rounds: tuple[Round, ...]
    arrays: bytes | None


class Generation(NamedTuple):
    """A release of Flower, by the directory of its commands, and the wire that its SuperNode is to speak."""

    flwr_bin: Path
    wire: Wire


class Run:
    """One `flwr run` of the demo's app. Its process ends when the run ends.

    Attributes:
        process: the `flwr run` process; its log holds what the ServerApp logged.
        output: the directory that the ServerApp writes to.
    """

    def __init__(self, federation: "Federation", process: Process, output: Path) -> None:
        self.process = process
        self.output = output
        self._federation = federation
        self._start = time.monotonic()

    def rounds(self) -> tuple[Round, ...]:
        """The rounds that are finished now."""
        try:
            text = (self.output / "history.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        whole = text[: text.rfind("\n") + 1]  # the last line may be half written
        return tuple(
            Round(line["round"], line["train_loss"], line["evaluate_loss"], line["seconds"])
            for line in map(json.loads, whole.splitlines())
        )

    def wait(self, timeout: float = RUN_SECONDS, *, check: bool = True) -> RunResult:
        """Wait for the end of the run.

        Args:
            timeout: seconds from now.
            check: raise when the run failed.

        Raises:
            FederationError: a process of the federation ended by itself, the time is over, or (with `check`)
                the ServerApp did not come to its end.
        """
        end = time.monotonic() + timeout
        while self.process.running:
            for process in self._federation.processes:
                process.check()
            if time.monotonic() > end:
                raise self.process.error(f"did not end within {timeout:.0f} s")
            time.sleep(POLL)
        seconds = time.monotonic() - self._start
        saved = self.output / "arrays.npz"
        arrays = saved.read_bytes() if saved.exists() else None
        result = RunResult(self.process.wait(0), seconds, self.rounds(), arrays)
        if check and (result.returncode != 0 or arrays is None):
            raise self.process.error(f"ended without a result (exit code {result.returncode})")
        return result


class Federation:
    """A SuperLink, the relay and SuperNodes; none is started by the constructor. See the module's docstring.

    Attributes:
        directory: temporary; holds the logs, the FLWR_HOMEs and the output of runs.
        superlink, relay, supernodes: the processes; `relay` is None in a direct federation.
        superexec: the one beside the SuperLink; None where the SuperLink starts its own.
        ports: of the SuperLink.
        relay_port, admin_port: of the relay.
    """

    def __init__(
        self,
        flwr_bin: Path,
        *,
        wire: Wire = Wire.HTTP_V1,
        nodes: int | Sequence[Generation] = 2,
        relayed: bool = True,
        workers: int = 2,
        relay_config: Mapping[str, Any] | None = None,
        listener_config: Mapping[str, Any] | None = None,
        entry_port: int | None = None,
        root_certificates: Path | None = None,
        userinfo: Sequence[str] = (),
        superexec: bool = False,
        superlink_log_level: str = "INFO",
        keep: bool = False,
    ) -> None:
        """Make the directory, reserve the ports and prepare the processes.

        Args:
            flwr_bin: the directory of Flower's commands (`flower-superlink`, `flwr`, ...).
            wire: what SuperLink and SuperNodes speak; their release must know it.
            nodes: number of SuperNodes; or a generation for each of them, if it is not the SuperLink's.
            relayed: the SuperNodes connect to the relay; otherwise to the SuperLink itself.
            workers: processes of the relay.
            relay_config: settings of the relay that go over the federation's own, section by section.
            listener_config: settings of the relay's one listener that go over the federation's own.
            entry_port: the port that SuperNodes connect to, if it is neither the relay's nor the SuperLink's.
            root_certificates: with them SuperNodes speak TLS; the relay itself does so if `listener_config`
                says so.
            userinfo: what SuperNodes present themselves with, as `name:key`, in their order; those beyond
                with nothing.
            superexec: start ServerApps from a SuperExec beside the SuperLink, so that they outlive it.
            superlink_log_level: with DEBUG its access log has every call.
            keep: leave the directory at the end.
        """
        self.wire = wire
        self.directory = Path(tempfile.mkdtemp(prefix="flwr-relay-"))
        self._flwr_bin = flwr_bin
        self._keep = keep
        generations = [Generation(flwr_bin, wire)] * nodes if isinstance(nodes, int) else nodes
        self._nodes = len(generations)
        self._node_wires = list(dict.fromkeys(node.wire.value for node in generations))
        self._id = secrets.token_hex(8)
        self._sweeper: subprocess.Popen[bytes] | None = None
        self._resources = ExitStack()
        self._runs: list[Run] = []
        shutil.copytree(flower.APP, self.directory / "app", ignore=shutil.ignore_patterns("__pycache__"))

        fleet = self._port()
        self.ports = Ports(fleet, *self._other_ports(fleet))
        self.superlink = self._process(
            "superlink", flower.superlink_argv(wire, flwr_bin, self.ports), self._superlink_is_ready
        )
        self.superlink.environment["FLWR_LOG_LEVEL"] = superlink_log_level

        self.superexec = self._superexec() if superexec else None

        self.relay_port, self.admin_port = (self._port(), self._port()) if relayed else (fleet, 0)
        self.relay = self._relay(workers, relay_config or {}, listener_config or {}) if relayed else None
        entry = self.relay_port if entry_port is None else entry_port
        self.supernodes = [
            self._supernode(
                number,
                generation,
                entry,
                root_certificates,
                userinfo[number] if number < len(userinfo) else "",
            )
            for number, generation in enumerate(generations)
        ]

    def __enter__(self) -> Self:
        self._sweeper = subprocess.Popen(  # noqa: S603 - our own argv, no shell
            [sys.executable, "-I", sweeper.__file__, self._mark()],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.down()
        finally:
            self._close()

    @property
    def processes(self) -> list[Process]:
        """The SuperLink, what is beside and before it, and the SuperNodes."""
        optional = [process for process in (self.superexec, self.relay) if process]
        return [self.superlink, *optional, *self.supernodes]

    def up(self, *, wait_for_nodes: bool = True) -> None:
        """Start all processes and wait until they are ready.

        Args:
            wait_for_nodes: also until the SuperLink has activated every SuperNode; a ServerApp waits for its
                nodes anyway.

        Raises FederationError when one of them ends by itself or is not ready in time.
        """
        servers = [self.superlink, *([self.relay] if self.relay else [])]
        for process in servers:
            process.start()
        wait_ready(servers)
        for process in [*([self.superexec] if self.superexec else []), *self.supernodes]:
            process.start()
        if wait_for_nodes:
            wait_ready(self.supernodes)

    def start_run(self, config: RunConfig | None = None) -> Run:
        """Start a run of the demo's app; `config` goes over the run config of its pyproject.toml."""
        number = len(self._runs) + 1
        output = self.directory / f"run-{number}"
        output.mkdir()
        run_config = output / "config.toml"
        flower.write_run_config(
            run_config, {"num-nodes": self._nodes, "output": str(output), **(config or {})}
        )
        argv: flower.Words = [self._flwr_bin / "flwr", "run", self.directory / "app", "local", "--stream"]
        process = self._process(f"run-{number}", [*argv, "--run-config", run_config])
        flower.write_connection(Path(process.environment["FLWR_HOME"]), self.ports.control)
        run = Run(self, process, output)
        self._runs.append(run)
        process.start(may_end=True)
        return run

    def run(self, config: RunConfig | None = None, timeout: float = RUN_SECONDS) -> RunResult:
        """Run the demo's app to its end. Arguments and errors as of `start_run` and `Run.wait`."""
        return self.start_run(config).wait(timeout)

    def stop_supernodes(self) -> None:
        """Stop the SuperNodes; they deactivate and unregister before they end."""
        stop_all(self.supernodes)

    def down(self) -> None:
        """Stop everything, in the order that lets everyone say goodbye. A second exception kills the rest."""
        stop_all([run.process for run in self._runs])
        self.stop_supernodes()
        if self.relay:
            self.relay.stop()
        if self.superexec:
            self.superexec.stop()
        self.superlink.stop()

    def relay_metrics(self) -> str | None:
        """The text of the relay's /metrics; None when there is no relay or it does not answer."""
        answer = get(self.admin_port, "/metrics") if self.relay else None
        return answer[1].decode() if answer and answer[0] == 200 else None

    def _close(self) -> None:
        """Kill what is left of the federation, and give back its ports and its directory."""
        sweeper.sweep([self._mark()], grace=0)
        for process in [*self.processes, *(run.process for run in self._runs)]:
            process.kill()  # it is dead by now; this takes its exit code from the kernel
        if self._sweeper and self._sweeper.stdin:
            self._sweeper.stdin.close()
            self._sweeper.wait()
        self._resources.close()
        if not self._keep:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _mark(self, name: str = "") -> str:
        return f"{self._id}/{name}/" if name else f"{self._id}/"

    def _port(self) -> int:
        holder = self._resources.enter_context(reserve_port())
        port: int = holder.getsockname()[1]
        return port

    def _process(
        self,
        name: str,
        argv: flower.Words,
        ready: Callable[[Process], bool] | None = None,
        flwr_bin: Path | None = None,
    ) -> Process:
        home = self.directory / "homes" / name
        home.mkdir(parents=True)
        return Process(
            name,
            argv,
            environment=flower.environment(flwr_bin or self._flwr_bin, home),
            directory=self.directory,
            log=self.directory / f"{name}.log",
            mark=self._mark(name),
            ready=ready,
        )

    def _other_ports(self, fleet: int) -> tuple[int, int]:
        if self.wire is Wire.HTTP_V1:
            return fleet, fleet
        control = self._port()
        shared = self.wire is Wire.GRPC and flower.shares_port(self._flwr_bin)
        return control, control if shared else self._port()

    def _superlink_is_ready(self, _: Process) -> bool:
        if self.wire is Wire.HTTP_V1:
            return _says_ok(self.ports.fleet, "/health")
        return all(map(listens, (self.ports.fleet, self.ports.control, self.ports.app_io)))

    def _superexec(self) -> Process:
        self.superlink.argv += ["--isolation", "process"]
        argv = flower.superexec_argv(self.wire, self._flwr_bin, self.ports)
        return self._process("superexec", argv)

    def _supernode(
        self,
        number: int,
        generation: Generation,
        entry_port: int,
        root_certificates: Path | None,
        userinfo: str,
    ) -> Process:
        node_config = {"partition-id": number, "num-partitions": self._nodes}
        argv = flower.supernode_argv(
            generation.wire,
            generation.flwr_bin,
            entry_port,
            self._port(),
            node_config,
            root_certificates=root_certificates,
            userinfo=userinfo,
        )
        return self._process(f"supernode-{number}", argv, _has_node_id, generation.flwr_bin)

    def _relay(self, workers: int, config: Mapping[str, Any], listener_config: Mapping[str, Any]) -> Process:
        listener = {"address": f"{LOOPBACK}:{self.relay_port}", "wires": self._node_wires}
        settings = _merged(
            {
                "workers": workers,
                "listeners": [_merged(listener, listener_config)],
                "upstream": {"wire": self.wire.value, "url": f"http://{LOOPBACK}:{self.ports.fleet}"},
                "admin": {"address": f"{LOOPBACK}:{self.admin_port}"},
                "log": {"level": "info", "format": "json"},
            },
            config,
        )
        path = self.directory / "relay.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        argv: flower.Words = [sys.executable, "-m", "relay", "serve", "--config", path]
        # Python finds the package in the working directory, also where it is not installed.
        relay = self._process("relay", argv, lambda _: _says_ok(self.admin_port, "/readyz"))
        relay.directory = _CODE
        return relay


def _says_ok(port: int, path: str) -> bool:
    answer = get(port, path)
    return answer is not None and answer[0] == 200


def _has_node_id(supernode: Process) -> bool:
    # Every release logs this as soon as the SuperLink has activated the node.
    return "SuperNode ID: " in supernode.output()


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
