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
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(partial(_one, names=tuple(names), keep=keep), configurations)
        except BaseException:
            for child in multiprocessing.active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGINT)  # the way out that stops every process of a federation
            pool.shutdown(cancel_futures=True)
            raise


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
