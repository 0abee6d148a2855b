import os
import sys
import time
from pathlib import Path

import pytest

from bench import proc, processes
from bench.processes import BenchError, Cores, Process, environment, free_port, layout, wait_for

ANY = frozenset(os.sched_getaffinity(0))


def python(code: str, folder: Path, *, piped: bool = False) -> Process:
    return Process([sys.executable, "-c", code], cores=ANY, log=folder / "log", piped=piped)


@pytest.mark.parametrize(
    ("cores", "wanted", "proxy", "load", "upstream"),
    [([0, 1], 1, {0}, {1}, {1}), ([2, 3, 6, 7], 1, {2}, {3}, {6}), ([0, 1, 2], 2, {0, 1}, {2}, {2})],
)
def test_cores_are_kept_apart_when_there_are_enough(
    cores: list[int], wanted: int, proxy: set[int], load: set[int], upstream: set[int]
) -> None:
    expected = Cores(frozenset(proxy), frozenset(load), frozenset(upstream), apart=True)
    assert layout(cores, wanted) == expected


@pytest.mark.parametrize(("cores", "wanted"), [([0], 1), ([0, 1], 2)])
def test_too_few_cores_are_shared(cores: list[int], wanted: int) -> None:
    everything = frozenset(cores)
    assert layout(cores, wanted) == Cores(everything, everything, everything, apart=False)


def test_the_relay_variables_are_not_passed_on() -> None:
    assert environment({"PATH": "/bin", "RELAY_WORKERS": "9"}) == {"PATH": "/bin"}


def test_free_ports_are_ports() -> None:
    assert 1024 < free_port() < 65536


def test_talks_is_pinned_and_ends(tmp_path: Path) -> None:
    code = "import os\nwhile True: print(input(), *os.sched_getaffinity(0), flush=True)"
    core = min(ANY)
    command = [sys.executable, "-c", code]
    with Process(command, cores=frozenset({core}), log=tmp_path / "log", piped=True) as process:
        process.tell("hello")
        assert process.hear(10) == f"hello {core}"
        assert process.alive()
    assert not process.alive()


def test_silence_and_an_early_end_are_errors(tmp_path: Path) -> None:
    with python("input()", tmp_path, piped=True) as process, pytest.raises(BenchError, match="said nothing"):
        process.hear(0.05)
    code = "import sys; sys.exit('the reason')"
    with python(code, tmp_path, piped=True) as process, pytest.raises(BenchError, match="the reason"):
        process.hear(10)


def test_waiting_has_a_limit_and_sees_an_end(tmp_path: Path) -> None:
    with python("import time; time.sleep(60)", tmp_path) as process:
        wait_for("yes", lambda: None, limit=1, process=process)
        with pytest.raises(BenchError, match="never within 0 s: all of it"):
            wait_for("never", lambda: "all of it", limit=0.05, process=process)
    with python("print('last words')", tmp_path) as process, pytest.raises(BenchError, match="last words"):
        wait_for("never", lambda: "all of it", limit=10, process=process)


def test_stopping_takes_stubborn_processes_and_orphans_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_STOP_LIMIT", 0.3)
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() and os.fork(): print('up', flush=True)\n"
        "time.sleep(60)"
    )
    log = tmp_path / "log"
    process = python(code, tmp_path)
    wait_for("up", lambda: None if "up" in log.read_text() else "it", limit=10, process=process)
    assert process.usage().processes == 3
    assert process.stop() is False
    deadline = time.monotonic() + 5
    while proc.tree(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)  # a killed orphan is gone once init has waited for it
    assert proc.tree(process.pid) == []
