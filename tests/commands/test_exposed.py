"""`flwr-relay check` warns of every file with a secret or a list that everybody on the host could read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from typer.testing import CliRunner

from relay.__main__ import app
from tests.certificates import make_pair
from tests.signing import Node

if TYPE_CHECKING:
    from pathlib import Path

KEYS = '{"count": 0, "flwr_relay_keys": 1}\n'


def check(config: Path) -> list[str]:
    result = CliRunner().invoke(app, ["check", "--no-probe", "--config", str(config)])
    assert result.exit_code == 0, result.output
    return [line for line in result.stderr.splitlines() if "warning" in line]


def test_each_file_that_others_may_read_or_change_is_named(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path, "a")
    other_certificate, other_key = make_pair(tmp_path, "b")
    upstream_certificate, upstream_key = make_pair(tmp_path, "c")
    files = {
        "listeners[0].tls.key": key,
        "listeners[0].tls.certificates[0].key": other_key,
        "upstream.key": upstream_key,
        "keys.file": tmp_path / "keys.jsonl",
        "keys.pepper_file": tmp_path / "pepper",
        "node_keys.allow": tmp_path / "node-keys",
        "quarantine.file": tmp_path / "quarantine",
        "settings": tmp_path / "relay.yaml",
    }
    files["keys.file"].write_text(KEYS)
    files["keys.pepper_file"].write_text("p" * 32)
    files["node_keys.allow"].write_text(Node().ssh)
    files["quarantine.file"].write_text("node 17\n")
    tls = {
        "certificate": str(certificate),
        "key": str(key),
        "certificates": [{"certificate": str(other_certificate), "key": str(other_key)}],
    }
    settings = {
        "listeners": [{"auth": {"accept": ["api_key", "node_signature"]}, "tls": tls}],
        "upstream": {
            "url": "https://superlink.example",
            "certificate": str(upstream_certificate),
            "key": str(upstream_key),
        },
        "keys": {"file": str(files["keys.file"]), "pepper_file": str(files["keys.pepper_file"])},
        "node_keys": {"allow": str(files["node_keys.allow"])},
        "quarantine": {"file": str(files["quarantine.file"])},
        "redelivery": {"redis": "redis://relay:secret@redis.example/0"},
    }
    config = files["settings"]
    config.write_text(yaml.safe_dump(settings))
    for path in files.values():
        path.chmod(0o640)
    assert check(config) == []
    for name, path in files.items():
        for mode, done in ((0o644, "read"), (0o602, "changed")):
            path.chmod(mode)
            assert check(config) == [
                f"{name}: warning: {path} can be {done} by everybody on this host: chmod o= {path}"
            ]
        path.chmod(0o600)


def test_proxies_that_anybody_may_be_are_named(tmp_path: Path) -> None:
    config = tmp_path / "relay.yaml"
    listeners = [{"trusted_proxies": ["10.0.0.0/8"]}, {"address": ":81", "trusted_proxies": ["::/0"]}]
    config.write_text(yaml.safe_dump({"listeners": listeners}))
    (line,) = check(config)
    assert line == (
        "listeners[1].trusted_proxies: warning: ::/0 lets anybody say whose call it is: name the addresses of"
        " the proxies alone"
    )


def test_settings_without_a_password_may_be_read(tmp_path: Path) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text("redelivery: {redis: 'redis://redis.example/0'}\n")
    config.chmod(0o644)
    assert check(config) == []


def test_files_that_are_not_there_yet_are_nobodys(tmp_path: Path) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text(f"quarantine: {{file: {tmp_path / 'quarantine'}}}\n")
    assert check(config) == []
