"""The TLS port as sslyze sees it: no old version, no weak cipher, nothing of the known attacks."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from relay.authority import Authority
from tests.certificates import make_pair
from tests.served import Served
from tests.tls_clients import connect_tls, trusting

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("sslyze")]

# In a venv of its own: it wants an older `cryptography` than the relay is tested with.
REQUIREMENT = "sslyze==6.3.1"
CACHE = Path(__file__).parents[2] / ".cache"
OLD = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1")
SCANS = (
    *("--sslv2", "--sslv3", "--tlsv1", "--tlsv1_1", "--tlsv1_2", "--tlsv1_3"),
    *("--certinfo", "--compression", "--reneg", "--resum", "--early_data", "--elliptic_curves", "--ems"),
    *("--heartbleed", "--openssl_ccs", "--robot"),
)


@pytest.fixture(scope="session")
def sslyze() -> Path:
    """Return its command; installed by uv when it is first wanted."""
    CACHE.mkdir(exist_ok=True)
    venv, stamp = CACHE / "sslyze", CACHE / "sslyze" / ".made"
    wanted = f"{venv} {REQUIREMENT} {sys.version}"
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        _unavailable(f"{uv} is not there: install the extra `dev`")
    with (CACHE / "sslyze.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            for arguments in (
                ("venv", "--quiet", "--clear", "--python", sys.executable, str(venv)),
                ("pip", "install", "--quiet", "--python", str(venv / "bin" / "python"), REQUIREMENT),
            ):
                done = subprocess.run([uv, *arguments], capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    _unavailable(f"{REQUIREMENT} cannot be installed: {done.stderr[-500:]}")
            stamp.write_text(wanted)
    return venv / "bin" / "sslyze"


def _unavailable(why: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture
def scan(sslyze: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that scans a port, and returns the results by the names that sslyze gives them."""

    def scan(served: Served, ca: Path) -> dict[str, Any]:
        found = tmp_path / "scan.json"
        where = [f"127.0.0.1:{served.port}", "--sni", "localhost", "--certinfo_ca_file", str(ca)]
        command = [str(sslyze), *SCANS, *where, "--mozilla_config", "disable", "--json_out", str(found)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert found.exists(), done.stdout + done.stderr
        (server,) = json.loads(found.read_text())["server_scan_results"]
        assert server["scan_status"] == "COMPLETED", done.stdout
        scanned = {
            name: made for name, made in server["scan_result"].items() if made["status"] != "NOT_SCHEDULED"
        }
        assert {made["status"] for made in scanned.values()} == {"COMPLETED"}, done.stdout
        return {name: made["result"] for name, made in scanned.items()}

    return scan


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "ca")
    made.issue_relay(["localhost"])
    return made


def test_what_a_scan_finds(scan: Callable[..., dict[str, Any]], authority: Authority) -> None:
    ca = authority.files("ca")[0]
    with Served(pair=authority.files("relay")) as served:
        found = scan(served, ca)
    for version in OLD:
        assert found[f"{version}_cipher_suites"]["accepted_cipher_suites"] == [], version
    for version in ("tls_1_2", "tls_1_3"):
        suites = [
            suite["cipher_suite"] for suite in found[f"{version}_cipher_suites"]["accepted_cipher_suites"]
        ]
        assert suites
        for suite in suites:
            assert not suite["is_anonymous"]
            assert suite["key_size"] >= 128
            assert "GCM" in suite["name"] or "POLY1305" in suite["name"]
            assert version == "tls_1_3" or suite["name"].startswith("TLS_ECDHE_")
    assert not found["tls_compression"]["supports_compression"]
    assert not found["tls_1_3_early_data"]["supports_early_data"]  # a poll must not be replayed
    assert not found["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"]
    assert found["session_renegotiation"]["client_renegotiations_success_count"] == 0
    assert found["session_renegotiation"]["supports_secure_renegotiation"]
    assert found["tls_extended_master_secret"]["supports_ems_extension"]
    assert not found["heartbleed"]["is_vulnerable_to_heartbleed"]
    assert not found["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"]
    assert found["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    curves = {curve["name"] for curve in found["elliptic_curves"]["supported_curves"]}
    assert {"X25519", "secp256r1"} <= curves <= {"X25519", "X448", "secp256r1", "secp384r1", "secp521r1"}
    (deployment,) = found["certificate_info"]["certificate_deployments"]
    assert len(deployment["received_certificate_chain"]) == 1
    assert deployment["received_chain_has_valid_order"]
    assert not deployment["verified_chain_has_sha1_signature"]
    by_ca = [made["was_validation_successful"] for made in deployment["path_validation_results"]]
    assert by_ca.count(True) == 1  # by the authority that was named; no public one knows it


def test_the_newest_version_alone(scan: Callable[..., dict[str, Any]], authority: Authority) -> None:
    with Served(pair=authority.files("relay"), minimum_version="1.3") as served:
        found = scan(served, authority.files("ca")[0])
    for version in (*OLD, "tls_1_2"):
        assert found[f"{version}_cipher_suites"]["accepted_cipher_suites"] == [], version
    assert found["tls_1_3_cipher_suites"]["accepted_cipher_suites"]


async def test_http_1_1_is_what_is_spoken(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    context = trusting(pair[0])
    context.set_alpn_protocols(["h2", "http/1.1"])
    with Served(pair=pair) as served:
        peer = await connect_tls(served.port, context)
        assert peer.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        await peer.close()


def test_no_session_can_be_resumed_where_certificates_are_asked_for(
    scan: Callable[..., dict[str, Any]], authority: Authority
) -> None:
    asks: dict[str, Any] = {"client_ca": authority.files("ca")[0], "client_certificates": "wanted"}
    with Served(pair=authority.files("relay"), **asks) as served:
        found = scan(served, authority.files("ca")[0])
    resumed = found["session_resumption"]
    assert resumed["tls_ticket_successful_resumptions_count"] == 0
