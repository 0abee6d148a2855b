import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

from bench.processes import free_port
from bench.proxies import OPTIONAL, PROXIES, envoy_config, nginx_config, relay_config, unready
from bench.scenarios import SCENARIOS


def test_relay_config_says_where_everything_is() -> None:
    config = yaml.safe_load(relay_config(workers=2, port=8080, admin=9100, upstream=8000))
    assert config["workers"] == 2
    assert config["listeners"] == [{"address": "127.0.0.1:8080", "wires": ["http_v1"]}]
    assert config["upstream"] == {"wire": "http_v1", "url": "http://127.0.0.1:8000"}
    assert config["admin"] == {"address": "127.0.0.1:9100"}


def test_envoy_config_is_json_with_both_ports() -> None:
    text = json.dumps(envoy_config(8080, 8000))
    assert '"port_value": 8080' in text
    assert '"port_value": 8000' in text


def test_nginx_config_keeps_connections_and_takes_any_size(tmp_path: Path) -> None:
    config = nginx_config(tmp_path, 8080, 8000, "proxy_buffering off;")
    for line in ("client_max_body_size 0;", "keepalive 128;", "proxy_buffering off;", "access_log off;"):
        assert line in config
    assert f"{tmp_path}/pid" in config


def test_scenarios_and_proxies_name_each_other() -> None:
    for proxy in PROXIES.values():
        assert set(proxy.scenarios) <= set(SCENARIOS)
    assert set(OPTIONAL) <= set(PROXIES)
    for scenario in SCENARIOS.values():
        assert scenario.target is None or scenario.target.beside in PROXIES


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "no nginx" in (PROXIES["nginx"].missing() or "")
    assert "no envoy" in (PROXIES["envoy"].missing() or "")
    assert PROXIES["nginx"].version() == ""
    assert PROXIES["direct"].missing() is None


def test_setups_of_one_program_share_its_name() -> None:
    assert {PROXIES[name].product for name in ("nginx", "nginx-default-buffers")} == {"nginx"}


def test_nothing_serves_on_a_free_port() -> None:
    assert "a poll failed" in (unready(free_port(), None) or "")
    assert "GET /readyz" in (unready(free_port(), free_port()) or "")
