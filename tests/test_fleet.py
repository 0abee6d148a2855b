"""The catalogue is Flower's own, and `peek` finds the ids that Flower's own messages carry."""

from __future__ import annotations

import time
from inspect import signature
from typing import TYPE_CHECKING, Any

import flwr.app
import pytest
from flwr.app import Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import DESCRIPTOR
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from relay.fleet import BY_PATH, PEEK_BYTES, Ids, Kind, Method, peek
from relay.wireformat import encode_bytes, encode_uint

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

RPCS = DESCRIPTOR.services_by_name["Fleet"].methods_by_name

#: How Flower's requests call the one id that is a string.
OBJECT_FIELDS = ("object_id", "hash_str", "message_object_id")

UINT64 = st.integers(min_value=1, max_value=2**64 - 1)
SHA256 = st.binary(min_size=32, max_size=32).map(bytes.hex)
IDS = st.builds(Ids, node_id=UINT64, run_id=UINT64, object_id=SHA256)

each_method = pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)


def request_of(method: Method) -> Descriptor:
    descriptor: Descriptor = RPCS[method.rpc].input_type
    return descriptor


def build(method: Method, ids: Ids, *, filling: int = 0) -> Message:
    """Make a request of `method` with those of `ids` that it carries, and `filling` bytes in all else."""
    request = GetMessageClass(request_of(method))()
    for field in request_of(method).fields:
        fill(request, field, ids, filling)
    return request


def fill(request: Any, field: FieldDescriptor, ids: Ids, filling: int) -> None:
    """Set one field of `request`."""
    if field.name == "node":
        request.node.SetInParent()
        request.node.node_id = ids.node_id
    elif field.name in ("node_id", "run_id"):
        setattr(request, field.name, getattr(ids, field.name))
    elif field.name in OBJECT_FIELDS:
        setattr(request, field.name, ids.object_id)
    elif field.name == "messages_list":
        request.messages_list.add().metadata.group_id = "x" * filling
    elif field.name == "message_object_trees":
        request.message_object_trees.add().object_id = "x" * filling
    elif field.name in ("message_ids", "clientapp_runtime_list"):
        getattr(request, field.name).append("x" * filling if field.name == "message_ids" else 0.5)
    elif field.type == field.TYPE_DOUBLE:
        setattr(request, field.name, 30.0)
    else:
        text = "x" * filling
        setattr(request, field.name, text if field.type == field.TYPE_STRING else text.encode())


def carried(method: Method, ids: Ids) -> Ids:
    """Return what of `ids` a request of `method` has a field for."""
    names = {field.name for field in request_of(method).fields}
    return Ids(
        ids.node_id if names & {"node", "node_id"} else None,
        ids.run_id if "run_id" in names else None,
        ids.object_id if names & set(OBJECT_FIELDS) else None,
    )


