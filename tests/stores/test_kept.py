"""KeptAnswers: alone, as several workers that share one table, and with workers that are killed."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from relay.stores.kept import LEASE, LINGER, PER_NODE, PIECE, KeptAnswers, Outcome
from relay.stores.records import BusyError, HostRecords

if TYPE_CHECKING:
    from collections.abc import Callable

NODE = 2**64 - 7
ME, OTHER = b"me      ", b"other   "
BODY = b"one message" * 20


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


class Worker(KeptAnswers):
    """One worker's view, which remembers what it was told."""

    def __init__(self, records: HostRecords, clock: Clock) -> None:
        self.told: Counter[Outcome] = Counter()
        self.clock = clock
        super().__init__(records, lambda outcome: self.told.update([outcome]), clock)

    def put(
        self,
        message: str = "m1",
        body: bytes = BODY,
        *,
        node: int = NODE,
        holder: bytes = ME,
        ttl: float = 3600.0,
        online: float = 60.0,
        ended: bool = True,
    ) -> bytes:
        """Keep an answer whose first delivery has ended."""
        token = self.keep(
            node,
            body,
            message=message,
            holder=holder,
            expires=self.clock() + ttl,
            online=self.clock() + online,
        )
        if ended:
            self.settle(node, token, delivered=True)
        return token


@pytest.fixture
def records() -> HostRecords:
    return HostRecords(512, PIECE)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(records: HostRecords, clock: Clock) -> Worker:
    return Worker(records, clock)


@pytest.fixture
def other(records: HostRecords, clock: Clock) -> Worker:
    return Worker(records, clock)


def left(records: HostRecords) -> int:
    return len(list(records.values()))


def test_nothing_is_kept_of_an_unknown_node(worker: Worker) -> None:
    assert not worker.has(NODE)
    assert worker.claim(NODE, ME, 3) is None
    worker.settle(NODE, b"nothing!", delivered=True)
    worker.drop(NODE, ME, None, Outcome.CONFIRMED)
    worker.available(NODE, time.monotonic() + 60)
    assert not worker.has(NODE)
    assert not worker.told


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 20 * PIECE + 5])
def test_another_worker_gets_what_was_kept_to_the_last_byte(
    worker: Worker, other: Worker, records: HostRecords, size: int
) -> None:
    body = os.urandom(size)
    token = worker.put(body=body)
    assert other.has(NODE)
    claim = other.claim(NODE, ME, 3)
    assert claim is not None
    assert claim[:3] == (token, body, 2)
    other.drop(NODE, ME, ["m1"], Outcome.CONFIRMED)
    assert not worker.has(NODE)
    assert left(records) == 0
    assert worker.told == {Outcome.KEPT: 1}
    assert other.told == {Outcome.CONFIRMED: 1}


def test_it_is_claimed_by_one_worker_until_that_has_settled_it(worker: Worker, other: Worker) -> None:
    worker.put()
    claim = worker.claim(NODE, ME, 9)
    assert claim is not None
    assert other.claim(NODE, ME, 9) is None
    worker.settle(NODE, claim.token, delivered=True)
    assert other.claim(NODE, ME, 9) is not None


def test_it_is_not_claimed_while_it_is_delivered_for_the_first_time(worker: Worker, other: Worker) -> None:
    token = worker.put(ended=False)
    assert other.claim(NODE, ME, 3) is None
    worker.settle(NODE, token, delivered=True)
    assert other.claim(NODE, ME, 3) is not None


def test_what_a_killed_worker_had_claimed_is_free_after_the_lease(
    worker: Worker, clock: Clock, forked: Callable[[Callable[[], object]], int]
) -> None:
    def claim_and_wait() -> None:
        while worker.claim(NODE, ME, 3) is None:
            pass
        signal.pause()

    worker.put()
    pid = forked(claim_and_wait)
    while (claim := worker.claim(NODE, ME, 3)) is not None:  # the child was not there yet
        worker.settle(NODE, claim.token, delivered=False)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert worker.claim(NODE, ME, 3) is None
    clock.now += LEASE + 0.1
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    assert claim.delivery == 3, "what the killed worker did with it is not known"


