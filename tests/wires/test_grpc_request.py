"""How the head of a gRPC call, and what is here of its message, becomes a Call."""

from __future__ import annotations

import ipaddress
import re
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drills.http2 import message
from relay import dialect
from relay.call import Certificate, Wire
from relay.fleet import Kind, Method
from relay.limits import Limits
from relay.refusal import Reason, Refusal
from relay.wires.forwarded import Forwarding
from relay.wires.grpc_message import WHOLE
from relay.wires.grpc_request import Receiver, timeout
from relay.wires.http2_request import Head

if TYPE_CHECKING:
    from relay.call import Call, Metadata
    from relay.wires.http2_stream import Stream

REQUEST = b"\x0a\x02\x08\x07"
OWN = [(b"te", b"trailers"), (b"content-type", b"application/grpc")]


class Shown:
    def __init__(self, certificate: Certificate) -> None:
        self.certificate = certificate


class Connected:
    def __init__(self, peer: str, *, tls: bool, shown: Shown | None, excess: Refusal | None) -> None:
        self.peer, self.tls, self.shown, self.excess = peer, tls, shown, excess


class Asked:
    """A stream of which some bytes are here."""

    def __init__(self, fields: Metadata, here: bytes, connection: Connected, *, ended: bool) -> None:
        size = sum(len(name) + len(value) for name, value in fields)
        self.asked = Head(b"POST", b"/", fields, size, None)
        self.connection = connection
        self.ended = ended
        self._here = here

    def at_hand(self) -> bytes:
        return self._here


def call_of(
    *fields: tuple[bytes, bytes],
    method: Method = Method.PULL_MESSAGES,
    wire: Wire = Wire.GRPC,
    here: bytes = message(REQUEST),
    ended: bool = True,
    peer: str = "192.0.2.7",
    tls: bool = False,
    shown: Certificate | None = None,
    excess: Refusal | None = None,
    trusted: str | None = None,
    header: bytes = b"",
    withheld: frozenset[bytes] = frozenset(),
    bodies: int = 1 << 20,
    **limits: Any,
) -> Call:
    """Return the call that comes of these fields, beside those of every gRPC client."""
    forwarding = Forwarding([ipaddress.ip_network(trusted)] if trusted else [], header)
    receiver = Receiver(forwarding, Limits(dict.fromkeys(Method, bodies), **limits), 20.0, withheld)
    connection = Connected(peer, tls=tls, shown=Shown(shown) if shown else None, excess=excess)
    asked = Asked([*OWN, *fields], here, connection, ended=ended)
    return receiver.call(cast("Stream", asked), wire, method)


def values(call: Call, name: bytes) -> list[bytes]:
    return [value for key, value in call.metadata if key == name]


# -- metadata -------------------------------------------------------------------------------------------


def test_what_the_superlink_is_told_of_every_call() -> None:
    call = call_of((b"flwr-package-version", b"1.39.0"), (b"grpc-timeout", b"5S"))
    assert {name: value for name, value in call.metadata if name not in (b"forwarded", b"x-request-id")} == {
        b"flwr-package-version": b"1.39.0",
        b"content-type": b"application/protobuf",
        b"accept": b"application/protobuf",
        b"via": b"2 flwr-relay",
        b"x-forwarded-for": b"192.0.2.7",
        b"x-forwarded-proto": b"http",
    }
    assert len(dict(call.metadata)) == len(call.metadata), "nothing twice"


def test_an_encrypted_connection_is_told_of() -> None:
    assert values(call_of(tls=True), b"x-forwarded-proto") == [b"https"]


@pytest.mark.parametrize("name", [b"authorization", b"x-secret"])
def test_what_is_withheld_reaches_no_call(name: bytes) -> None:
    call = call_of((name, b"secret"), withheld=frozenset({b"authorization", b"x-secret"}))
    assert values(call, name) == []
    assert values(call_of((name, b"secret")), name) == [b"secret"]


