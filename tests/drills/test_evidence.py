import json
from collections import Counter
from pathlib import Path

import pytest

from drills import evidence
from drills.evidence import AccessLog, Line, RelayLog
from relay.fleet import Method


def line(event: str, level: str = "debug", **fields: object) -> Line:
    return Line(1.0, level, event, fields)


def call(method: Method, outcome: str = "ok", source: str = "upstream", node_id: int = 7) -> Line:
    return line("call", method=method.rpc, outcome=outcome, source=source, node_id=node_id)


def test_a_line_is_read() -> None:
    text = {"timestamp": "1970-01-01T00:01:00.500000Z", "level": "info", "event": "call", "node_id": 7}
    assert evidence.parse(json.dumps(text)) == Line(60.5, "info", "call", {"node_id": 7})


@pytest.mark.parametrize("text", ["Traceback (most recent call last):", "[1]", "3", '{"event": "x"}', ""])
def test_what_is_no_line_of_the_log_is_kept_as_it_is(text: str) -> None:
    assert evidence.parse(text) == Line(0.0, "", text)


def test_a_call_that_went_well() -> None:
    assert call(Method.PULL_MESSAGES).is_ok(Method.PULL_MESSAGES, 7)
    assert not call(Method.PULL_MESSAGES).is_ok(Method.PULL_MESSAGES, 8)
    assert not call(Method.PULL_MESSAGES).is_ok(Method.SEND_NODE_HEARTBEAT, 7)
    assert not call(Method.PULL_MESSAGES, "upstream_403").is_ok(Method.PULL_MESSAGES, 7)
    assert not line("answer lost", method="PullMessages", outcome="ok", node_id=7).is_ok(
        Method.PULL_MESSAGES, 7
    )


def test_counts() -> None:
    lines = [
        call(Method.PULL_OBJECT),
        call(Method.PULL_OBJECT, source="local"),
        call(Method.PULL_OBJECT, "upstream_403"),
        line("answer lost", method="PullObject", request_id="a"),
        line("answer lost", method="PullMessages", request_id="b"),
        line("call refused", outcome="upstream_down"),
        line("call refused", outcome="upstream_down"),
        line("worker serves"),
    ]
    assert evidence.delivered(lines) == Counter(PullObject=1)
    assert evidence.lost(lines) == Counter(PullObject=1, PullMessages=1)
    assert evidence.lost(lines, but=frozenset({"a"})) == Counter(PullMessages=1)
    assert evidence.refused(lines) == Counter(upstream_down=2)


def test_paths_are_methods() -> None:
    paths = {"/v1/fleet/pull-object": 2, "/api/v0/fleet/get-run": 1}
    assert evidence.by_method(paths) == Counter(PullObject=2, GetRun=1)


def test_complaints() -> None:
    lines = [
        line("fine", "warning"),
        line("Worker was sent SIGKILL", "error"),
        line("call failed", "error", method="PullObject"),
        Line(0.0, "", "Segmentation fault"),
    ]
    assert len(evidence.complaints(lines)) == 3
    assert evidence.complaints(lines, but="was sent SIGKILL") == [
        "error call failed {'method': 'PullObject'}",
        " Segmentation fault {}",
    ]


def test_a_log_is_read_in_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "relay.log"
    log = RelayLog(path)
    assert list(log.read()) == []
    path.write_text("one\ntw")
    assert [each.event for each in log.read()] == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert [each.event for each in log.read()] == ["one", "two", "three"]


def test_the_access_log_of_both_generations(tmp_path: Path) -> None:
    path = tmp_path / "superlink.log"
    path.write_text(
        'INFO: 127.0.0.1:1 - "POST /v1/fleet/pull-object HTTP/1.1" 200 OK\n'
        'INFO: 127.0.0.1:1 - "POST /api/v0/fleet/pull-object HTTP/1.1" 200 OK\n'
        'INFO: 127.0.0.1:1 - "POST /v1/fleet/send-node-heartbeat HTTP/1.1" 200\n'
        'INFO: 127.0.0.1:1 - "POST /v1/fleet/pull-object HTTP/1.1" 500 Internal Server Error\n'
        'INFO: 127.0.0.1:1 - "POST /v1/control/list-runs HTTP/1.1" 200 OK\n'
    )
    assert AccessLog(path).read() == Counter(PullObject=2, SendNodeHeartbeat=1)
