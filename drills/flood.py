"""Very many calls at once, in the name of a node that is there: its proof is good for any call for 300 s."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from base64 import b64encode
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.run_pb2 import GetRunRequest

from drills import http2
from drills.strain import PREFIX
from relay import bridge
from relay.demo.processes import LOOPBACK
from relay.fleet import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drills.strain import Entry
    from relay.call import Wire

#: One in so many calls is a heartbeat.
HEARTBEATS: Final = 16
_INTERVAL: Final = 30.0  # seconds; what nodes say in a heartbeat
_STREAMS: Final = 20  # gRPC calls on a connection
_CONNECTING: Final = 50  # connections that are made at a time
_PATIENCE: Final = 90.0


@dataclass(slots=True)
class Flood:
    """What came of it.

    Attributes:
        answers: calls by method and by what became of them: `ok`, `refused` or `closed`.
        slowest: seconds to the last answer of each method that was `ok`.
    """

    answers: Counter[tuple[Method, str]] = field(default_factory=Counter)
    slowest: dict[Method, float] = field(default_factory=dict)

    def count(self, method: Method, answer: str, seconds: float) -> None:
        """Take note of an answer."""
        self.answers[method, answer] += 1
        if answer == "ok":
            self.slowest[method] = max(seconds, self.slowest.get(method, 0.0))

    def __str__(self) -> str:
        said = []
        for method in dict.fromkeys(method for method, _ in self.answers):
            parts = [f"{count} {answer}" for (of, answer), count in self.answers.items() if of is method]
            slowest = f" (the last after {self.slowest[method]:.1f} s)" if method in self.slowest else ""
            said.append(f"{method.rpc}: {', '.join(parts)}{slowest}")
        return "; ".join(said)


@dataclass(frozen=True, slots=True)
class Copied:
    """A call of the flood."""

    method: Method
    body: bytes
    request_id: str


class Copies:
    """Makes calls of a node from one of its pull-object calls, as the relay sent that on.

    Attributes:
        calls: that many; each has a request id of its own.
    """

    def __init__(self, request: bytes, count: int, *, userinfo: str = "") -> None:
        """Make `count` calls; `userinfo` is the node's `name:key`, if it has one."""
        _, headers, body = http2.from_http(request)
        asked = PullObjectRequest.FromString(body)
        heartbeat = SendNodeHeartbeatRequest(node=asked.node, heartbeat_interval=_INTERVAL)
        run = GetRunRequest(node=asked.node, run_id=asked.run_id)
        self._proof = [(name, value) for name, value in headers if name.lower().startswith(b"flwr-")]
        self._userinfo = userinfo
        mark = secrets.token_hex(4)
        self.calls = [
            Copied(Method.SEND_NODE_HEARTBEAT, heartbeat.SerializeToString(), f"{mark}-{number}")
            if number % HEARTBEATS == 0
            else Copied(Method.GET_RUN, run.SerializeToString(), f"{mark}-{number}")
            for number in range(count)
        ]

    def http(self, wire: Wire, call: Copied) -> bytes:
        """Return one as a request of HTTP/1.1."""
        headers = [
            (b"host", LOOPBACK.encode()),
            (b"content-type", b"application/protobuf"),
            (b"accept", b"application/protobuf"),
            (b"content-length", b"%d" % len(call.body)),
            (b"x-request-id", call.request_id.encode()),
            *self._proof,
        ]
        if self._userinfo:
            headers.append((b"authorization", b"Basic " + b64encode(self._userinfo.encode())))
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        return b"POST %b%b HTTP/1.1\r\n%b\r\n%b" % (
            PREFIX[wire].encode(),
            call.method.path.encode(),
            lines,
            call.body,
        )

    def grpc(self, call: Copied, stream: int) -> bytes:
        """Return one as a gRPC call."""
        metadata = [*bridge.to_metadata(self._proof), ("x-request-id", call.request_id)]
        return http2.call(call.method, call.body, metadata=metadata, stream=stream)


async def flood(entry: Entry, wire: Wire, copies: Copies) -> Flood:
    """Open all connections, then make all calls at once; return what came of them within 90 s."""
    each = _STREAMS if wire.grpc else 1
    groups = [copies.calls[start : start + each] for start in range(0, len(copies.calls), each)]
    result = Flood()
    slots, ready = asyncio.Semaphore(_CONNECTING), asyncio.Barrier(len(groups))

    async def one(group: Sequence[Copied]) -> None:
        left = {2 * number + 1: call for number, call in enumerate(group)}
        writer = None
        try:
            async with slots:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(
                        LOOPBACK, entry.port, ssl=entry.context() if entry.authority else None
                    )
            await ready.wait()
            if writer is None:
                return
            start = time.monotonic()
            async with asyncio.timeout(_PATIENCE):
                if wire.grpc:
                    await _grpc(reader, writer, copies, left, result, start)
                else:
                    writer.write(copies.http(wire, group[0]))
                    answer = await _answer(reader)
                    result.count(left.pop(1).method, answer, time.monotonic() - start)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass  # TimeoutError is an OSError
        finally:
            for call in left.values():
                result.count(call.method, "closed", 0.0)
            if writer is not None:
                writer.close()

    async with asyncio.TaskGroup() as tasks:
        for group in groups:
            tasks.create_task(one(group))
    return result


async def _answer(reader: asyncio.StreamReader) -> str:
    """Read a whole answer; say what it is."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            await reader.readexactly(int(line.split(b":")[1]))
    return "ok" if head.split(b" ")[1] == b"200" else "refused"


async def _grpc(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    copies: Copies,
    left: dict[int, Copied],
    result: Flood,
    start: float,
) -> None:
    """Make the calls of one connection; take each out of `left` that was answered."""
    writer.write(http2.PREFACE + b"".join(copies.grpc(call, stream) for stream, call in left.items()))
    answered = set()
    while left:
        head = http2.read_head(await reader.readexactly(http2.HEAD_SIZE))
        payload = await reader.readexactly(head.size)
        if head.kind == http2.DATA and head.size:
            answered.add(head.stream)  # a refusal has no message
        if head.ends and head.stream in left:
            answer = "ok" if head.stream in answered else "refused"
            result.count(left.pop(head.stream).method, answer, time.monotonic() - start)
        writer.write(http2.answer_to(head, payload))
