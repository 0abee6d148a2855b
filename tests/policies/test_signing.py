"""A node that cannot sign is let in by Flower's own check, and nobody else in its place.

The SuperLink here is a table of public keys behind Flower's `authenticate_node`.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import errno
import os
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.superlink.routers.fleet import node_auth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.call import Call, Identity, Metadata, Payload, Reply, Source, Wire
from relay.fleet import MAX_REQUEST, Kind, Method
from relay.pipeline import compose
from relay.policies import signing
from relay.policies.retry import Budget, Retry
from relay.policies.signing import Clock, Proof, Signing
from relay.refusal import Reason, Refusal
from relay.stores import node_signers
from relay.stores.node_signers import Node, NodeSigners, Owner
from relay.wireformat import encode_bytes, encode_uint, well_formed
from tests.test_payload import arriving
from tests.upstreams.conftest import body

if TYPE_CHECKING:
    from google.protobuf.message import Message

MakeCall = Callable[..., Call]

MONTH = 30 * 24 * 3600.0
OWN_KEY = b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 160 + b"\n-----END PUBLIC KEY-----\n"
ALICE, BOB = Identity("alice"), Identity("bob")
REGISTER = RegisterNodeFleetRequest(public_key=OWN_KEY).SerializeToString()
ACTIVATE = ActivateNodeRequest(public_key=OWN_KEY, heartbeat_interval=30).SerializeToString()
LATER = [method for method in Method if method.kind is not Kind.JOIN]

_MODULES = [
    import_module(f"flwr.proto.{name}_pb2") for name in ("fleet", "heartbeat", "message", "run", "fab")
]


def request_type(method: Method) -> type[Message]:
    found: type[Message] = next(
        getattr(module, method.request) for module in _MODULES if hasattr(module, method.request)
    )
    return found


def request(method: Method, node_id: int) -> bytes:
    """Return a request of a node as it sends it."""
    message: Any = request_type(method)()
    if hasattr(message, "node"):
        message.node.CopyFrom(NodeProto(node_id=node_id))
    else:
        message.node_id = node_id
    return bytes(message.SerializeToString())


class Time:
    """The clocks of one host, which a test moves."""

    def __init__(self) -> None:
        self.steady = 1000.0
        self.wall = 1_795_000_000.0

    def advance(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.steady)


class SuperLink:
    """A SuperLink of flwr 1.42: keys and ids, behind Flower's own check of a call.

    Attributes:
        ahead: seconds by which its clock is ahead of the relay's.
        date: what it adds to its time for its Date; None for none.
        asked: the calls that came, with their messages.
        signatures: the signed times that came.
    """

    def __init__(self, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
        self._time = time
        self.ahead = 0.0
        self.date: float | None = 0.0
        self.nodes: dict[bytes, int] = {}
        self.asked: list[tuple[Call, Any]] = []
        self.signatures: list[str] = []
        monkeypatch.setattr(node_auth, "get_linkstate", lambda _: self)
        monkeypatch.setattr(node_auth, "now", lambda: dt.datetime.fromtimestamp(self.now, dt.UTC))

    @property
    def now(self) -> float:
        return self._time.wall + self.ahead

    def get_node_id_by_public_key(self, key: bytes) -> int | None:
        return self.nodes.get(key)

    async def __call__(self, call: Call) -> Reply:
        data = await call.payload.read(MAX_REQUEST[Kind.JOIN])
        message: Any = request_type(call.method)()
        message.ParseFromString(data)
        self.asked.append((call, message))
        headers = first_of_each(call.metadata)
        self.signatures.append(headers.get("flwr-timestamp", ""))
        asked: Any = SimpleNamespace(headers=headers, state=SimpleNamespace(protobuf_request=message))
        try:
            node_auth.authenticate_node(asked)
        except HTTPException as error:
            return self._reply(b'{"code":1}', error.status_code)
        if call.method is Method.REGISTER_NODE:
            self.nodes[message.public_key] = 100 + len(self.nodes)
        if call.method is Method.ACTIVATE_NODE:
            return self._reply(encode_uint(1, self.nodes[message.public_key]))
        return self._reply(b"")

    def _reply(self, data: bytes, status: int = 200) -> Reply:
        headers: Metadata = [(b"server", b"uvicorn")]
        if self.date is not None:
            headers.append((b"date", email.utils.formatdate(self.now + self.date, usegmt=True).encode()))
        return Reply(Payload(data), Source.UPSTREAM, status=status, metadata=headers)


def first_of_each(metadata: Metadata) -> dict[str, str]:
    """Return headers as Starlette reads them: of a repeated one the first counts."""
    found: dict[str, str] = {}
    for name, value in metadata:
        found.setdefault(name.decode().lower(), value.decode())
    return found


class Relay:
    """Workers before one SuperLink, with one directory of keys."""

    def __init__(self, directory: Path, time: Time, superlink: SuperLink, make_call: MakeCall) -> None:
        self.directory = directory
        self.time = time
        self.superlink = superlink
        self._make_call = make_call
        self.worker = self.start()

    def start(self, *, unauthenticated: bool = False) -> Signing:
        return Signing(
            NodeSigners(self.directory, MONTH), unauthenticated=unauthenticated, clock=self.time.clock()
        )

    async def ask(
        self,
        method: Method,
        data: bytes | Payload,
        *,
        identity: Identity | None = ALICE,
        worker: Signing | None = None,
        metadata: Metadata | None = None,
    ) -> Reply:
        call = self._make_call(method, data, wire=Wire.REST_V0, metadata=metadata or [(b"Accept", b"*/*")])
        call.identity = identity
        return await (worker or self.worker).handle(call, self.superlink)

    async def join(self, identity: Identity = ALICE, key: bytes = OWN_KEY) -> int:
        """Register and activate a node; return its id."""
        register = RegisterNodeFleetRequest(public_key=key).SerializeToString()
        activate = ActivateNodeRequest(public_key=key, heartbeat_interval=30).SerializeToString()
        assert (await self.ask(Method.REGISTER_NODE, register, identity=identity)).status == 200
        assert (await self.ask(Method.ACTIVATE_NODE, activate, identity=identity)).status == 200
        secret = self.directory / "secret"
        os.utime(secret, (0, 0))  # it is not new
        return 99 + len(self.superlink.nodes)

    async def refused(self, *arguments: Any, **more: Any) -> Refusal:
        with pytest.raises(Refusal) as caught:
            await self.ask(*arguments, **more)
        assert caught.value.by == "signing"
        assert not caught.value.sent
        return caught.value


def refusals(cause: str) -> float:
    return REGISTRY.get_sample_value("relay_signing_refusals_total", {"cause": cause}) or 0.0


@pytest.fixture
def time_() -> Time:
    return Time()


@pytest.fixture
def superlink(time_: Time, monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    return SuperLink(time_, monkeypatch)


@pytest.fixture
def relay(tmp_path: Path, time_: Time, superlink: SuperLink, make_call: MakeCall) -> Relay:
    return Relay(tmp_path / "signing", time_, superlink, make_call)


# -- a node's life ----------------------------------------------------------------------------------


async def test_every_call_of_a_node_is_let_in_whatever_worker_it_meets(relay: Relay) -> None:
    workers = [relay.start() for _ in range(3)]
    await relay.ask(Method.REGISTER_NODE, REGISTER, worker=workers[0])
    await relay.ask(Method.ACTIVATE_NODE, ACTIVATE, worker=workers[1])
    last = [method for method in LATER if method is not Method.UNREGISTER_NODE] + [Method.UNREGISTER_NODE]
    for turn, method in enumerate(last):
        reply = await relay.ask(method, request(method, 100), worker=workers[turn % 3])
        assert reply.status == 200
    assert [call.method for call, _ in relay.superlink.asked[2:]] == last


async def test_a_node_lives_through_a_restart_of_the_relay(relay: Relay) -> None:
    node_id = await relay.join()
    relay.worker = relay.start()
    assert (await relay.ask(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))).status == 200


async def test_only_the_key_of_a_registration_is_changed(relay: Relay) -> None:
    unknown = encode_bytes(15, b"of a later release") + encode_uint(16, 7)
    await relay.ask(Method.REGISTER_NODE, unknown + REGISTER + unknown)
    await relay.ask(Method.ACTIVATE_NODE, ACTIVATE + unknown)
    (registered, _), (activated, message) = relay.superlink.asked
    key = next(iter(relay.superlink.nodes))
    assert registered.payload.data == unknown + encode_bytes(1, key) + unknown
    assert (
        activated.payload.data == ACTIVATE.replace(encode_bytes(1, OWN_KEY), encode_bytes(1, key)) + unknown
    )
    assert message.heartbeat_interval == 30
    assert len(key) == len(relay.worker._held[100].signer.public_key)


@pytest.mark.parametrize("method", LATER, ids=lambda method: method.rpc)
async def test_all_other_messages_pass_as_they_are(relay: Relay, method: Method) -> None:
    node_id = await relay.join()
    data = request(method, node_id) + encode_bytes(15, b"of a later release")
    await relay.ask(method, data)
    assert relay.superlink.asked[-1][0].payload.data == data


async def test_an_object_is_not_held_up_to_be_signed(relay: Relay, make_call: MakeCall) -> None:
    node_id = await relay.join()
    head = PushObjectRequest(node=NodeProto(node_id=node_id), run_id=9, object_content=b"c" * 300)
    call = make_call(Method.PUSH_OBJECT, body(head.SerializeToString(), size=5_000_000), wire=Wire.REST_V0)
    call.identity = ALICE
    seen: list[Call] = []

    async def upstream(call: Call) -> Reply:
        seen.append(call)
        return Reply(Payload(), Source.UPSTREAM)

    await relay.worker.handle(call, upstream)
    assert seen[0].payload.data is None
    assert seen[0].payload.size == 5_000_000


@pytest.mark.parametrize("wire", [wire for wire in Wire if wire is not Wire.REST_V0])
@pytest.mark.parametrize("method", [Method.REGISTER_NODE, Method.PULL_MESSAGES])
async def test_a_node_that_signs_itself_is_left_alone(
    relay: Relay, make_call: MakeCall, wire: Wire, method: Method
) -> None:
    metadata = [(b"flwr-public-key", b"its"), (b"flwr-timestamp", b"own"), (b"flwr-signature", b"proof")]
    call = make_call(method, b"any", wire=wire, metadata=metadata)

    async def upstream(got: Call) -> Reply:
        assert got is call
        assert (got.metadata, got.payload.data) == (metadata, b"any")
        return Reply(Payload(), Source.UPSTREAM, status=401)

    assert (await relay.worker.handle(call, upstream)).status == 401


async def test_a_repeat_of_a_registration_is_signed_as_the_first_attempt_was(relay: Relay) -> None:
    failing = [Refusal(Reason.UPSTREAM_DOWN, sent=False)]

    async def upstream(call: Call) -> Reply:
        if failing:
            raise failing.pop()
        return await relay.superlink(call)

    call = relay._make_call(Method.REGISTER_NODE, REGISTER, wire=Wire.REST_V0)
    call.identity = ALICE
    await retrying(relay.worker, upstream)(call)
    await relay.ask(Method.ACTIVATE_NODE, ACTIVATE)
    assert len(relay.superlink.nodes) == 1
    assert call.payload.data == REGISTER


def retrying(worker: Signing, upstream: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """Return the inner end of the chain, as it stands in a relay."""
    retry = Retry(enabled=True, base=0.001, cap=0.001, budget=Budget(1.0, 10.0))
    return compose((retry, worker), upstream, Method.PULL_MESSAGES, buffer_limit=1, strict=True).handler


# -- whose node it is -------------------------------------------------------------------------------

STRANGERS = [BOB, Identity("alice", tenant="other"), Identity("", tenant="alice")]


@pytest.mark.parametrize("identity", STRANGERS)
@pytest.mark.parametrize("method", LATER, ids=lambda method: method.rpc)
async def test_nobody_else_acts_as_a_node_by_its_id(relay: Relay, method: Method, identity: Identity) -> None:
    node_id = await relay.join()
    before, asked = refusals("not_its_node"), len(relay.superlink.asked)
    for worker in (relay.worker, relay.start()):
        refusal = await relay.refused(method, request(method, node_id), identity=identity, worker=worker)
        assert refusal.reason is Reason.UNAUTHENTICATED
    assert len(relay.superlink.asked) == asked
    assert refusals("not_its_node") == before + 2


async def test_who_sends_the_public_key_of_a_node_gets_a_node_of_his_own(relay: Relay) -> None:
    await relay.join(ALICE)
    await relay.join(BOB)
    assert sorted(relay.superlink.nodes.values()) == [100, 101]
    assert (await relay.refused(Method.GET_RUN, request(Method.GET_RUN, 100), identity=BOB)).reason is (
        Reason.UNAUTHENTICATED
    )
    assert (await relay.ask(Method.GET_RUN, request(Method.GET_RUN, 101), identity=BOB)).status == 200


async def test_an_id_further_back_in_a_message_does_not_make_the_relay_sign_for_it(relay: Relay) -> None:
    """Protobuf takes the last of two; the relay signs with the caller's own key, and that is not it."""
    alices = await relay.join(ALICE)
    bobs = await relay.join(BOB)
    filler = encode_bytes(15, b"x" * 300)
    first, last = request(Method.PULL_MESSAGES, bobs) + filler, request(Method.PULL_MESSAGES, alices)
    asked = len(relay.superlink.asked)
    refusal = await relay.refused(Method.PULL_MESSAGES, first + last, identity=BOB)
    assert refusal.reason is Reason.MALFORMED
    assert len(relay.superlink.asked) == asked
    refusal = await relay.refused(Method.PULL_MESSAGES, arriving(first, last), identity=BOB)
    assert refusal.reason is Reason.UNAUTHENTICATED
    _, message = relay.superlink.asked[-1]
    assert message.node.node_id == alices  # so it was the SuperLink that did not take it


