"""One process of a federation: started, waited for until it is ready, stopped with everything it started."""

import enum
import http.client
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from relay.demo import sweeper

LOOPBACK = "127.0.0.1"
POLL = 0.05
START_SECONDS = 90.0
STOP_SECONDS = 10.0
_ANSWER_SECONDS = 1.0
_TAIL_BYTES = 64 * 1024
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class FederationError(Exception):
    """A federation failed. str() names the process, says what happened, and gives the end of its log."""

    def __init__(self, process: str, problem: str, log: str = "") -> None:
        super().__init__(process, problem, log)
        self.process = process
        self.problem = problem
        self.log = log

    def __str__(self) -> str:
        text = f"{self.process} {self.problem}"
        return f"{text}. The end of its log:\n{self.log}" if self.log else f"{text}."


class State(enum.Enum):
    """Where a process is in its life. The value is the word that people read."""

    NEW = "not started"
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"
    FAILED = "failed"


class Process:
    """One process of a federation, together with everything that it starts itself.

    Attributes:
        name: what people call it, e.g. `supernode-1`.
        argv, environment: its command and its environment; may be changed before `start`.
        directory: its working directory.
        log: the file that its output is appended to, standard error included.
        mark: the value of sweeper.VARIABLE that it and its descendants carry.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        directory: Path,
        log: Path,
        mark: str,
        ready: "Callable[[Process], bool] | None" = None,
    ) -> None:
        """`ready` is asked until it says True; without it the process is ready as soon as it is started."""
        self.name = name
        self.argv = [str(word) for word in argv]
        self.log = log
        self.mark = mark
        self.environment = {**environment, sweeper.VARIABLE: mark}
        self.directory = directory
        self._is_ready = ready
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._ready = False
        self._may_end = False
        self._asked = False

    def start(self, *, may_end: bool = False) -> None:
        """Start it, or start it again after it has ended.

        Args:
            may_end: ending by itself is no failure.

        Raises:
            FederationError: the command cannot be run.
            RuntimeError: it is running.
        """
        if self.running:
            raise RuntimeError(f"{self.name} is running")
        self._ready, self._may_end, self._asked = False, may_end, False
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._popen = subprocess.Popen(  # noqa: S603 - the argv is made by us, there is no shell
                    self.argv,
                    env=self.environment,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C in the terminal is for its owner alone
                )
            except OSError as error:
                raise FederationError(self.name, f"could not be started: {error}") from error

    @property
    def pid(self) -> int:
        """Its id. Raises RuntimeError when it was never started."""
        if self._popen is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs or before its start."""
        return None if self._popen is None else self._popen.poll()

    @property
    def state(self) -> State:
        """Where it is in its life now. READY is what `wait_ready` found, so it is never asked for here."""
        if self._popen is None:
            return State.NEW
        code = self.returncode
        if code is None:
            return State.READY if self._ready else State.STARTING
        return State.ENDED if self._asked or (self._may_end and code == 0) else State.FAILED

    def output(self) -> str:
        """What it has written since its last start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def tail(self, lines: int = 25) -> str:
        """The last lines of its log, without colours."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = _ANSI.sub("", file.read().decode(errors="replace"))
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def error(self, problem: str) -> FederationError:
        """A FederationError about this process, with the end of its log."""
        return FederationError(self.name, problem, self.tail())

    def check(self) -> None:
        """Raise FederationError when it has ended and nobody asked it to."""
        code = self.returncode
        if code is not None and not self._may_end and not self._asked:
            raise self.error(f"ended by itself ({_meaning(code)})")

    def is_ready(self) -> bool:
        """Ask it whether it is ready; once it was, it is. Raises as `check` does."""
        self.check()
        if not self._ready:
            self._ready = self._is_ready is None or self._is_ready(self)
        return self._ready

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, e.g. SIGSTOP; nothing happens when it has ended."""
        if self._popen is not None:
            self._popen.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit code.

        Raises FederationError when it still runs after `timeout` seconds, RuntimeError when never started.
        """
        if self._popen is None:
            raise RuntimeError(f"{self.name} was not started")
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"did not end within {timeout:.0f} s") from None

    def stop(self, grace: float = STOP_SECONDS) -> int | None:
        """Stop it as `stop_all` does. Returns its exit code; None when it was never started."""
        stop_all([self], grace)
        return self.returncode

    def kill(self) -> None:
        """Kill it and everything that it started, at once."""
        self._asked = True
        if self._popen is not None:
            self._popen.kill()
            sweeper.sweep([self.mark], grace=0)
            self._popen.wait()

    def ask_to_end(self) -> None:
        """Send it SIGTERM, and SIGCONT in case it is stopped."""
        self._asked = True
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)


def wait_ready(processes: Iterable[Process], timeout: float = START_SECONDS) -> None:
    """Wait until all of them are ready.

    Raises FederationError about the first that ended by itself or is not ready after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    waiting = list(processes)
    while waiting := [process for process in waiting if not process.is_ready()]:
        if time.monotonic() > end:
            raise waiting[0].error(f"was not ready within {timeout:.0f} s")
        time.sleep(POLL)


def stop_all(processes: Sequence[Process], grace: float = STOP_SECONDS) -> None:
    """Stop them at the same time: SIGTERM, and after `grace` seconds SIGKILL, and so for all they started."""
    started = [process for process in processes if process.state is not State.NEW]
    for process in started:
        process.ask_to_end()
    end = time.monotonic() + grace
    while any(process.running for process in started) and time.monotonic() < end:
        time.sleep(POLL)
    for process in started:
        if process.running:
            process.kill()
    # What they started ends with them (Flower's children watch their parent), or is ended here.
    sweeper.sweep([process.mark for process in started])


def reserve_port() -> socket.socket:
    """A free port of the loopback address, as a socket that is bound to it and never listens.

    While it is open neither another reservation nor the kernel gives the port away, and a server that sets
    SO_REUSEADDR (all of ours do) can listen on it. Measured on Linux with both socket options in all
    combinations.
    """
    holder = socket.socket()
    holder.bind((LOOPBACK, 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def get(port: int, path: str) -> tuple[int, bytes] | None:
    """GET a path of a loopback HTTP server: its status and body, or None when it does not answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def listens(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    try:
        socket.create_connection((LOOPBACK, port), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _meaning(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