def test_it_is_delivered_so_often_and_then_dropped(worker: Worker, records: HostRecords) -> None:
    worker.put()
    for delivery in (2, 3):
        claim = worker.claim(NODE, ME, 3)
        assert claim is not None
        assert claim.delivery == delivery
        worker.settle(NODE, claim.token, delivered=True)
    assert worker.claim(NODE, ME, 3) is None
    assert worker.told == {Outcome.KEPT: 1, Outcome.EXHAUSTED: 1}
    assert left(records) == 0


def test_a_delivery_that_was_none_does_not_count(worker: Worker) -> None:
    worker.put()
    for _ in range(9):
        claim = worker.claim(NODE, ME, 2)
        assert claim is not None
        worker.settle(NODE, claim.token, delivered=False)


def test_somebody_else_gets_nothing_and_takes_nothing(worker: Worker, other: Worker) -> None:
    worker.put()
    for _ in range(5):
        assert other.claim(NODE, OTHER, 1) is None
        assert other.claim(NODE - 1, ME, 1) is None
    other.drop(NODE, OTHER, None, Outcome.CONFIRMED)
    other.drop(NODE - 1, ME, None, Outcome.CONFIRMED)
    assert not other.told
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    assert claim.delivery == 2


def test_the_oldest_comes_first(worker: Worker) -> None:
    bodies = [f"body {number}".encode() for number in range(3)]
    for number, body in enumerate(bodies):
        worker.put(f"m{number}", body)
    got = []
    while (claim := worker.claim(NODE, ME, 3)) is not None:
        got.append(claim.body)  # none of them is settled
    assert got == bodies
    worker.drop(NODE, ME, ["m0", "m2"], Outcome.CONFIRMED)
    worker.clock.now += LEASE + 1
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    assert claim.body == bodies[1]


def test_of_too_many_the_oldest_goes(worker: Worker, records: HostRecords) -> None:
    for number in range(PER_NODE + 2):
        worker.put(f"m{number}", b"%d" % number)
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    assert claim.body == b"2"
    assert worker.told == {Outcome.KEPT: PER_NODE + 2, Outcome.EVICTED: 2}
    assert left(records) == PER_NODE + 1


def test_what_the_superlink_hands_out_again_is_kept_once(worker: Worker, records: HostRecords) -> None:
    worker.put(body=b"old")
    worker.put(body=b"new")
    assert left(records) == 2
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    assert (claim.body, claim.delivery) == (b"new", 3)
    assert worker.told == {Outcome.KEPT: 2}


@pytest.mark.parametrize(("ttl", "online"), [(20.0, 60.0), (3600.0, 20.0)], ids=["its TTL", "its node"])
def test_it_ends_with(worker: Worker, records: HostRecords, ttl: float, online: float) -> None:
    worker.put(ttl=ttl, online=online)
    worker.clock.now += 19.9
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    worker.settle(NODE, claim.token, delivered=True)
    worker.clock.now += 0.2
    assert worker.claim(NODE, ME, 3) is None
    assert worker.told == {Outcome.KEPT: 1, Outcome.EXPIRED: 1}
    assert left(records) == 0