async def test_a_proof_that_came_with_a_call_does_not_reach_the_superlink(relay: Relay) -> None:
    node_id = await relay.join()
    brought = [(b"Flwr-Public-Key", b"x"), (b"FLWR-TIMESTAMP", b"x"), (b"flwr-signature", b"x"), (b"a", b"b")]
    await relay.ask(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id), metadata=brought)
    await relay.ask(Method.REGISTER_NODE, REGISTER, metadata=brought)
    for call, _ in relay.superlink.asked[-2:]:
        names = [name.lower() for name, _ in call.metadata]
        assert names == [b"a", b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"]


@pytest.mark.parametrize("method", [Method.REGISTER_NODE, Method.PULL_MESSAGES])
async def test_a_caller_who_was_not_asked_gets_no_signature(relay: Relay, method: Method) -> None:
    await relay.join()
    data = REGISTER if method is Method.REGISTER_NODE else request(method, 100)
    assert (await relay.refused(method, data, identity=None)).reason is Reason.FORBIDDEN


async def test_an_operator_may_let_an_id_be_enough(relay: Relay) -> None:
    relay.worker = relay.start(unauthenticated=True)
    await relay.ask(Method.REGISTER_NODE, REGISTER, identity=None)
    await relay.ask(Method.ACTIVATE_NODE, ACTIVATE, identity=None)
    await relay.ask(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, 100), identity=None)
    # but not for a node that somebody has registered by name
    alices = await relay.join(ALICE)
    refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, alices), identity=None)
    assert refusal.reason is Reason.UNAUTHENTICATED