@pytest.mark.parametrize(
    "claim",
    [
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"forwarded", b"for=203.0.113.9"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", b"else.example"),
        (b"x-forwarded-client-cert", b"Subject=CN=a"),
        (b"client-cert", b":MIIB:"),
    ],
)
def test_claims_of_a_stranger_are_neither_believed_nor_passed_on(claim: tuple[bytes, bytes]) -> None:
    call = call_of(claim)
    assert call.peer == "192.0.2.7"
    assert call.certificate is None
    assert not any(claim[1] in value for _, value in call.metadata)


def test_a_known_proxy_is_believed_however_many_fields_it_writes() -> None:
    fields = [(b"x-forwarded-for", b"203.0.113.9"), (b"x-forwarded-for", b"192.0.2.8")]
    call = call_of(*fields, (b"x-forwarded-proto", b"https"), trusted="192.0.2.0/24")
    assert call.peer == "203.0.113.9"
    assert values(call, b"x-forwarded-for") == [b"203.0.113.9, 192.0.2.8, 192.0.2.7"]
    assert values(call, b"x-forwarded-proto") == [b"https"]


def test_the_certificate_of_a_connection_is_the_calls() -> None:
    certificate = Certificate("CN=a")
    assert call_of(shown=certificate).certificate is certificate
    assert call_of().certificate is None


# -- ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [b"id-1", b"a:b.c_d", b"x" * 128])
def test_a_sound_request_id_is_kept(given: bytes) -> None:
    call = call_of((b"x-request-id", given))
    assert call.request_id.encode() == given
    assert values(call, b"x-request-id") == [given]


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"a,b", b"\xff"])
def test_any_other_is_replaced(given: bytes) -> None:
    call = call_of((b"x-request-id", given))
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", call.request_id)
    assert values(call, b"x-request-id") == [call.request_id.encode()]


def test_two_of_them_are_none() -> None:
    assert call_of((b"x-request-id", b"a"), (b"x-request-id", b"b")).request_id not in ("a", "b")


def test_no_two_calls_have_the_same() -> None:
    receiver = Receiver(Forwarding([]), Limits(), 20.0)
    other = Receiver(Forwarding([]), Limits(), 20.0)
    ids = [each.request_id() for each in (receiver, other) for _ in range(100)]
    assert len(set(ids)) == 200


# -- patience -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"4500m", 4.5),
        (b"5000000u", 5.0),
        (b"99999999n", 0.099999999),
        (b"0S", 0.0),
    ],
)
def test_a_timeout_is_read(said: bytes, seconds: float) -> None:
    assert timeout([*OWN, (b"grpc-timeout", said)]) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "said", [b"", b"S", b"5", b"123456789S", b"-1S", b"1.5S", b"1s", b" 1S", b"1S ", b"1S\n"]
)
def test_what_is_no_timeout_is_none(said: bytes) -> None:
    assert timeout([*OWN, (b"grpc-timeout", said)]) is None


@given(st.binary(max_size=12))
def test_no_timeout_whatever_is_an_error(said: bytes) -> None:
    seconds = timeout([(b"grpc-timeout", said)])
    assert seconds is None or seconds >= 0.0


PATIENCE = [
    *((Wire.GRPC, method, 5.0) for method in Method if method.kind is Kind.HEARTBEAT),
    (Wire.GRPC, Method.PULL_MESSAGES, dialect.HOLD_SECONDS),
    (Wire.GRPC, Method.GET_RUN, dialect.HOLD_SECONDS),
    (Wire.GRPC, Method.PUSH_MESSAGES, dialect.HOLD_SECONDS),
    (Wire.GRPC, Method.PUSH_OBJECT, 180.0),
    (Wire.GRPC, Method.PULL_OBJECT, 180.0),
    (Wire.GRPC_ADAPTER, Method.PULL_MESSAGES, dialect.HOLD_SECONDS),
    (Wire.GRPC_ADAPTER, Method.GET_RUN, 180.0),
    (Wire.GRPC_ADAPTER, Method.SEND_NODE_HEARTBEAT, 5.0),
]


