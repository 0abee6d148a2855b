"""What a worker knows of the keys: kept through every outage, and never mistaken for an empty table."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.call import Identity
from relay.credentials.keys import table as module
from relay.credentials.keys.record import KeyRecord, hashed, pepper_name
from relay.credentials.keys.stores import Records, StoreError
from relay.credentials.keys.table import KeyTable
from relay.refusal import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

A = KeyRecord("aaaaaaaa", "a", bytes(32), 1)
B = KeyRecord("bbbbbbbb", "b", bytes(32), 2, "north", (("site", "b"),))


class Store:
    """A store whose next answers are given."""

    name = "store"

    def __init__(self, *answers: Records | Exception | None) -> None:
        self.answers = list(answers)
        self.closed = False
        self.threads: set[int] = set()

    def poll(self) -> Records | None:
        self.threads.add(threading.get_ident())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def change(self, change: Callable[[Records], None], *, init: bool = False) -> None:
        raise AssertionError

    def close(self) -> None:
        self.closed = True


BOTH = {"aaaaaaaa": A, "bbbbbbbb": B}
DOWN = StoreError("down")


def reads(outcome: str) -> float:
    return REGISTRY.get_sample_value("relay_keys_reads_total", {"outcome": outcome}) or 0.0


async def test_keys_are_found_with_whom_they_stand_for() -> None:
    store = Store(BOTH)
    table = KeyTable(store)
    await table.refresh()
    entry = table.find(b"bbbbbbbb")
    assert entry is not None
    assert entry.record is B
    assert entry.user == b"b"
    assert entry.identity == Identity("b", "north", (("site", "b"),), ("api_key",))
    assert table.find(b"cccccccc") is None
    assert threading.get_ident() not in store.threads, "the event loop must not wait for a store"


@pytest.mark.parametrize("answers", [(), (DOWN,), (DOWN, DOWN), (OSError(),)])
async def test_before_the_keys_were_read_nobody_is_refused(answers: tuple[Exception, ...]) -> None:
    table = KeyTable(Store(*answers))
    for _ in answers:
        await table.refresh()
    with pytest.raises(Refusal) as caught:
        table.find(b"aaaaaaaa")
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    assert caught.value.cause == "keys_unavailable"
    assert not caught.value.sent


@pytest.mark.parametrize("fault", [DOWN, ValueError("a bug"), MemoryError()], ids=repr)
async def test_what_was_read_stays_through_an_outage(fault: Exception) -> None:
    table = KeyTable(Store(BOTH, fault, fault, {"aaaaaaaa": A}))
    for _ in range(3):
        await table.refresh()
        assert table.find(b"bbbbbbbb") is not None
    await table.refresh()
    assert table.find(b"bbbbbbbb") is None
    assert table.find(b"aaaaaaaa") is not None


async def test_an_outage_is_counted_each_time_and_logged_once() -> None:
    table = KeyTable(Store(DOWN, BOTH, DOWN, DOWN, StoreError("worse"), None, DOWN))
    before = reads("failed"), reads("changed")
    with capture_logs() as lines:
        for _ in range(7):
            await table.refresh()
    assert (reads("failed") - before[0], reads("changed") - before[1]) == (5, 1)
    assert [(line["event"], line.get("problem"), line.get("keys")) for line in lines] == [
        ("keys cannot be read", "down", "none are known: calls wait"),
        ("keys can be read again", None, None),
        ("keys read", None, 2),
        ("keys cannot be read", "down", "those of before stay in force"),
        ("keys cannot be read", "worse", "those of before stay in force"),
        ("keys can be read again", None, None),
        ("keys cannot be read", "down", "those of before stay in force"),
    ]


async def test_keys_that_could_not_be_read_for_long_defer_calls_until_they_can() -> None:
    clock = [100.0]
    table = KeyTable(Store(BOTH, DOWN, None), stale=60.0, now=lambda: clock[0])
    await table.refresh()
    clock[0] = 150.0
    await table.refresh()
    clock[0] = 160.0
    assert table.find(b"aaaaaaaa") is not None
    clock[0] = 160.1
    with pytest.raises(Refusal, match="not read for too long") as caught:
        table.find(b"aaaaaaaa")
    assert caught.value.reason is Reason.UPSTREAM_DOWN
    await table.refresh()
    assert table.find(b"aaaaaaaa") is not None


async def test_keys_may_stay_in_force_for_ever() -> None:
    clock = [0.0]
    table = KeyTable(Store(BOTH), now=lambda: clock[0])
    await table.refresh()
    clock[0] = 1e12
    assert table.find(b"aaaaaaaa") is not None


async def test_a_key_of_another_pepper_is_a_fault_of_the_store_and_no_wrong_key() -> None:
    ours, theirs = pepper_name(b"ours" * 4), pepper_name(b"theirs" * 4)
    table = KeyTable(Store(BOTH, {"aaaaaaaa": A._replace(pepper=theirs)}), pepper=b"ours" * 4)
    with capture_logs() as lines:
        await table.refresh()
        await table.refresh()
    assert table.find(b"bbbbbbbb") is not None
    assert f"was made with the pepper {theirs}" in lines[-1]["problem"]
    assert f"holds the pepper {ours}" in lines[-1]["problem"]


async def test_a_peppered_key_without_a_pepper_is_a_fault_of_the_store() -> None:
    table = KeyTable(Store({"aaaaaaaa": A._replace(pepper="12345678")}))
    with capture_logs() as lines:
        await table.refresh()
    assert "keys.pepper_file is not set" in lines[-1]["problem"]


async def test_a_secret_is_hashed_as_its_record_was() -> None:
    pepper = b"pepper" * 4
    table = KeyTable(Store(), pepper=pepper)
    assert table.hash(b"secret", A) == hashed(b"secret", b"")
    assert table.hash(b"secret", A._replace(pepper=pepper_name(pepper))) == hashed(b"secret", pepper)


async def test_what_stayed_the_same_keeps_its_identity() -> None:
    table = KeyTable(Store(BOTH, {**BOTH, "bbbbbbbb": B._replace(tenant="south")}))
    await table.refresh()
    before = table.find(b"aaaaaaaa")
    await table.refresh()
    assert table.find(b"aaaaaaaa") is before
    changed = table.find(b"bbbbbbbb")
    assert changed is not None
    assert changed.identity.tenant == "south"


async def test_a_tick_reads_in_the_background_one_at_a_time() -> None:
    store = Store(BOTH, None)
    table = KeyTable(store)
    table.tick()
    table.tick()
    assert len(store.answers) == 2
    while table._refreshing is not None and not table._refreshing.done():
        await asyncio.sleep(0.001)
    assert len(store.answers) == 1
    assert table.find(b"aaaaaaaa") is not None
    table.tick()
    await table.close()
    assert store.closed


async def test_the_first_reading_is_waited_for_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    table = KeyTable(Store(BOTH))
    await table.prepare()
    assert table.find(b"aaaaaaaa") is not None
    await KeyTable(Store(DOWN)).prepare()

    release = threading.Event()

    class Hanging(Store):
        def poll(self) -> Records | None:
            release.wait(10)
            return BOTH

    monkeypatch.setattr(module, "START_SECONDS", 0.01)
    slow = KeyTable(Hanging())
    await slow.prepare()
    with pytest.raises(Refusal):
        slow.find(b"aaaaaaaa")
    release.set()
    while slow._refreshing is not None and not slow._refreshing.done():
        await asyncio.sleep(0.001)
    assert slow.find(b"aaaaaaaa") is not None


async def test_a_store_that_hangs_is_told_while_it_does() -> None:
    """As a file system over the network may, or a server that sends a byte a second."""
    release = threading.Event()

    class Hanging(Store):
        def poll(self) -> Records | None:
            if len(self.answers) < 2:
                release.wait(10)
            return super().poll()

    clock = [100.0]
    table = KeyTable(Hanging(BOTH, None), now=lambda: clock[0])
    await table.refresh()
    before = reads("failed")
    with capture_logs() as lines:
        for seconds in (0.0, 9.0, 2.0, 1.0):
            clock[0] += seconds
            table.tick()
        release.set()
        while table._refreshing is not None and not table._refreshing.done():
            await asyncio.sleep(0.001)
    assert reads("failed") == before + 2
    assert [(line["event"], line.get("problem")) for line in lines] == [
        ("keys cannot be read", "no answer for 10 s"),
        ("keys can be read again", None),
    ]
    assert table.find(b"aaaaaaaa") is not None


async def test_a_store_that_hangs_is_left_at_the_end() -> None:
    release = threading.Event()

    class Hanging(Store):
        def poll(self) -> Records | None:
            release.wait(10)
            return None

    store = Hanging()
    table = KeyTable(store)
    table.tick()
    await asyncio.sleep(0.01)
    await table.close()
    assert store.closed
    release.set()


def test_without_a_store_nothing_is_read_and_no_loop_is_needed() -> None:
    table = KeyTable(None)
    table.tick()
    asyncio.run(table.refresh())
    asyncio.run(table.close())
