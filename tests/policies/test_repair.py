"""A lost answer costs neither a message nor a node, and what the SuperLink really refuses stays refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
)
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from prometheus_client import REGISTRY

from relay import dialect
from relay.call import Call, Identity, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.policies.repair import Repair
from relay.refusal import Reason, Refusal
from relay.stores.host import HostTable
from relay.wireformat import encode_bytes

MakeCall = Callable[..., Call]
Step = Refusal | Reply

KEY = b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 180 + b"\n-----END PUBLIC KEY-----\n"
REGISTER = RegisterNodeFleetRequest(public_key=KEY).SerializeToString()
ACTIVATE = ActivateNodeRequest(public_key=KEY, heartbeat_interval=30).SerializeToString()
PUSH = PushObjectRequest(
    node=Node(node_id=7), run_id=9, object_id="ab" * 32, object_content=b"c" * 300, session_id="s"
).SerializeToString()


def ok(data: bytes = b"") -> Reply:
    return Reply(Payload(data), Source.UPSTREAM)


def error(status: int, code: int) -> Reply:
    body = json.dumps({"code": code, "detail": "no"}).encode()
    return Reply(Payload(body), Source.UPSTREAM, status=status)


def words(body: bytes) -> Reply:
    return Reply(Payload(body), Source.UPSTREAM, status=412)


def lost() -> Refusal:
    return Refusal(Reason.UPSTREAM_DOWN, "closed the connection")


class SuperLink:
    """Answers as scripted, and keeps what it was asked."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.asked: list[Call] = []

    async def __call__(self, call: Call) -> Reply:
        self.asked.append(call)
        step = self.steps.pop(0)
        if isinstance(step, Refusal):
            raise step
        return step

    @property
    def methods(self) -> list[Method]:
        return [call.method for call in self.asked]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def table() -> HostTable:
    return HostTable(64)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.policies.repair.PAUSE", 0.0)


@pytest.fixture
def repair(table: HostTable, clock: Clock) -> Repair:
    return Repair(lost_answers=True, reactivate=True, table=table, now=clock)


# -- register-node ----------------------------------------------------------------------------------


@pytest.fixture
def before_rest(table: HostTable, clock: Clock) -> Repair:
    return Repair(lost_answers=True, reactivate=True, table=table, rest=True, now=clock)


async def registered(repair: Repair, make_call: MakeCall, second: Step) -> None:
    superlink = SuperLink(lost(), second)
    reply = await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), superlink)
    assert (reply.status, reply.source) == (200, Source.LOCAL)
    RegisterNodeFleetResponse.FromString(await reply.payload.read(100))
    assert superlink.methods == [Method.REGISTER_NODE] * 2


@pytest.mark.parametrize(
    "second", [error(412, 23), words(b"Public key already in use")], ids=["code 23", "gRPC of flwr 1.32"]
)
async def test_a_registration_that_had_arrived_is_a_success(
    make_call: MakeCall, repair: Repair, second: Step
) -> None:
    await registered(repair, make_call, second)


async def test_a_rest_superlink_has_but_a_500_to_say_it(make_call: MakeCall, before_rest: Repair) -> None:
    await registered(before_rest, make_call, failed())


async def test_a_500_of_any_other_superlink_is_a_failure(make_call: MakeCall, repair: Repair) -> None:
    for superlink in (SuperLink(lost(), failed()), SuperLink(failed(), failed())):
        with pytest.raises(Refusal):
            await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), superlink)


async def test_a_registration_that_had_not_arrived_is_made(make_call: MakeCall, repair: Repair) -> None:
    answer = ok(RegisterNodeFleetResponse(node_id=5).SerializeToString())
    reply = await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(lost(), answer))
    assert reply is answer


async def test_the_nodes_own_repeat_is_recognised_too(make_call: MakeCall, repair: Repair) -> None:
    with pytest.raises(Refusal):
        await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(lost(), lost()))
    reply = await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(error(412, 23)))
    assert reply.status == 200


