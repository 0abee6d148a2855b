"""How the proxies are configured: alike as far as they can be, and with nothing that the others do not do."""

import os
from pathlib import Path
from typing import Any, Final

from bench.scenarios import Protocol

NGINX_TUNED: Final = """
    client_body_buffer_size 256k;
    proxy_buffering off;
    proxy_request_buffering off;
    proxy_buffer_size 256k;
    proxy_buffers 8 256k;
    proxy_busy_buffers_size 512k;
"""


NGINX_GRPC_TUNED: Final = """
    client_body_buffer_size 256k;
    http2_body_preread_size 1m;
    http2_chunk_size 64k;
"""

_NGINX_HTTP: Final = """
            proxy_pass http://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_read_timeout 1h;
"""

# grpc_pass never buffers requests; what it lets a node send ahead is the size of the preread.
_NGINX_GRPC: Final = """
            grpc_pass grpc://superlink;
            grpc_read_timeout 1h;
            grpc_send_timeout 1h;
            grpc_buffer_size 256k;
"""


def nginx_config(folder: Path, port: int, upstream: int, *, protocol: Protocol, buffers: str) -> str:
    """One worker, keep-alive on both sides, no limits that a Flower round would hit."""
    http2, location = ("", _NGINX_HTTP) if protocol == "http" else (" http2", _NGINX_GRPC)
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
        listen 127.0.0.1:{port}{http2} backlog=1024;
        location / {{{location}        }}
    }}
}}
"""


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def envoy_config(port: int, upstream: int, *, protocol: Protocol) -> dict[str, Any]:
    """An HTTP connection manager with the router; what it does per call beyond that is switched off."""
    types = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": "HTTP1" if protocol == "http" else "HTTP2",
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
    if protocol == "grpc":
        name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        cluster["typed_extension_protocol_options"] = {
            name: {
                "@type": f"type.googleapis.com/{name}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
    return {
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
        "stats_config": {"stats_matcher": {"reject_all": True}},
    }


_WIRE: Final = {"http": "http_v1", "grpc": "grpc"}


def relay_config(
    *, workers: int, port: int, admin: int, upstream: int, front: Protocol, back: Protocol
) -> str:
    """What the relay's documentation starts with, and nothing switched off."""
    return f"""
workers: {workers}
listeners:
  - address: 127.0.0.1:{port}
    wires: [{_WIRE[front]}]
upstream:
  wire: {_WIRE[back]}
  url: http://127.0.0.1:{upstream}
admin:
  address: 127.0.0.1:{admin}
log: {{level: warning, format: json}}
"""
