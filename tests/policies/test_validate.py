"""A call that the wire found broken goes no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Method
from relay.policies import Validate
from relay.refusal import Reason, Refusal

MakeCall = Callable[..., Call]


async def test_the_fault_of_a_call_is_raised_as_it_is_and_nobody_behind_sees_the_call(
    make_call: MakeCall,
) -> None:
    async def unreachable(call: Call) -> Reply:
        raise AssertionError("a broken call went on")

    fault = Refusal(Reason.MALFORMED, "content-type 'text/html'", by="wire")
    with pytest.raises(Refusal) as caught:
        await Validate().handle(make_call(Method.PULL_MESSAGES, fault=fault), unreachable)
    assert caught.value is fault


async def test_a_sound_call_goes_on_and_its_reply_comes_back(make_call: MakeCall) -> None:
    call, reply = make_call(Method.PULL_MESSAGES), Reply(Payload(), Source.UPSTREAM)

    async def upstream(given: Call) -> Reply:
        assert given is call
        return reply

    assert await Validate().handle(call, upstream) is reply


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_any_call_may_be_broken(method: Method) -> None:
    assert Validate().applies(method)
