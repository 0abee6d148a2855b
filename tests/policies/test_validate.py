"""A call that is broken goes no further, and whatever a SuperNode sends is sound."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from relay.call import Call, Payload, Reply, Source, View
from relay.fleet import PEEK_BYTES, Ids, Kind, Method, peek
from relay.pipeline import compose
from relay.policies import Validate
from relay.policies.validate import _BEGINS, _PLAIN, fault
from relay.refusal import Reason, Refusal
from relay.wireformat import encode_bytes, encode_uint
from tests.test_fleet import IDS, OBJECT_FIELDS, UINT64, build, request_of

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from relay.pipeline import Handler

MakeCall = Callable[..., Call]

each_method = pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
with_node = [method for method in Method if method.kind is not Kind.JOIN]
with_run = [method for method in Method if method.ids.run]
with_object = [Method.PULL_OBJECT, Method.PUSH_OBJECT, Method.CONFIRM_MESSAGE_RECEIVED]

SOUND = Ids(node_id=2**63 + 1, run_id=7, object_id="5e" * 32)


class Pieces:
    """A body that comes in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    async def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def close(self) -> None:
        pass


async def unreachable(call: Call) -> Reply:
    raise AssertionError("a broken call went on")


def passing(reply: Reply) -> Handler:
    async def upstream(call: Call) -> Reply:
        return reply

    return upstream


def counted(method: Method, what: str) -> float:
    labels = {"method": method.rpc, "fault": what}
    return REGISTRY.get_sample_value("relay_validate_faults_total", labels) or 0.0


async def outcome(run: Awaitable[Reply]) -> str:
    """Return the cause of the refusal."""
    with pytest.raises(Refusal) as caught:
        await run
    refusal = caught.value
    assert (refusal.reason, refusal.by, refusal.sent) == (Reason.MALFORMED, "validate", False)
    return refusal.cause


# -- what the wire found --------------------------------------------------------------------------------


@pytest.mark.parametrize("check_calls", [True, False])
async def test_the_fault_of_a_call_is_raised_as_it_is_and_nobody_behind_sees_the_call(
    make_call: MakeCall, check_calls: bool
) -> None:
    fault = Refusal(Reason.MALFORMED, "content-type 'text/html'", by="wire")
    validate = Validate(check_calls=check_calls)
    with pytest.raises(Refusal) as caught:
        await validate.handle(make_call(Method.PULL_MESSAGES, fault=fault), unreachable)
    assert caught.value is fault


@each_method
async def test_a_sound_call_goes_on_and_its_reply_comes_back(make_call: MakeCall, method: Method) -> None:
    data = build(method, SOUND, filling=20).SerializeToString()
    call, reply = make_call(method, data), Reply(Payload(), Source.UPSTREAM)

    async def upstream(given: Call) -> Reply:
        assert given is call
        assert given.payload.data == data
        return reply

    assert await Validate().handle(call, upstream) is reply


@each_method
def test_any_call_may_be_broken(method: Method) -> None:
    assert Validate().applies(method)


# -- what a SuperNode sends -----------------------------------------------------------------------------


@given(ids=IDS, filling=st.integers(0, 300))
@settings(deadline=None, max_examples=60)
def test_what_flower_writes_is_sound_for_every_method(ids: Ids, filling: int) -> None:
    for method in Method:
        data = build(method, ids, filling=filling).SerializeToString()
        assert fault(method, data, whole=True) is None
        assert fault(method, data[:PEEK_BYTES], whole=False) is None


@given(ids=IDS)
@settings(deadline=None, max_examples=60)
def test_the_short_way_knows_what_every_release_writes(ids: Ids) -> None:
    """Nodes leave out what they do not use: only then is a call one of ids and nothing else."""
    for method, plain in _PLAIN.items():
        data = build(method, ids, filling=0).SerializeToString()
        if method is Method.SEND_NODE_HEARTBEAT:
            data = encode_bytes(1, encode_uint(1, ids.node_id or 0)) + b"\x11" + bytes(6) + b"\x3e\x40"
        if method is Method.PULL_MESSAGES:
            data = encode_bytes(1, encode_uint(1, ids.node_id or 0))
        assert plain(data), method
    for method, begins in _BEGINS.items():
        assert begins(build(method, ids, filling=9).SerializeToString()), method


@given(data=st.binary(max_size=120), method=st.sampled_from(Method))
@settings(deadline=None, max_examples=300)
def test_the_short_way_passes_nothing_that_the_long_way_refuses(data: bytes, method: Method) -> None:
    rng = random.Random(data)
    base = bytearray(build(method, SOUND, filling=3).SerializeToString() if len(data) % 2 else data)
    for _ in range(rng.randint(0, 2)):
        if base:
            base[rng.randrange(len(base))] = rng.randrange(256)
    sent = bytes(base)
    plain, begins = _PLAIN.get(method), _BEGINS.get(method)
    if plain is not None and plain(sent):
        assert fault(method, sent, whole=True) is None
    if begins is not None and begins(sent) and fault(method, sent, whole=True) is None:
        # the same ids read field by field
        assert slowly(method, sent) is None


