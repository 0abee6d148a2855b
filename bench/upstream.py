"""The stub SuperLink, a process of its own: `python -m bench.upstream SCENARIO`.

It answers what a SuperLink would, checks what it is sent, and costs little. It listens on a free loopback
port, prints `{"port": N}`, answers each line `stats` on its standard input with a line of JSON, and ends when
that input does.
"""

import json
import select
import socket
import sys
from dataclasses import asdict, dataclass

from bench import messages
from bench.channel import Channel
from bench.scenarios import SCENARIOS, Scenario
from bench.wire import Head, Reader, WireError


@dataclass(slots=True)
class Stats:
    """Counts since the start."""

    calls: int = 0
    refused: int = 0
    hashed: int = 0  # bodies whose content was compared with its SHA-256
    connections: int = 0


@dataclass(frozen=True, slots=True)
class Expected:
    """A request that the stub knows: the size of its message, and the message that answers it."""

    size: int
    content_at: int | None  # the offset of the pushed content in the message
    answer: bytes


def expectations(scenario: Scenario) -> dict[str, Expected]:
    """The requests of `scenario` by path, and the empty poll that readiness probes make."""
    node = messages.FIRST_NODE_ID
    content = messages.content_of(scenario.payload)
    object_id = messages.object_id_of(content)
    pulled = messages.pull_object_response(content if scenario.downloads else b"")
    prefix = messages.push_object_prefix(node, object_id, scenario.uploads)
    poll = messages.pull_messages_request(node)
    pull = messages.pull_object_request(node, object_id)
    beat = messages.heartbeat_request(node)
    return {
        messages.PULL_MESSAGES: Expected(len(poll), None, b""),
        messages.HEARTBEAT: Expected(len(beat), None, messages.BEATEN),
        messages.PULL_OBJECT: Expected(len(pull), None, pulled),
        messages.PUSH_OBJECT: Expected(len(prefix) + scenario.uploads, len(prefix), messages.STORED),
    }


class Upstream:
    """Serves the requests of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        """Listen on a free loopback port."""
        self._expected = expectations(scenario)
        self._answers = {
            path: memoryview(messages.response(expected.answer)) for path, expected in self._expected.items()
        }
        self._object_id = messages.object_id_of(messages.content_of(scenario.payload))
        self._stats = Stats()
        self._epoll = select.epoll()
        self._channels: dict[int, Channel] = {}
        self._heads: dict[bytes, Head] = {}
        self._keys: set[str] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)

    def serve(self) -> None:
        """Until the standard input ends."""
        listener, control = self._listener.fileno(), sys.stdin.fileno()
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(control, select.EPOLLIN)
        self._say({"port": self._listener.getsockname()[1]})
        while True:
            for number, events in self._epoll.poll():
                channel = self._channels.get(number)
                if channel is not None:
                    self._serve(number, channel, events)
                elif number == listener:
                    self._accept()
                elif number == control:
                    if not sys.stdin.readline():
                        return
                    self._say(asdict(self._stats))

    @staticmethod
    def _say(answer: dict[str, int]) -> None:
        print(json.dumps(answer), flush=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        first = True

        def hash_from(head: Head) -> int | None:
            """Hash the first content of each connection and of each node; later ones only by length."""
            nonlocal first
            expected = self._expected.get(head.target)
            if expected is None or expected.content_at is None or not (first or head.key not in self._keys):
                return None
            first = False
            self._keys.add(head.key)
            return expected.content_at

        reader = Reader(requests=True, heads=self._heads, hash_from=hash_from)
        self._channels[sock.fileno()] = Channel(sock, self._epoll, reader)
        self._stats.connections += 1

    def _serve(self, number: int, channel: Channel, events: int) -> None:
        try:
            complete = channel.ready(events)
            if complete:
                self._answer(channel)
        except OSError:
            complete = None  # the load generator notices if this cost it an answer
        except WireError as error:
            self._refuse(channel, str(error))
            complete = None
        if complete is None:
            del self._channels[number]
            channel.close()

    def _answer(self, channel: Channel) -> None:
        reader = channel.reader
        head = reader.head
        expected = self._expected.get(head.target)
        if expected is None:
            raise WireError(f"unexpected path {head.target}")
        if reader.size != expected.size:
            raise WireError(f"body of {reader.size} bytes, expected {expected.size}")
        if head.content_type != "application/protobuf" or not head.key:
            raise WireError(f"lost headers: content-type {head.content_type!r}, public key {head.key!r}")
        if reader.digest is not None:
            if reader.digest != self._object_id:
                raise WireError("the content was changed on its way")
            self._stats.hashed += 1
        self._stats.calls += 1
        channel.send(self._answers[head.target])

    def _refuse(self, channel: Channel, text: str) -> None:
        self._stats.refused += 1
        try:
            channel.send(memoryview(messages.refusal(f"stub SuperLink: {text}")))
        except OSError:
            return


if __name__ == "__main__":
    Upstream(SCENARIOS[sys.argv[1]]).serve()