async def test_it_is_recognised_before_a_rest_superlink_at_once(
    make_call: MakeCall, before_rest: Repair
) -> None:
    with pytest.raises(Refusal):
        await before_rest.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(lost(), lost()))
    superlink = SuperLink(failed())
    reply = await before_rest.handle(make_call(Method.REGISTER_NODE, REGISTER), superlink)
    assert (reply.status, len(superlink.asked)) == (200, 1)


@pytest.mark.parametrize("answer", [error(412, 23), error(412, 2004), error(401, 1)])
async def test_a_key_in_use_without_an_attempt_of_ours_stays_a_refusal(
    make_call: MakeCall, repair: Repair, answer: Reply
) -> None:
    superlink = SuperLink(answer)
    reply = await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), superlink)
    assert reply is answer
    assert await reply.payload.read(1000)
    assert len(superlink.asked) == 1


async def test_another_key_is_not_taken_for_the_one_that_was_lost(
    make_call: MakeCall, repair: Repair
) -> None:
    with pytest.raises(Refusal):
        await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(lost(), lost()))
    other = RegisterNodeFleetRequest(public_key=KEY.replace(b"A", b"B")).SerializeToString()
    reply = await repair.handle(make_call(Method.REGISTER_NODE, other), SuperLink(error(412, 23)))
    assert reply.status == 412


async def test_an_attempt_is_forgotten_after_ten_minutes(
    make_call: MakeCall, repair: Repair, clock: Clock
) -> None:
    with pytest.raises(Refusal):
        await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(lost(), lost()))
    clock.now += 601
    reply = await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(error(412, 23)))
    assert reply.status == 412


async def test_a_registration_that_never_left_is_not_taken_for_an_attempt(
    make_call: MakeCall, repair: Repair
) -> None:
    unsent = Refusal(Reason.UPSTREAM_DOWN, sent=False)
    superlink = SuperLink(unsent)
    with pytest.raises(Refusal):
        await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), superlink)
    reply = await repair.handle(make_call(Method.REGISTER_NODE, REGISTER), SuperLink(error(412, 23)))
    assert (reply.status, len(superlink.asked)) == (412, 1)


@pytest.mark.parametrize("reason", [Reason.UPSTREAM_REJECTED, Reason.UPSTREAM_BAD_ANSWER])
async def test_a_superlink_that_fails_each_time_has_registered_nobody(
    make_call: MakeCall, before_rest: Repair, reason: Reason
) -> None:
    """A REST SuperLink says 500 of a key in use, too, and would be its own reason to believe that."""
    failures = [Refusal(reason, status=500) for _ in range(4)]
    superlink = SuperLink(*failures)
    for second in (failures[1], failures[3]):
        with pytest.raises(Refusal) as caught:
            await before_rest.handle(make_call(Method.REGISTER_NODE, REGISTER), superlink)
        assert caught.value is second


# -- push-object ------------------------------------------------------------------------------------

STORED = PushObjectResponse(stored=True).SerializeToString()
NOT_STORED = PushObjectResponse(stored=False).SerializeToString()
AVAILABLE = PullObjectResponse(
    object_found=True, object_available=True, object_content=b"c" * 300
).SerializeToString()
EMPTY = PullObjectResponse(object_found=True, object_available=False).SerializeToString()
UNKNOWN = PullObjectResponse(object_found=False).SerializeToString()


def stored(reply: Reply) -> bool:
    assert reply.status == 200
    return bool(PushObjectResponse.FromString(reply.payload.data or b"").stored)


