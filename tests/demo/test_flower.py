import os
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from relay.call import Wire
from relay.demo import flower
from relay.demo.flower import Ports
from relay.demo.processes import FederationError

BIN = Path("/opt/flwr/bin")


def test_superlink_http_v1_has_one_port() -> None:
    assert flower.superlink_argv(Wire.HTTP_V1, BIN, Ports(8000, 8000, 8000)) == [
        BIN / "flower-superlink",
        "--insecure",
        "--disable-runtime-dependency-installation",
        *("--host", "127.0.0.1"),
        *("--port", "8000"),
    ]


def test_superlink_rest_v0_has_three() -> None:
    assert flower.superlink_argv(Wire.REST_V0, BIN, Ports(9092, 9093, 9091))[3:] == [
        *("--fleet-api-type", "rest"),
        *("--fleet-api-address", "127.0.0.1:9092"),
        *("--control-api-address", "127.0.0.1:9093"),
        *("--serverappio-api-address", "127.0.0.1:9091"),
    ]


def test_superlink_grpc_has_three_ports_or_two() -> None:
    assert flower.superlink_argv(Wire.GRPC, BIN, Ports(9092, 9093, 9091))[3:] == [
        *("--fleet-api-type", "grpc-rere"),
        *("--fleet-api-address", "127.0.0.1:9092"),
        *("--control-api-address", "127.0.0.1:9093"),
        *("--serverappio-api-address", "127.0.0.1:9091"),
    ]
    assert flower.superlink_argv(Wire.GRPC, BIN, Ports(9092, 8000, 8000))[3:] == [
        *("--fleet-api-type", "grpc-rere"),
        *("--fleet-api-address", "127.0.0.1:9092"),
        *("--host", "127.0.0.1"),
        *("--port", "8000"),
    ]


@pytest.mark.parametrize(
    ("wire", "option"), [(Wire.GRPC, "--grpc-rere"), (Wire.GRPC_ADAPTER, "--grpc-adapter")]
)
@pytest.mark.parametrize(
    ("release", "own"),
    [
        ("1.32.1", ["--clientappio-api-address", "127.0.0.1:9094"]),
        ("1.39.0", ["--host", "127.0.0.1", "--port", "9094"]),
    ],
)
def test_supernode_grpc(tmp_path: Path, wire: Wire, option: str, release: str, own: list[str]) -> None:
    flwr_bin = script(tmp_path, f"echo Flower version: {release}")
    argv = flower.supernode_argv(wire, flwr_bin, 8080, 9094, {})
    assert argv[4:] == [option, "--superlink", "127.0.0.1:8080", *own]


def test_supernode() -> None:
    config: flower.RunConfig = {"partition-id": 1, "num-partitions": 2, "name": "a b"}
    http = flower.supernode_argv(Wire.HTTP_V1, BIN, 8080, 9094, config)
    assert http[2:6] == [
        "--node-config",
        'partition-id=1 num-partitions=2 name="a b"',
        "--superlink",
        "127.0.0.1:8080",
    ]
    rest = flower.supernode_argv(Wire.REST_V0, BIN, 8080, 9094, config)
    assert rest[4:] == [
        "--rest",
        *("--superlink", "http://127.0.0.1:8080"),
        *("--clientappio-api-address", "127.0.0.1:9094"),
    ]


def test_a_supernode_may_present_itself_in_its_address() -> None:
    http = flower.supernode_argv(Wire.HTTP_V1, BIN, 8080, 9094, {}, userinfo="name:key")
    assert "name:key@127.0.0.1:8080" in http
    rest = flower.supernode_argv(
        Wire.REST_V0, BIN, 8080, 9094, {}, userinfo="name:key", root_certificates=BIN / "ca.pem"
    )
    assert "https://name:key@127.0.0.1:8080" in rest


def test_environment_is_offline_and_takes_nothing_of_the_users_flower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "FLWR_HOME",
        "RELAY_WORKERS",
        "https_proxy",
        "ALL_PROXY",
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
    ):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("LANG", "C.UTF-8")
    environment = flower.environment(BIN, tmp_path)
    assert environment["FLWR_HOME"] == environment["TMPDIR"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["PATH"] == f"{BIN}{os.pathsep}/usr/bin"
    assert environment["LANG"] == "C.UTF-8"
    assert "mine" not in environment.values()


def test_connection_is_what_flwr_run_reads(tmp_path: Path) -> None:
    flower.write_connection(tmp_path, 8000)
    assert tomllib.loads((tmp_path / "config.toml").read_text()) == {
        "superlink": {"default": "local", "local": {"address": "127.0.0.1:8000", "insecure": True}}
    }


def test_run_config_is_toml(tmp_path: Path) -> None:
    config: flower.RunConfig = {"rounds": 3, "rate": 0.5, "fast": True, "output": '/tmp/"ä" b'}
    path = tmp_path / "config.toml"
    flower.write_run_config(path, config)
    assert tomllib.loads(path.read_text(encoding="utf-8")) == config


@pytest.mark.parametrize(
    ("release", "http", "rest", "grpc"),
    [
        ((1, 22, 0), False, False, False),
        ((1, 23, 0), False, True, True),
        ((1, 32, 1), False, True, True),
        ((1, 33, 0), False, False, True),
        ((1, 39, 0), False, False, True),
        ((1, 40, 0), True, False, False),
        ((1, 42, 0), True, False, False),
    ],
)
def test_who_speaks_what(release: flower.Version, http: bool, rest: bool, grpc: bool) -> None:
    assert flower.speaks(release, Wire.HTTP_V1) is http
    assert flower.speaks(release, Wire.REST_V0) is rest
    assert flower.speaks(release, Wire.GRPC) is grpc
    assert flower.speaks(release, Wire.GRPC_ADAPTER) is grpc


def test_version_of_this_python() -> None:
    assert ".".join(map(str, flower.version(Path(sys.executable).parent))) == metadata.version("flwr")


def script(directory: Path, text: str) -> Path:
    path = directory / "flwr"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return directory


def test_version_of_another(tmp_path: Path) -> None:
    assert flower.version(script(tmp_path, "echo Flower version: 1.32.1")) == (1, 32, 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("echo broken >&2; exit 1", "broken"), ("echo hello", "gave no version, but 'hello")],
)
def test_no_version(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(FederationError, match=problem):
        flower.version(script(tmp_path, text))


def test_no_flwr_at_all(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="flwr could not be run"):
        flower.version(tmp_path)


def test_the_app_has_no_federations() -> None:
    # With that table newer `flwr run` rewrites the connection that the federation has prepared.
    project = tomllib.loads((flower.APP / "pyproject.toml").read_text())
    assert "federations" not in project["tool"]["flwr"]
