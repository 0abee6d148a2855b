"""Files that settings name: each is looked at when the settings are read, not when it is first needed.

A file that cannot be used is refused with the reason. Nothing is kept of what a file holds.
"""

import os
import re
import ssl
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from relay import certificates
from relay.settings_types import Doc

_PRIVATE_KEY = re.compile(
    rb"^-----BEGIN (?P<encrypted>ENCRYPTED )?(?:\w+ )*PRIVATE KEY-----\s*$", re.MULTILINE
)
_ENCRYPTED_HEADER = re.compile(rb"^Proc-Type: *4, *ENCRYPTED\s*$", re.MULTILINE)
SHORTEST_PEPPER = 16
_ENCRYPTED = "is encrypted, and nobody is there to type its password: give a key without one"

# How OpenSSL says that key and certificate are no pair: same type of key, another type, another curve.
_NO_PAIR = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "DIFFERENT_PARAMETERS"}


def pair_fault(certificate: Path, key: Path) -> str | None:
    """Say why a server cannot prove who it is with these two files: what is wrong with `key`. None: it can.

    Files that were refused alone are not meant for this. An expired certificate is no fault.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason in _NO_PAIR:
            return (
                f"is not the key of the first certificate in {certificate}: give the key that belongs to it"
            )
        if not error.reason:  # OpenSSL gives none for bytes that it cannot decode
            return f"cannot be used with {certificate}: one of the two is damaged"
        return f"cannot be used with {certificate}: {error.reason.lower().replace('_', ' ')}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _no_password() -> str:
    """Stand in for OpenSSL's own question on the terminal, which would stop the start."""
    raise ValueError(_ENCRYPTED)


def _check_certificates(path: Path) -> Path:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise ValueError(
            "must be a file of PEM certificates, and this one holds none that can be read"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return path


def _check_lists(path: Path) -> Path:
    try:
        lists = certificates.lists(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except ValueError:
        lists = []
    if not lists:
        raise ValueError("must be a file of PEM revocation lists, and this one holds none that can be read")
    return path


def _check_key(path: Path) -> Path:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    found = _PRIVATE_KEY.search(text)
    if found is None:
        raise ValueError("must be a file with a PEM private key, and this one holds none")
    if found["encrypted"] or _ENCRYPTED_HEADER.search(text):
        raise ValueError(_ENCRYPTED)
    return path


def _check_pid_file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError("is a directory: write the path of a file in it, such as relay.pid")
    if not path.parent.is_dir():
        raise ValueError(f"is in no directory that exists: make {path.parent}, or write another path")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot be written: this user may not write to {path.parent}")
    return path


def _check_store(path: Path) -> Path:
    if path.is_dir():
        raise ValueError("is a directory: write the path of a file in it, such as keys.jsonl")
    if not path.parent.is_dir():
        raise ValueError(f"is in no directory that exists: make {path.parent}, or write another path")
    return path


def _check_pepper(path: Path) -> Path:
    try:
        size = len(path.read_bytes().strip())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if size < SHORTEST_PEPPER:
        raise ValueError(
            f"must hold at least {SHORTEST_PEPPER} random bytes: make it with openssl rand -hex 32 > FILE"
        )
    return path


def _check_signing_directory(path: Path) -> Path:
    from relay.stores.node_signers import StoreError, read_secret  # noqa: PLC0415 - few need its cryptography

    if not path.exists():
        if not path.parent.is_dir():
            raise ValueError(f"is in no directory that exists: make {path.parent}, or write another path")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ValueError(f"cannot be made: this user may not write to {path.parent}")
        return path
    if not path.is_dir():
        raise ValueError("must be a directory")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError("cannot be used: this user may not read it and write to it")
    secret = path / "secret"
    if secret.exists():
        if secret.stat().st_mode & 0o007:
            raise ValueError(f"holds a secret that others can read: chmod 600 {secret}")
        try:
            read_secret(secret)
        except StoreError as error:
            raise ValueError(f"cannot be used: {error}") from None
    return path


CaFile = Annotated[Path, AfterValidator(_check_certificates), Doc("path")]
CertificateFile = Annotated[Path, AfterValidator(_check_certificates), Doc("path")]
CrlFile = Annotated[Path, AfterValidator(_check_lists), Doc("path")]
KeyFile = Annotated[Path, AfterValidator(_check_key), Doc("path")]
PidFile = Annotated[Path, AfterValidator(_check_pid_file), Doc("path")]
PepperFile = Annotated[Path, AfterValidator(_check_pepper), Doc("path")]
StoreFile = Annotated[Path, AfterValidator(_check_store), Doc("path")]
SigningDirectory = Annotated[Path, AfterValidator(_check_signing_directory), Doc("path")]
