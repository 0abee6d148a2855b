"""The load generator, a process of its own: `python -m bench.load SCENARIO PORT WARM SECONDS FIRST_NODE_ID`.

It makes the calls of one scenario over keep-alive connections, each of which repeats its call without a
pause (a closed loop). After a warm-up it prints `ready` with nothing in flight, waits for a line on its
standard input, makes the measured calls, waits for the last answer, and prints a `LoadResult` as one line of
JSON. The first call that fails ends it: then the line is `{"error": "..."}` and the exit code is 1.
"""

import json
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Final

from bench import messages
from bench.channel import Channel
from bench.scenarios import SCENARIOS, Scenario
from bench.stats import percentile
from bench.wire import Head, Reader, WireError

NO_PROGRESS: Final = 15.0  # seconds without any event after which a run has failed
WARM_CALLS: Final = 2  # per connection at least


class LoadError(Exception):
    """A call failed or was answered wrongly."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The measured part of a run."""

    calls: int
    seconds: float
    cpu: float  # CPU seconds of the load generator
    p50: float
    p99: float
    hashed: int  # answers compared with their SHA-256, warm-up included
    reconnects: int  # connections that the proxy closed between two calls, warm-up included


class Plan:
    """What all callers of a scenario share: the object, and the answer that they expect."""

    __slots__ = ("_content", "_path", "answer", "content_at", "object_id")

    def __init__(self, scenario: Scenario) -> None:
        """Render the object of `scenario`."""
        self._path = scenario.path
        self._content = messages.content_of(scenario.payload)
        self.object_id = messages.object_id_of(self._content)
        self.answer = b""
        self.content_at: int | None = None  # the offset of the pulled content in the answer
        if scenario.path == messages.PULL_OBJECT:
            self.answer = messages.pull_object_response(self._content)
            self.content_at = len(self.answer) - len(self._content)
        elif scenario.path == messages.PUSH_OBJECT:
            self.answer = messages.STORED
        elif scenario.path == messages.HEARTBEAT:
            self.answer = messages.BEATEN

    def message(self, node_id: int) -> tuple[bytes, bytes]:
        """What one node sends: the beginning, and a pushed content that all nodes share."""
        match self._path:
            case messages.PULL_MESSAGES:
                return messages.pull_messages_request(node_id), b""
            case messages.HEARTBEAT:
                return messages.heartbeat_request(node_id), b""
            case messages.PULL_OBJECT:
                return messages.pull_object_request(node_id, self.object_id), b""
            case _:
                size = len(self._content)
                return messages.push_object_prefix(node_id, self.object_id, size), self._content

    def request(self, node_id: int, host: str) -> list[memoryview]:
        """The bytes of one node's call over HTTP; a pushed content is not copied."""
        body, content = self.message(node_id)
        length = len(body) + len(content)
        head = messages.request_head(path=self._path, node_id=node_id, content_length=length, host=host)
        return [memoryview(head + body), *([memoryview(content)] if content else [])]


class Caller:
    """One node: its request, its connection, its call in flight."""

    __slots__ = (
        "_epoll",
        "_first",
        "_heads",
        "_parts",
        "_plan",
        "_port",
        "channel",
        "hashed",
        "reconnects",
        "started",
    )

    def __init__(
        self, plan: Plan, *, node_id: int, port: int, epoll: select.epoll, heads: dict[bytes, Head]
    ) -> None:
        """Render the request and connect."""
        self._plan = plan
        self._parts = plan.request(node_id, f"127.0.0.1:{port}")
        self._port = port
        self._epoll = epoll
        self._heads = heads
        self.hashed = 0
        self.reconnects = 0
        self.started = 0.0  # of the call in flight, 0 when there is none
        self._connect()

    def _connect(self) -> None:
        self._first = True
        reader = Reader(requests=False, heads=self._heads, hash_from=self._hash_from)
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=NO_PROGRESS)
        self.channel = Channel(sock, self._epoll, reader)

    def _hash_from(self, _: Head) -> int | None:
        """Hash the first object of each connection."""
        return self._plan.content_at if self._first else None

    def reconnect(self) -> None:
        """Replace a connection that the proxy closed between two calls."""
        self.channel.close()
        self.reconnects += 1
        self._connect()

    def begin(self) -> None:
        """Send the request."""
        self.started = time.perf_counter()
        self.channel.send(*self._parts)

    def check(self) -> None:
        """Check the answer that just completed.

        Raises:
            LoadError: it is not the one the stub gave.
        """
        reader = self.channel.reader
        head = reader.head
        answer = self._plan.answer
        self.started = 0.0
        wrong = (
            head.target != "200"
            or head.content_type != "application/protobuf"
            or reader.size != len(answer)
            or reader.kept != answer[: len(reader.kept)]
            or self.channel.sending
        )
        if wrong:
            raise LoadError(
                f"answer {head.target} {head.content_type!r} with {reader.size} bytes, expected 200 "
                f"application/protobuf with {len(answer)}; it begins with {reader.kept[:300]!r}"
            )
        if reader.digest is not None:
            if reader.digest != self._plan.object_id:
                raise LoadError("the content of an answer was changed on its way")
            self.hashed += 1
        self._first = False
        if head.close:
            self.reconnect()


