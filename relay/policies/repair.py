"""Mend what a lost answer or a crashed node leaves behind.

A lost answer is one that the SuperLink gave and nobody got: the connection broke, or the time was up. The
SuperLink has then done what was asked, and refuses to do it again. Three cases would cost a message or a
node, and in each of them the truth can be had (facts of flwr 1.42: docs/flower-compatibility.md):

register-node: after an attempt that ended ambiguously, "public key already in use" (412, code 23; only these
words before flwr 1.33, and a 500 if it speaks REST) means that the attempt had arrived. Nodes ignore the
content of the answer, and over HTTP the SuperLink has checked the signature before it says so.

push-object: `stored=false` for an object that can be pulled means that it was stored before. `stored=true`
is then the truth; told `false`, the node would drop its whole reply. A 500 is passing or lasting (a run that
the SuperLink does not know), and nothing in it says which: the node is told to come back with the object for
two minutes of nothing but that, and then what the SuperLink says, by which it gives its message up.

activate-node: a node that crashed and comes back, or whose answer was lost, is refused (412, code 2004)
while the SuperLink holds it ONLINE, and would exit. It is deactivated first, with the proof that this
very call carries, if its node id is known on this host from an earlier activation. If not, it is told to come
back for as long as an ONLINE may last (2 heartbeat intervals of 30 s).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import TYPE_CHECKING, ClassVar

import structlog
from prometheus_client import Counter

from relay.call import Call, Payload, Reply, Source, View
from relay.fleet import MAX_REQUEST, PEEK_BYTES, Kind, Method, peek
from relay.refusal import Reason, Refusal
from relay.wireformat import TruncatedError, encode_bytes, encode_uint, fields, uint

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.pipeline import Handler
    from relay.stores.host import HostTable

log = structlog.get_logger("relay.policies.repair")

REPAIRS = Counter("relay_repairs", "Lost answers and crashed nodes that were mended, by method", ["method"])

#: Codes of the SuperLink's errors, and what gRPC SuperLinks say that have none (flwr 1.32.1
#: `common/constant.py`, `server/superlink/fleet/message_handler/message_handler.py`).
_KEY_IN_USE = (23, re.compile(rb"Public key already in use"))
_ACTIVATION_FAILED = (2004, re.compile(rb"SuperNode with node ID -?\d+ could not be activated\."))
_STORED = encode_uint(1, 1)
_FAILING = b"failing:"
#: Two times, in seconds, are one number of 64 bits.
_TWO = 1 << 32
_AMBIGUOUS = frozenset({Reason.UPSTREAM_DOWN, Reason.UPSTREAM_TIMEOUT, Reason.UPSTREAM_BAD_ANSWER})

#: Seconds between two attempts to push an object that the SuperLink does not hold.
PAUSE = 1.0
#: A register or activate request holds a public key, about 215 bytes of PEM, and a number.
_JOIN_BYTES = MAX_REQUEST[Kind.JOIN]
#: An error of a SuperLink is a short JSON object.
_ERROR_BYTES = 16 * 1024
#: A SuperLink holds a silent node ONLINE for 60 s; a refusal that comes later means something else.
_ONLINE_SECONDS = 75
#: How long an object is given back to its node that the SuperLink fails on. A push session lives for 180 s.
_LASTING_SECONDS = 120
#: A node comes back with it within 20 s; who comes later than this begins anew.
_GAP_SECONDS = 60
#: How long an ambiguous registration, or a refused activation, is remembered.
_MEMORY_SECONDS = 600


class Repair:
    """Recognises the three cases and mends them."""

    name: ClassVar[str] = "repair"
    sees: ClassVar[View] = View.PEEK

    def __init__(
        self,
        *,
        lost_answers: bool,
        reactivate: bool,
        table: HostTable,
        rest: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Mend what is switched on.

        Args:
            lost_answers: of register-node and push-object.
            reactivate: let nodes in that the SuperLink still holds ONLINE.
            table: node ids by public key, and what happened to a key when.
            rest: the SuperLink speaks legacy REST, which has no status for a key that is in use.
            now: seconds of a clock that all workers of the host share.
        """
        self._lost_answers = lost_answers
        self._reactivate = reactivate
        self._table = table
        self._rest = rest
        self._now = now

    def applies(self, method: Method) -> bool:
        """The three methods, as far as they are switched on."""
        if method is Method.ACTIVATE_NODE:
            return self._reactivate
        return self._lost_answers and method in (Method.REGISTER_NODE, Method.PUSH_OBJECT)

    async def handle(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass the call on and mend what comes back. Raises the Refusal that could not be mended."""
        if call.method is Method.PUSH_OBJECT:
            return await self._push(call, next)
        key = _key(await call.payload.peek(_JOIN_BYTES + 1))
        if not key:
            return await next(call)
        if call.method is Method.REGISTER_NODE:
            return await self._register(call, next, key)
        return await self._activate(call, next, key)

    # -- register-node ------------------------------------------------------------------------------

    async def _register(self, call: Call, next: Handler, key: bytes) -> Reply:  # noqa: A002
        attempt = b"registering:" + key
        try:
            return await self._registered(call, await next(call), attempt)
        except Refusal as refusal:
            if self._in_use(refusal, attempt):
                return self._success(call)
            if not _is_ambiguous(refusal):
                raise
            if not (
                self._rest and refusal.status == 500
            ):  # or it would be its own reason, were it said twice
                self._remember(attempt)
        try:
            return await self._registered(call, await next(call), attempt)
        except Refusal as refusal:
            if self._in_use(refusal, attempt):
                return self._success(call)
            raise

    async def _registered(self, call: Call, reply: Reply, attempt: bytes) -> Reply:
        if reply.status == 412 and self._age(attempt) is not None and await _says(reply, *_KEY_IN_USE):
            return self._success(call)
        return reply

    def _in_use(self, refusal: Refusal, attempt: bytes) -> bool:
        """Return whether a REST SuperLink, which has no status for it, says that the key is in use."""
        return self._rest and refusal.status == 500 and self._age(attempt) is not None

    def _success(self, call: Call) -> Reply:
        REPAIRS.labels(call.method.rpc).inc()
        log.info("registration had arrived", request_id=call.request_id)
        return Reply(Payload(), Source.LOCAL)

    # -- push-object --------------------------------------------------------------------------------

    async def _push(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        head = await call.payload.peek(PEEK_BYTES)
        failing: float | None = None  # since when, without anything else in between
        while True:
            try:
                reply = await next(call)
            except Refusal as refusal:
                if not _is_ambiguous(refusal):
                    raise
                if await self._available(call, next, head):
                    return self._stored(call)
                failing = self._failing(call, refusal, head, failing)
                if failing is not None and self._now() - failing >= _LASTING_SECONDS:
                    log.warning("object given up, the SuperLink fails on it", request_id=call.request_id)
                    raise
                # Not stored: it is sent again, by us if it is at hand and in time, else by the node.
                if not call.payload.replayable or time.monotonic() + PAUSE > call.deadline:
                    if failing is not None:
                        self._table.put(_FAILING + head, int(failing) * _TWO + int(self._now()))
                    raise Refusal(
                        Reason.UPSTREAM_DOWN, refusal.detail, by=refusal.by, status=refusal.status
                    ) from refusal
                await asyncio.sleep(PAUSE)
                continue
            if reply.status == 200 and reply.payload.data is not None:
                stored = uint(reply.payload.data, 1)
                if not stored and await self._available(call, next, head):
                    return self._stored(call)
            return reply

    async def _available(self, call: Call, next: Handler, head: bytes) -> bool:  # noqa: A002
        """Ask the SuperLink, with this call's proof, whether it holds the object."""
        ids = peek(Method.PUSH_OBJECT, head)
        if ids.node_id is None or ids.run_id is None or not ids.object_id:
            return False
        question = (
            encode_bytes(1, encode_uint(1, ids.node_id))
            + encode_uint(2, ids.run_id)
            + encode_bytes(3, ids.object_id.encode())
        )
        try:
            reply = await next(call.beside(Method.PULL_OBJECT, question))
        except Refusal:
            return False
        try:
            # found and available are the first two fields; the content behind them is not wanted
            answer = await reply.payload.peek(4)
        except Refusal:
            return False
        finally:
            reply.payload.close()
        return reply.status == 200 and answer == encode_uint(1, 1) + encode_uint(2, 1)

    def _failing(self, call: Call, refusal: Refusal, head: bytes, known: float | None) -> float | None:
        """Return since when the SuperLink does nothing but fail on an object; None: it was away just now."""
        then = self._table.get(_FAILING + head) or 0
        if refusal.reason is not Reason.UPSTREAM_REJECTED:
            if then:
                self._table.put(_FAILING + head, 0)  # it may know better when it is back
            return None
        if known is not None:
            return known
        first, last = divmod(then, _TWO)
        return first if first and call.started - last <= _GAP_SECONDS else self._now()

    def _stored(self, call: Call) -> Reply:
        REPAIRS.labels(call.method.rpc).inc()
        log.info("object had been stored", request_id=call.request_id)
        return Reply(Payload(_STORED), Source.LOCAL)

    # -- activate-node ------------------------------------------------------------------------------

    async def _activate(self, call: Call, next: Handler, key: bytes) -> Reply:  # noqa: A002
        reply = await next(call)
        if reply.status == 200:
            self._learn(key, reply)
            return reply
        if reply.status != 412 or not await _says(reply, *_ACTIVATION_FAILED):
            return reply
        if await self._deactivated(call, next, key):
            reply = await next(call)
            self._learn(key, reply)
            return reply
        return self._come_back(reply, b"activating:" + key)

    async def _deactivated(self, call: Call, next: Handler, key: bytes) -> bool:  # noqa: A002
        node_id = self._table.get(key)
        if node_id is None:
            return False
        try:
            reply = await next(call.beside(Method.DEACTIVATE_NODE, encode_uint(1, node_id)))
        except Refusal:
            return False
        reply.payload.close()
        if reply.status == 200:
            REPAIRS.labels(call.method.rpc).inc()
            log.info("node was still online, deactivated", node_id=node_id, request_id=call.request_id)
        return reply.status == 200

    def _come_back(self, reply: Reply, attempt: bytes) -> Reply:
        age = self._age(attempt)
        if age is None:
            self._remember(attempt)
        elif age > _ONLINE_SECONDS:
            return reply  # it is not that; the node shall say so and exit
        raise Refusal(Reason.UPSTREAM_DOWN, "not activated; perhaps still ONLINE", by="repair")

    def _learn(self, key: bytes, reply: Reply) -> None:
        node_id = uint(reply.payload.data or b"", 1)
        if reply.status == 200 and key and node_id:
            self._table.put(key, node_id)

    # -- memory -------------------------------------------------------------------------------------

    def _remember(self, what: bytes) -> None:
        self._table.put(what, int(self._now() * 1000))

    def _age(self, what: bytes) -> float | None:
        """Return the seconds since `what` was remembered; None if it was not, or long ago."""
        then = self._table.get(what)
        if then is None:
            return None
        age = self._now() - then / 1000
        return age if age <= _MEMORY_SECONDS else None


def _is_ambiguous(refusal: Refusal) -> bool:
    failed = refusal.reason is Reason.UPSTREAM_REJECTED and (refusal.status or 0) >= 500
    return refusal.sent and (failed or refusal.reason in _AMBIGUOUS)


def _key(request: bytes) -> bytes:
    """Return the public key of a node that joins: the last one, as protobuf has it. b"" if there is none."""
    key = b""
    try:
        for number, value in fields(request):
            if number == 1 and isinstance(value, bytes):
                key = value
    except TruncatedError:
        return b""
    return key if len(request) <= _JOIN_BYTES else b""


async def _says(reply: Reply, code: int, words: re.Pattern[bytes]) -> bool:
    """Return whether a SuperLink's error has this code, or is these words; the reply can be passed on."""
    body = await reply.payload.read(_ERROR_BYTES)
    try:
        error = json.loads(body)
    except ValueError:
        return words.fullmatch(body) is not None
    return isinstance(error, dict) and error.get("code") == code
