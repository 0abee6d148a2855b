"""Flower's commands, as each generation wants them, and the environment that keeps them offline."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from relay.call import Wire
from relay.demo.processes import LOOPBACK, FederationError

APP = Path(__file__).with_name("app")

Version = tuple[int, int, int]
Words = list[str | Path]
RunConfig = Mapping[str, str | int | float | bool]

_OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # SuperExec looks for work every second by default; flwr 1.32 does not know this variable.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    # The arrays are small, and threads of a BLAS would only take the cores from each other.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
# What a user has set for other programs. PYTHONDONTWRITEBYTECODE would make every process of an app compile
# Flower's modules again: 2.7 s instead of 1.1 s for a ClientApp of flwr 1.42 (measured).
_NOT_INHERITED = re.compile(
    r"FLWR_.*|RELAY_.*|(?:https?|ftp|all|no)_proxy|PYTHON(?:PATH|HOME|DONTWRITEBYTECODE)", re.IGNORECASE
)


#: What Flower calls a wire in its options, before HTTP v1.
_TRANSPORTS = {Wire.REST_V0: "rest", Wire.GRPC: "grpc-rere", Wire.GRPC_ADAPTER: "grpc-adapter"}


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a SuperLink. In HTTP v1 all of its APIs share one, and the other two are not used. From
    flwr 1.35 on, all but the Fleet API share one."""

    fleet: int
    control: int
    app_io: int


def environment(flwr_bin: Path, home: Path) -> dict[str, str]:
    """The environment of a process of flwr in `flwr_bin`, with `home` as its FLWR_HOME and TMPDIR."""
    inherited = {key: value for key, value in os.environ.items() if not _NOT_INHERITED.fullmatch(key)}
    # Flower finds the commands of its children (flower-superexec, flwr-serverapp, flwr-clientapp) by name.
    path = f"{flwr_bin}{os.pathsep}{inherited.get('PATH', os.defpath)}"
    # What a killed process leaves in its temporary directory goes with the federation's own.
    return {**inherited, **_OFFLINE, "PATH": path, "FLWR_HOME": str(home), "TMPDIR": str(home)}


def superlink_argv(wire: Wire, flwr_bin: Path, ports: Ports) -> Words:
    """The command of a SuperLink that serves the Fleet API on `wire`."""
    argv: Words = [flwr_bin / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
    if wire is Wire.HTTP_V1:
        return [*argv, "--host", LOOPBACK, "--port", str(ports.fleet)]
    argv += ["--fleet-api-type", _TRANSPORTS[wire], "--fleet-api-address", f"{LOOPBACK}:{ports.fleet}"]
    if ports.app_io == ports.control:
        return [*argv, "--host", LOOPBACK, "--port", str(ports.control)]
    argv += ["--control-api-address", f"{LOOPBACK}:{ports.control}"]
    return [*argv, "--serverappio-api-address", f"{LOOPBACK}:{ports.app_io}"]


def superexec_argv(wire: Wire, flwr_bin: Path, ports: Ports) -> Words:
    """The command of a SuperExec that starts the ServerApps of a SuperLink with `--isolation process`."""
    argv: Words = [flwr_bin / "flower-superexec", "--insecure"]
    if wire is Wire.HTTP_V1:
        return [*argv, "--runtime-api-address", f"{LOOPBACK}:{ports.app_io}"]
    return [*argv, "--plugin-type", "serverapp", "--appio-api-address", f"{LOOPBACK}:{ports.app_io}"]


def supernode_argv(
    wire: Wire,
    flwr_bin: Path,
    fleet_port: int,
    own_port: int,
    node_config: RunConfig,
    *,
    root_certificates: Path | None = None,
    userinfo: str = "",
) -> Words:
    """The command of a SuperNode.

    Args:
        wire: what it speaks.
        flwr_bin: the directory of Flower's commands.
        fleet_port: where it connects to.
        own_port: where its ClientApps find it.
        node_config: what its ClientApps read.
        root_certificates: a PEM file of those it trusts; without, it does not use TLS.
        userinfo: what it presents itself with, as `name:key`; "" for nothing.
    """
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in node_config.items())
    tls: Words = ["--root-certificates", root_certificates] if root_certificates else ["--insecure"]
    argv: Words = [flwr_bin / "flower-supernode", *tls, "--node-config", config]
    address = f"{userinfo}@{LOOPBACK}:{fleet_port}" if userinfo else f"{LOOPBACK}:{fleet_port}"
    if wire is Wire.HTTP_V1:
        return [*argv, "--superlink", address, "--host", LOOPBACK, "--port", str(own_port)]
    if wire is Wire.REST_V0:
        scheme = "https" if root_certificates else "http"
        argv += ["--rest", "--superlink", f"{scheme}://{address}"]
    else:
        argv += [f"--{_TRANSPORTS[wire]}", "--superlink", address]
        if shares_port(flwr_bin):
            return [*argv, "--host", LOOPBACK, "--port", str(own_port)]
    return [*argv, "--clientappio-api-address", f"{LOOPBACK}:{own_port}"]


def write_connection(home: Path, control_port: int) -> None:
    """Write the config.toml that makes `flwr run APP local` use the SuperLink on that port."""
    address = f"{LOOPBACK}:{control_port}"
    text = f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{address}"\ninsecure = true\n'
    (home / "config.toml").write_text(text, encoding="utf-8")


def write_run_config(path: Path, config: RunConfig) -> None:
    """Write a run config as the TOML file that `flwr run --run-config` takes."""
    # A JSON number, boolean or string is the same in TOML.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()]
    path.write_text("".join(lines), encoding="utf-8")


def version(flwr_bin: Path) -> Version:
    """The version of flwr whose commands are in `flwr_bin`.

    Raises FederationError when there is none.
    """
    if flwr_bin == Path(sys.executable).parent:
        return _parse(metadata.version("flwr"))
    command = flwr_bin / "flwr"
    try:
        result = subprocess.run(  # noqa: S603 - our own argv, no shell
            [command, "--version"],
            env=environment(flwr_bin, Path(os.devnull)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FederationError("flwr", f"could not be run: {error}") from error
    if result.returncode != 0:
        raise FederationError("flwr", f"of {flwr_bin} failed", result.stdout + result.stderr)
    return _parse(result.stdout)


@cache
def shares_port(flwr_bin: Path) -> bool:
    """Whether all APIs of this flwr but the gRPC Fleet API share one port, given as `--host` and `--port`."""
    return version(flwr_bin) >= (1, 35, 0)


def speaks(release: Version, wire: Wire) -> bool:
    """Whether SuperLink and SuperNode of this release speak the wire."""
    match wire:
        case Wire.HTTP_V1:
            return release >= (1, 40, 0)
        case Wire.REST_V0:
            return (1, 23, 0) <= release < (1, 33, 0)
        case Wire.GRPC | Wire.GRPC_ADAPTER:
            return (1, 23, 0) <= release < (1, 40, 0)


def _parse(text: str) -> Version:
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise FederationError("flwr", f"gave no version, but {text!r}")
    major, minor, patch = map(int, found.groups())
    return major, minor, patch
