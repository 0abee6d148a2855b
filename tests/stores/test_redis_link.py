"""RedisLink: nobody waits for longer than he said, and a server that is out is left alone for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from relay.stores import redis_link
from relay.stores.redis_link import MOST_WAITING, OutageError, RedisLink
from tests.sockets import until


@pytest.fixture
def link() -> RedisLink:
    return RedisLink("redis shown")


def soon(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def unused() -> None:
    raise AssertionError("the answer was waited for")


def ignored() -> None:
    pass


async def says(answer: Any, after: float = 0.0) -> Any:
    await asyncio.sleep(after)
    if isinstance(answer, Exception):
        raise answer
    return answer


def back(link: RedisLink) -> None:
    """Let the time pass for which nothing is asked."""
    link._off_until = 0.0


async def test_an_answer_is_returned(link: RedisLink) -> None:
    assert await link.ask(says(7), soon(), unused) == 7
    assert not link._asking


async def test_a_failure_spares_the_next_the_waiting_and_is_logged_once(link: RedisLink) -> None:
    with capture_logs() as lines:
        for _ in range(2):
            with pytest.raises(OutageError):
                await link.ask(says(OutageError("TimeoutError")), soon(), ignored)
            for _ in range(3):
                with pytest.raises(OutageError):
                    await link.ask(says(7), soon(), unused)
            back(link)
        assert await link.ask(says(7), soon(), unused) == 7
    assert [(line["log_level"], line.get("problem"), line["store"]) for line in lines] == [
        ("warning", "TimeoutError", "redis shown"),
        ("info", None, "redis shown"),
    ]


async def test_it_is_left_alone_for_a_second(link: RedisLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_link, "OFF", 0.5)
    link.failed("a test")
    with pytest.raises(OutageError):
        await link.ask(says(7), soon(), unused)
    await asyncio.sleep(0.55)
    assert await link.ask(says(7), soon(), unused) == 7


async def test_who_has_no_time_left_asks_nothing(link: RedisLink) -> None:
    with pytest.raises(OutageError):
        await link.ask(says(7), soon(-1), unused)
    assert await link.ask(says(7), soon(), unused) == 7, "that was no failure"


async def test_the_end_of_a_late_answer_is_told(link: RedisLink) -> None:
    for answer in (7, OutageError()):
        back(link)
        late: list[str] = []
        with pytest.raises(OutageError):
            await link.ask(says(answer, after=0.5), soon(0.05), partial(late.append, "late"))
        assert late == []
        await until(partial(len, late))
        assert late == ["late"]
    assert not link._asking


async def test_the_end_of_an_answer_to_who_was_cancelled_is_told(link: RedisLink) -> None:
    late: list[str] = []
    asking = asyncio.create_task(link.ask(says(7, after=0.5), soon(), lambda: late.append("late")))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: late)
    assert late == ["late"]


async def test_what_is_owed_is_told_when_there_is_an_answer_again(link: RedisLink) -> None:
    told = Told()
    for number in range(3):
        owe = partial(link.owe, told.change(number))
        with pytest.raises(OutageError):
            await link.ask(says(OutageError("ConnectionError")), soon(), owe)
        back(link)
    await asyncio.sleep(0.01)
    assert told.told == []
    await link.ask(says(7), soon(), unused)
    await link.close()
    assert told.told == [0, 1, 2]


async def test_a_late_answer_pays_what_is_owed(link: RedisLink) -> None:
    told = Told()
    with pytest.raises(OutageError):
        await link.ask(says(7, after=0.5), soon(0.05), lambda: link.owe(told.change(1)))
    await until(lambda: told.told)
    assert told.told == [1], "also soon after a failure"


class Told:
    """What was told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def change(self, number: int, *, fails: bool = False, after: float = 0.0) -> Callable[[], Any]:
        async def tell() -> None:
            await asyncio.sleep(after)
            if fails:
                raise OutageError("ConnectionError")
            self.told.append(number)

        return tell


async def test_changes_are_told_in_their_order_by_one_task(link: RedisLink) -> None:
    told = Told()
    for number in range(3):
        link.later(told.change(number, after=0.03 - 0.01 * number))
    assert told.told == []
    await link.close()
    assert told.told == [0, 1, 2]
    assert link._telling is None


async def test_after_a_failure_only_what_must_be_told_is_tried(link: RedisLink) -> None:
    told = Told()
    link.later(told.change(1, fails=True))
    link.later(told.change(2))
    link.later(told.change(3), force=True)
    await link.close()
    assert told.told == [3]
    link.failed("a test")
    link.later(told.change(4))
    link.later(told.change(5), force=True)
    await link.close()
    assert told.told == [3, 5]
    back(link)
    link.later(told.change(6))
    await link.close()
    assert told.told == [3, 5, 6]


async def test_what_waits_is_bounded_in_bytes(link: RedisLink) -> None:
    told = Told()
    link.later(told.change(1), MOST_WAITING // 2)
    link.later(told.change(2), MOST_WAITING // 2)
    link.later(told.change(3), MOST_WAITING // 4)
    await link.close()
    assert told.told == [1, 3]
    link.later(told.change(4), MOST_WAITING - 1000)
    await link.close()
    assert told.told == [1, 3, 4], "what was told does not wait any more"


async def test_the_end_waits_for_nobody_for_long(link: RedisLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_link, "_AT_END", 0.05)
    told = Told()
    link.later(told.change(1, after=60.0))
    asking = asyncio.create_task(link.ask(says(7, after=60.0), soon(60), unused))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await link.close()
    assert told.told == []
    with pytest.raises(asyncio.CancelledError):
        await asking
