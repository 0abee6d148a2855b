"""Hand a message out again whose first answer its node did not get.

A SuperLink hands each message out once. If the answer is lost on its way to the node, or the node fails to
fetch an object of the message and gives it up, the ServerApp waits for a reply that never comes. So an answer
to pull-messages that carries a message is kept until the message has certainly arrived. If its node pulls
again before, and the SuperLink has nothing else for it, the node gets the same answer.

When a second delivery is right. The main loop of a SuperNode is one thread (`start_client_internal.py` of
flwr 1.32.1, 1.39.0, 1.41.0 and 1.42.0): it pulls; fetches run, app and objects; confirms; waits for the reply
of the ClientApp; pushes it; and only then pulls again. A repeat after a transport error (`retry_invoker`)
gives the earlier connection up. So a node that pulls

  - has confirmed and answered its last message: confirm-message-received carries the id of the message, the
    reply says `reply_to_message_id`. Either of them, once the SuperLink has accepted it, ends the keeping.
    (An app that the node does not trust is answered with an error without a confirmation.);
  - or has given it up (`_pull_and_store_message` deletes message and objects, and returns None);
  - or never got it.

In the last two cases a second delivery is what the node needs. The relay may take the first case for one of
them when it has not seen the confirmation: it passed another host, or the answer to it was lost. So the
SuperLink is asked before: a confirmation deletes the object of the message, whose id is the message id
(`confirm_message_received` in the handlers of 1.32.1, 1.39.0 and 1.42.0), and pull-object tells, with the
proof that this very pull carries, whether it is there. What it refuses now, because the run has ended for
example, it would refuse the node. So a message that was confirmed is never handed out again, and a ClientApp
with a state advances twice only if the SuperLink never accepted the confirmation of a message that was worked
on, and its reply passed another host.

Who gets it. The pull goes to the SuperLink first, and only a 200 of its own shows that this caller is the
node: an HTTP v1 SuperLink checks the signature, and answers 401 to a stranger. A REST SuperLink checks
nothing; a node id is 64 random bits, and who knows it can take the messages from the SuperLink itself. If the
listener asks for credentials, the identity must be the same as at the first delivery. What ends the keeping
must have been accepted by the SuperLink, too, so that a forged call of a stranger does not.

What comes first. A message that the SuperLink has just handed out is passed on at once, also if an older one
is kept: it is then never in the relay's memory alone. The older one follows when there is nothing else.

The end. A message is given up after `deliveries` of them, with its TTL, and when the SuperLink would call its
node unavailable: 2 heartbeat intervals after the last heartbeat that it accepted, or at once when the node
has left. The SuperLink tells the ServerApp so then, and refuses a reply that comes later. A delivery that
could not even be written is none. While one is being written nobody else gets the message.

Several hosts. With Redis a message is handed out again by any of them, as often in all (`stores/kept_hosts`).
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import structlog
from prometheus_client import Counter

from relay.call import Call, Ending, Payload, Reply, Source, View
from relay.fleet import Method
from relay.refusal import Reason, Refusal
from relay.stores.kept import Claim, KeptAnswers, Outcome
from relay.stores.kept_hosts import KeptOnHosts
from relay.wireformat import TruncatedError, double, encode_bytes, encode_uint, fields, uint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.fleet import Ids
    from relay.pipeline import Handler
    from relay.stores.host import HostTable
    from relay.stores.kept_hosts import Redis
    from relay.stores.records import HostRecords

log = structlog.get_logger("relay.policies.redelivery")

OUTCOMES = Counter(
    "relay_redelivery",
    "Pull answers that were kept for another delivery, by what became of them",
    ["outcome"],
)

_METHODS = frozenset(
    {
        Method.ACTIVATE_NODE,
        Method.DEACTIVATE_NODE,
        Method.UNREGISTER_NODE,
        Method.SEND_NODE_HEARTBEAT,
        Method.PULL_MESSAGES,
        Method.PUSH_MESSAGES,
        Method.CONFIRM_MESSAGE_RECEIVED,
    }
)
#: The metadata of a reply stand before its object tree. An error in it may be long.
_HEAD_BYTES = 16 * 1024
#: A SuperLink gives a node up after this many heartbeat intervals (HEARTBEAT_PATIENCE in all versions).
_PATIENCE = 2
#: Seconds between two heartbeats, as long as a node was not heard to say another number, and the most.
_INTERVAL = 30.0
_LONGEST_INTERVAL = 1800.0
#: Seconds for the question whether a message was confirmed, repeats included.
_QUESTION_SECONDS = 5.0
_NOBODY = bytes(8)


class _Message(NamedTuple):
    """What matters of a message.

    Attributes:
        id, run_id: as in its metadata.
        left: seconds until its TTL is over.
    """

    id: str
    run_id: int
    left: float


class Redelivery:
    """Keeps pull answers that carry a message, and hands them out again."""

    name: ClassVar[str] = "redelivery"
    sees: ClassVar[View] = View.PEEK

    def __init__(
        self,
        *,
        enabled: bool,
        max_size: int,
        deliveries: int,
        records: HostRecords,
        table: HostTable,
        redis: Redis | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep answers if `enabled`, else leave no trace in the chain.

        Args:
            enabled: whether anything is kept.
            max_size: longest answer that is kept, in bytes.
            deliveries: how often a message is handed out, the first time included.
            records: where answers are kept, of `kept.PIECE` bytes each.
            table: until when the SuperLink takes a node for available.
            redis: where answers are kept for other hosts, too.
            now: seconds of a clock that all workers of the host share.
        """
        self._enabled = enabled
        self._max_size = max_size
        self._deliveries = deliveries
        here = KeptAnswers(records, _tell, now)
        self._kept = here if redis is None else KeptOnHosts(here, redis, table, _tell, now)
        self._table = table
        self._now = now

    def start(self) -> None:
        """Listen for what other hosts keep; to be called in the event loop."""
        if isinstance(self._kept, KeptOnHosts):
            self._kept.start()

    async def close(self) -> None:
        """Tell other hosts what they do not know yet."""
        if isinstance(self._kept, KeptOnHosts):
            await self._kept.close()

    def applies(self, method: Method) -> bool:
        """What hands messages out, what shows that one has arrived, and what shows that a node is there."""
        return self._enabled and method in _METHODS

    def handle(self, call: Call, next: Handler) -> Awaitable[Reply]:  # noqa: A002
        """Pass the call on; an empty pull may be answered with what is kept. Raises what `next` raises."""
        return (self._pull if call.method is Method.PULL_MESSAGES else self._watch)(call, next)

    async def _watch(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        """Pass a call on that tells something of a message or a node, once the SuperLink has accepted it."""
        head = await call.payload.peek(_HEAD_BYTES)
        ids = await call.ids()
        reply = await next(call)
        if _accepted(reply):
            self._learn(call, head, ids, reply)
        return reply

    # -- pull-messages ------------------------------------------------------------------------------

    async def _pull(self, call: Call, next: Handler) -> Reply:  # noqa: A002
        ids = await call.ids() if call.payload.data is None else call.ids_at_hand()
        node = ids.node_id
        reply = await next(call)
        if node is None or not _accepted(reply):
            return reply
        body = reply.payload.data
        if body is None:
            body = await self._awaited(reply.payload)
        if body:
            self._keep(call, node, body)
        elif body is not None and self._kept.has(node):
            return await self._again(call, next, node) or reply
        return reply

    async def _awaited(self, payload: Payload) -> bytes | None:
        """Return a body that is still arriving; None if it is too long, and it can still be passed on."""
        if payload.size is None or payload.size <= self._max_size:
            body = await payload.peek(self._max_size + 1)
            if len(body) <= self._max_size:
                return await payload.read(self._max_size)
        _tell(Outcome.TOO_LARGE)
        return None

    def _keep(self, call: Call, node: int, body: bytes) -> None:
        message = _message(body, node)
        if message is None or not message.left > 0:  # it may be no number
            return
        if len(body) > self._max_size:
            _tell(Outcome.TOO_LARGE)
            return
        now = self._now()
        online = self._table.get(_online_key(node))
        token = self._kept.keep(
            node,
            body,
            message=message.id,
            holder=_holder(call),
            expires=now + message.left,
            online=now + _PATIENCE * _INTERVAL if online is None else online / 1000,
        )
        self._settle_at_end(call, node, token)

    async def _again(self, call: Call, next: Handler, node: int) -> Reply | None:  # noqa: A002
        """Return what is kept for the node and was not confirmed; None if there is nothing."""
        holder = _holder(call)
        while (claim := await self._claim(node, holder)) is not None:
            message = _message(claim.body, node)
            if message is None:
                self._kept.take(node, claim.token, Outcome.EVICTED)
                continue
            try:
                why = await self._ended(call, next, node, message)
            except BaseException as error:
                self._kept.settle(node, claim.token, delivered=False)
                if isinstance(error, Refusal):
                    return None  # the SuperLink cannot be asked; the node pulls again in 3 s
                raise
            if why is None:
                return self._delivery(call, node, claim, message)
            self._kept.take(node, claim.token, why)
        return None

    async def _claim(self, node: int, holder: bytes) -> Claim | None:
        if isinstance(self._kept, KeptOnHosts):
            return await self._kept.claim(node, holder, self._deliveries)
        return self._kept.claim(node, holder, self._deliveries)

    async def _ended(self, call: Call, next: Handler, node: int, message: _Message) -> Outcome | None:  # noqa: A002
        """Ask the SuperLink, with the proof of this pull, whether the message is over, and how.

        Raises:
            Refusal: it gave no answer that means anything.
        """
        try:
            reply = await next(self._question(call, node, message))
        except Refusal as refusal:
            # 500 is what a SuperLink says of a run that it does not know; another status is somebody else's.
            if refusal.reason is Reason.UPSTREAM_REJECTED and refusal.status in (403, 500):
                return Outcome.REFUSED
            raise
        try:
            if reply.status == 200:
                # found is the first field; the content comes last and is not wanted
                found = uint(await reply.payload.peek(2), 1)
                return None if found else Outcome.CONFIRMED
            if reply.status == 403:
                return Outcome.REFUSED
            raise Refusal(Reason.UPSTREAM_BAD_ANSWER, by=self.name, status=reply.status)
        finally:
            reply.payload.close()

    def _question(self, call: Call, node: int, message: _Message) -> Call:
        question = (
            encode_bytes(1, encode_uint(1, node))
            + encode_uint(2, message.run_id)
            + encode_bytes(3, message.id.encode())
        )
        asking = call.beside(Method.PULL_OBJECT, question)
        asking.deadline = min(call.deadline, time.monotonic() + _QUESTION_SECONDS)
        return asking

    def _delivery(self, call: Call, node: int, claim: Claim, message: _Message) -> Reply:
        self._settle_at_end(call, node, claim.token)
        _tell(Outcome.REDELIVERED)
        log.info(
            "message handed out again",
            run_id=message.run_id,
            node_id=node,
            delivery=claim.delivery,
            request_id=call.request_id,
        )
        return Reply(Payload(claim.body), Source.LOCAL)

    def _settle_at_end(self, call: Call, node: int, token: bytes) -> None:
        def ended(_: Call, ending: Ending) -> None:
            self._kept.settle(node, token, delivered=ending.outcome != "node_gone")

        call.on_end(ended)

    # -- what other calls tell ----------------------------------------------------------------------

    def _learn(self, call: Call, head: bytes, ids: Ids, reply: Reply) -> None:
        if call.method is Method.ACTIVATE_NODE:
            node = uint(reply.payload.data or b"", 1)
            if node:
                self._is_available(node, head)
            return
        node = ids.node_id
        if node is None:
            return
        match call.method:
            case Method.SEND_NODE_HEARTBEAT:
                if uint(reply.payload.data or b"", 1):
                    self._is_available(node, head)
            case Method.CONFIRM_MESSAGE_RECEIVED:
                self._drop(call, node, [ids.object_id or ""], Outcome.CONFIRMED)
            case Method.PUSH_MESSAGES:
                self._drop(call, node, _answered(head), Outcome.CONFIRMED)
            case _:
                self._drop(call, node, None, Outcome.EXPIRED)

    def _is_available(self, node: int, request: bytes) -> None:
        interval = double(request, 2) or _INTERVAL
        if not 0 < interval < _LONGEST_INTERVAL:  # it may be no number
            interval = _LONGEST_INTERVAL
        until = self._now() + _PATIENCE * interval
        self._table.put(_online_key(node), int(until * 1000))
        if self._kept.has(node):
            self._kept.available(node, until)

    def _drop(self, call: Call, node: int, messages: list[str] | None, why: Outcome) -> None:
        if self._kept.has(node):
            self._kept.drop(node, _holder(call), messages, why)


def _tell(outcome: Outcome) -> None:
    OUTCOMES.labels(outcome.value).inc()


def _accepted(reply: Reply) -> bool:
    """Return whether the SuperLink itself has accepted the call."""
    return reply.status == 200 and reply.source is Source.UPSTREAM


def _holder(call: Call) -> bytes:
    identity = call.identity
    if identity is None:
        return _NOBODY
    return hashlib.sha256(f"{identity.tenant}\0{identity.name}".encode()).digest()[:8]


def _online_key(node: int) -> bytes:
    return b"online:" + node.to_bytes(8, "big")


def _message(body: bytes, node: int) -> _Message | None:
    """Return the message in a PullMessagesResponse, of which a node takes the first; None if it has none."""
    metadata = _metadata(body)
    if not metadata:
        return None
    found: dict[int, int | bytes] = {}
    try:
        found.update(fields(metadata[0]))
    except TruncatedError:
        return None
    run_id, message_id, to = found.get(1, 0), found.get(2, b""), found.get(4)
    if not isinstance(run_id, int) or not isinstance(message_id, bytes) or to != node:
        return None
    ends = (double(metadata[0], 9) or 0.0) + (double(metadata[0], 7) or 0.0)
    return _Message(message_id.decode("utf-8", "replace"), run_id, ends - time.time())


def _answered(request: bytes) -> list[str]:
    """Return the ids of the messages that a PushMessagesRequest replies to; its end may be missing."""
    found = []
    for metadata in _metadata(request):
        try:
            replied = dict(fields(metadata)).get(5)
        except TruncatedError:
            continue
        if isinstance(replied, bytes):
            found.append(replied.decode("utf-8", "replace"))
    return found


def _metadata(data: bytes) -> list[bytes]:
    """Return the metadata of the messages in a PullMessagesResponse or PushMessagesRequest."""
    found = []
    try:
        for number, message in fields(data):
            if number == 2 and isinstance(message, bytes):
                metadata = dict(fields(message)).get(1)
                if isinstance(metadata, bytes):
                    found.append(metadata)
    except TruncatedError:
        pass
    return found
