"""Faults of this host: named, counted, seldom logged, and never held against the SuperLink."""

from __future__ import annotations

import errno
import os
import resource
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.refusal import Reason, Refusal
from relay.stores.upstreams import UpstreamTable
from relay.upstreams.check import Check, Question
from relay.upstreams.health import Verdict, verdict
from relay.upstreams.local_fault import LocalFaults, is_local, local_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from relay.upstreams.pool import Pool

    MakePool = Callable[..., Pool]


@contextmanager
def no_files() -> Iterator[None]:
    """Let this process open no file more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EMFILE, "x"), "no_files"),
        (OSError(errno.ENFILE, "x"), "no_files"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "no_ports"),
        (OSError(errno.ENOBUFS, "x"), "no_memory"),
        (OSError(errno.ENOMEM, "x"), "no_memory"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "no_name"),
        (socket.gaierror(socket.EAI_NONAME, "x"), "no_name"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), None),
        (OSError(errno.EHOSTUNREACH, "x"), None),
        (OSError("Multiple exceptions"), None),
        (TimeoutError(), None),
        (ssl.SSLCertVerificationError(1, "x"), None),
        (UnicodeError("x"), None),
    ],
    ids=repr,
)
def test_which_fault_is_this_hosts(error: BaseException, expected: str | None) -> None:
    assert local_fault(error) == expected


@pytest.mark.parametrize("cause", ["no_files", "no_ports", "no_memory", "no_name"])
def test_it_says_nothing_about_the_superlink(cause: str) -> None:
    refusal = LocalFaults("sl:1").refusal(cause, "why")
    assert is_local(refusal)
    assert verdict(refusal) is Verdict.SAYS_NOTHING
    assert (refusal.reason, refusal.sent, refusal.by) == (Reason.UPSTREAM_DOWN, False, "sl:1")


def test_what_the_superlink_is_at_fault_for_is_not_local() -> None:
    assert not is_local(Refusal(Reason.UPSTREAM_DOWN, sent=False))
    assert not is_local(Refusal(Reason.UNAUTHENTICATED, cause="no_name"))


def test_all_are_counted_and_few_logged() -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("relay_upstream_local_faults_total", {"cause": "no_ports"}) or 0.0

    faults, before = LocalFaults("sl:1"), counted()
    with capture_logs() as lines:
        for _ in range(100):
            faults.refusal("no_ports", "why")
        LocalFaults("sl:2").refusal("no_ports", "why")
    assert counted() == before + 101
    assert [(line["address"], line["cause"], line["error"]) for line in lines] == [
        ("sl:1", "no_ports", "why"),
        ("sl:2", "no_ports", "why"),
    ]


async def test_a_worker_that_can_open_no_file_holds_it_against_nobody(make_pool: MakePool) -> None:
    pool, table = make_pool(), UpstreamTable()
    check = Check(pool, table, Question("/", 200), interval=9, timeout=1, failures=1, on_result=lambda: None)
    with no_files():
        with pytest.raises(Refusal) as caught:
            await pool.acquire()
        await check._run()
    assert caught.value.cause == "no_files"
    assert verdict(caught.value) is Verdict.SAYS_NOTHING
    assert not table.get(pool.name).checked
    assert pool.state()["connections"] == 0
