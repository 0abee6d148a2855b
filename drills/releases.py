"""Flower releases for drills and end-to-end tests: a venv each in .cache/flwr, made by uv when wanted."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from relay.call import Wire

#: The newest release that speaks each wire.
RELEASES: Final[Mapping[Wire, str]] = {
    Wire.HTTP_V1: "flwr==1.42.0",
    Wire.REST_V0: "flwr[rest]==1.32.1",
    Wire.GRPC: "flwr==1.39.0",
    Wire.GRPC_ADAPTER: "flwr==1.39.0",
}

_CACHE: Final = Path(__file__).parents[1] / ".cache" / "flwr"
_UV: Final = Path(sys.executable).with_name("uv")
_INSTALL_SECONDS: Final = 600

# flwr 1.42 wants a certifi that not every package index has yet. Nothing here leaves this machine, so an
# older one does as well.
_OVERRIDES: Final[Mapping[str, str]] = {"flwr==1.42.0": "certifi>=2025.1.1\n"}


class ReleaseError(Exception):
    """A release of Flower cannot be had here; the text says why."""


def commands(requirement: str) -> Path:
    """Return the directory of Flower's commands of the release `requirement`, such as `flwr==1.42.0`.

    Raises:
        ReleaseError: uv is not there, or it could not install the release.
    """
    venv = _CACHE / requirement
    wanted = f"{venv} {requirement} {sys.version} {_OVERRIDES.get(requirement, '')}"
    stamp = venv / ".made"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{requirement}.lock").open("w") as lock:
        # Another process may be making it; who comes second finds the stamp.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(venv, ignore_errors=True)
            _make(venv, requirement)
            stamp.write_text(wanted)
    return venv / "bin"


def _make(venv: Path, requirement: str) -> None:
    if not _UV.exists():
        raise ReleaseError(f"{_UV} is not there: run scripts/check, or install the extra `dev`")
    overrides = _CACHE / f"{requirement}.overrides"
    overrides.write_text(_OVERRIDES.get(requirement, ""))
    _uv("venv", "--quiet", "--python", sys.executable, str(venv))
    # Without compiled bytecode every process of an app would compile all of Flower first.
    options = ["--quiet", "--compile-bytecode", "--override", str(overrides)]
    _uv("pip", "install", "--python", str(venv / "bin" / "python"), *options, requirement)


def _uv(*arguments: str) -> None:
    try:
        result = subprocess.run(
            [_UV, *arguments], capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ReleaseError(f"uv {arguments[0]} took longer than {_INSTALL_SECONDS} s") from None
    if result.returncode != 0:
        raise ReleaseError(f"uv {' '.join(arguments)} failed: {result.stderr[-2000:]}")
