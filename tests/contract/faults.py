"""What a node is told: every distinct answer of the dialect, and answers that it must never be told."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from relay.bridge import code_of
from relay.call import Payload, Reply, Source, Wire
from relay.dialect import TABLE, Abort, Answer, Hold, Status
from relay.fleet import Kind, Method
from relay.refusal import NodeGone, Reason, Refusal
from relay.wires.http_request import CONTENT_TYPE
from tests.contract.superlink import http

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.contract.superlink import Fault

    Right = Callable[[], Awaitable[Reply]]

#: What stands for the minute of a Hold. The policy `retry` waits, the wire only answers.
HOLD_SECONDS = 1.0

_PAGE = b"<!doctype html><html><body>Welcome to nginx!</body></html>"


class Case(NamedTuple):
    """A method whose calls fail, and the name of the answer that they get."""

    method: Method
    answer: str


class Cell(NamedTuple):
    """An answer of the dialect to a method, with every reason for which it is given."""

    case: Case
    answer: Answer
    reasons: tuple[Reason, ...]


def name_of(answer: Answer) -> str:
    """Return the answer's name in `outcomes.json` and in the documentation."""
    return str(answer.code) if isinstance(answer, Status | Abort) else type(answer).__name__.lower()


def cells(wire: Wire) -> list[Cell]:
    """Return each distinct cell of a wire once; not those of unknown methods, which no real node calls."""
    reasons: dict[tuple[Method, Answer], list[Reason]] = {}
    for (of, reason, method), cell in TABLE.items():
        if of is wire and method is not None:
            reasons.setdefault((method, cell.answer), []).append(reason)
    return [
        Cell(Case(method, name_of(answer)), answer, tuple(why)) for (method, answer), why in reasons.items()
    ]


def faults(wire: Wire) -> dict[Case, Fault]:
    """Return all that nodes of a wire are told: the cells of the dialect, and CONTROLS."""
    made: dict[Case, Fault] = {}
    controls = GRPC_CONTROLS if wire.grpc else CONTROLS
    for method in Method:
        if method.kind is not Kind.LEAVE:  # a node that leaves asks once and hardly listens
            made.update({Case(method, name): fault for name, fault in controls.items()})
    for name in ("cut", "other type"):
        # A node that sends two objects at a time has sent both or one of them when it gives up: chance.
        made.pop(Case(Method.PUSH_OBJECT, name), None)
    for cell in cells(wire):
        made[cell.case] = partial(_refuse, cell.answer, cell.reasons[0])
    return made


async def _refuse(answer: Answer, reason: Reason, _: Right) -> Reply:
    if isinstance(answer, Hold):
        await asyncio.sleep(HOLD_SECONDS)
    raise Refusal(reason)


async def _status(code: int, _: Right) -> Reply:
    return http(code, b"text/plain", b"no")


async def _body(content_type: bytes, body: bytes, _: Right) -> Reply:
    return http(200, content_type, body)


async def _other_type(right: Right) -> Reply:
    reply = await right()
    reply.metadata = [(b"content-type", CONTENT_TYPE + b"; charset=utf-8")]
    return reply


async def _cut(right: Right) -> Reply:
    reply = await right()
    data = reply.payload.data or b""
    half = data[: len(data) // 2] or b"\n"
    payload = Payload(body=_Half(half), size=len(half) + 1)
    return Reply(payload, Source.UPSTREAM, metadata=reply.metadata)


class _Half:
    """A body that breaks off after its first piece."""

    def __init__(self, piece: bytes) -> None:
        self._pieces = [piece]

    async def read(self) -> bytes:
        if self._pieces:
            return self._pieces.pop()
        raise Refusal(Reason.UPSTREAM_BAD_ANSWER, "broke off")

    def close(self) -> None:
        pass


async def _drop(_: Right) -> Reply:
    raise NodeGone  # there is nobody to answer, so the wire closes the connection


#: What may come from a SuperLink in trouble, or from a general proxy before it.
CONTROLS: dict[str, Fault] = {
    **{str(code): partial(_status, code) for code in (403, 404, 413, 429, 500, 502, 503, 504)},
    "empty": partial(_body, CONTENT_TYPE, b""),
    "html": partial(_body, b"text/html", _PAGE),
    "garbage": partial(_body, CONTENT_TYPE, b"\xff" * 9),
    "other type": _other_type,
    "cut": _cut,
    "drop": _drop,
}

#: The same for gRPC: statuses by their names. The wire translates HTTP's.
GRPC_CONTROLS: dict[str, Fault] = {
    **{code_of(code): partial(_status, code) for code in (400, 403, 404, 409, 412, 418, 429, 500, 501, 503)},
    "empty": CONTROLS["empty"],
    "garbage": CONTROLS["garbage"],
}
