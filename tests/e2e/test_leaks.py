"""The search for secrets in logs finds them."""

from __future__ import annotations

from base64 import b64encode
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from relay.credentials.keys.key import generate
from tests.e2e.leaks import leaked, private

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    """Processes with logs in which nothing stands."""
    logs = {name: tmp_path / f"{name}.log" for name in ("relay", "superlink")}
    for log in logs.values():
        log.write_bytes(b"")
    return cast("Any", SimpleNamespace(**{name: SimpleNamespace(log=log) for name, log in logs.items()}))


def test_it_finds_an_api_key_in_every_log_and_form(federation: Any, tmp_path: Path) -> None:
    key, edge = generate(), tmp_path / "edge"
    edge.mkdir()
    for log in (federation.relay.log, federation.superlink.log, edge / "access.json"):
        for text in (str(key).encode(), b64encode(f"node-0:{key}".encode()), b64encode(f"n:{key}".encode())):
            log.write_bytes(b'{"at": "' + text + b'"}')
            assert leaked(federation, [generate(), key], [edge]) == [log.name]
            assert leaked(federation, [generate()], [edge]) == []
        log.write_bytes(b"flwr_" + key.id)
        assert leaked(federation, [key], [edge]) == []


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=["tls", "node"])
def test_it_finds_a_private_key(federation: Any, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key, path = ec.generate_private_key(curve), tmp_path / "key"
    for kind in (PrivateFormat.OpenSSH, PrivateFormat.PKCS8):
        path.write_bytes(key.private_bytes(Encoding.PEM, kind, NoEncryption()))
        for text in (path.read_bytes(), repr(path.read_bytes()).encode()):
            federation.relay.log.write_bytes(text)
            assert leaked(federation, [private(path)]) == ["relay.log"]
        assert leaked(federation, [private(path)[::-1][:-1]]) == []


def test_it_finds_a_signature(federation: Any) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    for number in range(200):
        signature = key.sign(b"%d" % number, ec.ECDSA(SHA256()))
        for text in (b64encode(signature), signature.hex().encode(), repr(signature).encode()):
            federation.relay.log.write_bytes(b"x " + text)
            assert leaked(federation, [], signed=True) == ["relay.log (a signature)"], text
            assert leaked(federation, []) == []
    federation.superlink.log.write_bytes(federation.relay.log.read_bytes())
    federation.relay.log.write_bytes(b"")
    assert leaked(federation, [], signed=True) == []
