"""The container is what Flower's own code writes and reads."""

from __future__ import annotations

import pytest
from flwr.proto.fleet_pb2 import DESCRIPTOR
from flwr.proto.grpcadapter_pb2 import MessageContainer
from hypothesis import given
from hypothesis import strategies as st

from relay.fleet import BY_REQUEST, Method
from relay.wires.grpc_adapter import head, unpack


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("data", [b"", b"\x0a\x02\x08\x07", b"x" * 1000], ids=["empty", "small", "long"])
def test_a_request_of_flower_is_taken_out(method: Method, data: bytes) -> None:
    rpc = DESCRIPTOR.services_by_name["Fleet"].methods_by_name[method.rpc]
    container = MessageContainer(
        metadata={"flower-version": "1.39.0", "grpc-message-qualname": rpc.input_type.name},
        grpc_message_name=rpc.input_type.name,
        grpc_message_content=data,
    )
    assert unpack(container.SerializeToString()) == (method, rpc.input_type.name, data)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("data", [b"", b"\x08\x01", b"x" * 1000], ids=["empty", "small", "long"])
def test_an_answer_is_what_flower_reads(method: Method, data: bytes) -> None:
    response = DESCRIPTOR.services_by_name["Fleet"].methods_by_name[method.rpc].output_type
    container = MessageContainer.FromString(head(method, len(data)) + data)
    assert container.grpc_message_name == response.name
    assert container.grpc_message_content == data
    module = response.file.name.removesuffix(".proto").replace("/", ".") + "_pb2"
    assert dict(container.metadata) == {
        "grpc-message-module": module,
        "grpc-message-qualname": response.name,
    }


def test_nothing_tells_a_node_to_exit() -> None:
    assert all(b"should-exit" not in head(method, 0) for method in Method)


def test_each_request_names_one_method() -> None:
    assert len(BY_REQUEST) == len(Method)


@pytest.mark.parametrize("name", ["CreateNodeRequest", "PullMessagesResponse", "pullmessagesrequest", ""])
def test_any_other_message_is_none(name: str) -> None:
    container = MessageContainer(grpc_message_name=name, grpc_message_content=b"x").SerializeToString()
    assert unpack(container)[:2] == (None, name)


@given(st.binary(max_size=200))
def test_garbage_is_nothing_and_no_error(data: bytes) -> None:
    assert unpack(data).method is None
