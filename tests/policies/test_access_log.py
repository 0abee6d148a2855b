"""One line per call that did not go well, one per call at debug, and never what a payload holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from structlog.testing import CapturingLogger

from relay.call import Call, Ending, Identity, Payload, Reply, Source, Wire
from relay.fleet import Method
from relay.policies import AccessLog, access_log
from relay.refusal import NodeGone, Reason, Refusal

MakeCall = Callable[..., Call]

REQUEST = PushObjectRequest(
    node=Node(node_id=7), run_id=8, object_id="ab" * 32, object_content=b"a secret weight " * 100
).SerializeToString()

OK = Ending("ok", seconds=0.0123456, source=Source.UPSTREAM, sent=2)
REFUSED = Ending("upstream_down", seconds=1, refusal=Refusal(Reason.UPSTREAM_DOWN, "no connection", by="x:1"))
PASSED_ON = Ending("upstream_403", seconds=1, source=Source.UPSTREAM, sent=9)
CUT = Ending("cut", seconds=1, source=Source.UPSTREAM, sent=9, lost=True)
GONE = Ending("node_gone", seconds=1)

EVERY_ENDING = pytest.mark.parametrize(
    "ending", [OK, REFUSED, PASSED_ON, CUT, GONE], ids=lambda ending: ending.outcome
)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    logger = CapturingLogger()
    monkeypatch.setattr(access_log, "log", logger)
    return logger


class Body:
    """A body that arrives in pieces, or breaks off."""

    def __init__(self, *pieces: bytes, error: Exception | None = None) -> None:
        self.left = list(pieces)
        self.error = error

    async def read(self) -> bytes:
        if not self.left and self.error is not None:
            raise self.error
        return self.left.pop(0) if self.left else b""

    def close(self) -> None:
        pass


async def upstream(call: Call) -> Reply:
    async for _ in call.payload.stream():
        pass
    return Reply(Payload(), Source.UPSTREAM)


async def answering(call: Call) -> Reply:
    return Reply(Payload(), Source.UPSTREAM)


@EVERY_ENDING
@pytest.mark.parametrize("debug", [False, True], ids=["usually", "at debug"])
async def test_a_call_is_written_as_loudly_as_it_went_badly(
    make_call: MakeCall, log: CapturingLogger, ending: Ending, debug: bool
) -> None:
    call = make_call(Method.PULL_MESSAGES)
    await AccessLog(debug=debug).handle(call, answering)
    assert log.calls == []
    call.end(ending)
    expected = {
        "ok": [("debug", "call")] if debug else [],
        "upstream_down": [("info", "call refused")],
        "upstream_403": [("info", "call")],
        "cut": [("warning", "answer lost")],
        "node_gone": [("info", "call")],
    }[ending.outcome]
    assert [(entry.method_name, *entry.args) for entry in log.calls] == expected


async def test_a_line_says_what_was_asked_by_whom_and_what_came_of_it(
    make_call: MakeCall, log: CapturingLogger
) -> None:
    call = make_call(Method.PUSH_OBJECT, REQUEST, wire=Wire.REST_V0, peer="203.0.113.9", request_id="id-1")
    await AccessLog(debug=True).handle(call, answering)
    call.end(OK)
    assert log.calls[0].kwargs == {
        "method": "PushObject",
        "wire": "rest_v0",
        "outcome": "ok",
        "source": "upstream",
        "peer": "203.0.113.9",
        "node_id": 7,
        "run_id": 8,
        "bytes_in": len(REQUEST),
        "bytes_out": 2,
        "ms": 12.35,
        "request_id": "id-1",
    }


async def test_a_refusal_is_written_with_its_original(make_call: MakeCall, log: CapturingLogger) -> None:
    call = make_call(Method.PUSH_OBJECT, REQUEST)
    await AccessLog(debug=False).handle(call, answering)
    call.end(REFUSED)
    fields = log.calls[0].kwargs
    assert (fields["detail"], fields["by"], fields["source"]) == ("no connection", "x:1", "local")
    assert (fields["node_id"], fields["run_id"]) == (7, 8)


async def test_a_line_names_who_proved_to_be_whom_and_why_a_credential_was_refused(
    make_call: MakeCall, log: CapturingLogger
) -> None:
    call = make_call(Method.PUSH_OBJECT, REQUEST)
    await AccessLog(debug=True).handle(call, answering)
    call.identity = Identity("hospital-a", "north", (("site", "a"),), ("api_key",))
    call.end(OK)
    assert (log.calls[0].kwargs["identity"], log.calls[0].kwargs["tenant"]) == ("hospital-a", "north")
    call = make_call(Method.PUSH_OBJECT, REQUEST)
    await AccessLog(debug=True).handle(call, answering)
    revoked = Refusal(Reason.UNAUTHENTICATED, "key x is revoked", by="api_key", cause="revoked")
    call.end(Ending("unauthenticated", seconds=1, refusal=revoked))
    assert log.calls[1].kwargs["cause"] == "revoked"
    assert "identity" not in log.calls[1].kwargs


async def test_a_large_body_that_passed_by_left_its_ids_at_debug(
    make_call: MakeCall, log: CapturingLogger
) -> None:
    call = make_call(Method.PUSH_OBJECT, Payload(body=Body(REQUEST[:300], REQUEST[300:])))
    await AccessLog(debug=True).handle(call, upstream)
    call.end(CUT)
    fields = log.calls[0].kwargs
    assert (fields["node_id"], fields["run_id"], fields["bytes_in"]) == (7, 8, len(REQUEST))


async def test_looking_at_a_call_takes_nothing_of_it_away(make_call: MakeCall, log: CapturingLogger) -> None:
    call = make_call(Method.PUSH_OBJECT, Payload(body=Body(REQUEST[:300], REQUEST[300:])))

    async def whole(call: Call) -> Reply:
        assert b"".join([piece async for piece in call.payload.stream()]) == REQUEST
        return Reply(Payload(), Source.UPSTREAM)

    await AccessLog(debug=True).handle(call, whole)
    assert call.payload.passed == len(REQUEST)


async def test_a_long_body_is_looked_at_before_it_is_gone_so_that_a_loss_has_a_name(
    make_call: MakeCall, log: CapturingLogger
) -> None:
    call = make_call(Method.PUSH_OBJECT, Payload(body=Body(REQUEST)))
    await AccessLog(debug=False).handle(call, answering)
    assert b"".join([piece async for piece in call.payload.stream()]) == REQUEST
    call.end(GONE)
    (entry,) = log.calls
    assert entry.kwargs["node_id"] is not None


@pytest.mark.parametrize("error", [Refusal(Reason.MALFORMED, "the body stalled"), NodeGone()], ids=type)
@pytest.mark.parametrize("debug", [False, True], ids=["usually", "at debug"])
async def test_a_call_whose_body_breaks_off_is_written_as_well(
    make_call: MakeCall, log: CapturingLogger, error: Exception, debug: bool
) -> None:
    call = make_call(Method.PUSH_OBJECT, Payload(body=Body(b"\x0a\x02", error=error)))
    with pytest.raises(type(error)):
        await AccessLog(debug=debug).handle(call, upstream)
    call.end(GONE)
    (entry,) = log.calls
    assert (entry.kwargs["node_id"], entry.kwargs["bytes_in"]) == (None, 2)


@EVERY_ENDING
async def test_neither_payload_nor_credentials_are_written(
    make_call: MakeCall, log: CapturingLogger, ending: Ending
) -> None:
    credentials = [(b"authorization", b"Basic c2VjcmV0"), (b"flwr-signature", b"c2lnbmF0dXJl")]
    call = make_call(Method.PUSH_OBJECT, REQUEST, metadata=credentials)
    await AccessLog(debug=True).handle(call, answering)
    call.end(ending)
    written = repr(log.calls)
    assert written != "[]"
    assert not any(secret in written for secret in ("secret", "c2VjcmV0", "c2lnbmF0dXJl"))


@pytest.mark.parametrize("method", Method, ids=lambda method: method.rpc)
def test_calls_of_every_method_are_written_down(method: Method) -> None:
    assert AccessLog(debug=False).applies(method)


@pytest.mark.parametrize("debug", [False, True])
async def test_a_message_of_grpc_is_not_received_for_the_log_and_its_ids_are_written(
    make_call: MakeCall, log: CapturingLogger, debug: bool
) -> None:
    """Whoever sends it has not been asked yet who he is."""
    call = make_call(Method.PUSH_OBJECT, Payload(body=Body(REQUEST)), wire=Wire.GRPC)

    async def auth(call: Call) -> Reply:
        assert call.payload.passed == 0
        await call.payload.peek(1)
        raise NodeGone

    with pytest.raises(NodeGone):
        await AccessLog(debug=debug).handle(call, auth)
    call.end(GONE)
    assert log.calls[0].kwargs["node_id"] == 7