def test_a_heartbeat_prolongs_it_but_not_beyond_its_ttl(
    records: HostRecords, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.stores.records.time.monotonic", clock)
    worker = Worker(records, clock)
    body = os.urandom(3 * PIECE)
    worker.put(body=body, ttl=1000, online=60)
    for _ in range(16):
        clock.now += 59
        worker.available(NODE, clock.now + 60)
        claim = worker.claim(NODE, ME, 3)
        assert claim is not None
        assert claim.body == body
        worker.settle(NODE, claim.token, delivered=False)
    clock.now += 57
    worker.available(NODE, clock.now + 60)
    assert worker.claim(NODE, ME, 3) is None
    assert worker.told[Outcome.EXPIRED] == 1


def test_the_records_of_a_node_that_never_comes_back_end_by_themselves(
    records: HostRecords, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.stores.records.time.monotonic", clock)
    worker = Worker(records, clock)
    worker.put(body=bytes(5 * PIECE), online=60)
    clock.now += 60 + LINGER - 5
    assert left(records) == 6
    clock.now += 6
    assert left(records) == 0
    assert not worker.has(NODE)


def test_an_answer_that_lost_a_piece_is_not_delivered_in_part(worker: Worker, records: HostRecords) -> None:
    token = worker.put(body=os.urandom(4 * PIECE))
    worker.put("m2", b"whole")
    records.delete(token + (2).to_bytes(4, "big"))
    claim = worker.claim(NODE, ME, 3)
    assert claim is not None
    assert claim.body == b"whole"
    assert worker.told == {Outcome.KEPT: 2, Outcome.EVICTED: 1}
    assert left(records) == 2


def test_a_full_table_loses_the_oldest(clock: Clock) -> None:
    worker = Worker(HostRecords(8, PIECE), clock)  # one bucket
    for node in range(1, 9):
        worker.put(f"m{node}", b"%d" % node, node=node)
    got = [worker.claim(node, ME, 3) for node in range(1, 9)]
    assert [claim and claim.body for claim in got] == [None] * 4 + [b"5", b"6", b"7", b"8"]


def test_a_locked_bucket_raises_nothing_and_is_counted(
    worker: Worker, records: HostRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = worker.put()

    def busy(*_: object) -> None:
        raise BusyError

    monkeypatch.setattr(records, "update", busy)
    worker.settle(NODE, token, delivered=True)
    worker.drop(NODE, ME, None, Outcome.CONFIRMED)
    worker.available(NODE, 1.0)
    worker.put("m2")
    assert worker.claim(NODE, ME, 3) is None
    assert set(worker.told) == {Outcome.KEPT, Outcome.BUSY}
    assert worker.told[Outcome.KEPT] == 1
    monkeypatch.undo()
    assert worker.claim(NODE, ME, 3) is not None


def test_many_workers_claim_each_delivery_once(
    records: HostRecords, clock: Clock, forked: Callable[[Callable[[], object]], int]
) -> None:
    worker = Worker(records, clock)
    rounds, workers = 60, 3
    reader, writer = os.pipe()

    def claims() -> None:
        mine = Worker(records, clock)
        for node in range(1, rounds + 1):
            for _ in range(2):
                claim = mine.claim(node, ME, 3)
                if claim is not None:
                    os.write(writer, b"%d %d %b\n" % (node, claim.delivery, claim.body))
                    mine.settle(node, claim.token, delivered=True)

    for node in range(1, rounds + 1):
        worker.put(body=b"for-%d" % node, node=node)
    pids = [forked(claims) for _ in range(workers)]
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        got = lines.read().splitlines()
    for pid in pids:
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status == 0  # type: ignore[union-attr]
    assert sorted(got) == sorted(
        b"%d %d for-%d" % (node, delivery, node) for node in range(1, rounds + 1) for delivery in (2, 3)
    )


def test_workers_that_are_killed_at_any_moment_leave_nothing_locked_and_no_mixed_answer(
    records: HostRecords, clock: Clock, forked: Callable[[Callable[[], object]], int]
) -> None:
    worker = Worker(records, clock)

    def work() -> None:
        mine = Worker(records, clock)
        number = 0
        while True:
            number += 1
            mine.put("m", bytes([number % 251 + 1]) * (3 * PIECE))
            claim = mine.claim(NODE, ME, 200)
            if claim is not None:
                mine.settle(NODE, claim.token, delivered=False)

    for attempt in range(12):
        pid = forked(work)
        time.sleep(0.002 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        clock.now += LEASE + 1
        start = time.perf_counter()
        claim = worker.claim(NODE, ME, 250)
        assert time.perf_counter() - start < 10.0
        if claim is not None:
            assert len(set(claim.body)) == 1
            assert len(claim.body) == 3 * PIECE
            worker.settle(NODE, claim.token, delivered=False)
    assert Outcome.BUSY not in worker.told
