"""A real relay: `python -m relay serve` with its workers, as tests start, watch and end it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

START_SECONDS = 20.0


#: Below the ports that Linux gives out by itself: none is taken by a connection, or by a listener on port 0,
#: between its choice and its use. gRPC would share a port that is taken instead of failing.
_PORTS = range(12_000, 32_000)
#: So many of them belong to one process.
_BLOCK = 400


def _own_ports() -> Iterator[int]:
    """Yield ports that no other process gets here, in a circle."""
    lock = socket.socket(socket.AF_UNIX)  # the kernel lets go of its name when this process has ended
    for first in range(_PORTS.start, _PORTS.stop, _BLOCK):
        try:
            lock.bind(f"\0flwr-relay-tests-{first}")
        except OSError:
            continue
        while True:
            yield from range(first, first + _BLOCK)
    raise RuntimeError("all ports are taken by other test runs")


_ports = _own_ports()


def free_port() -> int:
    """Return a loopback port on which nothing listens."""
    for port in itertools.islice(_ports, _BLOCK):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of the ports of this process is free")


class RelayProcess:
    """One relay, with a temporary directory and ports of its own.

    Attributes:
        port, admin: where it listens.
        settings: what stands in its configuration file; change it, then `write` and `reload`.
        log: the file with its log.
    """

    def __init__(
        self,
        directory: Path,
        upstream: int,
        *,
        workers: int = 2,
        wire: str = "http_v1",
        program: str | None = None,
        **settings: Any,
    ) -> None:
        """Prepare it.

        Args:
            directory: for its files.
            upstream: port of its SuperLink.
            workers: how many.
            wire: what the SuperLink speaks.
            program: Python code to run in place of `-m relay serve`; `sys.argv[1]` is the configuration.
            settings: whole sections, in addition or instead.
        """
        self.port, self.admin = free_port(), free_port()
        self.temporary = directory / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.config = directory / "relay.yaml"
        self.log = directory / "relay.log"
        self.settings: dict[str, Any] = {
            "workers": workers,
            "upstream": {"url": f"http://127.0.0.1:{upstream}", "wire": wire},
            "listeners": [{"address": f"127.0.0.1:{self.port}"}],
            "admin": {"address": f"127.0.0.1:{self.admin}"},
            "drain": {"idle_grace": 0.5, "timeout": 20},
            "log": {"format": "json"},
            # What these tests send are numbers and hashes, so that each call can be told from the others.
            "limits": {"check_calls": False},
            **settings,
        }
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def write(self) -> None:
        """Write the configuration file, which a relay that reads it meanwhile finds whole."""
        written = self.config.with_suffix(".written")
        written.write_text(yaml.safe_dump(self.settings))
        written.replace(self.config)

    def start(self, *, ready: bool = True) -> Self:
        """Start it; wait until every worker serves, if `ready`."""
        self.write()
        what = ["-m", "relay", "serve", "-c"] if self._program is None else ["-c", self._program]
        environ = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RELAY_", "PROMETHEUS_", "GRPC_"))
        }
        environ["TMPDIR"] = str(self.temporary)
        environ["GRPC_VERBOSITY"] = "error"  # as flwr sets it for whatever is started beside it
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *what, str(self.config)],
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )
        if ready:
            self.until(lambda: self.count("worker serves") >= self.settings["workers"])
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._process is None:
            return
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._process.kill()
        self._process.wait(10)

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def _children(self) -> list[psutil.Process]:
        try:
            return self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes that live."""
        living = []
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if child.status() != psutil.STATUS_ZOMBIE:
                    living.append(child)
        return living

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def exit_code(self, timeout: float = 20.0) -> int:
        """Wait for the end; return the exit code."""
        assert self._process is not None
        return self._process.wait(timeout)

    def stop(self, timeout: float = 20.0) -> int:
        self.signal(signal.SIGTERM)
        return self.exit_code(timeout)

    # -- what it says -------------------------------------------------------------------------------

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of its log; what is no JSON stands under `text`."""
        lines = []
        for line in self.log.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({"text": line})
        return lines

    def count(self, event: str) -> int:
        return sum(line.get("event") == event for line in self.lines())

    def complaints(self) -> list[dict[str, Any]]:
        """Return the lines of its log that an operator would worry about."""
        return [line for line in self.lines() if line.get("level") not in ("info", "debug")]

    def get(self, path: str) -> tuple[int, str]:
        """Ask the admin port."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a metric that have these labels."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match is None or match[1] != name:
                continue
            have = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if all(have.get(key) == value for key, value in labels.items()):
                total += float(match[3])
        return total

    def leftovers(self) -> list[str]:
        """Return what it left in its temporary directory."""
        return sorted(path.name for path in self.temporary.iterdir())

    def until(self, condition: Any, timeout: float = START_SECONDS) -> None:
        """Wait for `condition()`; fail with the log when the relay ends or the time is up."""
        assert self._process is not None
        end = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None:
                raise AssertionError(
                    f"the relay ended with {self._process.returncode}:\n{self.log.read_text()}"
                )
            if time.monotonic() > end:
                raise AssertionError(f"nothing came of it in {timeout:g} s:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)
