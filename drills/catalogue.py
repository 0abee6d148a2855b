"""The drills: what is done to a federation in the middle of a run."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from signal import SIGCONT, SIGSTOP
from typing import Final

from drills.faults import Fault
from drills.field import Field
from drills.flood import HEARTBEATS, Copies, flood
from drills.matrix import Edge, Needs, Setup
from drills.strain import SlowReader, count_answered, count_closed, half_handshakes, half_requests
from relay.call import Wire
from relay.demo.processes import FederationError, wait_ready
from relay.fleet import Method

STOPPED_SECONDS: Final = 40.0
CLOSED_SECONDS: Final = 20.0
ALL_SECONDS: Final = 8.0  # every call meets the fault
SHARE_SECONDS: Final = 10.0  # then a share of them does
SHARE: Final = 1 / 3
DOWN_SECONDS: Final = 5.0
APART_SECONDS: Final = 4.0
ADDRESS_SECONDS: Final = 12.0
BREAKER_SECONDS: Final = 20.0
RETURN_SECONDS: Final = 8.0  # an address is left out for 5 s at first
CLIENTS: Final = 200
OBJECTS_SECONDS: Final = 20.0
STRAIN_SECONDS: Final = 20.0
SLOW_SECONDS: Final = 40.0
CALLS_AT_ONCE: Final = 2000
SLOW_LEAST_SECONDS: Final = 25.0  # a node's heartbeats are at most 22.5 s apart
CAPTURE_SECONDS: Final = 60.0
NODE_CUT_SECONDS: Final = 60.0
MESSAGES_CUT: Final = 4
AGAIN_SECONDS: Final = 20.0
REDELIVERED: Final = "message handed out again"
BIG: Final = 4_000_000  # bytes of an object that no buffer on its way holds whole


EVERYWHERE: Final = Needs()
CALLS: Final = Needs(calls=True)


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill.

    Attributes:
        name: what people call it.
        about: what is done.
        act: does it, in the middle of a run, and undoes it; returns what is worth knowing about it.
        needs: where it makes sense.
        may_fail: why the run in which it is done may fail; "" if it may not. Nodes must live in any case.
        noise: text of the errors that the relay's log should have after it.
        patience: seconds that a ServerApp waits for the replies of one train or evaluate.
    """

    name: str
    about: str
    act: Callable[[Field], str]
    needs: Needs = EVERYWHERE
    may_fail: str = ""
    noise: str = ""
    patience: float = 60.0


