"""Each node that calls is written down, once a second at most, and what it was refused at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from relay.call import Call, Ending, Identity, Payload, Reply, Source, Wire
from relay.credentials.node_keys import node_key
from relay.fleet import Method
from relay.policies import Inventory, inventory
from relay.refusal import Reason, Refusal
from relay.stores.nodes import NodeRecord, Nodes, Refused
from relay.wireformat import encode_bytes, encode_uint
from tests.signing import Node

if TYPE_CHECKING:
    from relay.pipeline import Handler

MakeCall = Callable[..., Call]

NODE = Node()
OK = Ending("ok", seconds=0.01, source=Source.UPSTREAM)
LOCAL = Ending("ok", seconds=0.01, source=Source.LOCAL)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.wall = time.time()

    def __call__(self) -> float:
        return self.now

    def day(self) -> float:
        return self.wall

    def forward(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def nodes() -> Nodes:
    return Nodes(256)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(nodes: Nodes, clock: Clock) -> Inventory:
    return Inventory(enabled=True, nodes=nodes, now=clock, wall=clock.day)


def answering(data: bytes = b"", *, status: int = 200) -> Handler:
    async def answer(_: Call) -> Reply:
        return Reply(Payload(data), Source.UPSTREAM, status=status)

    return answer


async def refusing(_: Call) -> Reply:
    raise Refusal(Reason.UPSTREAM_DOWN)


def refused(reason: Reason, cause: str = "") -> Ending:
    return Ending(reason.value, seconds=0.01, refusal=Refusal(reason, cause=cause))


async def run(policy: Inventory, call: Call, ending: Ending = OK, upstream: Handler | None = None) -> None:
    try:
        await policy.handle(call, upstream or answering())
    except Refusal:
        assert upstream is refusing
    call.end(ending)


def known(nodes: Nodes, node_id: int = NODE.node_id) -> NodeRecord:
    record = nodes.get(node_id)
    assert record is not None
    return record


async def test_a_call_says_who_called_from_where_and_with_what(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall
) -> None:
    signed = (datetime.fromtimestamp(clock.wall, UTC) + timedelta(seconds=2)).isoformat()
    headers = [(b"Flwr-Package-Version", b"1.42.0"), *NODE.proof(signed)]
    call = make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers, started=clock.now, peer="2001:db8::7")
    call.identity = Identity("site b", "north")
    clock.forward(30.0)  # a pull that was held says nothing about the clock
    await run(policy, call)
    record = known(nodes)
    facts = record.facts
    assert facts is not None
    assert (record.node_id, record.method, record.calls, record.refusals) == (
        NODE.node_id,
        Method.PULL_MESSAGES,
        1,
        0,
    )
    assert (facts.wire, facts.version, facts.peer) == (Wire.HTTP_V1, "1.42.0", "2001:db8::7")
    assert (facts.identity, facts.tenant, facts.accepted) == ("site b", "north", True)
    assert facts.key == node_key(NODE.pem).digest
    assert facts.skew == pytest.approx(2.0, abs=0.01)
    assert record.last == clock.now


async def test_what_an_unmodified_node_sends_is_read(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    headers = [(b"user-agent", b"python-httpx/0.28.1"), (b"flwr-package-version", b"1.42.0"), *NODE.headers()]
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers))
    facts = known(nodes).facts
    assert facts is not None
    assert abs(facts.skew) < 5
    assert facts.version == "1.42.0"


async def test_a_legacy_node_tells_its_library(policy: Inventory, nodes: Nodes, make_call: MakeCall) -> None:
    headers = [(b"User-Agent", b"python-requests/2.34.2"), (b"flwr-package-version", b"9.9")]
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers, wire=Wire.REST_V0))
    facts = known(nodes).facts
    assert facts is not None
    assert (facts.wire, facts.version) == (Wire.REST_V0, "python-requests/2.34.2")
    assert not any(facts.key)
    assert facts.skew != facts.skew, "it signs nothing that would tell its clock"


async def test_nothing_that_a_stranger_sends_breaks_it(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    for number, headers in enumerate(
        [
            [(b"flwr-package-version", b"\xff\x1b[31m" * 50)],
            NODE.headers()[:2],
            NODE.headers() * 2,
            [(b"flwr-public-key", b"eA=="), (b"flwr-timestamp", b"soon"), (b"flwr-signature", b"eA==")],
            NODE.proof("9999-12-31T23:59:59-23:59"),
            NODE.proof("12:00"),
        ],
        start=1,
    ):
        body = encode_bytes(1, encode_uint(1, number))
        await run(
            policy, make_call(Method.PULL_MESSAGES, body, metadata=headers), refused(Reason.UNAUTHENTICATED)
        )
        assert known(nodes, number).refusals == 1
    facts = known(nodes, 1).facts
    assert facts is not None
    assert "\xff" not in facts.version
    for body in (b"", b"\xff\xff", encode_bytes(1, b""), b"\x0a"):
        await run(policy, make_call(Method.PULL_MESSAGES, body))
    assert len(list(nodes.all())) == 6


async def test_a_refusal_is_written_down_at_once_with_its_cause(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall
) -> None:
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body))
    clock.forward(0.1)
    call = make_call(Method.SEND_NODE_HEARTBEAT, NODE.body)
    await run(policy, call, refused(Reason.UNAUTHENTICATED, "clock"), refusing)
    assert known(nodes).refused == Refused("unauthenticated:clock", Method.SEND_NODE_HEARTBEAT, clock.now)
    clock.forward(0.1)
    rejected = Ending("upstream_403", seconds=0, source=Source.UPSTREAM)
    await run(policy, make_call(Method.GET_RUN, NODE.body), rejected)
    assert known(nodes).refused == Refused("upstream_403", Method.GET_RUN, clock.now)
    assert (known(nodes).calls, known(nodes).refusals) == (3, 2)
    for ending in (Ending("node_gone", seconds=0), Ending("cut", seconds=0, source=Source.UPSTREAM), LOCAL):
        clock.forward(2)
        await run(policy, make_call(Method.GET_RUN, NODE.body), ending)
    assert (known(nodes).calls, known(nodes).refusals) == (6, 2)


async def test_the_calls_of_a_busy_node_are_gathered(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall
) -> None:
    for _ in range(5):
        await run(policy, make_call(Method.PULL_OBJECT, NODE.body))
        clock.forward(0.1)
    assert known(nodes).calls == 1
    policy.sample()
    assert known(nodes).calls == 1, "not yet due"
    clock.forward(0.6)
    policy.sample()
    assert known(nodes).calls == 5
    assert known(nodes).last == pytest.approx(clock.now - 0.7)
    clock.forward(5)
    policy.sample()
    assert known(nodes).last == pytest.approx(clock.now - 5.7), "what was written is not written again"
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body))
    assert (known(nodes).calls, known(nodes).method) == (6, Method.PULL_MESSAGES)


async def test_the_same_refusal_over_and_over_is_gathered_too(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall
) -> None:
    for _ in range(4):
        await run(policy, make_call(Method.PULL_MESSAGES, NODE.body), refused(Reason.FORBIDDEN), refusing)
    assert known(nodes).refusals == 1
    clock.forward(1.1)
    policy.sample()
    assert (known(nodes).refusals, known(nodes).calls) == (4, 4)


async def test_what_is_said_of_a_node_is_looked_at_again_after_a_while(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall
) -> None:
    def version() -> str:
        facts = known(nodes).facts
        assert facts is not None
        return facts.version

    for seconds, sent, shown in ((0, b"1", "1"), (3, b"2", "1"), (8, b"3", "3"), (3, b"4", "3")):
        clock.forward(seconds)
        headers = [(b"flwr-package-version", sent)]
        await run(policy, make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers))
        assert version() == shown


async def test_a_call_that_was_not_accepted_keeps_nobody_from_looking(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall
) -> None:
    def saying(version: bytes) -> Call:
        headers = [(b"flwr-package-version", version)]
        return make_call(Method.PULL_MESSAGES, NODE.body, metadata=headers)

    await run(policy, saying(b"1"))
    clock.forward(20)
    await run(policy, saying(b"6.6"), refused(Reason.UNAUTHENTICATED), refusing)
    clock.forward(2)
    await run(policy, saying(b"2"))
    facts = known(nodes).facts
    assert facts is not None
    assert facts.version == "2"


async def test_the_first_accepted_call_is_looked_at_whatever_came_before(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    forged = [(b"flwr-package-version", b"6.6.6")]
    await run(
        policy,
        make_call(Method.PULL_MESSAGES, NODE.body, metadata=forged),
        refused(Reason.UNAUTHENTICATED),
        refusing,
    )
    true = [(b"flwr-package-version", b"1.42.0")]
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body, metadata=true))
    facts = known(nodes).facts
    assert facts is not None
    assert (facts.version, facts.accepted) == ("1.42.0", True)


async def test_what_the_relay_answers_itself_is_no_acceptance(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body), LOCAL)
    facts = known(nodes).facts
    assert facts is not None
    assert not facts.accepted


async def test_a_node_that_joins_is_known_by_the_id_in_the_answer(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    call = make_call(Method.ACTIVATE_NODE, encode_bytes(1, NODE.pem), metadata=NODE.headers())
    await run(policy, call, OK, answering(encode_uint(1, 77)))
    assert known(nodes, 77).method is Method.ACTIVATE_NODE


async def test_a_node_that_is_not_let_in_is_known_by_its_key(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    for upstream, ending in (
        (refusing, refused(Reason.UNAUTHENTICATED, "not_allowed")),
        (answering(encode_uint(1, 5), status=412), Ending("upstream_412", seconds=0, source=Source.UPSTREAM)),
    ):
        call = make_call(Method.ACTIVATE_NODE, encode_bytes(1, NODE.pem), metadata=NODE.headers())
        await run(policy, call, ending, upstream)
    unsigned = make_call(Method.ACTIVATE_NODE, encode_bytes(1, NODE.pem))
    await run(policy, unsigned, refused(Reason.UNAUTHENTICATED, "missing"), refusing)
    gone = make_call(Method.ACTIVATE_NODE, encode_bytes(1, NODE.pem), metadata=NODE.headers())
    await run(policy, gone, Ending("node_gone", seconds=0), refusing)
    (record,) = nodes.all()
    assert (record.node_id, record.calls, record.refusals) == (0, 2, 2)
    assert record.refused is not None
    assert record.refused.why == "upstream_412"
    assert record.facts is not None
    assert record.facts.key == node_key(NODE.pem).digest
    assert not record.facts.accepted


async def test_a_node_that_leaves_is_written_down_at_once(
    policy: Inventory, nodes: Nodes, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    note = nodes.note

    def noting(*args: object, **named: object) -> bool:
        left.append(bool(named.get("leaves")))
        return note(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(nodes, "note", noting)
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body))
    leaving = encode_uint(1, NODE.node_id)
    await run(policy, make_call(Method.UNREGISTER_NODE, leaving), refused(Reason.UPSTREAM_DOWN), refusing)
    await run(policy, make_call(Method.UNREGISTER_NODE, leaving))
    assert left == [False, False, True]
    assert known(nodes).method is Method.UNREGISTER_NODE


async def test_a_note_that_found_a_lock_is_made_later(
    policy: Inventory, nodes: Nodes, clock: Clock, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "note", lambda *_, **__: False)
        await run(policy, make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.headers()))
    assert nodes.get(NODE.node_id) is None
    clock.forward(1.5)
    await run(policy, make_call(Method.PULL_MESSAGES, NODE.body, metadata=NODE.headers()))
    assert known(nodes).calls == 2
    assert known(nodes).facts is not None, "what was to be learned was not lost with it"


async def test_a_worker_remembers_a_bounded_number_of_nodes_and_loses_no_call(
    policy: Inventory, nodes: Nodes, make_call: MakeCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_MOST", 4)
    for _ in range(2):
        for number in range(1, 7):
            for _ in range(2):
                await run(policy, make_call(Method.PULL_MESSAGES, encode_bytes(1, encode_uint(1, number))))
    assert len(policy._seen) == 4
    assert len(policy._pending) <= 4
    assert [known(nodes, number).calls for number in (1, 2)] == [4, 4]


async def test_a_long_body_that_was_passed_on_is_not_waited_for(
    policy: Inventory, nodes: Nodes, make_call: MakeCall
) -> None:
    class Stalled:
        async def read(self) -> bytes:
            raise AssertionError("looked at")

        def close(self) -> None:
            pass

    await run(policy, make_call(Method.PUSH_OBJECT, Payload(body=Stalled(), size=1 << 20)))
    assert list(nodes.all()) == []


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_it_leaves_no_trace_when_it_is_off(nodes: Nodes, method: Method) -> None:
    assert Inventory(enabled=True, nodes=nodes).applies(method)
    assert not Inventory(enabled=False, nodes=nodes).applies(method)


async def test_reply_and_refusal_pass_as_they_are(policy: Inventory, make_call: MakeCall) -> None:
    reply = Reply(Payload(b"x"), Source.UPSTREAM)

    async def last(_: Call) -> Reply:
        return reply

    for method in (Method.PULL_MESSAGES, Method.ACTIVATE_NODE):
        assert await policy.handle(make_call(method), last) is reply
        with pytest.raises(Refusal):
            await policy.handle(make_call(method), refusing)
