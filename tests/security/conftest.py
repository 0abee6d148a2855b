"""The upstream of these tests: it writes down what it is sent, to the byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.security.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def upstream() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder
