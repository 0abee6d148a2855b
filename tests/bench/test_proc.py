import os
import subprocess
import sys

from bench import proc
from bench.proc import Stat, belonging, parse_busy, parse_kilobytes, parse_stat

LINE = (
    "4242 (a (strange) name) S 17 4242 4241 0 -1 4194304 1 2 3 4 "
    "100 20 3 7 20 0 1 0 12345 1000000 250 18446744073709551615 1 1 0"
)


def test_stat_adds_up_own_and_waited_children() -> None:
    assert parse_stat(LINE, ticks=100) == Stat(pid=4242, parent=17, session=4241, cpu=1.30)


def test_peak_memory_is_bytes() -> None:
    assert parse_kilobytes("Name:\tx\nVmHWM:\t   1234 kB\nVmRSS:\t 900 kB\n", "VmHWM") == 1234 * 1024
    assert parse_kilobytes("Name:\tzombie\n", "VmHWM") == 0


def test_busy_leaves_out_idle_and_guests() -> None:
    stat = "cpu  100 10 50 9000 700 5 15 30 99 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n"
    assert parse_busy(stat, ticks=100) == (1.80, 0.30)


def test_descendants_and_orphans_of_the_session_belong() -> None:
    stats = [
        Stat(pid=1, parent=0, session=1, cpu=0),
        Stat(pid=10, parent=1, session=10, cpu=0),
        Stat(pid=12, parent=11, session=12, cpu=0),  # grandchild, with a session of its own
        Stat(pid=11, parent=10, session=10, cpu=0),
        Stat(pid=13, parent=1, session=10, cpu=0),  # its parent has died
        Stat(pid=14, parent=1, session=1, cpu=0),
    ]
    assert {stat.pid for stat in belonging(10, stats)} == {10, 11, 12, 13}
    assert belonging(99, stats) == []


def test_usage_counts_children_that_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        usage = proc.usage(child.pid)
        child.stdin.close()
    assert usage.cpu >= 0.2
    assert usage.processes == 1
    assert usage.peak_rss > 1_000_000


def test_own_process_is_found_and_machine_is_busy() -> None:
    assert any(stat.pid == os.getpid() for stat in proc.tree(os.getpid()))
    busy, stolen = proc.machine_busy()
    assert busy > 0
    assert stolen >= 0


def test_a_process_that_is_gone_has_used_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert proc.usage(gone.pid) == proc.Usage(cpu=0, peak_rss=0, processes=0)
