import importlib.util
import shutil

import pytest

from bench.processes import free_port
from bench.proxies import OPTIONAL, PROXIES, Setup, unready
from bench.scenarios import SCENARIOS


def test_each_scenario_has_the_proxies_that_can_carry_it() -> None:
    fitting = {
        scenario.name: {proxy.name for proxy in PROXIES.values() if proxy.fits(scenario)}
        for scenario in SCENARIOS.values()
    }
    assert fitting["small-call"] == {"direct", "nginx", "envoy", "relay", "relay-2-workers"}
    assert fitting["big-upload"] == {"direct", "nginx", "nginx-default-buffers", "envoy", "relay"}
    assert fitting["grpc-poll"] == fitting["grpc-upload"] == {"direct", "bare", "nginx", "envoy", "relay"}
    assert fitting["grpc-to-http"] == fitting["http-to-grpc"] == {"relay"}


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
    assert "a poll failed" in (unready(Setup([], free_port())) or "")
    assert "no connection" in (unready(Setup([], free_port(), "grpc")) or "")
    assert "GET /readyz" in (unready(Setup([], free_port(), admin_port=free_port())) or "")