def slowly(method: Method, data: bytes) -> str | None:
    """Judge without the short ways."""
    begins = _BEGINS.pop(method, None)
    try:
        return fault(method, data, whole=True)
    finally:
        if begins is not None:
            _BEGINS[method] = begins


@given(node=UINT64, size=st.sampled_from(range(1, 11)))
@settings(deadline=None, max_examples=80)
def test_an_id_of_any_length_is_known(node: int, size: int) -> None:
    node = node % (1 << min(64, 7 * size)) or 1
    assert _PLAIN[Method.PULL_MESSAGES](encode_bytes(1, encode_uint(1, node)))
    assert _PLAIN[Method.DEACTIVATE_NODE](encode_uint(1, node))


@each_method
def test_fields_of_later_releases_and_another_order_are_as_good(method: Method) -> None:
    data = build(method, SOUND).SerializeToString()
    assert fault(method, data + encode_bytes(99, b"later") + encode_uint(98, 0), whole=True) is None
    assert fault(method, encode_uint(98, 1) + data, whole=True) is None


# -- what no SuperNode sends ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", with_node, ids=lambda method: method.rpc)
@pytest.mark.parametrize("node", [None, 0])
async def test_a_call_without_a_node_is_refused(
    make_call: MakeCall, method: Method, node: int | None
) -> None:
    data = build(method, SOUND._replace(node_id=0)).SerializeToString()
    if node is None and method.ids.node_is_message:
        data = data[2:] if data[:2] == b"\x0a\x00" else data
    before = counted(method, "node_id")
    assert await outcome(Validate().handle(make_call(method, data), unreachable)) == "node_id"
    assert counted(method, "node_id") == before + 1


@pytest.mark.parametrize("method", with_run, ids=lambda method: method.rpc)
async def test_a_call_of_no_run_is_refused(make_call: MakeCall, method: Method) -> None:
    data = build(method, SOUND._replace(run_id=0)).SerializeToString()
    assert await outcome(Validate().handle(make_call(method, data), unreachable)) == "run_id"


@pytest.mark.parametrize("method", with_object, ids=lambda method: method.rpc)
@pytest.mark.parametrize(
    "name", ["", "5e" * 31, "5E" * 32, "5e" * 33, "../" + "e" * 61, "5e" * 31 + "5g", "5e" * 31 + "\n5"]
)
async def test_an_object_is_named_by_a_hash(make_call: MakeCall, method: Method, name: str) -> None:
    data = build(method, SOUND._replace(object_id=name)).SerializeToString()
    assert await outcome(Validate().handle(make_call(method, data), unreachable)) == "object_id"


def test_what_names_an_app_is_not_looked_at() -> None:
    data = build(Method.GET_FAB, SOUND._replace(object_id="any-name")).SerializeToString()
    assert fault(Method.GET_FAB, data, whole=True) is None


@each_method
@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\x05\x08\x01", b"\xff" * 11, b"\x00\x01", b"<html></html>", b"\x0b"]
)
async def test_what_is_no_protobuf_is_refused(make_call: MakeCall, method: Method, data: bytes) -> None:
    assert await outcome(Validate().handle(make_call(method, data), unreachable)) == "protobuf"


@pytest.mark.parametrize("method", [*with_object, Method.PUSH_MESSAGES], ids=lambda method: method.rpc)
def test_ids_that_are_sound_do_not_excuse_what_follows(method: Method) -> None:
    data = build(method, SOUND).SerializeToString()
    assert fault(method, data + b"\x2a\x7fcut", whole=True) == "protobuf"


@pytest.mark.parametrize(
    "node", [b"\x80\x00", b"\x80" * 9 + b"\x00", b"\x80" * 9 + b"\x02", b"\x00"], ids=lambda node: node.hex()
)
def test_zero_is_zero_however_it_is_written(node: bytes) -> None:
    assert fault(Method.PULL_MESSAGES, encode_bytes(1, b"\x08" + node), whole=True) == "node_id"
    assert not _PLAIN[Method.PULL_MESSAGES](encode_bytes(1, b"\x08" + node))


async def test_unsound_bytes_are_only_counted_if_so_wished(make_call: MakeCall) -> None:
    reply, before = Reply(Payload(), Source.UPSTREAM), counted(Method.PULL_MESSAGES, "protobuf")
    call = make_call(Method.PULL_MESSAGES, b"\xff")
    assert await Validate(check_calls=False).handle(call, passing(reply)) is reply
    assert counted(Method.PULL_MESSAGES, "protobuf") == before + 1


async def test_no_byte_of_a_refused_call_stands_in_the_refusal(make_call: MakeCall) -> None:
    with pytest.raises(Refusal) as caught:
        await Validate().handle(make_call(Method.PULL_MESSAGES, b"SECRET" * 9), unreachable)
    assert "SECRET" not in str(caught.value)


# -- bodies that are still coming -----------------------------------------------------------------------


