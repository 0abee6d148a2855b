"""The numbers that master and workers share: what one process writes, every other one reads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from relay.shared import Shared
from relay.stores.kept import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable


def in_a_child(work: Callable[[], object]) -> None:
    """Do `work` in a forked process, as the master's workers are."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a child must not come back into pytest
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)


def numbers(shared: Shared) -> tuple[bool, int, int, int]:
    return shared.stopping, shared.generation, shared.serving, shared.refused


def test_a_new_relay_serves_its_first_settings() -> None:
    assert numbers(Shared()) == (False, 0, 0, 0)


def test_what_the_master_says_is_read_by_workers_that_were_forked_before() -> None:
    shared = Shared()
    told, heard = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told[0], 1)
        os.write(heard[1], bytes(numbers(shared)))
        os._exit(0)
    shared.stop()
    shared.reloaded(accepted=True)
    shared.reloaded(accepted=True)
    shared.reloaded(accepted=False)
    os.write(told[1], b".")
    assert tuple(os.read(heard[0], 4)) == (True, 2, 0, 1)
    os.waitpid(child, 0)
    for end in (*told, *heard):
        os.close(end)


def test_what_a_worker_says_is_read_by_the_master() -> None:
    shared = Shared()
    shared.reloaded(accepted=True)
    in_a_child(lambda: shared.serves(1))
    assert numbers(shared) == (False, 1, 1, 0)


def test_a_worker_of_old_settings_that_comes_late_does_not_take_back_that_newer_ones_serve() -> None:
    shared = Shared()
    shared.serves(3)
    in_a_child(lambda: shared.serves(2))
    assert shared.serving == 3


def test_workers_of_older_settings_are_succeeded_when_all_with_newer_ones_serve() -> None:
    shared = Shared()
    shared.serves(0, 1)
    shared.serves(0, 2)
    assert not shared.succeeded(0)
    shared.reloaded(accepted=True, workers=2)
    in_a_child(lambda: shared.serves(1, 3))
    in_a_child(lambda: shared.serves(1, 3))
    assert not shared.succeeded(0), "it is one worker, that said so twice"
    in_a_child(lambda: shared.serves(1, 4))
    assert shared.succeeded(0)
    assert not shared.succeeded(1)
    shared.reloaded(accepted=False, workers=9)
    assert shared.succeeded(0), "a reload that was refused brings no workers"


def test_workers_that_were_replaced_many_times_are_told_apart() -> None:
    shared = Shared()
    shared.reloaded(accepted=True, workers=2)
    for number in range(5000, 5002):
        shared.serves(1, number)
    assert shared.succeeded(0)


def test_how_far_a_worker_has_come_is_known_to_the_master() -> None:
    shared = Shared()

    def come() -> tuple[bool, bool, bool]:
        return shared.may_accept(7), shared.has_begun(7), shared.has_left(7)

    assert come() == (False, False, False)
    served = [shared.served]
    for said, expected in (
        (lambda: shared.listens(7), (True, False, False)),
        (lambda: shared.serves(0, 7), (True, True, False)),
        (lambda: shared.leaves(7), (True, True, True)),
    ):
        in_a_child(said)
        assert come() == expected
        served.append(shared.served)
    assert served == [False, False, True, True]
    assert not shared.may_accept(8)
    # A place is used again after many workers; what the one before said is not the next one's.
    shared.starts(7 + 1024)
    assert come() == (False, False, False)


def test_a_worker_that_starts_in_the_place_of_another_serves_nothing_yet() -> None:
    shared = Shared()
    shared.reloaded(accepted=True)
    shared.serves(1, 5)
    assert shared.succeeded(0)
    shared.starts(5 + 1024)
    assert not shared.succeeded(0)


def test_a_reload_goes_on_from_the_reading_until_it_is_in_force_or_given_up() -> None:
    shared = Shared()
    states = []
    for said in (shared.begin, lambda: shared.reloaded(accepted=True), lambda: shared.end(1)):
        said()
        states.append((shared.reloading, shared.generation, shared.in_force))
    assert states == [(True, 0, 0), (True, 1, 0), (False, 1, 1)]


def test_each_number_stands_for_itself() -> None:
    shared = Shared()
    for _ in range(300):  # more than a byte holds
        shared.reloaded(accepted=True)
    assert numbers(shared) == (False, 300, 0, 0)
    for _ in range(260):
        shared.reloaded(accepted=False)
    shared.serves(299)
    assert numbers(shared) == (False, 300, 299, 260)
    shared.stop()
    assert numbers(shared) == (True, 300, 299, 260)


def test_relays_of_one_process_share_nothing() -> None:
    one, other = Shared(), Shared()
    one.stop()
    one.reloaded(accepted=True)
    one.table.put(b"node", 1)
    assert numbers(other) == (False, 0, 0, 0)
    assert other.table.get(b"node") is None


def test_what_one_worker_remembers_of_a_node_is_known_to_the_others() -> None:
    shared = Shared()
    in_a_child(lambda: shared.table.put(b"node", 7))
    assert shared.table.get(b"node") == 7


def test_what_one_worker_keeps_for_a_node_is_there_for_the_others() -> None:
    shared = Shared(kept=64 * PIECE)
    assert shared.kept.size == PIECE
    in_a_child(lambda: shared.kept.put(b"answer", bytes(PIECE), 60.0))
    assert shared.kept.get(b"answer") == bytes(PIECE)
    assert Shared().kept.get(b"answer") is None
