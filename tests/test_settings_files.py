"""Which files are taken for certificates, keys and process ids, and what is said of the others."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import certifi
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import PrivateFormat
from pydantic import TypeAdapter, ValidationError

from relay.settings_files import CaFile, CertificateFile, KeyFile, PidFile, pair_fault
from tests.certificates import make_pair

ENCRYPTED = "is encrypted, and nobody is there to type its password: give a key without one"
DAMAGED = "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n"


def refusal(kind: Any, value: object) -> str:
    """The reason for which the type `kind` refuses `value`."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    [fault] = caught.value.errors()
    return str(fault["ctx"]["error"])


@pytest.mark.parametrize("kind", [CaFile, CertificateFile])
def test_a_file_of_certificates_holds_some(kind: Any, tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    for path in (Path(certifi.where()), certificate):
        assert TypeAdapter(kind).validate_python(str(path)) == path
    empty = tmp_path / "empty.pem"
    empty.touch()
    binary = tmp_path / "relay.der"
    binary.write_bytes(ssl.PEM_cert_to_DER_cert(certificate.read_text()))
    for path in (empty, binary, key):
        assert refusal(kind, path) == (
            "must be a file of PEM certificates, and this one holds none that can be read"
        )
    assert refusal(kind, tmp_path / "missing.pem") == "cannot be read: No such file or directory"
    assert refusal(kind, tmp_path) == "cannot be read: Is a directory"


def test_a_chain_with_a_damaged_certificate_is_refused(tmp_path: Path) -> None:
    chain, _ = make_pair(tmp_path)
    with chain.open("a") as file:
        file.write(DAMAGED)
    assert "holds none that can be read" in refusal(CertificateFile, chain)


@pytest.mark.parametrize("key_format", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_key_file_holds_a_key_without_a_password(key_format: PrivateFormat, tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path, key_format=key_format)
    assert TypeAdapter(KeyFile).validate_python(str(key)) == key
    assert pair_fault(certificate, key) is None
    _, encrypted = make_pair(tmp_path, "encrypted", key_format=key_format, password=b"secret")
    assert refusal(KeyFile, encrypted) == ENCRYPTED


def test_a_key_file_that_is_none_is_refused(tmp_path: Path) -> None:
    certificate, _ = make_pair(tmp_path)
    assert refusal(KeyFile, certificate) == "must be a file with a PEM private key, and this one holds none"
    assert refusal(KeyFile, tmp_path / "missing.pem") == "cannot be read: No such file or directory"
    assert refusal(KeyFile, tmp_path) == "cannot be read: Is a directory"


def test_one_file_may_hold_certificate_and_key(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    assert TypeAdapter(KeyFile).validate_python(both) == both
    assert TypeAdapter(CertificateFile).validate_python(both) == both
    assert pair_fault(both, both) is None


def test_an_expired_certificate_is_no_fault(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path, expired=True)
    assert TypeAdapter(CertificateFile).validate_python(certificate) == certificate
    assert pair_fault(certificate, key) is None


def test_certificate_and_key_must_belong_together(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    said = f"is not the key of the first certificate in {certificate}: give the key that belongs to it"
    _, other = make_pair(tmp_path, "other")
    assert pair_fault(certificate, other) == said
    _, larger = make_pair(tmp_path, "larger", curve=ec.SECP384R1())
    assert pair_fault(certificate, larger) == said
    authority, _ = make_pair(tmp_path, "authority")
    chain = tmp_path / "chain.pem"
    chain.write_bytes(certificate.read_bytes() + authority.read_bytes())
    assert pair_fault(chain, key) is None
    chain.write_bytes(authority.read_bytes() + certificate.read_bytes())
    assert "is not the key of the first certificate" in (pair_fault(chain, key) or "")


def test_a_pair_that_openssl_refuses_is_a_fault(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN PRIVATE KEY-----\nYWJj\n-----END PRIVATE KEY-----\n")
    assert TypeAdapter(KeyFile).validate_python(damaged) == damaged
    assert pair_fault(certificate, damaged) == f"cannot be used with {certificate}: one of the two is damaged"
    assert pair_fault(certificate, tmp_path / "gone.pem") == "cannot be read: No such file or directory"
    with certificate.open("a") as file:
        file.write(DAMAGED)
    assert pair_fault(certificate, key) == f"cannot be used with {certificate}: bad base64 decode"


def test_no_password_is_asked_for_on_the_terminal(tmp_path: Path) -> None:
    """OpenSSL would wait for an answer for ever, so the process gets a terminal on which nobody types."""
    certificate, key = make_pair(tmp_path, password=b"secret")
    assert pair_fault(certificate, key) == ENCRYPTED
    code = (
        "import pathlib, sys; from relay.settings_files import pair_fault;"
        " print(pair_fault(*map(pathlib.Path, sys.argv[1:])))"
    )
    terminal, standard_input = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, certificate, key],
            stdin=standard_input,
            capture_output=True,
            text=True,
            timeout=20,
            start_new_session=True,
            check=True,
        )
    finally:
        os.close(terminal)
        os.close(standard_input)
    assert (done.stdout, done.stderr) == (f"{ENCRYPTED}\n", "")


def test_a_pid_file_is_in_a_directory_that_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "relay.pid"
    assert TypeAdapter(PidFile).validate_python(str(path)) == path
    assert not path.exists()
    path.write_text("1")
    assert TypeAdapter(PidFile).validate_python(path) == path
    monkeypatch.chdir(tmp_path)
    assert TypeAdapter(PidFile).validate_python("relay.pid") == Path("relay.pid")
    assert refusal(PidFile, tmp_path).startswith("is a directory: ")
    assert refusal(PidFile, "").startswith("is a directory: ")
    missing = tmp_path / "missing"
    assert refusal(PidFile, missing / "relay.pid") == (
        f"is in no directory that exists: make {missing}, or write another path"
    )
    assert "is in no directory that exists" in refusal(PidFile, path / "relay.pid")


def test_a_pid_file_in_a_directory_that_is_not_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert refusal(PidFile, tmp_path / "relay.pid") == (
        f"cannot be written: this user may not write to {tmp_path}"
    )