async def test_not_stored_is_stored_when_the_object_can_be_pulled(
    make_call: MakeCall, repair: Repair
) -> None:
    superlink = SuperLink(ok(NOT_STORED), ok(AVAILABLE))
    repaired = ("relay_repairs_total", {"method": "PushObject"})
    before = REGISTRY.get_sample_value(*repaired) or 0.0
    call = make_call(Method.PUSH_OBJECT, PUSH, metadata=[(b"flwr-signature", b"proof")])
    call.identity = Identity("alice")
    assert stored(await repair.handle(call, superlink))
    assert REGISTRY.get_sample_value(*repaired) == before + 1
    question = superlink.asked[1]
    assert question.method is Method.PULL_OBJECT
    assert (question.metadata, question.identity) == (call.metadata, call.identity)
    asked = PullObjectRequest.FromString(question.payload.data or b"")
    assert asked == PullObjectRequest(node=Node(node_id=7), run_id=9, object_id="ab" * 32)


@pytest.mark.parametrize("answer", [ok(EMPTY), ok(UNKNOWN), error(403, 2007), lost()])
async def test_not_stored_stays_so_when_the_object_is_not_there(
    make_call: MakeCall, repair: Repair, answer: Step
) -> None:
    assert not stored(
        await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), SuperLink(ok(NOT_STORED), answer))
    )


async def test_not_stored_stays_so_when_the_object_breaks_off(make_call: MakeCall, repair: Repair) -> None:
    class Broken:
        closed = False

        async def read(self) -> bytes:
            raise Refusal(Reason.UPSTREAM_BAD_ANSWER, "broke off")

        def close(self) -> None:
            self.closed = True

    body = Broken()
    asked = Reply(Payload(body=body, size=1 << 20), Source.UPSTREAM)
    superlink = SuperLink(ok(NOT_STORED), asked)
    assert not stored(await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), superlink))
    assert body.closed, "its connection is not left to nobody"


async def test_a_lost_answer_to_a_push_is_told_from_what_the_superlink_holds(
    make_call: MakeCall, repair: Repair
) -> None:
    superlink = SuperLink(lost(), ok(AVAILABLE))
    assert stored(await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), superlink))
    assert superlink.methods == [Method.PUSH_OBJECT, Method.PULL_OBJECT]


async def test_a_push_that_had_not_arrived_is_sent_again_if_it_still_can(
    make_call: MakeCall, repair: Repair
) -> None:
    failed = Refusal(Reason.UPSTREAM_REJECTED, status=500)
    superlink = SuperLink(lost(), ok(EMPTY), failed, ok(EMPTY), ok(STORED))
    assert stored(await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), superlink))
    pair = [Method.PUSH_OBJECT, Method.PULL_OBJECT]
    assert superlink.methods == [*pair, *pair, Method.PUSH_OBJECT]


async def test_a_push_is_given_back_to_its_node_when_its_time_is_up(
    make_call: MakeCall, repair: Repair
) -> None:
    failed = Refusal(Reason.UPSTREAM_REJECTED, status=500)
    call = make_call(Method.PUSH_OBJECT, PUSH, deadline=time.monotonic())
    with pytest.raises(Refusal) as caught:
        await repair.handle(call, SuperLink(failed, ok(EMPTY)))
    assert caught.value.reason is Reason.UPSTREAM_DOWN, "the node asks again, and keeps its reply"


class Pushing:
    """A node that pushes an object again and again, each time for so long that the relay gives it back."""

    def __init__(self, make_call: MakeCall, repair: Repair, clock: Clock) -> None:
        self._make_call = make_call
        self._repair = repair
        self._clock = clock

    async def __call__(self, step: Step, *, after: float, body: bytes = PUSH, took: float = 0.0) -> Refusal:
        self._clock.now += after
        call = self._make_call(Method.PUSH_OBJECT, body, started=self._clock.now, deadline=time.monotonic())
        self._clock.now += took
        with pytest.raises(Refusal) as caught:
            await self._repair.handle(call, SuperLink(step, ok(EMPTY)))
        return caught.value


def failed(status: int = 500) -> Refusal:
    return Refusal(Reason.UPSTREAM_REJECTED, status=status)


@pytest.fixture
def push(make_call: MakeCall, repair: Repair, clock: Clock) -> Pushing:
    return Pushing(make_call, repair, clock)


