import subprocess
import sys
from pathlib import Path

import pytest


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", "demo", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def flwr(directory: Path, version: str) -> Path:
    path = directory / "flwr"
    path.write_text(f"#!/bin/sh\necho Flower version: {version}\n")
    path.chmod(0o755)
    return directory


@pytest.mark.parametrize(("wire", "version"), [("http_v1", "1.39.0"), ("rest_v0", "1.42.0")])
def test_a_flower_that_does_not_speak_the_wire(tmp_path: Path, wire: str, version: str) -> None:
    result = demo("--wire", wire, "--flwr-bin", str(flwr(tmp_path, version)))
    assert result.returncode == 1
    assert result.stdout == (
        f"The demo failed. flwr {version} does not speak {wire}: choose another --wire or --flwr-bin.\n"
    )


def test_no_flower_there(tmp_path: Path) -> None:
    result = demo("--flwr-bin", str(tmp_path))
    assert result.returncode == 1
    assert result.stdout.startswith("The demo failed. flwr could not be run")


def test_importing_the_command_does_not_import_prometheus_client() -> None:
    # `flwr-relay serve` imports it with the command line, and decides only then how prometheus_client counts.
    program = "import sys, relay.demo.command; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
