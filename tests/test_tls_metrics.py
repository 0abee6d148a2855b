"""What Prometheus and the log learn of TLS: handshakes, files that changed, and files that end."""

from __future__ import annotations

import shutil
import ssl
import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay import settings
from relay.stores.host import HostTable
from relay.tls_files import ListenerTls
from relay.tls_metrics import Handshakes, Tls
from tests.certificates import make_pair

if TYPE_CHECKING:
    from pathlib import Path


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def listener(directory: Path, name: str) -> ListenerTls:
    section = settings.Tls(certificate=directory / "relay.pem", key=directory / "relay-key.pem")
    return ListenerTls(name, section)


def expiry(name: str) -> float:
    return value("relay_tls_certificate_expiry_seconds", listener=name, file="certificate")


def reloads(outcome: str) -> float:
    return value("relay_tls_reloads_total", outcome=outcome)


def test_the_end_of_each_file_is_shown_and_follows_a_renewal(tmp_path: Path) -> None:
    make_pair(tmp_path, days=30)
    tls = Tls([None, listener(tmp_path, "shown:1")], None, HostTable(64))
    assert expiry("shown:1") == pytest.approx(time.time() + 30 * 86_400, abs=60)
    taken, refused = reloads("taken"), reloads("refused")
    make_pair(tmp_path, days=60)
    tls.tick()
    assert expiry("shown:1") == pytest.approx(time.time() + 60 * 86_400, abs=60)
    assert (reloads("taken"), reloads("refused")) == (taken + 1, refused)
    (tmp_path / "relay.pem").write_bytes(b"garbage")
    tls.tick()
    assert (reloads("taken"), reloads("refused")) == (taken + 1, refused + 1)
    assert expiry("shown:1") == pytest.approx(time.time() + 60 * 86_400, abs=60)


def warnings(tls: Tls, monkeypatch: pytest.MonkeyPatch, now: float) -> list[tuple[str, str]]:
    monkeypatch.setattr("relay.tls_metrics.time.time", lambda: now)
    with capture_logs() as logs:
        tls.tick()
    return [(line["event"], line["where"]) for line in logs if line["log_level"] == "warning"]


def test_what_ends_soon_is_warned_of_once_a_day_by_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path, days=15)
    table = HostTable(64)
    tls, other = (Tls([listener(tmp_path, "warned:1")], None, table) for _ in range(2))
    day = 86_400.0
    now = (time.time() // day + 1) * day  # at midnight, so that hours do not matter
    end = tls.listeners[0].ends[0].at  # type: ignore[union-attr]
    soon = [("a TLS file ends soon", "warned:1")]
    assert warnings(tls, monkeypatch, end - 14 * day - 1) == []
    assert warnings(tls, monkeypatch, now + 3 * day) == soon
    assert warnings(other, monkeypatch, now + 3 * day + 61) == []
    assert warnings(tls, monkeypatch, now + 3 * day + 3600) == []
    assert warnings(other, monkeypatch, now + 4 * day) == soon
    assert warnings(tls, monkeypatch, end + 1) == [("a TLS file has ended", "warned:1")]


def test_the_warning_says_which_file_and_when(tmp_path: Path) -> None:
    make_pair(tmp_path, days=3)
    with capture_logs() as logs:
        Tls([listener(tmp_path, "said:1")], None, HostTable(64)).tick()
    (line,) = logs
    assert line["file"] == "certificate"
    assert line["ends"].endswith("Z")


def test_a_renewal_ends_the_warning(tmp_path: Path) -> None:
    make_pair(tmp_path, days=3)
    tls = Tls([listener(tmp_path, "renewed:1")], None, HostTable(64))
    make_pair(tmp_path / "..", "renewed", days=300)
    for ending in (".pem", "-key.pem"):
        shutil.copyfile(tmp_path / ".." / f"renewed{ending}", tmp_path / f"relay{ending}")
    with capture_logs() as logs:
        tls.tick()
    assert [line["event"] for line in logs] == ["TLS files taken up"]


def test_handshakes_are_counted_and_those_that_fail_for_a_certificate_are_said() -> None:
    counting = Handshakes()
    before = [value("relay_tls_handshakes_total", outcome="done", version="TLSv1.3")]
    before.append(value("relay_tls_handshakes_total", outcome="refused", version=""))
    counting.done("TLSv1.3")
    with capture_logs() as logs:
        for reason in ("HTTP_REQUEST", "PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            error = ssl.SSLError(1, reason)
            error.reason = reason
            counting.refused(error)
        failed = ssl.SSLCertVerificationError(1, "x")
        failed.reason, failed.verify_message = "CERTIFICATE_VERIFY_FAILED", "certificate has expired"
        counting.refused(failed)
    assert value("relay_tls_handshakes_total", outcome="done", version="TLSv1.3") == before[0] + 1
    assert value("relay_tls_handshakes_total", outcome="refused", version="") == before[1] + 3
    assert [line["problem"] for line in logs] == ["no certificate was shown", "certificate has expired"]