async def test_an_object_on_which_the_superlink_fails_for_two_minutes_is_given_up(push: Pushing) -> None:
    for after in (0, 20, 20, 20, 20, 20, 19):
        assert (await push(failed(), after=after)).reason is Reason.UPSTREAM_DOWN
    lasting = failed()
    assert await push(lasting, after=1) is lasting
    again = failed()
    assert await push(again, after=5) is again, "its other thread may come with it once more"


async def test_an_object_that_takes_long_to_send_is_given_up_as_well(push: Pushing) -> None:
    assert (await push(failed(), after=0, took=300)).reason is Reason.UPSTREAM_DOWN
    lasting = failed(501)
    assert await push(lasting, after=20, took=300) is lasting


async def test_a_failure_that_passes_costs_no_object(make_call: MakeCall, push: Pushing) -> None:
    """Neither if it comes back later, nor if the SuperLink was away in between, nor with another object."""
    for after in (0, 50, 50):
        assert (await push(failed(), after=after)).reason is Reason.UPSTREAM_DOWN
    assert (await push(failed(), after=61)).reason is Reason.UPSTREAM_DOWN, "it begins anew"
    for after in (50, 50):
        assert (await push(failed(), after=after)).reason is Reason.UPSTREAM_DOWN
    assert (await push(lost(), after=19)).reason is Reason.UPSTREAM_DOWN
    assert (await push(failed(), after=20)).reason is Reason.UPSTREAM_DOWN, "and once more"
    other = PUSH.replace(b"ab" * 32, b"cd" * 32)
    for _ in range(2):
        assert (await push(failed(), after=50, body=other)).reason is Reason.UPSTREAM_DOWN


@pytest.mark.parametrize(
    ("outage", "asked"), [(None, 5), (2, 7)], ids=["nothing but failures", "an outage in between"]
)
async def test_it_is_given_up_within_one_call_of_a_node_that_waits_long(
    make_call: MakeCall, repair: Repair, clock: Clock, outage: int | None, asked: int
) -> None:
    """As gRPC nodes do."""
    pushed = 0

    async def superlink(call: Call) -> Reply:
        nonlocal pushed
        if call.method is Method.PULL_OBJECT:
            return ok(EMPTY)
        pushed += 1
        clock.now += 30
        raise lost() if pushed == outage else failed()

    with pytest.raises(Refusal) as caught:
        await repair.handle(make_call(Method.PUSH_OBJECT, PUSH, started=clock.now), superlink)
    assert (caught.value.reason, pushed) == (Reason.UPSTREAM_REJECTED, asked)


async def test_an_outage_within_a_call_begins_anew(
    make_call: MakeCall, repair: Repair, push: Pushing, clock: Clock
) -> None:
    for after in (0, 50, 50):
        await push(failed(), after=after)
    clock.now += 30
    superlink = SuperLink(lost(), ok(EMPTY), failed(), ok(EMPTY), ok(STORED))
    call = make_call(Method.PUSH_OBJECT, PUSH, started=clock.now)
    assert stored(await repair.handle(call, superlink))


async def test_an_outage_never_costs_an_object(push: Pushing) -> None:
    for _ in range(30):
        assert (await push(lost(), after=20)).reason is Reason.UPSTREAM_DOWN


async def test_what_is_stored_after_all_is_not_given_up(
    make_call: MakeCall, repair: Repair, push: Pushing, clock: Clock
) -> None:
    for after in (0, 50, 50, 19):
        await push(failed(), after=after)
    clock.now += 20
    call = make_call(Method.PUSH_OBJECT, PUSH, started=clock.now)
    assert stored(await repair.handle(call, SuperLink(failed(), ok(AVAILABLE))))


