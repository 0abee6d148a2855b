"""In maintenance every call is refused and nothing reaches the SuperLink; else the policy is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from relay.call import Call, Reply
from relay.fleet import Method
from relay.policies.maintenance import Maintenance
from relay.refusal import Reason, Refusal


async def test_every_call_is_refused_as_draining_and_goes_nowhere(make_call: Callable[..., Call]) -> None:
    async def unreachable(call: Call) -> Reply:
        raise AssertionError("a call went on")

    with pytest.raises(Refusal) as caught:
        await Maintenance(enabled=True).handle(make_call(Method.PULL_MESSAGES), unreachable)
    assert caught.value.reason is Reason.DRAINING
    assert not caught.value.sent


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
@pytest.mark.parametrize("enabled", [True, False])
def test_it_meets_every_call_or_none(method: Method, enabled: bool) -> None:
    assert Maintenance(enabled=enabled).applies(method) is enabled
