"""States, choices, turns and claims hold for all processes of a host, also when one of them is killed."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest

from relay.stores.records import BusyError
from relay.stores.upstreams import OPEN, State, UpstreamTable

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

FORK = get_context("fork")


@pytest.fixture
def table() -> UpstreamTable:
    return UpstreamTable()


def forked(work: Callable[[], object]) -> BaseProcess:
    process = FORK.Process(target=work)
    process.start()
    return process


def test_nothing_is_known_of_an_address_at_first(table: UpstreamTable) -> None:
    assert table.get("a:1") == State()


def test_a_change_is_seen_in_other_processes_and_moves_the_version(table: UpstreamTable) -> None:
    before = table.version
    wanted = State(OPEN, 1.5, 2.5, 3, 4, True, True, 5.5)
    process = forked(lambda: table.change("a:1", lambda _: wanted))
    process.join(10)
    assert table.get("a:1") == wanted
    assert table.get("b:1") == State()
    assert table.version != before


def test_a_change_that_changes_nothing_leaves_the_version(table: UpstreamTable) -> None:
    table.change("a:1", lambda state: state._replace(ejections=1))
    version = table.version
    assert table.change("a:1", lambda state: state) == (State(ejections=1), State(ejections=1))
    assert table.version == version


def test_changes_of_several_processes_are_one_after_the_other(table: UpstreamTable) -> None:
    def work() -> None:
        for _ in range(200):
            table.change("a:1", lambda state: state._replace(ejections=state.ejections + 1))

    processes = [forked(work) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert table.get("a:1").ejections == 600


def test_a_change_that_cannot_be_made_is_none(table: UpstreamTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise BusyError

    monkeypatch.setattr(table._records, "update", busy)
    before, after = table.change("a:1", lambda state: state._replace(breaker=OPEN))
    assert before == after == State()
    assert not table.choose("x", "y", instead_of=None)
    assert not table.turn("x", 1.0)


def test_a_choice_holds_until_somebody_who_knows_it_chooses_again(table: UpstreamTable) -> None:
    assert table.choice("ip") is None
    assert table.choose("ip", "10.0.0.1", instead_of=None)
    assert not table.choose("ip", "10.0.0.2", instead_of=None)
    assert table.choice("ip") == "10.0.0.1"
    assert table.choose("ip", "10.0.0.2", instead_of="10.0.0.1")
    assert table.choice("ip") == "10.0.0.2"
    assert table.choice("other") is None


def test_a_turn_is_one_workers_until_its_time_is_up(table: UpstreamTable) -> None:
    assert table.turn("check", 2.0)
    assert not table.turn("check", 2.0)
    assert table.turn("another", 2.0)
    process = forked(lambda: os._exit(int(table.turn("check", 2.0))))
    process.join(10)
    assert process.exitcode == 0
    time.sleep(2.05)
    assert table.turn("check", 2.0)


def test_asking_for_a_turn_in_vain_does_not_put_it_off(table: UpstreamTable) -> None:
    assert table.turn("check", 0.3)
    end = time.monotonic() + 5
    asked = 0
    while not table.turn("check", 0.3):
        assert time.monotonic() < end
        asked += 1
        time.sleep(0.01)
    assert asked > 0


def test_a_claim_is_held_once_in_a_process_and_on_the_host(table: UpstreamTable) -> None:
    assert table.claim("probe")
    assert not table.claim("probe")
    assert table.claim("another")
    process = forked(lambda: os._exit(int(UpstreamTable.claim(_fresh(table), "probe"))))
    process.join(10)
    assert process.exitcode == 0
    table.release("probe")
    assert table.claim("probe")


def test_a_claim_that_is_not_held_can_be_released(table: UpstreamTable) -> None:
    table.release("probe")
    assert table.claim("probe")


def test_a_killed_process_leaves_no_claim_behind(table: UpstreamTable) -> None:
    read, write = os.pipe()

    def hold() -> None:
        assert _fresh(table).claim("probe")
        os.write(write, b"x")
        time.sleep(60)

    process = forked(hold)
    assert os.read(read, 1) == b"x"
    assert not table.claim("probe")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert table.claim("probe")
    os.close(read)
    os.close(write)


def _fresh(table: UpstreamTable) -> UpstreamTable:
    """What a worker has that was forked before anything was claimed."""
    table._claimed.clear()
    return table
