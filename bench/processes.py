"""Processes of the benchmark: each on its own cores, in its own session, gone when the benchmark is."""

import contextlib
import ctypes
import os
import select
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from bench import proc

ROOT: Final = Path(__file__).resolve().parents[1]
_STOP_LIMIT: Final = 10.0
_LAST_WORDS: Final = 1_500  # characters of a log that an error quotes
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


class BenchError(Exception):
    """The benchmark cannot go on with what it was measuring."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores each side may use."""

    proxy: frozenset[int]
    load: frozenset[int]
    upstream: frozenset[int]
    apart: bool  # the proxy shares no core with the others


def layout(cores: list[int], wanted: int = 1) -> Cores:
    """Give the proxy `wanted` cores of its own if that leaves one for the load; else all share all."""
    everything = frozenset(cores)
    if len(cores) <= wanted:
        return Cores(everything, everything, everything, apart=False)
    proxy, others = cores[:wanted], cores[wanted:]
    upstream = others[1:2] or others[:1]
    return Cores(frozenset(proxy), frozenset(others[:1]), frozenset(upstream), apart=True)


class Process:
    """A child process, stopped on leaving its `with` block."""

    def __init__(self, command: list[str], *, cores: frozenset[int], log: Path, piped: bool = False) -> None:
        """Start `command` in the repository, pinned to `cores`.

        What it says goes to `log`; with `piped`, `tell` and `hear` talk to it instead.
        """
        self.command = command
        self._log = log
        self._heard = b""
        self._stopped = False
        pipe = subprocess.PIPE if piped else None
        with log.open("ab") as sink:
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(os.environ),
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or sink,
                stderr=sink,
                bufsize=0,
                start_new_session=True,
                preexec_fn=_before_exec(cores, os.getpid()),  # noqa: PLW1509 - we have one thread
            )
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def alive(self) -> bool:
        """True until it has ended."""
        return self._child.poll() is None

    def usage(self) -> proc.Usage:
        """What it and its children have used."""
        return proc.usage(self.pid)

    def tell(self, line: str) -> None:
        """Write a line to its standard input.

        Raises:
            BenchError: it does not listen any more.
        """
        try:
            _pipe(self._child.stdin).write(f"{line}\n".encode())
        except BrokenPipeError as error:
            raise BenchError(f"{self.command[:3]} ended early\n{self.last_words()}") from error

    def hear(self, limit: float) -> str:
        """The next line of its standard output.

        Raises:
            BenchError: none came within `limit` seconds, or it ended.
        """
        pipe = _pipe(self._child.stdout).fileno()
        deadline = time.monotonic() + limit
        while b"\n" not in self._heard:
            readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise BenchError(f"{self.command[1:4]} said nothing for {limit:.0f} s\n{self.last_words()}")
            heard = os.read(pipe, 65_536)
            if not heard:
                raise BenchError(f"{self.command[1:4]} ended without an answer\n{self.last_words()}")
            self._heard += heard
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def last_words(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-_LAST_WORDS:].strip()

    def stop(self) -> bool:
        """End it and all that belongs to it; False when it had to be killed. A second time does nothing."""
        if self._stopped:
            return True
        self._stopped = True
        gentle = True
        if self._child.stdin is not None:
            self._child.stdin.close()
        if self.alive():
            self._child.terminate()
        try:
            self._child.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            gentle = False
        for member in proc.tree(self.pid):  # by the session that we made, so it is nobody else's
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        return gentle


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Ours without the relay's own variables: its settings come from the file of the benchmark alone."""
    return {name: value for name, value in ours.items() if not name.startswith("RELAY_")}


def _before_exec(cores: frozenset[int], parent: int) -> Callable[[], None]:
    def before_exec() -> None:
        os.sched_setaffinity(0, cores)
        # Even a benchmark that is killed outright leaves nothing running.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise BenchError("the process was started without pipes")
    return pipe


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(what: str, missing: Callable[[], str | None], *, limit: float, process: Process) -> None:
    """Poll `missing`, which says what is not there yet, until it says None; `what` begins the error.

    Raises:
        BenchError: `limit` seconds passed, or `process` ended.
    """
    deadline = time.monotonic() + limit
    while (lack := missing()) is not None:
        if not process.alive():
            raise BenchError(f"{what}, it ended: {shlex.join(process.command)}\n{process.last_words()}")
        if time.monotonic() > deadline:
            raise BenchError(f"{what} within {limit:.0f} s: {lack}\n{process.last_words()}")
        time.sleep(0.05)
