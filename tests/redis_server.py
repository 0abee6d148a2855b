"""A real Redis server on loopback, to be stopped, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import redis

from tests.relay_process import free_port

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

PROGRAM = shutil.which("redis-server")
START_SECONDS = 20.0


class RedisServer:
    """The server; to be used as a context.

    Attributes:
        port: where it listens; the same after a restart.
        password: what it asks for; "" if nothing.
    """

    def __init__(self, directory: Path, *options: str, password: str = "") -> None:
        """Prepare it, with further options of its command line.

        Skips the test where there is no redis-server, and fails it in continuous integration.
        """
        if PROGRAM is None:
            reason = "redis-server is not installed (Debian: apt install redis-server)"
            if os.environ.get("CI", "").lower() in {"true", "1"}:
                pytest.fail(reason)
            pytest.skip(reason)
        self.port = free_port()
        self.password = password
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        entry = f":{self.password}@" if self.password else ""
        return f"redis://{entry}127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)

    def start(self) -> Self:
        """Start it, empty, and wait until it answers."""
        assert PROGRAM is not None
        argv = [PROGRAM, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        argv += ["--dir", str(self._directory), *(["--requirepass", self.password] if self.password else [])]
        argv += self._options
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, "redis-server ended"
            try:
                with self.client() as client:
                    client.ping()
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < end, "redis-server does not answer"
                time.sleep(0.02)
            else:
                return self

    def freeze(self) -> None:
        """Have it answer nothing, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def thaw_and_kill(self) -> None:
        """Leave nothing running."""
        if self._process is not None:
            self.thaw()
        self.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw_and_kill()
