"""A real relay: what one worker handed out another hands out again, also when the first was killed."""

from __future__ import annotations

import http.client
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Message, Metadata, PullObjectResponse
from flwr.proto.node_pb2 import Node

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Method
from tests.relay_process import RelayProcess
from tests.served import Served, path_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("relay-processes")]

NODE = 7
MESSAGE = "ab" * 32


class SuperLink:
    """Has one message, and hands it out once."""

    def __init__(self) -> None:
        self.asked: Counter[Method] = Counter()
        self._there = True
        metadata = Metadata(
            run_id=9, message_id=MESSAGE, dst_node_id=NODE, ttl=3600.0, created_at=time.time()
        )
        self.message = PullMessagesResponse(messages_list=[Message(metadata=metadata)]).SerializeToString()

    async def __call__(self, call: Call) -> Reply:
        self.asked[call.method] += 1
        answer = b""
        if call.method is Method.PULL_MESSAGES and self.asked[call.method] == 1:
            answer = self.message
        elif call.method is Method.PULL_OBJECT:
            answer = PullObjectResponse(object_found=self._there).SerializeToString()
        elif call.method is Method.CONFIRM_MESSAGE_RECEIVED:
            self._there = False
        return Reply(Payload(answer), Source.LOCAL)


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def relay(tmp_path: Path, superlink: SuperLink) -> Iterator[RelayProcess]:
    with Served(superlink) as served, RelayProcess(tmp_path, served.port, workers=2) as relay:
        yield relay


def ask(relay: RelayProcess, method: Method, request: bytes) -> bytes:
    """Make a call on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=20)
    try:
        connection.request("POST", path_of(method), request, {"Content-Type": "application/protobuf"})
        response = connection.getresponse()
        assert response.status == 200
        return response.read()
    finally:
        connection.close()


def pull(relay: RelayProcess) -> bytes:
    return ask(relay, Method.PULL_MESSAGES, PullMessagesRequest(node=Node(node_id=NODE)).SerializeToString())


def outcomes(relay: RelayProcess) -> dict[str, float]:
    names = ("kept", "redelivered", "confirmed", "exhausted")
    return {name: relay.metric("relay_redelivery_total", outcome=name) for name in names}


def test_it_outlives_killed_workers_and_a_reload(relay: RelayProcess, superlink: SuperLink) -> None:
    assert pull(relay) == superlink.message
    for worker in relay.workers():
        worker.kill()
    relay.until(lambda: relay.count("worker serves") == 4)
    assert pull(relay) == superlink.message
    relay.signal(signal.SIGHUP)
    relay.until(lambda: relay.count("worker serves") == 6)
    assert pull(relay) == superlink.message
    assert pull(relay) == b""
    assert outcomes(relay) == {"kept": 1, "redelivered": 2, "confirmed": 0, "exhausted": 1}


def test_a_confirmation_through_any_worker_ends_it(relay: RelayProcess, superlink: SuperLink) -> None:
    request = ConfirmMessageReceivedRequest(node=Node(node_id=NODE), run_id=9, message_object_id=MESSAGE)
    assert pull(relay) == superlink.message
    ask(relay, Method.CONFIRM_MESSAGE_RECEIVED, request.SerializeToString())
    for _ in range(10):
        assert pull(relay) == b""
    assert superlink.asked[Method.PULL_OBJECT] == 0
    assert outcomes(relay) == {"kept": 1, "redelivered": 0, "confirmed": 1, "exhausted": 0}
