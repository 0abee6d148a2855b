"""`flwr-relay certs`: what it makes is what the relay and nodes take, and what it shows is what is in use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import yaml
from typer.testing import CliRunner

from relay.__main__ import app
from relay.settings import load
from tests.certificates import make_pair

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def certs(*arguments: str) -> Result:
    return CliRunner().invoke(app, ("certs", *arguments), env={"RELAY_CONFIG": None})


def blocks(text: str) -> list[str]:
    """Return the printed parts, each of which begins with a comment."""
    return [block for block in re.split(r"(?m)^# .*\n", text) if block.strip()]


def test_what_create_prints_are_settings_that_hold(run: None, tmp_path: Path) -> None:
    result = certs("create", "ca", "--name", "relay.example", "--name", "10.0.0.5", "--client", "site-a")
    assert result.exit_code == 0, result.output
    server, nodes, site = blocks(result.output)
    for name, text in (("server.yaml", server), ("site.yaml", site)):
        (tmp_path / name).write_text(text)
    settings = load(tmp_path / "server.yaml", {})
    assert settings.listeners[0].tls is not None
    assert settings.listeners[0].tls.client_certificates == "wanted"
    assert settings.listeners[0].auth.accept == (("certificate",),)
    assert str(settings.client_certificates.allow[0].match) == "CN:site-a"
    upstream = load(tmp_path / "site.yaml", {}).upstream
    assert str(upstream.url) == "https://relay.example:8443"
    assert str(upstream.certificate) == "ca/site-a.pem"
    command = "flower-supernode --root-certificates ca/ca.pem"
    assert nodes.splitlines()[:2] == [
        f"{command} --superlink relay.example:8443",
        f"{command} --rest --superlink https://relay.example:8443  # flwr <= 1.32",
    ]
    assert "PRIVATE" not in result.output


def test_a_relay_alone_asks_for_no_client_certificates(run: None) -> None:
    result = certs("create", "ca", "--name", "::1")
    assert result.exit_code == 0, result.output
    server, nodes = blocks(result.output)
    assert set(yaml.safe_load(server)) == {"listeners"}
    assert set(yaml.safe_load(server)["listeners"][0]["tls"]) == {"certificate", "key"}
    assert "--superlink [::1]:8443" in nodes


def test_clients_can_be_added_to_an_authority(run: None, tmp_path: Path) -> None:
    certs("create", "ca", "--name", "localhost")
    before = (tmp_path / "ca" / "ca.pem").read_bytes()
    result = certs("create", "ca", "--client", "site-a", "--client", "site-b")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "ca" / "ca.pem").read_bytes() == before
    assert (tmp_path / "ca" / "site-b-key.pem").exists()
    assert "https://RELAY:8443" in result.output


def test_nothing_is_overwritten_without_force(run: None, tmp_path: Path) -> None:
    certs("create", "ca", "--name", "localhost")
    before = (tmp_path / "ca" / "relay.pem").read_bytes()
    result = certs("create", "ca", "--name", "localhost")
    assert result.exit_code == 1
    assert result.stderr.startswith("not made: ca/relay.pem and ca/relay-key.pem would be overwritten")
    assert (tmp_path / "ca" / "relay.pem").read_bytes() == before
    assert certs("create", "ca", "--name", "localhost", "--force").exit_code == 0
    assert (tmp_path / "ca" / "relay.pem").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a b"], "neither a host name nor an IP address"),
        (["--client", "../x"], "cannot name a client"),
    ],
)
def test_a_name_that_cannot_be_is_said(run: None, arguments: list[str], said: str) -> None:
    result = certs("create", "ca", *arguments)
    assert result.exit_code == 1
    assert said in result.stderr


def test_something_must_be_asked_for(run: None, tmp_path: Path) -> None:
    assert certs("create", "ca").exit_code == 2
    assert not (tmp_path / "ca").exists()


def test_a_directory_that_cannot_be_made_is_said(run: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = certs("create", "file", "--name", "localhost")
    assert result.exit_code == 1
    assert "not made: " in result.stderr


def write(tmp_path: Path, **sections: object) -> str:
    (tmp_path / "relay.yaml").write_text(yaml.safe_dump(sections))
    return "relay.yaml"


def listener(certificate: Path, key: Path, **more: object) -> dict[str, object]:
    return {"address": ":8443", "tls": {"certificate": str(certificate), "key": str(key), **more}}


def test_show_lists_each_file_with_its_names_and_its_end(run: None, tmp_path: Path) -> None:
    certs("create", "ca", "--name", "relay.example", "--name", "10.0.0.5", "--client", "site-a")
    certificate, key = make_pair(tmp_path, host="*.other.example", days=40)
    ca = tmp_path / "ca"
    more = {
        "certificates": [{"certificate": str(certificate), "key": str(key)}],
        "client_certificates": "needed",
        "client_ca": str(ca / "ca.pem"),
    }
    upstream = {
        "url": "https://superlink",
        "ca_file": str(ca / "ca.pem"),
        "certificate": str(ca / "site-a.pem"),
        "key": str(ca / "site-a-key.pem"),
    }
    sections = {
        "listeners": [listener(ca / "relay.pem", ca / "relay-key.pem", **more), {"address": ":8080"}],
        "upstream": upstream,
    }
    result = certs("show", "-c", write(tmp_path, **sections))
    assert result.exit_code == 0, result.output
    lines = [re.sub(r"\d{4}-\S+Z", "TIME", line) for line in result.output.splitlines()]
    assert lines == [
        "0.0.0.0:8443  certificate  TIME  397 days left  relay.example, 10.0.0.5",
        "0.0.0.0:8443  certificates[0]  TIME  40 days left  *.other.example",
        "0.0.0.0:8443  client_ca  TIME  3650 days left",
        "upstream  ca_file  TIME  3650 days left",
        "upstream  certificate  TIME  397 days left  site-a",
    ]


@pytest.mark.parametrize(("days", "code"), [(-1, 1), (13, 1), (15, 0)])
def test_show_fails_when_something_ends_soon(run: None, tmp_path: Path, days: int, code: int) -> None:
    pair = make_pair(tmp_path, days=days)
    result = certs("show", "-c", write(tmp_path, listeners=[listener(*pair)]))
    assert result.exit_code == code
    assert ("has ended" in result.output) == (days < 0)


def test_show_says_that_there_is_nothing(run: None, tmp_path: Path) -> None:
    result = certs("show", "-c", write(tmp_path))
    assert (result.exit_code, result.output) == (0, "no certificates in use\n")


def test_show_needs_settings_that_hold(run: None, tmp_path: Path) -> None:
    assert certs("show", "-c", write(tmp_path, workers=0)).exit_code == 2
