"""Fuzzing runs on the event loop of the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvloop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop's way with buffers and closing is what counts."""
    return {"uvloop": uvloop.new_event_loop}