def _stop_superlink(field: Field) -> str:
    field.federation.superlink.send(SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    field.federation.superlink.send(SIGCONT)
    return ""


def _restart_superlink(field: Field) -> str:
    start = time.monotonic()
    # The proxy would accept connections for a SuperLink that is not there.
    field.proxy.set(Fault.REFUSED)
    field.federation.superlink.kill()
    time.sleep(DOWN_SECONDS)
    field.federation.superlink.start()
    wait_ready([field.federation.superlink])
    field.proxy.set(Fault.NONE)
    return f"away for {time.monotonic() - start:.0f} s"


def _close_port(field: Field) -> str:
    field.proxy.set(Fault.REFUSED)
    time.sleep(CLOSED_SECONDS)
    field.proxy.set(Fault.NONE)
    return ""


def _disturb(fault: Fault) -> Callable[[Field], str]:
    def act(field: Field) -> str:
        before = field.proxy.hits[fault]
        field.proxy.set(fault)
        time.sleep(ALL_SECONDS)
        field.proxy.set(fault, SHARE)
        time.sleep(SHARE_SECONDS)
        field.proxy.set(Fault.NONE)
        return f"{field.proxy.hits[fault] - before} calls met it"

    return act


def _about(fault: Fault) -> str:
    return f"calls are {fault.value}: all for {ALL_SECONDS:.0f} s, a third for {SHARE_SECONDS:.0f} s"


def _kill_workers(field: Field) -> str:
    killed = []
    for _ in range(2):
        field.wait_for_objects(OBJECTS_SECONDS)
        busiest = max(field.workers(), key=lambda worker: len(worker.net_connections("tcp4")))
        busiest.kill()
        killed.append(str(busiest.pid))
        time.sleep(APART_SECONDS)
    return f"pids {' and '.join(killed)}"


def _reload(field: Field) -> str:
    for _ in range(3):
        field.wait_for_objects(APART_SECONDS)
        field.hang_up()
        time.sleep(APART_SECONDS)
    return ""


def _restart_relay(field: Field) -> str:
    start = time.monotonic()
    field.restart_relay()
    return f"away for {time.monotonic() - start:.0f} s"


def _reload_nginx(field: Field) -> str:
    assert field.edge is not None
    for _ in range(3):
        field.wait_for_objects(APART_SECONDS)
        field.edge.reload()
        time.sleep(APART_SECONDS)
    return ""


def _kill_addresses(field: Field) -> str:
    assert field.second_proxy is not None
    since = time.time()
    for proxy in (field.proxy, field.second_proxy):
        field.wait_for_objects(OBJECTS_SECONDS)
        proxy.set(Fault.REFUSED)
        time.sleep(ADDRESS_SECONDS)
        proxy.set(Fault.NONE)
        time.sleep(RETURN_SECONDS)
    ejected = sum(
        line.at > since and line.event == "upstream address ejected" for line in field.relay_log.read()
    )
    return f"addresses were left out {ejected} times"


def _open_breaker(field: Field) -> str:
    since, before = time.time(), field.proxy.hits[Fault.STATUS_503]
    field.proxy.set(Fault.STATUS_503)
    time.sleep(BREAKER_SECONDS)
    field.proxy.set(Fault.NONE)
    asked = field.proxy.hits[Fault.STATUS_503] - before
    closed = field.wait_for(
        lambda line: line.event == "circuit breaker changed" and line.fields["to"] == "closed",
        CLOSED_SECONDS,
        since=since,
    )
    opened = sum(line.at > since and line.event == "circuit breaker opened" for line in field.relay_log.lines)
    return f"opened {opened} times, {'closed' if closed else 'not closed'}, {asked} calls met the outage"


def _read_slowly(field: Field) -> str:
    # The proof that comes with a call is good for 300 s, so a copy of a node's call is a call, too.
    request = field.proxy.capture(Method.PULL_OBJECT.path.encode(), BIG, CAPTURE_SECONDS)
    reader = SlowReader(field.entry, field.as_node(request), grpc=field.configuration.wire.grpc)
    field.not_nodes.add(reader.request_id)
    time.sleep(SLOW_SECONDS)
    ended = field.find(
        lambda line: line.fields.get("request_id") == reader.request_id and "outcome" in line.fields
    )
    reader.close()
    read = f"{reader.read} of {reader.size} bytes in {SLOW_SECONDS:.0f} s, status {reader.status}"
    if ended is None:
        return f"{read}; the relay was still at it"
    return f"{read}; the relay's part was over after {ended.fields['ms'] / 1000:.0f} s"


def _cut_nodes(field: Field) -> str:
    proxy = field.node_proxy
    assert proxy is not None
    since, end = time.time(), time.monotonic() + NODE_CUT_SECONDS
    if field.configuration.wire.grpc:  # what nodes are told cannot be read, but what the relay is told can
        field.proxy.on_message = proxy.cut_next
    else:
        proxy.set(Fault.CUT_MESSAGE)
    while proxy.hits[Fault.CUT_MESSAGE] < MESSAGES_CUT and time.monotonic() < end:
        time.sleep(0.1)
    field.proxy.on_message = None
    proxy.set(Fault.NONE)
    cut = proxy.hits[Fault.CUT_MESSAGE]
    if not cut:
        raise TimeoutError("no node was given a message")
    again, end = 0, time.monotonic() + AGAIN_SECONDS
    while again < cut and time.monotonic() < end:
        time.sleep(0.1)
        again = sum(line.event == REDELIVERED and line.at > since for line in field.relay_log.read())
    return f"{cut} answers with a message were lost, {again} messages handed out again"


def _slow_superlink(field: Field) -> str:
    request = field.proxy.capture(Method.PULL_OBJECT.path.encode(), 1, CAPTURE_SECONDS)
    copies = Copies(request, CALLS_AT_ONCE, userinfo=field.keys[0] if field.keys else "")
    field.not_nodes |= {call.request_id for call in copies.calls}
    since = time.time()
    field.proxy.set(Fault.SLOW)
    came = asyncio.run(flood(field.entry, field.configuration.wire, copies))
    time.sleep(max(0.0, since + SLOW_LEAST_SECONDS - time.time()))  # each node sends a heartbeat in it
    field.proxy.set(Fault.NONE)
    outcomes = Counter(
        line.fields["outcome"]
        for line in field.relay_log.read()
        if line.at > since
        and line.event == "call"
        and line.fields["method"] == Method.SEND_NODE_HEARTBEAT.rpc
        and line.fields["request_id"] not in field.not_nodes
    )
    if set(outcomes) != {"ok"}:
        raise FederationError("the relay", f"answered the nodes' heartbeats with {dict(outcomes)}; {came}")
    return f"{came}; the nodes' own heartbeats: {outcomes['ok']} ok"


def _half_requests(field: Field) -> str:
    with half_requests(field.entry, field.configuration.wire, CLIENTS) as clients:
        time.sleep(STRAIN_SECONDS)
        if field.configuration.wire.grpc:  # its server speaks first
            closed = count_closed(clients)
            return f"{len(clients)} clients, of which {closed} were closed in {STRAIN_SECONDS:.0f} s"
        return _strained(clients)


def _half_handshakes(field: Field) -> str:
    with half_handshakes(field.entry, CLIENTS) as clients:
        time.sleep(STRAIN_SECONDS)
        return _strained(clients)


def _strained(clients: Sequence[socket.socket]) -> str:
    seconds = f"in {STRAIN_SECONDS:.0f} s"
    return f"{len(clients)} clients, of which {count_answered(clients)} were answered or closed {seconds}"


_HEARTBEAT_LOST: Final = (
    "a refused connection ends the heartbeats of a node of flwr <= 1.32, if one falls into the gap"
)
_FROZEN: Final = (
    "the SuperLink gives up a node after 60 s without a heartbeat, and the poll that it was at may have taken"
    " a message with it"
)
_OBJECT_LOST: Final = "a node gives up a message whose object it is refused, with the relay or without"
_ANSWER_LOST: Final = (
    "the SuperLink gives a message out once, and the answer with it may be the one that is cut before the"
    " relay has it"
)
_KILLED: Final = "a killed worker may take a message with it that the SuperLink gives out once"

_ALL: Final = (
    Drill(
        "superlink-stopped",
        f"the SuperLink is frozen for {STOPPED_SECONDS:.0f} s",
        _stop_superlink,
        may_fail=_FROZEN,
        patience=90.0,
    ),
    Drill(
        "superlink-restarted",
        "the SuperLink is killed and started again with its database; the ServerApp lives on",
        _restart_superlink,
        patience=120.0,
    ),
    Drill(
        "superlink-restarted-inside",
        "the same, with a ServerApp that dies with it",
        _restart_superlink,
        Needs(setup=Setup.INSIDE),
        may_fail="the ServerApp dies with its SuperLink",
        patience=20.0,
    ),
    Drill(
        "upstream-port-closed",
        f"for {CLOSED_SECONDS:.0f} s the SuperLink's port is closed",
        _close_port,
        may_fail=_ANSWER_LOST,
    ),
    Drill(
        "breaker-opens",
        f"for {BREAKER_SECONDS:.0f} s all calls are answered with 503: one at a time asks, the others wait",
        _open_breaker,
        CALLS,
    ),
    Drill(
        "pool-address-dies",
        f"each of two addresses of the SuperLink is dead for {ADDRESS_SECONDS:.0f} s, in turn",
        _kill_addresses,
        Needs(setup=Setup.TWO_WAYS),
    ),
    Drill(
        "superlink-slow",
        f"{CALLS_AT_ONCE} calls at once, of which one in {HEARTBEATS} is a heartbeat; all calls are"
        f" {Fault.SLOW.value}",
        _slow_superlink,
        CALLS,
        patience=120.0,
    ),
    Drill("upstream-500", _about(Fault.STATUS_500), _disturb(Fault.STATUS_500), CALLS, may_fail=_OBJECT_LOST),
    Drill("upstream-429", _about(Fault.STATUS_429), _disturb(Fault.STATUS_429), CALLS),
    Drill("upstream-garbage", _about(Fault.GARBAGE), _disturb(Fault.GARBAGE), CALLS),
    Drill("upstream-hangs", _about(Fault.HANG), _disturb(Fault.HANG), CALLS, patience=90.0),
    Drill("upstream-cuts", _about(Fault.CUT), _disturb(Fault.CUT), CALLS, may_fail=_ANSWER_LOST),
    Drill("object-cut", _about(Fault.CUT_LONG), _disturb(Fault.CUT_LONG), CALLS),
    Drill(
        "worker-killed",
        f"twice, {APART_SECONDS:.0f} s apart: SIGKILL to the relay's worker with the most connections",
        _kill_workers,
        may_fail=_KILLED,
        noise="was sent SIGKILL",
    ),
    Drill("reload-three-times", "three SIGHUPs to the relay, some seconds apart", _reload),
    Drill(
        "relay-restarted",
        "SIGTERM to the relay; when it has ended, it is started again",
        _restart_relay,
        Needs(not_direct=((Wire.REST_V0, _HEARTBEAT_LOST),)),
    ),
    Drill("nginx-reloaded", "nginx reloads three times", _reload_nginx, Needs(edge=Edge.NGINX)),
    Drill("slow-reader", "a client takes a byte a second of an object", _read_slowly, CALLS),
    Drill(
        "node-cut",
        "the connection of a node is reset when the relay has just answered its pull with a message",
        _cut_nodes,
        Needs(readable=True, calls=True, setup=Setup.CUTTABLE),
    ),
    Drill("half-requests", f"{CLIENTS} clients send half of a call and wait", _half_requests),
    Drill(
        "half-handshakes",
        f"{CLIENTS} clients send half of a TLS hello and wait",
        _half_handshakes,
        Needs(tls=True),
    ),
)
DRILLS: Final[Mapping[str, Drill]] = {drill.name: drill for drill in _ALL}

#: The most telling ones, for `--quick`.
QUICK: Final = (
    "superlink-restarted",
    "upstream-port-closed",
    "object-cut",
    "worker-killed",
    "reload-three-times",
    "relay-restarted",
)
