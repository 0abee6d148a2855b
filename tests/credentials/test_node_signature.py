"""A node's signature as a credential: who it is, and when that is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from relay.call import Call, Identity, Payload, Reply, Source, Wire
from relay.credentials.allowed_keys import AllowedKey
from relay.credentials.node_keys import NodeKeys, read_key
from relay.credentials.node_signature import NodeSignature
from relay.fleet import Method
from relay.policies import Auth
from relay.refusal import Reason, Refusal
from tests.signing import Node

MakeCall = Callable[..., Call]

NODE, OTHER = Node(), Node()
OWNER = AllowedKey(read_key(NODE.ssh.encode())[0].fingerprint, "site b", "north", (("room", "1"),))
LIST: Any = SimpleNamespace(value={OWNER.fingerprint: OWNER})


async def test_a_signed_call_has_the_identity_of_its_key(make_call: MakeCall) -> None:
    credential = NodeSignature(NodeKeys(allowed=LIST), always=True)
    call = make_call(Method.PULL_MESSAGES, metadata=NODE.headers())
    expected = Identity("site b", "north", (("room", "1"),), ("node_signature",))
    assert await credential.check(call) == expected
    assert call.proved


async def test_without_a_list_the_name_is_the_fingerprint(make_call: MakeCall) -> None:
    credential = NodeSignature(NodeKeys(), always=True)
    identity = await credential.check(make_call(Method.PULL_MESSAGES, metadata=NODE.headers()))
    assert identity == Identity(OWNER.fingerprint, by=("node_signature",))


async def test_a_call_that_is_not_signed_shows_no_credential(make_call: MakeCall) -> None:
    credential = NodeSignature(NodeKeys(), always=True)
    assert await credential.check(make_call(Method.PULL_MESSAGES)) is None
    legacy = make_call(Method.PULL_MESSAGES, metadata=NODE.headers(), wire=Wire.REST_V0)
    assert await credential.check(legacy) is None


@pytest.mark.parametrize("always", [True, False])
async def test_key_and_time_are_always_looked_at(make_call: MakeCall, always: bool) -> None:
    credential = NodeSignature(NodeKeys(allowed=LIST), always=always)
    for headers, cause in ((OTHER.headers(), "not_allowed"), (NODE.proof(age=400), "clock")):
        with pytest.raises(Refusal) as caught:
            await credential.check(make_call(Method.PULL_MESSAGES, metadata=headers))
        assert caught.value.cause == cause


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("wire", [wire for wire in Wire if wire is not Wire.REST_V0])
@pytest.mark.parametrize("wrong", [-(10**9), -400, -6, 306, 10**9])
async def test_a_wrong_clock_of_this_host_ends_no_node(
    make_call: MakeCall, wire: Wire, wrong: float, always: bool
) -> None:
    keys = NodeKeys(allowed=LIST, now=lambda: time.time() + wrong)
    auth = Auth(((NodeSignature(keys, always=always),),), drop=True)

    async def upstream(_: Call) -> Reply:
        return Reply(Payload(), Source.UPSTREAM)

    for method in Method:
        call = make_call(method, metadata=NODE.headers(), wire=wire)
        with pytest.raises(Refusal) as caught:
            await auth.handle(call, upstream)
        assert (caught.value.reason, caught.value.cause) == (Reason.UPSTREAM_DOWN, "clock")


async def test_the_signature_is_left_to_the_superlink_if_asked(make_call: MakeCall) -> None:
    keys = NodeKeys(allowed=LIST)
    call = make_call(Method.PULL_MESSAGES, metadata=NODE.proof(by=OTHER))
    identity = await NodeSignature(keys, always=False).check(call)
    assert identity is not None
    assert not call.proved
    with pytest.raises(Refusal, match="signature"):
        keys.ensure_verified(call)
    with pytest.raises(Refusal, match="signature"):
        await NodeSignature(keys, always=True).check(call)
