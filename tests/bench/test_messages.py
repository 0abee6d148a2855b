import base64
import warnings

from bench import messages
from bench.messages import FIRST_NODE_ID, RUN_ID
from relay.fleet import Method

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # what Flower imports is deprecated here and there, which is not ours to fix
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
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


def test_heartbeat() -> None:
    request = SendNodeHeartbeatRequest(node=NODE, heartbeat_interval=30.0)
    assert messages.heartbeat_request(NODE.node_id) == request.SerializeToString()
    assert SendNodeHeartbeatResponse(success=True).SerializeToString() == messages.BEATEN


def test_every_method_has_its_name_in_grpc() -> None:
    for path, name in messages.GRPC.items():
        (method,) = (method for method in Method if method.grpc == name)
        assert path.endswith(f"/{method.path}")


def test_a_node_proves_the_same_over_grpc_and_over_http() -> None:
    raw = dict(messages.metadata(7))
    head = messages.request_head(path="/", node_id=7, content_length=0, host="h").decode()
    for name in ("flwr-public-key", "flwr-signature"):
        value = raw[f"{name}-bin"]
        assert isinstance(value, bytes)
        assert f"\r\n{name}: {base64.b64encode(value).decode()}\r\n" in head


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
