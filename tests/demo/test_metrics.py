import pytest

from relay.demo import metrics
from relay.demo.metrics import Calls

TEXT = """\
# TYPE relay_calls_total counter
relay_calls_total{method="PullMessages",outcome="ok",source="upstream",wire="http_v1"} 10.0
relay_calls_total{method="PullMessages",outcome="ok",source="local",wire="http_v1"} 4.0
relay_calls_total{method="PullMessages",outcome="upstream_down",source="local",wire="http_v1"} 1.0
relay_calls_total{method="GetRun",outcome="ok",source="upstream",wire="http_v1"} 2.0
# TYPE relay_call_duration_seconds histogram
relay_call_duration_seconds_sum{method="PullMessages",wire="http_v1"} 0.3
relay_call_duration_seconds_bucket{le="0.001",method="PullMessages",wire="http_v1"} 0.0
relay_call_duration_seconds_bucket{le="+Inf",method="PullMessages",wire="http_v1"} 15.0
relay_call_duration_seconds_count{method="PullMessages",wire="http_v1"} 15.0
# TYPE relay_calls_in_flight gauge
relay_calls_in_flight{wire="http_v1"} 1.0
# TYPE relay_bytes_total counter
relay_bytes_total{direction="in",method="PullMessages",wire="http_v1"} 180.0
relay_bytes_total{direction="out",method="PullMessages",wire="http_v1"} 7000.0
relay_bytes_total{direction="in",method="PushObject",wire="http_v1"} 0.0
"""


def test_parse() -> None:
    calls = metrics.parse(TEXT)
    assert list(calls) == ["PullMessages", "GetRun"]
    assert calls == {
        "GetRun": Calls(total=2, ok=2, upstream=2),
        "PullMessages": Calls(
            total=15, ok=14, upstream=10, seconds=0.3, timed=15, bytes_in=180, bytes_out=7000
        ),
    }
    assert calls["PullMessages"].mean_seconds == pytest.approx(0.02)
    assert calls["PullMessages"].failed == 1
    assert calls["GetRun"].mean_seconds == 0


def test_sum() -> None:
    total = sum(metrics.parse(TEXT).values(), Calls())
    assert (total.total, total.failed, total.timed, total.bytes_out) == (17, 1, 15, 7000)


def test_nothing_yet() -> None:
    assert metrics.parse("") == {}
