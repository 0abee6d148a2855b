"""What tests of several modules share: a call without a wire, and imports that must not warn."""

from __future__ import annotations

import math
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from relay.call import Call, Payload, Wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.call import Metadata
    from relay.fleet import Method
    from relay.refusal import Refusal

with warnings.catch_warnings():
    # flwr and our command line import typer, and typer 0.20 what click 8.5 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import typer  # noqa: F401


@pytest.fixture
def make_call() -> Callable[..., Call]:
    """Return a factory of calls: `make_call(method, data)`, and any argument of Call by its name."""

    def make(
        method: Method,
        data: bytes | Payload = b"",
        *,
        wire: Wire = Wire.HTTP_V1,
        metadata: Metadata | None = None,
        peer: str = "192.0.2.7",
        request_id: str = "test-1",
        started: float | None = None,
        deadline: float = math.inf,
        fault: Refusal | None = None,
    ) -> Call:
        return Call(
            method,
            wire,
            [] if metadata is None else metadata,
            data if isinstance(data, Payload) else Payload(data),
            peer=peer,
            request_id=request_id,
            started=time.monotonic() if started is None else started,
            deadline=deadline,
            fault=fault,
        )

    return make
