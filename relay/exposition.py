"""The metrics of all workers, also of those that have ended, as one page for Prometheus.

prometheus_client keeps the numbers of each process in files of its own, and leaves those of ended ones where
they are. A relay that is reloaded daily would collect them for years, so they are added up in one pair.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess, values
from prometheus_client.mmap_dict import MmapedDict

from relay.metrics_file import ReservedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

log = structlog.get_logger("relay.exposition")

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


def count_as(pid: int) -> None:
    """Keep the numbers of this process in files of its own, which are reserved before they are written.

    To be called after the fork and before the first metric is made. prometheus_client is told once who this
    is; by itself it asks for its pid at each count.
    """
    values.MmapedDict = ReservedDict  # type: ignore[attr-defined]
    values.ValueClass = values.MultiProcessValue(lambda: pid)  # type: ignore[no-untyped-call]


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
    """Drop the gauges of a worker that has ended, and keep its counters and histograms.

    Never raises: what finds no room to be added up stays where it is, and what cannot be read is removed.
    """
    directory = Path(os.environ[DIRECTORY])
    try:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
    except OSError as error:
        log.warning("gauges of an ended worker stay", pid=pid, problem=str(error))
    for kind in ("counter", "histogram"):
        ended = directory / f"{kind}_{pid}.db"
        try:
            if ended.exists():
                with _lock(fcntl.LOCK_EX):
                    _add(ended, directory / f"{kind}_ended.db")
        except OSError as error:
            log.warning("counts of an ended worker are not added up", pid=pid, problem=str(error))
        except (ValueError, RuntimeError, IndexError, struct.error) as error:
            log.warning("counts of an ended worker are lost", pid=pid, problem=str(error))
            ended.unlink(missing_ok=True)


def _add(ended: Path, total: Path) -> None:
    """Add the numbers in `ended` to those in `total`, and remove `ended`. Raises OSError for want of room."""
    sum_ = total.with_suffix(".new")
    read = MmapedDict.read_all_values_from_file(str(ended))  # type: ignore[no-untyped-call]
    new = {key: value for key, value, _, _ in read}
    try:
        if total.exists():
            shutil.copyfile(total, sum_)
        file = ReservedDict(str(sum_))
        try:
            for key, value in new.items():
                so_far, _ = file.read_value(key)
                file.write_value(key, so_far + value, 0.0)
            if file.counts_alone():
                raise OSError(ENOSPC, os.strerror(ENOSPC), str(sum_))
        finally:
            file.close()
        sum_.replace(total)
    except BaseException:
        sum_.unlink(missing_ok=True)
        raise
    ended.unlink()


@contextmanager
def _lock(kind: int) -> Iterator[None]:
    """Keep a scrape from seeing numbers twice, or not at all, while they are being moved."""
    with (Path(os.environ[DIRECTORY]) / "lock").open("w") as file:
        fcntl.flock(file, kind)
        yield
