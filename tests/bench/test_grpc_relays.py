import pytest

from bench import grpc_relays
from bench.grpc_relays import PROXIES, SCENARIOS, measure, show


def test_a_ratio_is_that_of_the_medians() -> None:
    costs = {"small": {"bare grpc.aio": [100.0, 90.0, 300.0], "relay": [120.0, 110.0, 400.0]}}
    assert show(costs).splitlines()[2:] == [
        "| small | bare grpc.aio | 100 (90, 300) | 1.00 |",
        "| small | relay | 120 (110, 400) | 1.20 |",
    ]


def test_each_call_that_is_measured_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_relays, "PROXIES", {"bare grpc.aio": PROXIES["bare grpc.aio"]})
    monkeypatch.setattr(grpc_relays, "SCENARIOS", {"small": SCENARIOS["small"]})
    costs = measure(1, 0.2)
    assert costs["small"]["bare grpc.aio"][0] > 0
