"""A worker that waits for a processor is not taken for one that hangs."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from gunicorn.config import Config
from gunicorn.workers.workertmp import WorkerTmp

from relay.processor import Waits, waited

if TYPE_CHECKING:
    from collections.abc import Iterator


class Worker(SimpleNamespace):
    """A worker of gunicorn's that told of itself so many seconds ago."""

    def silent(self) -> float:
        silence: float = time.monotonic() - self.tmp.last_update()
        return silence


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(tmp=WorkerTmp(Config()))
    told = time.monotonic() - 15.0
    os.utime(worker.tmp.fileno(), (told, told))
    yield worker
    worker.tmp.close()


def test_what_it_waited_does_not_count(worker: Worker) -> None:
    total = {1: 100.0}
    waits = Waits(lambda pid: total[pid])
    waits.forgive({1: worker})
    assert 15 <= worker.silent() < 18, "what was before is nobody's business"
    total[1] += 9
    waits.forgive({1: worker})
    assert 6 <= worker.silent() < 9
    waits.forgive({1: worker})
    assert 6 <= worker.silent() < 9, "it counts once"


def test_it_never_told_of_itself_in_the_future(worker: Worker) -> None:
    total = {1: 0.0}
    waits = Waits(lambda pid: total[pid])
    waits.forgive({1: worker})
    total[1] += 100
    waits.forgive({1: worker})
    assert 0 <= worker.silent() < 3


def test_one_that_works_or_sleeps_without_a_word_is_as_silent_as_before(worker: Worker) -> None:
    waits = Waits(lambda _: 5.0)
    waits.forgive({1: worker})
    waits.forgive({1: worker})
    assert worker.silent() >= 15


def test_one_that_is_gone_is_passed_over() -> None:
    worker = Worker(tmp=WorkerTmp(Config()))
    worker.tmp.close()
    total = {1: 0.0}
    waits = Waits(lambda pid: total[pid])
    waits.forgive({1: worker})
    total[1] += 1
    waits.forgive({1: worker})


def test_the_kernel_says_how_long_a_process_waited() -> None:
    if not os.path.exists("/proc/self/schedstat"):  # noqa: PTH110
        pytest.skip("this kernel does not count it")
    first = waited(os.getpid())
    assert first > 0
    assert waited(os.getpid()) >= first
    assert waited(2**30) == 0.0
