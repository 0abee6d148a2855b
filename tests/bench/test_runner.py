"""The whole machinery with a small pass-through proxy that can be told to misbehave."""

import sys
from pathlib import Path

import pytest

from bench import processes
from bench.processes import free_port
from bench.proxies import Proxy, Setup
from bench.runner import Options, Outcome, Runner
from bench.scenarios import SCENARIOS, Scenario

HTTP = [scenario.name for scenario in SCENARIOS.values() if scenario.group == "http"]

PASS_THROUGH = r"""
import asyncio, signal, sys

port, upstream, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if fault == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
OWN = b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: 0\r\n\r\n"

def change(data, answer):  # only calls that move objects, so that the probes for readiness pass
    if fault == "no type" and b"pull-object" in data:
        return data.replace(b"content-type: application/protobuf", b"x-content-type: none")
    if fault == "wrong path":
        return data.replace(b"/pull-object", b"/push-object")
    if fault == "flip in request" and not answer and len(data) > 9000:
        return data[:-1] + bytes([data[-1] ^ 1])
    if answer and len(data) > 1000:
        if fault == "status":
            return data.replace(b"200 OK", b"503 No")
        if fault == "cut":
            return b""
        if fault == "flip in answer":
            return data[:-1] + bytes([data[-1] ^ 1])
    return data

async def copy(reader, writer, answer):
    while data := await reader.read(1 << 18):
        if not (data := change(data, answer)):
            break
        writer.write(data)
        await writer.drain()
    writer.close()

async def serve(reader, writer):
    try:
        if fault == "own answers":
            while data := await reader.read(1 << 18):
                writer.write(OWN)
            return
        there = await asyncio.open_connection("127.0.0.1", upstream)
        await asyncio.gather(copy(reader, there[1], False), copy(there[0], writer, True))
    except OSError:
        pass

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()

asyncio.run(main())
"""


def pass_through(fault: str) -> Proxy:
    def set_up(folder: Path, upstream: int, _: Scenario) -> Setup:
        port = free_port()
        program = folder / "proxy.py"
        program.write_text(PASS_THROUGH)
        return Setup([sys.executable, str(program), str(port), str(upstream), fault], port)

    return Proxy(fault, "a proxy of the tests", Path, str, set_up)


def outcome_of(scenario: str, fault: str) -> Outcome:
    runner = Runner(Options(rounds=1, seconds=0.2, warm=0.1), lambda _: None)
    runner.run(SCENARIOS[scenario], [pass_through(fault)])
    return runner.outcome


@pytest.mark.parametrize("scenario", HTTP)
def test_a_proxy_that_forwards_is_measured(scenario: str) -> None:
    outcome = outcome_of(scenario, "honest")
    assert outcome.failures == []
    (run,) = outcome.runs
    assert run.calls > 0
    assert run.payload == run.calls * SCENARIOS[scenario].payload
    assert run.proxy_cpu > 0
    assert run.peak_rss > 1_000_000
    assert run.processes == 1
    assert 0 < run.p50 <= run.p99
    assert run.hashed >= (SCENARIOS[scenario].connections if run.payload else 0)


@pytest.mark.parametrize(
    ("scenario", "fault", "reason"),
    [
        ("small-call", "own answers", "0 reached the SuperLink"),
        ("small-object", "no type", "lost headers"),
        ("small-object", "wrong path", "body of 89 bytes"),
        ("small-object", "status", "answer 503"),
        ("small-object", "flip in answer", "expected 200"),
        ("small-object", "cut", "without an answer"),
        ("big-upload", "flip in request", "the content was changed"),
    ],
)
def test_a_proxy_that_breaks_a_call_has_no_result(scenario: str, fault: str, reason: str) -> None:
    outcome = outcome_of(scenario, fault)
    assert outcome.runs == []
    (failure,) = outcome.failures
    assert (failure.scenario, failure.proxy) == (scenario, fault)
    assert reason in failure.reason


def test_a_proxy_that_does_not_stop_has_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_STOP_LIMIT", 1.0)
    outcome = outcome_of("small-call", "stubborn")
    assert outcome.runs == []
    assert "did not stop" in outcome.failures[0].reason


def test_a_proxy_that_does_not_start_says_why() -> None:
    def set_up(folder: Path, upstream: int, _: Scenario) -> Setup:
        return Setup(
            [sys.executable, "-c", f"raise SystemExit('no {upstream} in {folder.name}')"], free_port()
        )

    runner = Runner(Options(rounds=1, seconds=0.1, warm=0.1), lambda _: None)
    runner.run(SCENARIOS["small-call"], [Proxy("broken", "", Path, str, set_up)])
    assert "in broken" in runner.outcome.failures[0].reason
