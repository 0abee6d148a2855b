import warnings

from bench import messages
from bench.messages import FIRST_NODE_ID, RUN_ID

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # what Flower imports is deprecated here and there, which is not ours to fix
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
    from flwr.proto.message_pb2 import (
        PullObjectRequest,
        PullObjectResponse,
        PushObjectRequest,
        PushObjectResponse,
    )
    from flwr.proto.node_pb2 import Node

NODE = Node(node_id=FIRST_NODE_ID + 5)
CONTENT = messages.content_of(1_000)
OBJECT_ID = messages.object_id_of(CONTENT)


def test_idle_poll_is_as_long_as_a_real_one() -> None:
    poll = messages.pull_messages_request(NODE.node_id)
    assert poll == PullMessagesRequest(node=NODE).SerializeToString()
    assert len(poll) == 13
    assert PullMessagesResponse().SerializeToString() == b""


def test_pulled_object() -> None:
    request = PullObjectRequest(node=NODE, run_id=RUN_ID, object_id=OBJECT_ID)
    assert messages.pull_object_request(NODE.node_id, OBJECT_ID) == request.SerializeToString()
    answer = PullObjectResponse(object_found=True, object_available=True, object_content=CONTENT)
    assert messages.pull_object_response(CONTENT) == answer.SerializeToString()
    assert messages.pull_object_response(CONTENT).endswith(CONTENT)


def test_pushed_object() -> None:
    request = PushObjectRequest(node=NODE, run_id=RUN_ID, object_id=OBJECT_ID, object_content=CONTENT)
    prefix = messages.push_object_prefix(NODE.node_id, OBJECT_ID, len(CONTENT))
    assert prefix + CONTENT == request.SerializeToString()
    assert PushObjectResponse(stored=True).SerializeToString() == messages.STORED


def test_content_is_the_same_everywhere() -> None:
    assert messages.content_of(10) == messages.content_of(10)
    assert messages.content_of(20)[:10] == messages.content_of(10)