async def test_nothing_is_remembered_of_a_push_that_came_through(make_call: MakeCall, clock: Clock) -> None:
    class Untouched(HostTable):
        def get(self, key: bytes) -> int | None:
            raise AssertionError

        put = get  # type: ignore[assignment]

    repair = Repair(lost_answers=True, reactivate=True, table=Untouched(8), now=clock)
    for answer in (ok(STORED), ok(NOT_STORED)):
        await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), SuperLink(answer, ok(EMPTY)))


@pytest.mark.parametrize("wire", Wire)
def test_a_node_survives_to_be_told_so(wire: Wire) -> None:
    """What it is told each time, and at last: docs/flower-compatibility.md has what became of it."""
    told = dialect.answer(wire, Reason.UPSTREAM_REJECTED, Method.PUSH_OBJECT)
    bridged = dialect.answer(wire, Reason.UPSTREAM_DOWN, Method.PUSH_OBJECT)
    if wire.grpc:
        assert (bridged, told) == (dialect.Abort("UNAVAILABLE"), dialect.Abort("PERMISSION_DENIED"))
    else:
        comes_back = dialect.Status(503) if wire is Wire.HTTP_V1 else dialect.Drop()
        assert (bridged, told) == (comes_back, dialect.Status(403))


async def test_a_push_that_the_superlink_refuses_is_not_sent_again(
    make_call: MakeCall, repair: Repair
) -> None:
    refusal = Refusal(Reason.UPSTREAM_REJECTED, status=413)
    with pytest.raises(Refusal) as caught:
        await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), SuperLink(refusal))
    assert caught.value is refusal


class Arriving:
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self) -> bytes:
        piece, self.data = self.data, b""
        return piece

    def close(self) -> None:
        pass


async def test_a_long_push_that_had_not_arrived_is_the_nodes_to_repeat(
    make_call: MakeCall, repair: Repair
) -> None:
    payload = Payload(body=Arriving(PUSH), size=len(PUSH))
    refusal = lost()
    with pytest.raises(Refusal) as caught:
        await repair.handle(make_call(Method.PUSH_OBJECT, payload), SuperLink(refusal, ok(EMPTY)))
    assert caught.value.reason is Reason.UPSTREAM_DOWN


async def test_a_stored_push_costs_nothing_more(make_call: MakeCall, repair: Repair) -> None:
    superlink = SuperLink(ok(STORED))
    assert stored(await repair.handle(make_call(Method.PUSH_OBJECT, PUSH), superlink))
    assert len(superlink.asked) == 1


# -- activate-node ----------------------------------------------------------------------------------

ACTIVATED = ActivateNodeResponse(node_id=77).SerializeToString()


@pytest.mark.parametrize(
    "refused",
    [error(412, 2004), words(b"SuperNode with node ID 77 could not be activated.")],
    ids=["code 2004", "gRPC of flwr 1.32"],
)
async def test_a_node_that_came_back_is_deactivated_with_its_own_proof_and_let_in(
    make_call: MakeCall, repair: Repair, refused: Reply
) -> None:
    await repair.handle(make_call(Method.ACTIVATE_NODE, ACTIVATE), SuperLink(ok(ACTIVATED)))
    again = ok(ACTIVATED)
    superlink = SuperLink(refused, ok(), again)
    call = make_call(Method.ACTIVATE_NODE, ACTIVATE, metadata=[(b"flwr-signature", b"fresh")])
    assert await repair.handle(call, superlink) is again
    deactivation = superlink.asked[1]
    assert deactivation.method is Method.DEACTIVATE_NODE
    assert deactivation.metadata == call.metadata
    assert DeactivateNodeRequest.FromString(deactivation.payload.data or b"").node_id == 77


async def test_a_node_that_nobody_here_knows_is_told_to_come_back_while_it_may_be_online(
    make_call: MakeCall, repair: Repair, clock: Clock
) -> None:
    for seconds in (0, 20, 54):
        clock.now = 1000.0 + seconds
        with pytest.raises(Refusal) as caught:
            await repair.handle(make_call(Method.ACTIVATE_NODE, ACTIVATE), SuperLink(error(412, 2004)))
        assert caught.value.reason is Reason.UPSTREAM_DOWN
    clock.now = 1080.0
    reply = await repair.handle(make_call(Method.ACTIVATE_NODE, ACTIVATE), SuperLink(error(412, 2004)))
    assert reply.status == 412