@pytest.mark.parametrize(("wire", "method", "seconds"), PATIENCE)
def test_a_call_ends_before_its_node_gives_up(wire: Wire, method: Method, seconds: float) -> None:
    before = time.monotonic()
    call = call_of(method=method, wire=wire)
    assert before <= call.started <= time.monotonic()
    assert call.deadline - call.started == pytest.approx(0.95 * seconds)
    short = call_of((b"grpc-timeout", b"2S"), method=method, wire=wire)
    assert short.deadline - short.started == pytest.approx(0.95 * 2.0)
    long = call_of((b"grpc-timeout", b"9H"), method=method, wire=wire)
    assert long.deadline - long.started == pytest.approx(0.95 * seconds), "no node keeps it for hours"


@pytest.mark.parametrize(
    ("wire", "method", "seconds"), [each for each in PATIENCE if each[0].value != "grpc"]
)
def test_a_call_out_of_a_container_waits_as_its_method_does(
    wire: Wire, method: Method, seconds: float
) -> None:
    receiver = Receiver(Forwarding([]), Limits(), 20.0)
    asked = cast("Stream", Asked(OWN, b"", Connected("", tls=False, shown=None, excess=None), ended=False))
    call = receiver.call(asked, wire, Method.PUSH_OBJECT)
    before = time.monotonic()
    receiver.turns_out(call, asked, method, REQUEST)
    assert (call.method, call.payload.data) == (method, REQUEST)
    assert call.deadline - before == pytest.approx(0.95 * seconds, abs=0.1)


# -- what is wrong --------------------------------------------------------------------------------------


def fault_of(call: Call) -> Reason | None:
    return call.fault.reason if call.fault is not None else None


def test_a_sound_call_has_no_fault_and_its_message_at_hand() -> None:
    call = call_of()
    assert call.fault is None
    assert (call.payload.data, call.payload.size) == (REQUEST, len(REQUEST))


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ([(b"x-%d" % number, b"a") for number in range(9)], {"header_count": 10}),
        ([(b"x-long", b"a" * 95)], {"header_size": 100}),
        ([(b"x-%d" % number, b"a" * 50) for number in range(4)], {"header_size": 100, "head_size": 240}),
    ],
    ids=["count", "size", "head"],
)
def test_a_head_beyond_its_limits_is_too_large(fields: Metadata, limits: dict[str, Any]) -> None:
    assert fault_of(call_of(*fields, **limits)) is Reason.TOO_LARGE
    fewer = [(name, value[:-1]) for name, value in fields[:8]]
    if "head_size" in limits:
        fewer = [(name, value[:-4]) for name, value in fewer]
    assert fault_of(call_of(*fewer, **limits)) is None


def test_one_of_a_connection_too_many_is_put_off_whatever_else_it_is() -> None:
    excess = Refusal(Reason.OVERLOADED)
    assert call_of(here=b"\1", excess=excess).fault is excess


@pytest.mark.parametrize(
    ("here", "ended", "reason"),
    [
        (b"", True, Reason.MALFORMED),
        (message(REQUEST)[:-1], True, Reason.MALFORMED),
        (b"\1" + message(REQUEST)[1:], True, Reason.MALFORMED),
        (b"\1" + message(REQUEST)[1:6], False, Reason.MALFORMED),
        (message(b"x" * 1001), True, Reason.TOO_LARGE),
        (message(b"x" * 1001)[:5], False, Reason.TOO_LARGE),
        (b"\0\xff\xff\xff\xff", False, Reason.TOO_LARGE),
        (b"", False, None),
        (message(b"x" * 1000)[:5], False, None),
        (message(b"x" * 1000), False, None),
        (message(b""), True, None),
    ],
)
def test_a_fault_is_known_as_soon_as_it_shows(here: bytes, ended: bool, reason: Reason | None) -> None:
    assert fault_of(call_of(here=here, ended=ended, bodies=1000)) is reason


@pytest.mark.parametrize("here", [0, 4, 5, 100])
def test_a_message_that_is_still_coming_has_a_size_once_it_has_said_it(here: int) -> None:
    call = call_of(here=message(b"x" * 5000)[:here], ended=False, method=Method.PUSH_OBJECT)
    assert call.payload.data is None
    assert call.payload.size == (5000 if here >= 5 else None)
    assert call.payload.passed == 0


def test_a_long_message_is_passed_on_though_it_is_here() -> None:
    call = call_of(here=message(b"x" * (WHOLE + 1)))
    assert (call.payload.data, call.payload.size) == (None, WHOLE + 1)
