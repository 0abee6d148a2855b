"""A real relay: what one worker handed out another hands out again, also when the first was killed."""

from __future__ import annotations

import asyncio
import http.client
import select
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Message, Metadata, PullObjectResponse
from flwr.proto.node_pb2 import Node

from relay.call import Call, Payload, Reply, Source
from relay.fleet import Method
from relay.stores.kept import LEASE
from tests.relay_process import RelayProcess
from tests.served import Served, path_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("relay-processes")]

NODE, OTHER = 7, 8
#: Seconds that workers may take to start on a busy machine.
START = 60.0
MESSAGE = "ab" * 32


class SuperLink:
    """Has one message, and hands it out once.

    Attributes:
        hangs: whether the question for an object gets no answer for a while.
    """

    def __init__(self) -> None:
        self.asked: Counter[Method] = Counter()
        self.hangs = False
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
        elif call.method is Method.SEND_NODE_HEARTBEAT:
            answer = SendNodeHeartbeatResponse(success=True).SerializeToString()
        elif call.method is Method.PULL_OBJECT:
            while self.hangs:
                await asyncio.sleep(0.01)
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


def begin(relay: RelayProcess, method: Method, request: bytes) -> http.client.HTTPConnection:
    """Begin a call on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=20)
    connection.request("POST", path_of(method), request, {"Content-Type": "application/protobuf"})
    return connection


def ask(relay: RelayProcess, method: Method, request: bytes) -> bytes:
    """Make a call on a connection of its own."""
    connection = begin(relay, method, request)
    try:
        response = connection.getresponse()
        assert response.status == 200
        return response.read()
    finally:
        connection.close()


def pulling(node: int) -> bytes:
    return PullMessagesRequest(node=Node(node_id=node)).SerializeToString()


def pull(relay: RelayProcess, node: int = NODE) -> bytes:
    return ask(relay, Method.PULL_MESSAGES, pulling(node))


def pull_again(relay: RelayProcess) -> bytes:
    """Pull as a node does until there is something, for as long as a claim of a worker that was killed lasts.

    A worker may have been killed, or be busy, between the last byte of an answer and its note that the
    delivery has ended.
    """
    end = time.monotonic() + LEASE + START
    while not (answer := pull(relay)) and time.monotonic() < end:
        assert pull(relay, OTHER) == b""
        time.sleep(0.1)
    return answer


def begin_claim(relay: RelayProcess, superlink: SuperLink) -> tuple[float, http.client.HTTPConnection]:
    """Begin a pull whose worker claims the message and asks a SuperLink that hangs; return when, and it.

    A pull is answered with nothing as long as the first delivery has not been noted to have ended.
    """
    while True:
        before = time.monotonic()
        connection = begin(relay, Method.PULL_MESSAGES, pulling(NODE))
        while not select.select([connection.sock], [], [], 0.01)[0]:
            if superlink.asked[Method.PULL_OBJECT]:
                return before, connection
        assert connection.getresponse().read() == b""
        connection.close()


def stay_available(relay: RelayProcess) -> None:
    """Have the node taken for available for longer than any of this lasts."""
    beat = SendNodeHeartbeatRequest(node=Node(node_id=NODE), heartbeat_interval=600.0)
    ask(relay, Method.SEND_NODE_HEARTBEAT, beat.SerializeToString())


def ends_with_nothing(relay: RelayProcess) -> None:
    """The message is given up, and never handed out again."""

    def exhausted() -> bool:
        assert pull(relay) == b""
        return outcomes(relay)["exhausted"] == 1

    relay.until(exhausted, LEASE + START)
    for node in (NODE, OTHER) * 3:
        assert pull(relay, node) == b""


def serving(relay: RelayProcess, connection: http.client.HTTPConnection) -> psutil.Process:
    """Return the worker at the other end of a connection."""
    port = connection.sock.getsockname()[1]
    (worker,) = (
        worker
        for worker in relay.workers()
        if any(end.raddr and end.raddr.port == port for end in worker.net_connections("tcp4"))
    )
    return worker


def outcomes(relay: RelayProcess) -> dict[str, float]:
    names = ("kept", "redelivered", "confirmed", "exhausted")
    return {name: relay.metric("relay_redelivery_total", outcome=name) for name in names}


def test_it_outlives_killed_workers_and_a_reload(relay: RelayProcess, superlink: SuperLink) -> None:
    stay_available(relay)
    assert pull(relay) == superlink.message
    for worker in relay.workers():
        worker.kill()
    relay.until(lambda: relay.count("worker serves") == 4, START)
    assert pull_again(relay) == superlink.message
    relay.signal(signal.SIGHUP)
    relay.until(lambda: relay.count("worker serves") == 6, START)
    assert pull_again(relay) == superlink.message
    ends_with_nothing(relay)
    assert outcomes(relay) == {"kept": 1, "redelivered": 2, "confirmed": 0, "exhausted": 1}


def test_a_worker_that_is_killed_while_it_holds_a_claim_takes_the_message_from_nobody(
    relay: RelayProcess, superlink: SuperLink
) -> None:
    """It may have handed the message out, so that its claim lasts for a while, and counts as a delivery."""
    stay_available(relay)
    assert pull(relay) == superlink.message
    superlink.hangs = True
    before, connection = begin_claim(relay, superlink)
    worker = serving(relay, connection)
    worker.kill()
    with pytest.raises(ConnectionError):
        connection.getresponse()
    connection.close()
    superlink.hangs = False
    assert pull_again(relay) == superlink.message
    assert time.monotonic() - before > LEASE
    assert worker.pid not in {living.pid for living in relay.workers()}
    ends_with_nothing(relay)
    assert outcomes(relay) == {"kept": 1, "redelivered": 1, "confirmed": 0, "exhausted": 1}


def test_a_confirmation_through_any_worker_ends_it(relay: RelayProcess, superlink: SuperLink) -> None:
    request = ConfirmMessageReceivedRequest(node=Node(node_id=NODE), run_id=9, message_object_id=MESSAGE)
    assert pull(relay) == superlink.message
    ask(relay, Method.CONFIRM_MESSAGE_RECEIVED, request.SerializeToString())
    for _ in range(10):
        assert pull(relay) == b""
    assert superlink.asked[Method.PULL_OBJECT] == 0
    assert outcomes(relay) == {"kept": 1, "redelivered": 0, "confirmed": 1, "exhausted": 0}