async def test_a_deactivation_that_fails_leaves_the_node_to_come_back(
    make_call: MakeCall, repair: Repair
) -> None:
    await repair.handle(make_call(Method.ACTIVATE_NODE, ACTIVATE), SuperLink(ok(ACTIVATED)))
    with pytest.raises(Refusal):
        await repair.handle(
            make_call(Method.ACTIVATE_NODE, ACTIVATE),
            SuperLink(error(412, 2004), Refusal(Reason.UPSTREAM_BAD_ANSWER, status=412)),
        )


OTHER_KEY = KEY.replace(b"A", b"B")


@pytest.mark.parametrize("filling", [0, 500, 3000], ids=lambda size: f"{size} bytes between")
async def test_nobody_is_taken_for_the_holder_of_a_key_that_stands_before_his_own(
    make_call: MakeCall, repair: Repair, filling: int
) -> None:
    """A SuperLink goes by the last one."""
    twice = encode_bytes(1, KEY) + encode_bytes(9, bytes(filling)) + encode_bytes(1, OTHER_KEY)
    await repair.handle(make_call(Method.ACTIVATE_NODE, twice), SuperLink(ok(ACTIVATED)))
    superlink = SuperLink(error(412, 2004))
    with pytest.raises(Refusal):
        await repair.handle(make_call(Method.ACTIVATE_NODE, ACTIVATE), superlink)
    assert len(superlink.asked) == 1, "nobody knows the node of this key"
    again = SuperLink(error(412, 2004), ok(), ok(ACTIVATED))
    own = ActivateNodeRequest(public_key=OTHER_KEY).SerializeToString()
    assert (await repair.handle(make_call(Method.ACTIVATE_NODE, own), again)).status == 200


#: It ends a field where what is looked at ends, and goes on.
TOO_LONG = encode_bytes(1, KEY) + encode_bytes(9, bytes(16 * 1024 + 1 - len(encode_bytes(1, KEY)) - 3))


@pytest.mark.parametrize("body", [b"", b"\x0a\xff", TOO_LONG + b"\x08\x01"])
async def test_who_shows_no_key_is_mended_nothing(make_call: MakeCall, repair: Repair, body: bytes) -> None:
    """Else all of them were one."""
    for method in (Method.REGISTER_NODE, Method.ACTIVATE_NODE):
        failure = lost()
        with pytest.raises(Refusal) as caught:
            await repair.handle(make_call(method, body), SuperLink(failure))
        assert caught.value is failure
        for refused in (error(412, 23), error(412, 2004)):
            assert await repair.handle(make_call(method, body), SuperLink(refused)) is refused


HTML = Reply(Payload(b"<html>412"), Source.UPSTREAM, status=412)


@pytest.mark.parametrize("answer", [error(401, 1), error(412, 23), error(400, 2010), HTML])
async def test_another_no_to_an_activation_is_passed_on(
    make_call: MakeCall, repair: Repair, answer: Reply
) -> None:
    assert await repair.handle(make_call(Method.ACTIVATE_NODE, ACTIVATE), SuperLink(answer)) is answer


# -- switches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost_answers", [True, False])
@pytest.mark.parametrize("reactivate", [True, False])
def test_each_part_can_be_switched_off(table: HostTable, lost_answers: bool, reactivate: bool) -> None:
    repair = Repair(lost_answers=lost_answers, reactivate=reactivate, table=table)
    expected = set()
    if lost_answers:
        expected |= {Method.REGISTER_NODE, Method.PUSH_OBJECT}
    if reactivate:
        expected |= {Method.ACTIVATE_NODE}
    assert {method for method in Method if repair.applies(method)} == expected
