"""No process is left behind: those of a federation carry a mark in their environment, and are found by it.

A parent process id, a process group or a session would not do: Flower's SuperLink starts its SuperExec in a
new session, and the processes of an app outlive the one that started them. The environment is inherited by
all of them.

Run as a program, this file is the watchman of one federation: `sweeper.py MARK` waits until its standard
input ends, which it also does when the owner is killed, and then ends every process that carries the mark.
It imports nothing but the standard library, so that it starts fast.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "DEMO_FEDERATION"
GRACE = 2.0
LAST_WAIT = 10.0
POLL = 0.05


def marked(marks: Sequence[str]) -> list[int]:
    """The ids of all living processes whose mark starts with one of `marks`. A zombie has no environment."""
    return [
        pid for pid in (int(entry.name) for entry in Path("/proc").glob("[1-9]*")) if _carries(pid, marks)
    ]


def signal_marked(marks: Sequence[str], number: signal.Signals) -> None:
    """Send a signal to every process that carries a mark, and to no other that has got its id meanwhile."""
    for pid in marked(marks):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if _carries(pid, marks):
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)


def sweep(marks: Sequence[str], grace: float = GRACE) -> list[int]:
    """End every process that carries a mark: SIGTERM, and after `grace` seconds SIGKILL.

    Returns the ids of those that live on after `LAST_WAIT` seconds more (only the kernel can hold them).
    """
    if grace > 0 and marked(marks):
        signal_marked(marks, signal.SIGTERM)
        signal_marked(marks, signal.SIGCONT)  # a stopped process does not see the SIGTERM
        gone(marks, grace)
    end = time.monotonic() + LAST_WAIT
    while (left := marked(marks)) and time.monotonic() < end:
        # Again and again: one of them may have forked between the listing and its end.
        signal_marked(marks, signal.SIGKILL)
        time.sleep(POLL)
    return left


def gone(marks: Sequence[str], timeout: float) -> bool:
    """Wait until no process carries a mark; False when one still does after `timeout` seconds."""
    end = time.monotonic() + timeout
    while marked(marks):
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


def _carries(pid: int, marks: Sequence[str]) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or it is another user's
        return False
    wanted = tuple(f"{VARIABLE}={mark}".encode() for mark in marks)
    return any(entry.startswith(wanted) for entry in environment.split(b"\0"))


def _watch(mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its end is the end of its input, nothing else
    sys.stdin.buffer.read()
    sweep([mark])


if __name__ == "__main__":
    _watch(sys.argv[1])
