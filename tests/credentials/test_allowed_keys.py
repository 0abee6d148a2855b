"""The list of allowed keys is read as OpenSSH reads it, and every mistake is named with its line."""

from __future__ import annotations

import shutil
import subprocess
from base64 import b64encode
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.credentials import allowed_keys
from relay.credentials.allowed_keys import AllowedKey, line, parse
from relay.credentials.node_keys import read_key
from relay.stores.lists import ListError
from tests.signing import Node

if TYPE_CHECKING:
    from pathlib import Path

NODE = Node()
KEY, TYPE, BLOB = read_key(NODE.ssh.encode())


def test_keys_are_found_by_their_fingerprints() -> None:
    other = Node()
    text = f"# hospitals\n\n{NODE.ssh}\n  tenant=north,site=b.1 {other.ssh} node of b  \n"
    found = parse(text)
    assert found[KEY.fingerprint] == AllowedKey(KEY.fingerprint, KEY.fingerprint)
    assert len(found) == 2
    second = next(key for key in found.values() if key.tenant)
    assert second == AllowedKey(second.fingerprint, "node of b", "north", (("site", "b.1"),))


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
@pytest.mark.parametrize("bits", [256, 384, 521])
def test_a_key_of_ssh_keygen_has_the_fingerprint_that_it_prints(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", str(bits), "-N", "", "-C", "site b", "-f", path], check=True
    )
    shown = subprocess.run(["ssh-keygen", "-lf", f"{path}.pub"], check=True, capture_output=True, text=True)
    (key,) = parse((tmp_path / "key.pub").read_text()).values()
    assert shown.stdout.split()[1] == key.fingerprint
    assert key.name == "site b"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no key, which would shut down every node"),
        ("# nothing\n\n", "holds no key"),
        (f"{NODE.ssh}\n\n# again\n{NODE.ssh} name\n", "line 4: holds a key that stands above"),
        ("ssh-ed25519 AAAA\n", "line 1: must be a public key that begins with one of ecdsa-sha2-nistp256"),
        ("garbage\n", "line 1: must be a public key"),
        (f"{TYPE}\n", "line 1: has a damaged key"),
        (f"{TYPE} %%%\n", "line 1: has a key that is not base64"),
        (f"{NODE.ssh[:-20]}\n", "line 1: has a (damaged key|key that is not base64)"),
        (f"{TYPE} {b64encode(BLOB[:-1]).decode()}\n", "line 1: has a damaged key"),
        (f"{TYPE} {b64encode(BLOB + b'x').decode()}\n", "line 1: has a damaged key"),
        (f"ecdsa-sha2-nistp256 {b64encode(BLOB).decode()}\n", "line 1: has a damaged key"),
        (f"{NODE.ssh} {'n' * 65}\n", "line 1: has a name that is longer than 64 characters"),
        (f"{NODE.ssh} a\x1b[31m\n", "line 1: has a name .* control characters"),
        (f"tenant= {NODE.ssh}\n", "line 1: must begin with a public key, or with options"),
        (f"tenant=a,tenant=b {NODE.ssh}\n", "line 1: must begin with"),
        (f'command="x" {NODE.ssh}\n', "line 1: must begin with"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ListError, match=problem):
        parse(text)


WORDS = st.from_regex(r"[A-Za-z0-9._-]{1,32}", fullmatch=True)


@given(
    name=st.from_regex(r"[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]{0,60}[^\s\x00-\x1f\x7f])?", fullmatch=True),
    tenant=st.just("") | WORDS,
    labels=st.dictionaries(WORDS.filter(lambda word: word != "tenant"), WORDS, max_size=3),
)
def test_a_line_reads_as_it_was_written_or_is_not_written(
    name: str, tenant: str, labels: dict[str, str]
) -> None:
    key = AllowedKey(KEY.fingerprint, name, tenant, tuple(labels.items()))
    try:
        text = line(TYPE, BLOB, key)
    except ValueError:
        assert name != name.strip() or not name.isprintable()
        return
    assert parse(f"{text}\n") == {KEY.fingerprint: key}
    assert allowed_keys.numbered(f"#\n{text}") == [(2, key)]


@given(st.text())
def test_whatever_stands_in_a_list_is_read_or_refused(text: str) -> None:
    for garbage in (text, f"{TYPE} {text}", f"{text} {NODE.ssh}", f"{NODE.ssh} {text}"):
        try:
            parse(garbage)
        except ListError:
            continue
