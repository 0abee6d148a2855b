"""A pair of key and node id is written down when the SuperLink has accepted it, and never otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from relay.call import Call, Metadata, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.policies import Accepted, accepted
from relay.refusal import Reason, Refusal
from relay.stores.accepted import AcceptedPairs
from relay.wireformat import encode_bytes, encode_uint
from tests.signing import Node

if TYPE_CHECKING:
    from relay.pipeline import Handler

MakeCall = Callable[..., Call]

NODE = Node()
HEADERS = NODE.headers()


@pytest.fixture
def pairs() -> AcceptedPairs:
    return AcceptedPairs(64)


def answering(data: bytes = b"", *, status: int = 200, source: Source = Source.UPSTREAM) -> Handler:
    async def answer(_: Call) -> Reply:
        return Reply(Payload(data), source, status=status)

    return answer


async def refusing(_: Call) -> Reply:
    raise Refusal(Reason.UPSTREAM_DOWN)


async def test_what_the_superlink_answers_with_200_is_accepted(
    make_call: MakeCall, pairs: AcceptedPairs
) -> None:
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=HEADERS)
    reply = await Accepted(enabled=True, pairs=pairs).handle(call, answering(b"x"))
    assert reply.payload.data == b"x"
    assert pairs.accepted(NODE.pem, NODE.node_id)
    assert not pairs.accepted(NODE.pem, NODE.node_id + 1)


@pytest.mark.parametrize(
    ("upstream", "headers"),
    [
        (answering(status=401), HEADERS),
        (answering(status=403), HEADERS),
        (answering(source=Source.LOCAL), HEADERS),
        (answering(), []),
        (answering(), HEADERS[:2]),
        (answering(), [*HEADERS, *HEADERS]),
    ],
)
async def test_nothing_else_is(
    make_call: MakeCall, pairs: AcceptedPairs, upstream: Handler, headers: Metadata
) -> None:
    policy = Accepted(enabled=True, pairs=pairs)
    await policy.handle(make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers), upstream)
    assert not pairs.accepted(NODE.pem, NODE.node_id)


async def test_a_refusal_and_a_legacy_call_prove_nothing(make_call: MakeCall, pairs: AcceptedPairs) -> None:
    policy = Accepted(enabled=True, pairs=pairs)
    with pytest.raises(Refusal):
        await policy.handle(make_call(Method.PULL_MESSAGES, NODE.body, metadata=HEADERS), refusing)
    legacy = make_call(Method.PULL_MESSAGES, NODE.body, metadata=HEADERS, wire=Wire.REST_V0)
    await policy.handle(legacy, answering())
    assert not pairs.accepted(NODE.pem, NODE.node_id)


async def test_the_id_of_an_activation_is_the_one_in_its_answer(
    make_call: MakeCall, pairs: AcceptedPairs
) -> None:
    policy = Accepted(enabled=True, pairs=pairs)
    body = encode_bytes(1, NODE.pem)
    call = make_call(Method.ACTIVATE_NODE, body, metadata=HEADERS)
    await policy.handle(call, answering(encode_uint(1, 99)))
    assert pairs.accepted(NODE.pem, 99)
    await policy.handle(make_call(Method.ACTIVATE_NODE, body, metadata=HEADERS), answering())
    assert not policy.applies(Method.REGISTER_NODE), "its answer carries no id that anybody has proved"


async def test_a_node_that_unregisters_is_forgotten(make_call: MakeCall, pairs: AcceptedPairs) -> None:
    policy = Accepted(enabled=True, pairs=pairs)
    await policy.handle(make_call(Method.PULL_MESSAGES, NODE.body, metadata=HEADERS), answering())
    leaving = encode_uint(1, NODE.node_id)
    await policy.handle(make_call(Method.UNREGISTER_NODE, leaving, metadata=HEADERS), answering(status=500))
    assert pairs.accepted(NODE.pem, NODE.node_id)
    await policy.handle(make_call(Method.UNREGISTER_NODE, leaving, metadata=HEADERS), answering())
    assert not pairs.accepted(NODE.pem, NODE.node_id)


async def test_a_pair_is_written_again_after_a_while_only(
    make_call: MakeCall, pairs: AcceptedPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Accepted(enabled=True, pairs=pairs)
    written: list[tuple[bytes, int]] = []
    monkeypatch.setattr(pairs, "accept", lambda *pair: written.append(pair))
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(accepted, "_MOST", 1)

    async def poll(node: Node) -> None:
        call = make_call(Method.PULL_MESSAGES, node.body, metadata=node.headers(), started=0.0)
        await policy.handle(call, answering())

    for seconds in (0, 30, 29.9, 0.2):
        clock[0] += seconds
        await poll(NODE)
    assert written == [(NODE.pem, NODE.node_id)] * 2
    await poll(Node(7))
    await poll(NODE)
    assert len(written) == 4, "what is remembered of it is bounded"


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_it_leaves_no_trace_when_it_is_off(method: Method, pairs: AcceptedPairs) -> None:
    assert not Accepted(enabled=False, pairs=pairs).applies(method)
    assert Accepted(enabled=True, pairs=pairs).applies(method) == (method is not Method.REGISTER_NODE)
