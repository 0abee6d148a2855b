"""`flwr-relay demo` as its users meet it: to its end, interrupted, killed, and with something broken."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay.demo.federation import Federation
from relay.demo.processes import LOOPBACK, FederationError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240), pytest.mark.xdist_group("demo")]

Leftovers = Callable[[], list[str]]


class Demo:
    """A running `flwr-relay demo --plain`."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._output = directory / "demo.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "relay", "demo", "--plain", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(directory)},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def until(self, text: str, timeout: float = 90) -> None:
        """Wait until it has printed the text."""
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)


@contextmanager
def demo(directory: Path, *options: str) -> Iterator[Demo]:
    running = Demo(directory, *options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def test_trains_and_ends_by_itself(tmp_path: Path, leftovers: Leftovers) -> None:
    with demo(tmp_path, "--rounds", "2") as running:
        assert running.process.wait(180) == 0, running.output
        assert leftovers() == []
        assert "2 rounds, 2 SuperNodes, 2 relay workers, flwr " in running.output
        assert "round 2 of 2: train loss" in running.output
        assert [
            line.split()[1:3] for line in running.output.splitlines() if line.startswith("UnregisterNode")
        ] == [["2", "0"]]
    assert [path.name for path in tmp_path.iterdir()] == ["demo.txt"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=str,
)
def test_a_signal_ends_everything(
    tmp_path: Path, leftovers: Leftovers, number: signal.Signals, code: int
) -> None:
    with demo(tmp_path) as running:
        running.until("supernode-1 ready")
        assert len(leftovers()) > 6  # demo, SuperLink, relay with its workers, SuperNodes, SuperExecs, ...
        running.process.send_signal(number)
        assert running.process.wait(40) == code
        assert leftovers() == []
        assert f"Ended by {number.name}" in running.output
    assert [path.name for path in tmp_path.iterdir()] == ["demo.txt"]


def test_an_app_in_the_middle_of_its_work_is_ended_too(tmp_path: Path, leftovers: Leftovers) -> None:
    with demo(tmp_path) as running:
        running.until("round 1 of 3")
        _until(lambda: any("flwr-clientapp" in line for line in leftovers()))
        assert any("flwr-serverapp" in line for line in leftovers())
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(40) == 130
        assert leftovers() == []


def test_impatience_ends_everything_at_once(tmp_path: Path, leftovers: Leftovers) -> None:
    with demo(tmp_path) as running:
        running.until("supernode-1 ready")
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(40) == 130
        _until(lambda: not leftovers())


def test_even_sigkill_leaves_nothing_behind(tmp_path: Path, leftovers: Leftovers) -> None:
    with demo(tmp_path) as running:
        running.until("supernode-1 ready")
        running.process.kill()
        running.process.wait(10)
        _until(lambda: not leftovers())


def test_a_process_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path, leftovers: Leftovers) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    for command in Path(sys.executable).parent.glob("fl*w*r*"):
        (broken / command.name).symlink_to(command)
    (broken / "flower-supernode").unlink()
    (broken / "flower-supernode").write_text("#!/bin/sh\nsleep 1; echo no such partition; exit 7\n")
    (broken / "flower-supernode").chmod(0o755)
    with demo(tmp_path, "--flwr-bin", str(broken)) as running:
        assert running.process.wait(120) == 1
        assert leftovers() == []
        error = "supernode-0 ended by itself (exit code 7). The end of its log:\nno such partition\n"
        assert f"The demo failed. {error}" in running.output


def test_a_port_that_is_taken(leftovers: Leftovers) -> None:
    with Federation(Path(sys.executable).parent) as federation:
        with (
            socket.create_server((LOOPBACK, federation.ports.fleet)),
            pytest.raises(FederationError) as error,
        ):
            federation.up()
        assert error.value.process == "superlink"
        assert "ended by itself" in error.value.problem
        assert "address already in use" in error.value.log
    assert leftovers() == []


def _until(condition: Callable[[], bool], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
