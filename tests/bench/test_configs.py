import json
from pathlib import Path

import pytest
import yaml

from bench.configs import NGINX_GRPC_TUNED, envoy_config, nginx_config, relay_config


def test_relay_config_says_where_everything_is() -> None:
    text = relay_config(workers=2, port=8080, admin=9100, upstream=8000, front="http", back="grpc")
    config = yaml.safe_load(text)
    assert config["workers"] == 2
    assert config["listeners"] == [{"address": "127.0.0.1:8080", "wires": ["http_v1"]}]
    assert config["upstream"] == {"wire": "grpc", "url": "http://127.0.0.1:8000"}
    assert config["admin"] == {"address": "127.0.0.1:9100"}


def test_envoy_config_is_json_with_both_ports() -> None:
    text = json.dumps(envoy_config(8080, 8000, protocol="http"))
    assert '"port_value": 8080' in text
    assert '"port_value": 8000' in text
    assert "http2" not in text


def test_envoy_speaks_http2_to_both_sides_of_grpc() -> None:
    (cluster,) = envoy_config(8080, 8000, protocol="grpc")["static_resources"]["clusters"]
    (options,) = cluster["typed_extension_protocol_options"].values()
    assert options["explicit_http_config"] == {"http2_protocol_options": {}}
    assert '"codec_type": "HTTP2"' in json.dumps(envoy_config(8080, 8000, protocol="grpc"))


@pytest.mark.parametrize("line", ["client_max_body_size 0;", "keepalive 128;", "access_log off;"])
def test_nginx_config_keeps_connections_and_takes_any_size(tmp_path: Path, line: str) -> None:
    config = nginx_config(tmp_path, 8080, 8000, protocol="http", buffers="proxy_buffering off;")
    assert line in config
    assert "proxy_buffering off;" in config
    assert "listen 127.0.0.1:8080 backlog" in config
    assert f"{tmp_path}/pid" in config


def test_nginx_config_passes_grpc(tmp_path: Path) -> None:
    config = nginx_config(tmp_path, 8080, 8000, protocol="grpc", buffers=NGINX_GRPC_TUNED)
    assert "listen 127.0.0.1:8080 http2 " in config
    assert "grpc_pass grpc://superlink;" in config
    assert "proxy_pass" not in config
