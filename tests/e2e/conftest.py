"""Flower releases for the end-to-end tests: a venv each in .cache/flwr, made by uv when first wanted."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "flwr"
UV = Path(sys.executable).with_name("uv")
INSTALL_SECONDS = 600
MARK = "FLOWER_END_TO_END_TEST"

# flwr 1.42 wants a certifi that not every package index has yet. Nothing here leaves this machine, so an
# older one does as well.
OVERRIDES = {"flwr==1.42.0": "certifi>=2025.1.1\n"}


@pytest.fixture(scope="session")
def flower() -> Callable[[str], Path]:
    """A function from a requirement, such as `flwr==1.42.0`, to the directory of its commands."""
    return _install


def _install(requirement: str) -> Path:
    venv = CACHE / requirement
    wanted = f"{venv} {requirement} {sys.version} {OVERRIDES.get(requirement, '')}"
    stamp = venv / ".made"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{requirement}.lock").open("w") as lock:
        # Another worker of this test run may be making it; who comes second finds the stamp.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(venv, ignore_errors=True)
            _make(venv, requirement)
            stamp.write_text(wanted)
    return venv / "bin"


def _make(venv: Path, requirement: str) -> None:
    if not UV.exists():
        _unavailable(f"{UV} is not there: run scripts/check, or install the extra `dev`")
    overrides = CACHE / f"{requirement}.overrides"
    overrides.write_text(OVERRIDES.get(requirement, ""))
    _uv("venv", "--quiet", "--python", sys.executable, str(venv))
    # Without compiled bytecode every process of an app would compile all of Flower first.
    options = ["--quiet", "--compile-bytecode", "--override", str(overrides)]
    _uv("pip", "install", "--python", str(venv / "bin" / "python"), *options, requirement)


def _uv(*arguments: str) -> None:
    try:
        result = subprocess.run(
            [UV, *arguments], capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        _unavailable(f"uv {arguments[0]} took longer than {INSTALL_SECONDS} s")
    else:
        if result.returncode != 0:
            _unavailable(f"uv {' '.join(arguments)} failed: {result.stderr[-2000:]}")


def _unavailable(reason: str) -> None:
    """Skip where a person lacks uv or the network; in continuous integration that hides broken tests."""
    if os.environ.get("CI", "").lower() in {"true", "1"}:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def leftovers(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[[], list[str]]]:
    """A function that lists the processes that descend from this test and still live.

    Found through psutil by an environment variable that the test sets, independently of how the demo finds
    its processes. The test fails at its end when there is one.
    """
    value = f"{os.getpid()}-{request.node.nodeid}"
    monkeypatch.setenv(MARK, value)

    def living() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == value:
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:  # it has ended meanwhile, or it is another user's
                continue
        return found

    yield living
    left = living()
    for line in left:
        psutil.Process(int(line.split()[0])).kill()
    assert left == []