async def test_a_long_body_is_judged_by_its_beginning_and_stays_whole(make_call: MakeCall) -> None:
    data = build(Method.PUSH_OBJECT, SOUND, filling=5000).SerializeToString()
    payload = Payload(body=Pieces(data[:10], data[10:300], data[300:]), size=len(data))
    reply = Reply(Payload(), Source.UPSTREAM)
    got: list[bytes] = []

    async def upstream(call: Call) -> Reply:
        got.extend([piece async for piece in call.payload.stream()])
        return reply

    assert await Validate().handle(make_call(Method.PUSH_OBJECT, payload), upstream) is reply
    assert b"".join(got) == data


@pytest.mark.parametrize("size", [None, 70_000])
async def test_a_long_body_of_rubbish_is_refused_before_it_is_here(
    make_call: MakeCall, size: int | None
) -> None:
    body = Pieces(b"foo=bar&" * 40, b"never read")
    call = make_call(Method.PUSH_OBJECT, Payload(body=body, size=size))
    assert await outcome(Validate().handle(call, unreachable)) == "node_id"
    assert body.pieces == [b"never read"]


async def test_a_short_body_of_unknown_length_is_judged_whole(make_call: MakeCall) -> None:
    data = build(Method.PUSH_OBJECT, SOUND).SerializeToString()
    call = make_call(Method.PUSH_OBJECT, Payload(body=Pieces(data, b"\x2a\x7f")))
    assert await outcome(Validate().handle(call, unreachable)) == "protobuf"


async def test_it_looks_at_no_more_than_it_declares(make_call: MakeCall) -> None:
    chain = compose(
        [Validate()], passing(Reply(Payload(), Source.LOCAL)), Method.PUSH_OBJECT, buffer_limit=1, strict=True
    )
    data = build(Method.PUSH_OBJECT, SOUND, filling=999).SerializeToString()
    await chain.handler(make_call(Method.PUSH_OBJECT, Payload(body=Pieces(data), size=len(data))))
    assert Validate.sees is View.PEEK


def test_hostile_bytes_cost_no_more_than_their_length() -> None:
    """The expressions have no way to go wrong slowly."""
    started = time.process_time()
    for filler in (b"\x80", b"\xff", b"\x0a", b"\x0a\x0b\x08\x80", b"5e"):
        for method in Method:
            data = (filler * 70_000)[:65_536]
            if method in _PLAIN:
                _PLAIN[method](data)
            fault(method, data[:PEEK_BYTES], whole=False)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("between", [b"", encode_bytes(15, b"x" * 300)])
@pytest.mark.parametrize("method", [Method.PULL_MESSAGES, Method.PUSH_MESSAGES, Method.SEND_NODE_HEARTBEAT])
def test_a_request_for_two_nodes_is_refused(method: Method, between: bytes) -> None:
    """protobuf would take the last one, and whoever looks at the first bytes the first."""
    node = encode_bytes(1, encode_uint(1, 111))
    other = encode_bytes(1, encode_uint(1, 222))
    assert fault(method, node + between + other, whole=True) in ("repeated", "node_id")
    assert fault(method, node + between, whole=True) is None


@st.composite
def requests_in_parts(draw: st.DrawFn) -> tuple[Method, bytes]:
    """Return a request whose ids stand in any order and number, with other fields between them."""
    method = draw(st.sampled_from([method for method in Method if method.kind is not Kind.JOIN]))
    at, uints, names = method.ids, st.integers(0, 3) | UINT64, [b"5e" * 32, b"6f" * 32]

    def node() -> bytes:
        if not at.node_is_message:
            return encode_uint(at.node, draw(uints))
        inside = [encode_uint(1, draw(uints)) for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2])))]
        return encode_bytes(at.node, b"".join(inside))

    makes: list[Callable[[], bytes]] = [
        node,
        lambda: encode_uint(at.run, draw(uints)) if at.run else b"",
        lambda: encode_bytes(at.object, draw(st.sampled_from(names))) if at.object else b"",
        lambda: encode_uint(98, 5),
    ]
    chosen = draw(st.permutations([0, 1, 2, *draw(st.lists(st.integers(0, 3), max_size=2))]))
    return method, b"".join(makes[number]() for number in chosen)


@given(requests_in_parts())
@settings(deadline=None, max_examples=150)
def test_whose_request_it_is_a_superlink_reads_as_the_relay_does(given: tuple[Method, bytes]) -> None:
    """Else a node would be limited or kept out under the name of another."""
    method, data = given
    if fault(method, data, whole=True) is not None:
        return
    parsed: Any = GetMessageClass(request_of(method)).FromString(data)
    names = {field.name for field in request_of(method).fields}
    name = next((name for name in OBJECT_FIELDS if name in names), "")
    assert peek(method, data) == Ids(
        parsed.node.node_id if "node" in names else parsed.node_id,
        parsed.run_id if "run_id" in names else None,
        getattr(parsed, name) if name else None,
    )


def test_a_model_is_looked_past_and_not_copied() -> None:
    data = build(Method.PUSH_OBJECT, SOUND).SerializeToString() + encode_bytes(4, bytes(4 << 20))
    tracemalloc.start()
    try:
        assert fault(Method.PUSH_OBJECT, data, whole=True) is None
        assert fault(Method.PUSH_OBJECT, data + encode_uint(2, 1), whole=True) == "repeated"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(data) + 100_000  # for what was put behind it
