import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from relay.demo import sweeper


@pytest.fixture
def mark() -> Iterator[str]:
    mark = f"{secrets.token_hex(8)}/"
    yield mark
    sweeper.sweep([mark], grace=0)


def spawn(mark: str, program: str) -> subprocess.Popen[bytes]:
    """A Python program with the mark that has said on its standard output that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, sweeper.VARIABLE: mark},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == b"ready\n"
    return process


SLEEP = "print('ready', flush=True); import time; time.sleep(60)"
IGNORE_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
# Like Flower's SuperLink: a child in a session of its own, which lives on when its parent is gone.
ORPHAN = f"""
import subprocess, sys
subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}], start_new_session=True)
"""


def test_finds_processes_by_the_start_of_their_mark(mark: str) -> None:
    with spawn(f"{mark}one/", SLEEP) as one, spawn(f"{mark}two/", SLEEP) as two:
        assert set(sweeper.marked([mark])) == {one.pid, two.pid}
        assert sweeper.marked([f"{mark}one/"]) == [one.pid]
        assert sweeper.marked([f"{mark}on/"]) == []
        one.kill()
        two.kill()
    assert sweeper.marked([mark]) == []


def test_ends_an_orphan_in_another_session(mark: str) -> None:
    with spawn(mark, ORPHAN) as parent:
        assert parent.wait(10) == 0
    (orphan,) = sweeper.marked([mark])
    assert os.getsid(orphan) == orphan
    assert sweeper.sweep([mark]) == []
    assert sweeper.marked([mark]) == []


@pytest.mark.parametrize(
    ("program", "grace", "expected"),
    [
        (SLEEP, 5.0, signal.SIGTERM),
        (SLEEP, 0.0, signal.SIGKILL),
        (IGNORE_SIGTERM, 0.2, signal.SIGKILL),
    ],
)
def test_sigterm_first_then_sigkill(mark: str, program: str, grace: float, expected: signal.Signals) -> None:
    with spawn(mark, program) as process:
        # Not yet waited for, it stays a zombie, and a zombie does not count as living.
        assert sweeper.sweep([mark], grace) == []
        assert process.wait(5) == -expected


def test_ends_a_stopped_process_with_sigterm(mark: str) -> None:
    with spawn(mark, SLEEP) as process:
        process.send_signal(signal.SIGSTOP)
        sweeper.sweep([mark], grace=5)
        assert process.wait(5) == -signal.SIGTERM


def test_leaves_everyone_else_alone(mark: str) -> None:
    with spawn("someone-else/", SLEEP) as process:
        sweeper.sweep([mark])
        assert process.poll() is None
        process.kill()


def test_gone_waits_no_longer_than_it_may(mark: str) -> None:
    with spawn(mark, SLEEP) as process:
        start = time.monotonic()
        assert not sweeper.gone([mark], 0.2)
        assert time.monotonic() - start < 5
        process.kill()
    assert sweeper.gone([mark], 5)


def test_the_watchman_sweeps_when_its_owner_is_gone(mark: str) -> None:
    argv = [sys.executable, "-I", sweeper.__file__, mark]
    with (
        spawn(mark, SLEEP) as process,
        subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as watchman,
    ):
        assert watchman.stdin is not None
        time.sleep(0.2)
        assert process.poll() is None
        watchman.stdin.close()
        assert watchman.wait(15) == 0
        assert process.wait(5) == -signal.SIGTERM
