"""Look for secrets in the logs of a federation, in every way in which they may have been written down."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from relay.credentials.keys.key import Key
from tests.security.test_no_secrets import forms

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from relay.demo.federation import Federation

#: Signatures of P-384 keys, as nodes make them (two numbers of about 48 bytes in DER): in base64, in
#: hexadecimal digits, and as Python shows bytes.
SIGNATURE = re.compile(
    rb"M[FG][A-Za-z0-9]C[LM][A-Za-z0-9+/_-]{60}"
    rb"|30(?i:5[d-f]|6[0-6])02(?i:2[ef]|3[01])[0-9A-Fa-f]{60}"
    rb"|0[\]^_`a-f]\\x02[./01]"
)


def private(path: Path) -> bytes:
    """Return the secret of a private key in PEM or OpenSSH's format: its scalar."""
    text = path.read_bytes()
    key = load_ssh_private_key(text, None) if b"OPENSSH" in text else load_pem_private_key(text, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    size = (key.key_size + 7) // 8
    scalar = key.private_numbers().private_value.to_bytes(size, "big")
    # As a log would have the file: the scalar is not all that a line of base64 holds.
    assert scalar in key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return scalar


def files(federation: Federation, more: Iterable[Path] = ()) -> list[Path]:
    """Return the logs of relay and SuperLink, from their first start on, and all files in `more`."""
    assert federation.relay is not None
    found = [federation.relay.log, federation.superlink.log]
    for place in more:
        found += [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return found


def leaked(
    federation: Federation, secrets: Sequence[Key | bytes], more: Iterable[Path] = (), *, signed: bool = False
) -> list[str]:
    """Return the logs that hold a secret.

    Args:
        federation: the logs of its relay and SuperLink are searched.
        secrets: API keys, and others.
        more: further logs, or directories of logs.
        signed: no log but the SuperLink's may hold a signature either.
    """
    wanted = {form for each in secrets for form in forms(each.secret if isinstance(each, Key) else each)}
    found = []
    for path in files(federation, more):
        text = re.sub(rb"\\n|\n", b"", path.read_bytes())  # a key may stand in several lines of base64
        if any(form in text for form in wanted):
            found.append(path.name)
        elif signed and path != federation.superlink.log and SIGNATURE.search(text):
            found.append(f"{path.name} (a signature)")
    return found