class Load:
    """All callers of one run."""

    def __init__(self, scenario: Scenario, *, port: int, first_node_id: int) -> None:
        """Connect every caller to `port`."""
        plan = Plan(scenario)
        heads: dict[bytes, Head] = {}
        self._epoll = select.epoll()
        self._scenario = scenario
        self._callers = [
            Caller(plan, node_id=first_node_id + index, port=port, epoll=self._epoll, heads=heads)
            for index in range(scenario.connections)
        ]

    def warm(self, seconds: float) -> None:
        """Make calls for `seconds` and at least a few per connection; nothing is in flight afterwards."""
        self._run(seconds, at_least=WARM_CALLS * len(self._callers))

    def measure(self, seconds: float) -> LoadResult:
        """Make calls for `seconds`, wait for the last answers, and count."""
        cpu, began = time.process_time(), time.perf_counter()
        latencies = self._run(seconds, at_least=0)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        latencies.sort()
        return LoadResult(
            calls=len(latencies),
            seconds=took,
            cpu=cpu,
            p50=percentile(latencies, 0.50),
            p99=percentile(latencies, 0.99),
            hashed=sum(caller.hashed for caller in self._callers),
            reconnects=sum(caller.reconnects for caller in self._callers),
        )

    def _run(self, seconds: float, *, at_least: int) -> list[float]:
        latencies: list[float] = []
        began = time.perf_counter()
        in_flight = len(self._callers)
        for caller in self._callers:
            caller.begin()
        callers = {caller.channel.sock.fileno(): caller for caller in self._callers}
        while in_flight:
            events = self._epoll.poll(NO_PROGRESS)
            if not events:
                raise LoadError(f"no progress for {NO_PROGRESS:.0f} s with {in_flight} calls in flight")
            for number, event in events:
                caller = callers[number]
                complete = caller.channel.ready(event)
                if complete is None:
                    self._closed(callers, caller)
                if not complete:
                    continue
                now = time.perf_counter()
                latencies.append(now - caller.started)
                caller.check()
                if caller.channel.sock.fileno() != number:
                    callers[caller.channel.sock.fileno()] = caller
                calls = len(latencies)
                if (
                    now - began < seconds or calls < at_least
                ) and calls + in_flight <= self._scenario.max_calls:
                    caller.begin()
                else:
                    in_flight -= 1
        return latencies

    @staticmethod
    def _closed(callers: dict[int, Caller], caller: Caller) -> None:
        if caller.started:
            raise LoadError("the proxy closed a connection without an answer to the call on it")
        caller.reconnect()
        callers[caller.channel.sock.fileno()] = caller


def main(scenario: str, port: str, warm: str, seconds: str, first_node_id: str) -> int:
    """Warm up, wait for the word, measure, report."""
    try:
        load = Load(SCENARIOS[scenario], port=int(port), first_node_id=int(first_node_id))
        load.warm(float(warm))
        print("ready", flush=True)
        if not sys.stdin.readline():
            return 1
        print(json.dumps(asdict(load.measure(float(seconds)))), flush=True)
    except (LoadError, WireError, OSError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
