"""Configurations side by side, each in a process of its own."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from drills import releases
from drills.catalogue import DRILLS
from drills.matrix import Configuration
from drills.releases import ReleaseError
from drills.runner import Result, Runner
from relay.demo.processes import FederationError


def carry_out(
    configurations: Sequence[Configuration], names: Sequence[str], jobs: int, *, keep: bool = False
) -> Iterator[tuple[list[Result], str]]:
    """Carry out drills in each configuration.

    Args:
        configurations: where.
        names: of the drills.
        jobs: how many configurations at a time.
        keep: leave the directories of the federations.

    Yields, in the order of the configurations, what came of the drills, and why that is not all ("").
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=end_in_order) as pool:
        try:
            yield from pool.map(partial(_one, names=tuple(names), keep=keep), configurations)
        except BaseException:
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGTERM)  # the way out that stops every process of a federation
            pool.shutdown(cancel_futures=True)
            raise


def end_in_order() -> None:
    """Have SIGTERM end this process as Ctrl-C does: every process is stopped, every directory removed.

    SIGINT itself is ignored where a shell has started the drills in the background.
    """
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _one(configuration: Configuration, names: Sequence[str], keep: bool) -> tuple[list[Result], str]:
    runner = Runner(lambda wire: releases.commands(releases.RELEASES[wire]), say, keep=keep)
    try:
        runner.run(configuration, [DRILLS[name] for name in names])
    except (FederationError, ReleaseError) as error:
        return runner.results, str(error)
    return runner.results, ""


def say(text: str) -> None:
    """Tell people what goes on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
