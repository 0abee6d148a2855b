"""A timer runs out when it should, however often it was set before, and leaves nothing in the loop."""

from __future__ import annotations

import asyncio

from relay.upstreams.timer import Timer


class Ran:
    """Counts, and notes when."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.at.append(asyncio.get_running_loop().time())
        self.event.set()


async def out(ran: Ran) -> float:
    async with asyncio.timeout(5):
        await ran.event.wait()
    return ran.at[0]


async def test_it_runs_out_once_after_the_time_that_was_set_last() -> None:
    loop, ran = asyncio.get_running_loop(), Ran()
    timer = Timer(loop, ran)
    timer.set(0.01)
    timer.set(0.08)
    due = loop.time() + 0.08
    assert await out(ran) >= due - 0.002
    await asyncio.sleep(0.05)
    assert len(ran.at) == 1


async def test_a_shorter_time_is_not_kept_waiting_by_a_longer_one() -> None:
    loop, ran = asyncio.get_running_loop(), Ran()
    timer = Timer(loop, ran)
    timer.set(60)
    start = loop.time()
    timer.set(0.02)
    assert await out(ran) < start + 2


async def test_cleared_it_does_not_run_out_and_can_be_set_again() -> None:
    loop, ran = asyncio.get_running_loop(), Ran()
    timer = Timer(loop, ran)
    timer.set(0.01)
    timer.clear()
    await asyncio.sleep(0.03)
    assert not ran.at
    timer.set(0.01)
    await out(ran)


async def test_many_settings_cost_one_timer_of_the_loop() -> None:
    class Loop:
        calls = 0

        def time(self) -> float:
            return 0.0

        def call_at(self, *_: object) -> asyncio.Handle:
            self.calls += 1
            return asyncio.Handle(lambda: None, (), asyncio.get_running_loop())

    loop = Loop()
    timer = Timer(loop, lambda: None)  # type: ignore[arg-type]
    for _ in range(100):
        timer.set(25)
        timer.clear()
    assert loop.calls == 1


async def test_closed_it_never_runs_out() -> None:
    ran = Ran()
    timer = Timer(asyncio.get_running_loop(), ran)
    timer.set(0.01)
    timer.close()
    await asyncio.sleep(0.03)
    assert not ran.at
