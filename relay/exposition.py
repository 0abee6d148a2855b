"""The metrics of all workers, also of those that have ended, as one page for Prometheus.

prometheus_client keeps the numbers of each process in files of its own, and leaves those of ended ones where
they are. A relay that is reloaded daily would collect them for years, so they are added up in one pair.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess
from prometheus_client.mmap_dict import MmapedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


def exposition() -> bytes:
    """Return the metrics in Prometheus' text format; of this process alone outside `flwr-relay serve`.

    Reads files, so it does not belong on an event loop.
    """
    if DIRECTORY not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    with _lock(fcntl.LOCK_SH):
        return generate_latest(registry)


def bury(pid: int) -> None:
    """Drop the gauges of a worker that has ended, and keep its counters and histograms."""
    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
    directory = Path(os.environ[DIRECTORY])
    for kind in ("counter", "histogram"):
        ended = directory / f"{kind}_{pid}.db"
        if ended.exists():
            with _lock(fcntl.LOCK_EX):
                _add(ended, directory / f"{kind}_ended.db")


def _add(ended: Path, total: Path) -> None:
    """Add the numbers in `ended` to those in `total`, and remove `ended`."""
    sum_ = total.with_suffix(".new")
    if total.exists():
        shutil.copyfile(total, sum_)
    numbers = MmapedDict(str(sum_))  # type: ignore[no-untyped-call]
    for key, value, _, _ in MmapedDict.read_all_values_from_file(str(ended)):  # type: ignore[no-untyped-call]
        so_far, _ = numbers.read_value(key)  # type: ignore[no-untyped-call]
        numbers.write_value(key, so_far + value, 0.0)  # type: ignore[no-untyped-call]
    numbers.close()  # type: ignore[no-untyped-call]
    sum_.replace(total)
    ended.unlink()


@contextmanager
def _lock(kind: int) -> Iterator[None]:
    """Keep a scrape from seeing numbers twice, or not at all, while they are being moved."""
    with (Path(os.environ[DIRECTORY]) / "lock").open("w") as file:
        fcntl.flock(file, kind)
        yield