# -- nodes that are not known, or not any more ------------------------------------------------------


async def test_a_node_that_is_not_known_is_told_so(relay: Relay) -> None:
    await relay.join()
    refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, 7))
    assert refusal.reason is Reason.UNAUTHENTICATED


async def test_a_node_that_has_unregistered_is_forgotten(relay: Relay) -> None:
    node_id = await relay.join()
    await relay.ask(Method.UNREGISTER_NODE, request(Method.UNREGISTER_NODE, node_id))
    assert not (relay.directory / "nodes" / str(node_id)).exists()
    refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
    assert refusal.reason is Reason.UNAUTHENTICATED


async def test_a_node_that_cannot_be_forgotten_has_unregistered_nevertheless(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to come back, it would unregister a second time, and be refused."""
    node_id = await relay.join()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with capture_logs() as logs:
        reply = await relay.ask(Method.UNREGISTER_NODE, request(Method.UNREGISTER_NODE, node_id))
    assert reply.status == 200
    assert logs[-1]["event"] == "the key of an unregistered node stays"
    assert logs[-1]["node_id"] == node_id


async def test_a_node_whose_file_was_removed_is_refused_within_a_minute(relay: Relay) -> None:
    node_id = await relay.join()
    pull = partial(relay.ask, Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
    await pull()
    (relay.directory / "nodes" / str(node_id)).unlink()
    relay.time.advance(signing.REUSE - 1)
    await pull()
    relay.time.advance(1)
    refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
    assert refusal.reason is Reason.UNAUTHENTICATED


async def test_a_node_id_that_the_superlink_gave_to_another_is_that_ones(relay: Relay) -> None:
    node_id = await relay.join(ALICE)
    other = Node.of(Owner("", "bob"), OWN_KEY)
    store = NodeSigners(relay.directory, MONTH)
    relay.superlink.nodes = {store.derive(other).public_key: node_id}
    store.put(node_id, other)  # as another worker does when it has activated
    relay.time.advance(signing.REUSE)
    data = request(Method.PULL_MESSAGES, node_id)
    assert (await relay.ask(Method.PULL_MESSAGES, data, identity=BOB)).status == 200
    assert (await relay.refused(Method.PULL_MESSAGES, data)).reason is Reason.UNAUTHENTICATED


async def test_a_directory_that_is_gone_costs_no_node_its_life(relay: Relay) -> None:
    node_id = await relay.join()
    moved = relay.directory.rename(relay.directory.with_name("moved"))
    relay.time.advance(signing.REUSE)
    for worker in (relay.worker, relay.start()):
        with capture_logs() as lines:
            refusal = await relay.refused(
                Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id), worker=worker
            )
        assert refusal.reason is Reason.UPSTREAM_DOWN
        assert [line["log_level"] for line in lines] == ["error"]
    for path in sorted(relay.directory.rglob("*"), reverse=True):  # what the new worker has made
        path.unlink() if path.is_file() else path.rmdir()
    relay.directory.rmdir()
    moved.rename(relay.directory)
    assert (await relay.ask(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))).status == 200


async def test_a_node_that_cannot_be_written_down_is_not_told_that_it_is_active(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    await relay.ask(Method.REGISTER_NODE, REGISTER)

    def full(*_: object) -> None:
        raise node_signers.StoreError("no space")

    monkeypatch.setattr(NodeSigners, "put", full)
    assert (await relay.refused(Method.ACTIVATE_NODE, ACTIVATE)).reason is Reason.UPSTREAM_DOWN


async def test_a_file_system_that_hangs_is_not_waited_for(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_id = await relay.join()
    monkeypatch.setattr(signing, "_PATIENCE", 0.02)
    monkeypatch.setattr(NodeSigners, "find", lambda *_: time.sleep(0.2))
    refusal = await relay.refused(
        Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id), worker=relay.start()
    )
    assert (refusal.reason, "did not answer" in refusal.detail) == (Reason.UPSTREAM_DOWN, True)


@pytest.mark.parametrize(
    ("method", "data"),
    [
        (Method.REGISTER_NODE, b""),
        (Method.ACTIVATE_NODE, b"\x0a\x00"),
        (Method.ACTIVATE_NODE, b"\x08\x07"),
        (Method.REGISTER_NODE, b"\x0a\xff"),
        (Method.REGISTER_NODE, REGISTER + b"\x13"),
        (Method.REGISTER_NODE, encode_bytes(1, b"k" * signing._JOIN_BYTES)),
        (Method.PULL_MESSAGES, b""),
        (Method.PULL_MESSAGES, b"garbage"),
    ],
)
async def test_what_is_no_call_of_a_node_is_not_signed(relay: Relay, method: Method, data: bytes) -> None:
    assert (await relay.refused(method, data)).reason is Reason.MALFORMED
    assert relay.superlink.asked == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(list(Method)), data=st.binary(max_size=80), head=st.booleans())
async def test_whatever_is_sent_is_signed_or_refused(
    relay: Relay, method: Method, data: bytes, head: bool
) -> None:
    """Nothing else comes of it, and what is signed is what was sent, but for a key."""

    async def upstream(call: Call) -> Reply:
        came.append(call)
        return Reply(Payload(), Source.UPSTREAM)

    came: list[Call] = []
    data = encode_bytes(1, b"key") + data if head else data
    call = relay._make_call(method, data, wire=Wire.REST_V0)
    call.identity = ALICE
    reason = None
    try:
        await relay.worker.handle(call, upstream)
    except Refusal as refusal:
        reason = refusal.reason
    if came:
        assert (reason, method.kind) == (None, Kind.JOIN)
        assert well_formed(came[0].payload.data or b"")
    else:
        assert reason in (Reason.MALFORMED, Reason.UNAUTHENTICATED, Reason.UPSTREAM_DOWN)


async def test_a_worker_keeps_no_more_than_it_may_and_finds_the_others_again(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "_NODES", 2)
    nodes = [await relay.join(key=b"key %d" % number) for number in range(3)]
    assert len(relay.worker._held) == 2
    for node_id in nodes:
        await relay.ask(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
    assert len(relay.worker._held) == 2


def test_without_the_section_it_leaves_no_trace() -> None:
    assert not any(Signing(None).applies(method) for method in Method)


# -- time -------------------------------------------------------------------------------------------


async def pull(relay: Relay, node_id: int, worker: Signing | None = None) -> Reply:
    return await relay.ask(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id), worker=worker)


async def test_a_signature_is_used_for_a_minute(relay: Relay) -> None:
    node_id = await relay.join()
    relay.superlink.signatures.clear()
    for _ in range(4):
        await pull(relay, node_id)
        relay.time.advance(signing.REUSE / 3)
    first, second, third, fourth = relay.superlink.signatures
    assert first == second == third != fourth


@pytest.mark.parametrize("step", [-30.0, 30.0])
async def test_after_a_step_of_our_clock_a_signature_is_made_anew(relay: Relay, step: float) -> None:
    node_id = await relay.join()
    await pull(relay, node_id)
    relay.time.wall += step
    relay.superlink.ahead -= step  # whose clock did not step
    if step > 0:
        await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
    else:
        await pull(relay, node_id)
    before, after = relay.superlink.signatures[-2:]
    assert before != after


@pytest.mark.parametrize("ahead", [-3600.0, -6.0, 310.0, 86400.0])
async def test_a_wrong_clock_ends_no_node_and_is_corrected_by_the_superlinks(
    relay: Relay, ahead: float
) -> None:
    relay.superlink.ahead = ahead
    before = refusals("clock")
    with capture_logs() as lines:
        refusal = await relay.refused(Method.REGISTER_NODE, REGISTER)
    assert refusal.reason is Reason.UPSTREAM_BAD_ANSWER
    assert refusals("clock") == before + 1
    assert [line["log_level"] for line in lines] == ["error"]
    assert REGISTRY.get_sample_value("relay_upstream_clock_skew_seconds") == pytest.approx(-ahead, abs=1)
    node_id = await relay.join()
    assert (await pull(relay, node_id)).status == 200


@pytest.mark.parametrize("ahead", [-4.0, 0.0, 250.0])
async def test_a_clock_that_is_good_enough_is_not_touched(relay: Relay, ahead: float) -> None:
    relay.superlink.ahead = ahead
    await pull(relay, await relay.join())
    assert relay.worker._clock._correction == 0


async def test_the_node_does_not_notice_that_the_clock_went_wrong(relay: Relay) -> None:
    node_id = await relay.join()
    relay.superlink.ahead = -60.0
    relay.time.advance(signing.REUSE)
    relay.worker._clock._proved = 0  # nothing was asked for a while
    call = relay._make_call(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id), wire=Wire.REST_V0)
    call.identity = ALICE
    assert (await retrying(relay.worker, relay.superlink)(call)).status == 200


async def test_a_clock_that_was_proved_right_is_corrected_once_the_superlinks_stays_elsewhere(
    relay: Relay,
) -> None:
    node_id = await relay.join()
    relay.superlink.ahead = -60.0
    relay.time.advance(signing.REUSE)
    for _ in range(int(signing._PROOF_LASTS - signing.REUSE)):
        assert (await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))).reason is (
            Reason.UPSTREAM_BAD_ANSWER
        )
        relay.time.advance(1.0)
    with pytest.raises(Refusal):
        await pull(relay, node_id)
    assert (await pull(relay, node_id)).status == 200


async def test_a_node_that_the_superlink_has_forgotten_is_told_so(relay: Relay) -> None:
    node_id = await relay.join()
    relay.superlink.nodes.clear()
    refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
    assert (refusal.reason, refusal.status) == (Reason.UNAUTHENTICATED, 401)


async def test_a_date_of_somebody_between_does_not_spoil_a_clock_that_is_right(relay: Relay) -> None:
    forgotten, known = await relay.join(key=b"one"), await relay.join(key=b"two")
    relay.superlink.date = -1000.0
    del relay.superlink.nodes[next(k for k, v in relay.superlink.nodes.items() if v == forgotten)]
    refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, forgotten))
    assert refusal.reason is Reason.UPSTREAM_BAD_ANSWER  # in doubt it lives
    relay.time.advance(signing.REUSE)
    assert (await pull(relay, known)).status == 200


async def test_a_correction_that_does_not_help_is_taken_back_and_ends_no_node(relay: Relay) -> None:
    node_id = await relay.join()
    key = next(iter(relay.superlink.nodes))
    relay.superlink.date = -1000.0
    worker = relay.start()  # for which nothing is proved
    del relay.superlink.nodes[key]
    reasons = []
    for _ in range(4):
        refusal = await relay.refused(
            Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id), worker=worker
        )
        reasons.append(refusal.reason)
    assert set(reasons) == {Reason.UPSTREAM_BAD_ANSWER}
    relay.superlink.nodes[key] = node_id
    for _ in range(2):
        try:
            reply = await pull(relay, node_id, worker)
        except Refusal:
            continue
    assert reply.status == 200


async def test_without_a_date_a_node_is_ended_only_if_others_get_in(relay: Relay) -> None:
    forgotten, known = await relay.join(key=b"one"), await relay.join(key=b"two")
    relay.superlink.date = None
    del relay.superlink.nodes[next(k for k, v in relay.superlink.nodes.items() if v == forgotten)]
    ask = partial(relay.refused, Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, forgotten))
    assert (await ask()).reason is Reason.UPSTREAM_BAD_ANSWER
    await pull(relay, known)  # by a signature of before
    assert (await ask()).reason is Reason.UPSTREAM_BAD_ANSWER
    relay.time.advance(signing.REUSE)
    assert (await ask()).reason is Reason.UPSTREAM_BAD_ANSWER
    await pull(relay, known)
    relay.time.advance(0.5)
    assert (await ask()).reason is Reason.UNAUTHENTICATED


async def test_a_success_ends_the_doubt_about_a_node(relay: Relay) -> None:
    doubted, known = await relay.join(key=b"one"), await relay.join(key=b"two")
    key = next(k for k, v in relay.superlink.nodes.items() if v == doubted)
    relay.superlink.date = None
    ask = partial(relay.refused, Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, doubted))
    del relay.superlink.nodes[key]
    await ask()
    relay.superlink.nodes[key] = doubted
    await pull(relay, doubted)
    relay.time.advance(signing.REUSE)
    await pull(relay, known)
    del relay.superlink.nodes[key]
    assert (await ask()).reason is Reason.UPSTREAM_BAD_ANSWER


def test_only_a_signature_that_was_taken_at_once_says_that_the_clock_is_right(time_: Time) -> None:
    """One that is 20 s old says nothing of a clock that is 10 s ahead."""
    clock = time_.clock()
    proof = Proof([], clock.steady(), clock.lead)
    before = clock.steady() - 1
    time_.advance(20)
    clock.accepted(proof, [])
    assert clock.at_fault(proof, [], before)
    fresh = Proof([], clock.steady(), clock.lead)
    clock.accepted(fresh, [])
    assert not clock.at_fault(fresh, [], before)


async def test_without_a_date_a_wrong_clock_ends_no_node(relay: Relay) -> None:
    node_id = await relay.join()
    relay.superlink.date, relay.superlink.ahead = None, -60.0
    relay.time.advance(signing.REUSE)
    for _ in range(5):
        refusal = await relay.refused(Method.PULL_MESSAGES, request(Method.PULL_MESSAGES, node_id))
        assert refusal.reason is Reason.UPSTREAM_BAD_ANSWER
        relay.time.advance(20)
    relay.superlink.ahead = 0.0
    assert (await pull(relay, node_id)).status == 200


@pytest.mark.parametrize("date", [b"", b"yesterday", b"Mon, 99 Nov 2026 12:00:00 GMT", b"\xff"])
async def test_a_date_that_is_none_is_none(relay: Relay, date: bytes) -> None:
    assert signing._date([(b"Date", date)]) is None
    assert signing._date([(b"DATE", b"Mon, 23 Nov 2026 12:00:00 GMT")]) == 1795435200.5