class SuperLink:
    """Flower's own handlers over its state in memory, with one node, one run and one message for it."""

    def __init__(self) -> None:
        states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self.state = states.state()
        self.fab = self.state.store_fab(Fab("", b"a fab", {}))
        self.run = self.state.create_run(
            None, None, self.fab, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        assert self.state.claim_task(task)
        assert self.state.activate_task(task)

    def ask(self, method: Method, request: Message) -> object:
        """Return what a node would be answered: a message without its session, or Flower's error."""
        handler = getattr(fleet_handlers, method.name.lower())
        known = {"state": self.state, "store": self.state.object_store, "enable_supernode_auth": False}
        arguments = {name: known[name] for name in signature(handler).parameters if name in known}
        try:
            answer = handler(request=request, **arguments)
        except FlowerError as error:
            return error
        if method is Method.PUSH_MESSAGES:
            answer.ClearField("session_id")  # a new one each time, and each of them works
        return answer

    def next_request(self, method: Method) -> Any:
        """Live a node's life up to the point at which it would send a request of `method`; return that."""
        key = {"public_key": b"a key"}
        if method is Method.REGISTER_NODE:
            return self._make(method, **key)
        node = fleet_handlers.register_node(
            self._make(Method.REGISTER_NODE, **key), self.state, False
        ).node_id
        if method is Method.UNREGISTER_NODE:
            return self._make(method, node_id=node)
        activation = self._make(Method.ACTIVATE_NODE, **key, heartbeat_interval=30)
        if method is Method.ACTIVATE_NODE:
            return activation
        fleet_handlers.activate_node(activation, self.state)
        if method is Method.DEACTIVATE_NODE:
            return self._make(method, node_id=node)
        mine = {"node": {"node_id": node}}
        if method is Method.SEND_NODE_HEARTBEAT:
            return self._make(method, **mine, heartbeat_interval=30)
        if method is Method.GET_RUN:
            return self._make(method, **mine, run_id=self.run)
        if method is Method.GET_FAB:
            return self._make(method, **mine, run_id=self.run, hash_str=self.fab)
        return self._request_about_a_message(method, mine, node)

    def _request_about_a_message(self, method: Method, mine: dict[str, Any], node: int) -> Any:
        metadata = Metadata(self.run, "", SUPERLINK_NODE_ID, node, "", "", time.time(), 600.0, "train")
        message = flwr.app.Message(RecordDict(), metadata=metadata)
        metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        for object_id, inflatable in get_all_nested_objects(message).items():
            assert self.state.store_object(self.run, session, object_id, inflatable.deflate())
        mine_of_run = mine | {"run_id": self.run}
        if method is Method.PULL_MESSAGES:
            return self._make(method, **mine)
        if method is Method.PULL_OBJECT:
            return self._make(method, **mine_of_run, object_id=message.object_id)
        if method is Method.CONFIRM_MESSAGE_RECEIVED:
            return self._make(method, **mine_of_run, message_object_id=message.object_id)
        reply = flwr.app.Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        push = self._make(Method.PUSH_MESSAGES, **mine)
        push.messages_list.append(message_to_proto(reply))
        push.message_object_trees.append(get_object_tree(reply))
        if method is Method.PUSH_MESSAGES:
            return push
        session = fleet_handlers.push_messages(push, self.state).session_id
        content = {"object_id": reply.object_id, "object_content": reply.deflate(), "session_id": session}
        return self._make(method, **mine_of_run, **content)

    @staticmethod
    def _make(method: Method, **fields: Any) -> Any:
        return GetMessageClass(request_of(method))(**fields)


# -- the catalogue ------------------------------------------------------------------------------------


def test_the_catalogue_lists_exactly_the_rpcs_of_flowers_fleet_service() -> None:
    assert {method.rpc for method in Method} == set(RPCS)
    assert len(Method) == 12


@each_method
def test_the_message_types_are_those_of_flowers_service(method: Method) -> None:
    rpc = RPCS[method.rpc]
    assert (method.request, method.response) == (rpc.input_type.name, rpc.output_type.name)


@each_method
def test_the_path_and_types_are_those_that_flowers_own_client_uses(method: Method) -> None:
    asked: list[dict[str, Any]] = []

    class Recorder(FleetHttpClient):  # type: ignore[misc]
        def _unary_unary(self, **call: Any) -> None:
            asked.append(call)

    with Recorder("http://superlink") as client:
        getattr(client, method.rpc)(build(method, Ids(1, 2, "3")))
    (call,) = asked
    assert call["path"] == f"/v1/fleet/{method.path}"
    assert call["rpc_method"] == f"/flwr.proto.Fleet/{method.rpc}"
    assert call["response_type"].DESCRIPTOR.name == method.response


@each_method
def test_a_method_is_found_by_its_path(method: Method) -> None:
    assert BY_PATH[method.path] is method


@each_method
def test_the_field_numbers_of_the_ids_are_those_of_flowers_descriptors(method: Method) -> None:
    fields = {field.name: field for field in request_of(method).fields}
    node = fields.get("node", fields.get("node_id"))
    obj = next((fields[name] for name in OBJECT_FIELDS if name in fields), None)
    assert method.ids.node == (node.number if node else 0)
    if node is not None:
        assert method.ids.node_is_message == (node.message_type is not None)
    assert method.ids.run == (fields["run_id"].number if "run_id" in fields else 0)
    assert method.ids.object == (obj.number if obj else 0)


def test_the_node_message_carries_its_id_as_an_unsigned_varint_in_field_one() -> None:
    node = request_of(Method.PULL_MESSAGES).fields_by_name["node"].message_type
    assert node is not None
    field = node.fields_by_name["node_id"]
    assert (field.number, field.type) == (1, field.TYPE_UINT64)


@each_method
def test_a_method_is_repeatable_if_flowers_superlink_answers_the_same_bytes_again_as_well(
    method: Method,
) -> None:
    superlink = SuperLink()
    request = superlink.next_request(method)
    first = superlink.ask(method, request)
    assert not isinstance(first, FlowerError), "the life before it is not as it should be"
    assert (superlink.ask(method, request) == first) == method.repeatable


def test_only_what_every_entitled_node_gets_alike_is_cacheable() -> None:
    assert {method for method in Method if method.cacheable} == {
        Method.GET_RUN,
        Method.GET_FAB,
        Method.PULL_OBJECT,
    }


def test_what_is_cacheable_is_repeatable_and_only_fetches() -> None:
    assert all(m.repeatable and m.kind is Kind.FETCH for m in Method if m.cacheable)


# -- peek ---------------------------------------------------------------------------------------------


@each_method
@given(ids=IDS)
def test_peek_finds_the_ids_of_a_request(method: Method, ids: Ids) -> None:
    assert peek(method, build(method, ids).SerializeToString()) == carried(method, ids)


@each_method
@given(ids=IDS)
def test_peek_finds_the_ids_in_the_first_bytes_of_a_large_request(method: Method, ids: Ids) -> None:
    data = build(method, ids, filling=10_000).SerializeToString()
    assert peek(method, data[:PEEK_BYTES]) == carried(method, ids)


@each_method
def test_the_first_bytes_of_a_large_request_are_a_part_of_it(method: Method) -> None:
    """Guards the test above: where a request can be large, it was."""
    names = {field.name for field in request_of(method).fields}
    can_be_large = names & {"public_key", "message_ids", "messages_list", "object_content"}
    large = len(build(method, Ids(1, 2, "3"), filling=10_000).SerializeToString()) > PEEK_BYTES
    assert large == bool(can_be_large)


@each_method
def test_an_id_that_is_zero_or_empty_is_absent(method: Method) -> None:
    """Protobuf does not write what has its default."""
    assert peek(method, build(method, Ids(0, 0, "")).SerializeToString()) == Ids()


@each_method
@given(ids=IDS)
def test_a_request_cut_anywhere_gives_true_ids_or_none(method: Method, ids: Ids) -> None:
    whole = build(method, ids, filling=300).SerializeToString()
    true = carried(method, ids)
    for size in range(PEEK_BYTES):
        for found, id_ in zip(peek(method, whole[:size]), true, strict=True):
            assert found in (None, id_)


@each_method
@given(head=st.binary(max_size=2 * PEEK_BYTES))
def test_peek_never_raises_and_returns_what_its_types_say(method: Method, head: bytes) -> None:
    ids = peek(method, head)
    for number in (ids.node_id, ids.run_id):
        assert number is None or 0 <= number < 2**64
    assert ids.object_id is None or ids.object_id.isascii()


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(b"\xf8\x07\x05", id="varint"),
        pytest.param(b"\xf9\x07" + b"\x09" * 8, id="64 bits"),
        pytest.param(b"\xfa\x07\x03abc", id="bytes"),
        pytest.param(b"\xfd\x07" + b"\x0d" * 4, id="32 bits"),
    ],
)
@each_method
def test_fields_of_a_later_flower_are_stepped_over(method: Method, unknown: bytes) -> None:
    ids = Ids(2**64 - 1, 7, "ab" * 32)
    assert peek(method, unknown + build(method, ids).SerializeToString()) == carried(method, ids)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"\x0a\x05\x08\x01", id="a node message that ends early"),
        pytest.param(b"\x0a\x02\x08\xff", id="a varint that ends early"),
        pytest.param(b"\x0a\x02\x12\x00", id="a node message without its id"),
        pytest.param(b"\x0a\x03\x0a\x01x", id="an id that is no number"),
        pytest.param(b"\x08\x01", id="a node that is no message"),
        pytest.param(b"\x0b\x08\x01\x0c", id="a group"),
        pytest.param(b"\x02\x01x", id="field number 0"),
        pytest.param(b"\xff" * 16, id="a varint of more than 64 bits"),
    ],
)
def test_a_broken_node_is_no_node(head: bytes) -> None:
    assert peek(Method.PULL_MESSAGES, head) == Ids()


def test_what_was_found_before_the_bytes_break_is_kept() -> None:
    head = b"\x0a\x02\x08\x05" + b"\x10\x07" + b"\x1a\x03a\xffc"
    assert peek(Method.PULL_OBJECT, head) == Ids(5, 7, None)


def test_a_varint_longer_than_64_bits_wraps_as_in_protobuf() -> None:
    wide = b"\x10" + b"\xff" * 9 + b"\x7f"
    parsed = GetMessageClass(request_of(Method.GET_RUN))()
    parsed.ParseFromString(wide)
    assert peek(Method.GET_RUN, wide).run_id == parsed.run_id  # type: ignore[attr-defined]


def test_an_id_that_stands_there_twice_is_none() -> None:
    twice = encode_bytes(1, encode_uint(1, 111)) + encode_bytes(1, encode_uint(1, 222))
    inside = encode_bytes(1, encode_uint(1, 111) + encode_uint(1, 222))
    assert peek(Method.PULL_MESSAGES, twice) == Ids()
    assert peek(Method.PULL_MESSAGES, inside).node_id is None
    assert peek(Method.REGISTER_NODE, encode_bytes(1, b"a key")) == Ids()
