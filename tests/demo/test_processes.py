import http.server
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.demo import processes, sweeper
from relay.demo.processes import FederationError, Process, State, reserve_port, stop_all, wait_ready

Make = Callable[..., Process]
SLEEP = "import time; print('up', flush=True); time.sleep(60)"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Process] = []

    def make(program: str, name: str = "thing", ready: Callable[[Process], bool] | None = None) -> Process:
        process = Process(
            name,
            [sys.executable, "-S", "-c", program],
            environment=os.environ,
            directory=tmp_path,
            log=tmp_path / f"{name}.log",
            mark=f"{tmp_path.name}-{os.getpid()}/{name}/",
            ready=ready,
        )
        made.append(process)
        return process

    yield make
    for process in made:
        process.kill()


def says_up(process: Process) -> bool:
    return "up" in process.output()


def state(process: Process) -> State:
    return process.state  # mypy takes a property for a value that stays


def test_life_of_a_process_that_is_stopped(make: Make) -> None:
    process = make(SLEEP, ready=says_up)
    assert state(process) is State.NEW
    process.start()
    assert state(process) is State.STARTING
    wait_ready([process])
    assert state(process) is State.READY
    assert process.stop() == -signal.SIGTERM
    assert state(process) is State.ENDED
    process.check()


def test_an_end_nobody_asked_for_is_an_error_with_the_end_of_the_log(make: Make) -> None:
    process = make("import sys; print('\\x1b[91mERROR\\x1b[0m no database'); sys.exit(3)", "superlink")
    process.start()
    process.wait(10)
    assert state(process) is State.FAILED
    with pytest.raises(FederationError) as error:
        process.check()
    assert (
        str(error.value) == "superlink ended by itself (exit code 3). The end of its log:\nERROR no database"
    )


def test_the_error_names_the_signal(make: Make) -> None:
    process = make(SLEEP)
    process.start()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    with pytest.raises(FederationError, match=r"thing ended by itself \(SIGKILL\)"):
        process.check()


@pytest.mark.parametrize(("code", "expected"), [(0, State.ENDED), (1, State.FAILED)])
def test_a_process_that_may_end(make: Make, code: int, expected: State) -> None:
    process = make(f"raise SystemExit({code})")
    process.start(may_end=True)
    assert process.wait(10) == code
    assert state(process) is expected
    process.check()


def test_starts_again_and_is_ready_by_its_new_output_alone(make: Make) -> None:
    process = make(SLEEP, ready=says_up)
    process.start()
    wait_ready([process])
    process.kill()
    process.argv[-1] = "import time; time.sleep(60)"
    process.start()
    assert not process.is_ready()
    assert state(process) is State.STARTING
    with pytest.raises(RuntimeError, match="is running"):
        process.start()


def test_a_command_that_is_not_there(make: Make) -> None:
    process = make("")
    process.argv = ["/no/such/flower-superlink"]
    with pytest.raises(FederationError, match=r"thing could not be started: .*No such file"):
        process.start()
    assert state(process) is State.NEW


def test_wait_ready_names_the_one_that_is_not(make: Make) -> None:
    ready, late = make(SLEEP, "ready", says_up), make(SLEEP, "late", lambda _: False)
    ready.start()
    late.start()
    with pytest.raises(FederationError, match=r"late was not ready within 1 s"):
        wait_ready([ready, late], timeout=1)


def test_wait_gives_up(make: Make) -> None:
    process = make(SLEEP)
    with pytest.raises(RuntimeError):
        process.wait(0)
    process.start()
    with pytest.raises(FederationError, match="did not end within 0 s"):
        process.wait(0)


def test_stop_all_ends_children_and_what_ignores_sigterm(make: Make) -> None:
    parent = make(
        f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {SLEEP!r}])", "parent"
    )
    stubborn = make(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}", "stubborn")
    for process in (parent, stubborn):
        process.start()
    while not (says_up(parent) and says_up(stubborn)):
        pass
    stop_all([parent, stubborn, make(SLEEP, "never started")], grace=0.5)
    assert (parent.returncode, stubborn.returncode) == (-signal.SIGTERM, -signal.SIGKILL)
    assert sweeper.marked([parent.mark, stubborn.mark]) == []


def test_tail_is_the_end(make: Make) -> None:
    process = make("print(*range(100), sep='\\n')")
    assert process.tail() == ""
    process.start()
    process.wait(10)
    assert process.tail(2) == "98\n99"


def test_a_reserved_port_is_free_for_a_server_alone() -> None:
    with reserve_port() as holder, reserve_port() as other:
        port = holder.getsockname()[1]
        assert port != other.getsockname()[1]
        assert not processes.listens(port)
        with socket.create_server((processes.LOOPBACK, port)):  # sets SO_REUSEADDR
            assert processes.listens(port)
        with socket.socket() as plain, pytest.raises(OSError, match="in use"):
            plain.bind((processes.LOOPBACK, port))


def test_get() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    with http.server.HTTPServer((processes.LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert processes.get(server.server_port, "/health") == (200, b"hello")
        assert processes.get(server.server_port, "/") == (404, b"hello")
        server.shutdown()
        thread.join()
    assert processes.get(server.server_port, "/health") is None
