"""The gRPC ends of the benchmark, with the bare relay between them, and with relays that misbehave."""

import sys
from pathlib import Path

import pytest

from bench import messages
from bench.grpc_upstream import GrpcUpstream
from bench.processes import free_port
from bench.proxies import PROXIES, Proxy, Setup
from bench.runner import Options, Outcome, Runner
from bench.scenarios import SCENARIOS, Scenario
from bench.upstream import expectations

GRPC = [scenario.name for scenario in SCENARIOS.values() if scenario.front == scenario.back == "grpc"]
NODE = messages.FIRST_NODE_ID

FAULTY = r"""
import asyncio, sys
import grpc
from grpc import aio
from bench.grpc_upstream import OPTIONS, Handlers

port, upstream, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

async def main():
    channel = aio.insecure_channel(f"127.0.0.1:{upstream}", OPTIONS)

    def make(path):
        ask = channel.unary_unary(path)

        async def handle(request, context):
            if fault == "own answers":
                return b""
            if fault == "status":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
            if fault == "flip in request":
                request = request[:-1] + bytes([request[-1] ^ 1])
            if fault == "cut request":
                request = request[:-1]
            metadata = [pair for pair in context.invocation_metadata() if pair[0] != "user-agent"]
            if fault == "no key":
                metadata = [pair for pair in metadata if pair[0] != "flwr-public-key-bin"]
            answer = await ask(request, metadata=metadata)
            return answer[:-1] + bytes([answer[-1] ^ 1]) if fault == "flip in answer" else answer

        return handle

    server = aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Handlers(make),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()

asyncio.run(main())
"""


def faulty(fault: str) -> Proxy:
    def set_up(folder: Path, upstream: int, _: Scenario) -> Setup:
        port = free_port()
        return Setup([sys.executable, "-c", FAULTY, str(port), str(upstream), fault], port, "grpc")

    return Proxy(fault, "a relay of the tests", Path, str, set_up)


def outcome_of(scenario: str, proxy: Proxy) -> Outcome:
    runner = Runner(Options(rounds=1, seconds=0.2, warm=0.1), lambda _: None)
    runner.run(SCENARIOS[scenario], [proxy])
    return runner.outcome


@pytest.mark.parametrize("scenario", GRPC)
def test_the_bare_relay_is_measured(scenario: str) -> None:
    outcome = outcome_of(scenario, PROXIES["bare"])
    assert outcome.failures == []
    (run,) = outcome.runs
    assert run.calls > 0
    assert run.payload == run.calls * SCENARIOS[scenario].payload
    assert run.proxy_cpu > 0
    assert 0 < run.p50 <= run.p99
    assert run.hashed >= (SCENARIOS[scenario].connections if run.payload else 0)


@pytest.mark.parametrize("scenario", ["grpc-to-http", "http-to-grpc"])
def test_the_relay_is_measured_as_a_bridge(scenario: str) -> None:
    outcome = outcome_of(scenario, PROXIES["relay"])
    assert outcome.failures == []
    (run,) = outcome.runs
    assert run.calls > 0
    assert run.proxy_cpu > 0


@pytest.mark.parametrize(
    ("scenario", "fault", "reason"),
    [
        ("grpc-poll", "own answers", "0 reached the SuperLink"),
        ("grpc-poll", "status", "UNAVAILABLE: no"),
        ("grpc-poll", "no key", "lost metadata"),
        ("grpc-poll", "cut request", "message of 12 bytes"),
        ("grpc-heartbeat", "flip in answer", "expected 2"),
        ("grpc-download", "flip in answer", "an answer was changed"),
        ("grpc-upload", "flip in request", "the content was changed"),
    ],
)
def test_a_relay_that_breaks_a_call_has_no_result(scenario: str, fault: str, reason: str) -> None:
    outcome = outcome_of(scenario, faulty(fault))
    assert outcome.runs == []
    (failure,) = outcome.failures
    assert reason in failure.reason


def test_the_stub_hashes_the_first_content_of_each_node() -> None:
    scenario = SCENARIOS["grpc-upload"]
    upstream = GrpcUpstream(scenario)
    content = messages.content_of(scenario.uploads)
    expected = expectations(scenario)[messages.PUSH_OBJECT]
    sound = messages.push_object_prefix(NODE, messages.object_id_of(content), len(content)) + content
    broken = sound[:-1] + bytes([sound[-1] ^ 1])
    assert "changed" in (upstream.judge(expected, broken, messages.metadata(1)) or "")
    assert upstream.judge(expected, sound, messages.metadata(2)) is None
    assert upstream.judge(expected, broken, messages.metadata(2)) is None  # by length only
    assert upstream.stats.hashed == 1


def test_the_stub_knows_the_methods_of_the_benchmark_alone() -> None:
    upstream = GrpcUpstream(SCENARIOS["grpc-poll"])
    assert upstream.make("/flwr.proto.Fleet/PullMessages") is not None
    assert upstream.make("/flwr.proto.Fleet/GetRun") is None
