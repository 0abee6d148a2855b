"""What a gRPC call costs the relay, beside a bare relay of bytes on grpc.aio, and nginx.

    python -m bench.grpc_relays

Stub SuperLink, load generator and each proxy are processes of their own. The proxies are measured in turns,
and the CPU of a proxy is that of all its processes, from /proc, over the counted calls. grpc.aio costs more
than all policies, so the bare relay is what the relay can be compared with.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import uvloop
import yaml
from grpc import aio

from bench.proc import parse_stat
from bench.processes import ROOT, free_port
from relay.fleet import Method
from relay.wireformat import encode_bytes, encode_uint

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
#: An idle poll, and an object in the size that Flower cuts arrays into.
SCENARIOS = {"small": (Method.PULL_MESSAGES, 8), "5 MiB": (Method.PULL_OBJECT, 4)}
REQUEST = encode_bytes(1, encode_uint(1, 7))
OBJECT = encode_uint(1, 1) + encode_uint(2, 1) + encode_bytes(3, b"x" * (5 << 20))
METADATA = [
    ("flwr-package-name", "flwr"),
    ("flwr-package-version", "1.39.0"),
    ("flwr-component-name", "SuperNode"),
    ("flwr-public-key-bin", b"k" * 215),
    ("flwr-timestamp", "2026-11-23T12:00:00.000000+00:00"),
    ("flwr-signature-bin", b"s" * 103),
]
_START_SECONDS = 30.0


class _Bytes(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Serves every method with a function of bytes."""

    def __init__(self, make: Callable[[str], Callable[[bytes, Any], Awaitable[bytes]]]) -> None:
        self._make = make
        self._made: dict[str, grpc.RpcMethodHandler] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        path = details.method
        if path not in self._made:
            self._made[path] = grpc.unary_unary_rpc_method_handler(self._make(path))
        return self._made[path]


def _stub(path: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
    answer = OBJECT if path == Method.PULL_OBJECT.grpc else b""

    async def handle(_: bytes, __: Any) -> bytes:
        return answer

    return handle


def _bare(upstream: int) -> Callable[[str], Callable[[bytes, Any], Awaitable[bytes]]]:
    channels = [aio.insecure_channel(f"127.0.0.1:{upstream}", OPTIONS) for _ in range(4)]

    def make(path: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        stubs = itertools.cycle([channel.unary_unary(path) for channel in channels])

        async def handle(request: bytes, context: Any) -> bytes:
            metadata = [pair for pair in context.invocation_metadata() if pair[0] != "user-agent"]
            answer: bytes = await next(stubs)(request, metadata=metadata, timeout=25.0)
            return answer

        return handle

    return make


async def _serve(port: int, upstream: int | None) -> None:
    server = aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((_Bytes(_stub if upstream is None else _bare(upstream)),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def _load(port: int, method: Method, connections: int, seconds: float) -> int:
    """Call without a pause; return how many calls were answered. Raises AioRpcError if one was not."""
    channels = [aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS) for _ in range(connections)]
    end = time.monotonic() + seconds
    expected = len(OBJECT) if method is Method.PULL_OBJECT else 0

    async def node(channel: aio.Channel) -> int:
        ask = channel.unary_unary(method.grpc)
        for calls in itertools.count():
            if time.monotonic() >= end:
                return calls
            if len(await ask(REQUEST, metadata=METADATA, wait_for_ready=True)) != expected:
                raise RuntimeError("wrong answer")
        raise AssertionError

    try:
        return sum(await asyncio.gather(*map(node, channels)))
    finally:
        for channel in channels:
            await channel.close()


def _nginx(folder: Path, port: int, upstream: int) -> list[str]:
    user = "user root;" if os.geteuid() == 0 else ""
    paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(f"""
{user}
daemon off;
worker_processes 1;
pid {folder}/pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; {paths}
    client_max_body_size 0;
    keepalive_requests 100000000;
    grpc_buffer_size 256k;
    upstream superlink {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 100000000; }}
    server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://superlink; }} }}
}}
""")
    return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def _relay(folder: Path, port: int, upstream: int) -> list[str]:
    settings = {
        "workers": 1,
        "upstream": {"url": f"http://127.0.0.1:{upstream}", "wire": "grpc"},
        "listeners": [{"address": f"127.0.0.1:{port}"}],
        "admin": {"address": f"127.0.0.1:{free_port()}"},
        "log": {"level": "warning"},
    }
    (folder / "relay.yaml").write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "relay", "serve", "--config", str(folder / "relay.yaml")]


def _ourselves(*words: object) -> list[str]:
    return [sys.executable, "-m", "bench.grpc_relays", *map(str, words)]


PROXIES: dict[str, Callable[[Path, int, int], list[str]]] = {
    "bare grpc.aio": lambda _, port, upstream: _ourselves("--serve", port, "--upstream", upstream),
    "nginx": _nginx,
    "relay": _relay,
}


def _cpu(session: int) -> float:
    """CPU seconds of all processes of a session so far."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = parse_stat(path.read_text())
        except OSError:  # it has ended meanwhile
            continue
        total += stat.cpu if stat.session == session else 0.0
    return total


def measure(rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Return the CPU microseconds per call of each round, by scenario and proxy."""
    costs: dict[str, dict[str, list[float]]] = {name: {} for name in SCENARIOS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}

        def start(command: list[str]) -> int:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process.pid

        upstream = free_port()
        start(_ourselves("--serve", upstream))
        running = {}
        for name, command in PROXIES.items():
            port = free_port()
            (folder / name).mkdir()
            running[name] = (port, start(command(folder / name, port, upstream)))
        for _ in range(rounds):
            for scenario, (method, connections) in SCENARIOS.items():
                for name, (port, session) in running.items():
                    # The first calls also wait until it serves.
                    uvloop.run(asyncio.wait_for(_load(port, method, connections, 0.3), _START_SECONDS))
                    before = _cpu(session)
                    calls = uvloop.run(_load(port, method, connections, seconds))
                    cost = (_cpu(session) - before) / calls * 1e6
                    costs[scenario].setdefault(name, []).append(cost)
    return costs


def show(costs: dict[str, dict[str, list[float]]]) -> str:
    """Return a table: the median CPU per call, and how it stands to that of the bare relay."""
    lines = [
        "| call | proxy | CPU us per call (least, greatest) | beside bare grpc.aio |",
        "|---|---|---|---|",
    ]
    for scenario, proxies in costs.items():
        bare = statistics.median(proxies["bare grpc.aio"])
        for name, values in proxies.items():
            middle = statistics.median(values)
            spread = f"{middle:.0f} ({min(values):.0f}, {max(values):.0f})"
            lines.append(f"| {scenario} | {name} | {spread} | {middle / bare:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; or be the stub (--serve) or the bare relay (--serve, --upstream)."""
    parser = argparse.ArgumentParser(prog="python -m bench.grpc_relays", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        uvloop.run(_serve(options.serve, options.upstream))
        return
    costs = measure(options.rounds, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(costs))
    print(show(costs))


if __name__ == "__main__":
    main()
