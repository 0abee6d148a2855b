"""What Linux knows about processes: CPU time, peak memory, who belongs to whom. Read from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")  # per second; CPU times of /proc have this resolution
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Stat:
    """The part of /proc/PID/stat that the benchmark uses."""

    pid: int
    parent: int
    session: int
    cpu: float  # user and system seconds of all its threads, and of the children that it has waited for


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and everything it started have used so far."""

    cpu: float  # seconds
    peak_rss: int  # bytes: the sum of each living process's own peak, so shared pages count more than once
    processes: int


def parse_stat(text: str, ticks: int = TICKS) -> Stat:
    """Parse /proc/PID/stat; its second field, the name, may itself hold blanks and parentheses."""
    name_end = text.rindex(")")
    rest = text[name_end + 2 :].split()
    return Stat(
        pid=int(text[: text.index("(")]),
        parent=int(rest[1]),
        session=int(rest[3]),
        cpu=sum(map(int, rest[11:15])) / ticks,  # utime, stime, cutime, cstime
    )


def parse_kilobytes(status: str, key: str) -> int:
    """The bytes of a line like `VmHWM:  1234 kB` in /proc/PID/status; 0 without one (a zombie has none)."""
    for line in status.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def parse_busy(stat: str, ticks: int = TICKS) -> tuple[float, float]:
    """Seconds that all cores were busy, and that the hypervisor gave to others, from /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def belonging(root: int, stats: list[Stat]) -> list[Stat]:
    """`root`, its descendants, and the rest of its session (a child whose parent has died stays in that)."""
    members = {root}
    grew = True
    while grew:
        found = {stat.pid for stat in stats if stat.parent in members or stat.session == root} - members
        members |= found
        grew = bool(found)
    return [stat for stat in stats if stat.pid in members]


def all_stats() -> list[Stat]:
    """Of all processes that live right now."""
    stats = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                stats.append(parse_stat((entry / "stat").read_text(errors="replace")))
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended while we looked
    return stats


def tree(root: int) -> list[Stat]:
    """The processes that belong to `root`, which leads its own session."""
    return belonging(root, all_stats())


def usage(root: int) -> Usage:
    """What the tree of `root` has used until now."""
    members = tree(root)
    peak = 0
    for member in members:
        try:
            peak += parse_kilobytes((_PROC / str(member.pid) / "status").read_text(errors="replace"), "VmHWM")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return Usage(cpu=sum(member.cpu for member in members), peak_rss=peak, processes=len(members))


def machine_busy() -> tuple[float, float]:
    """See `parse_busy`."""
    return parse_busy((_PROC / "stat").read_text())
