"""`flwr-relay nodes`: what it asks, what it prints, and what it writes into its two files."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from relay.__main__ import app
from relay.credentials import allowed_keys
from relay.credentials.node_keys import read_key
from relay.stores import quarantine_list
from tests.relay_process import free_port
from tests.signing import Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NODE, OTHER = Node(), Node()
KEY, OTHER_KEY = (read_key(node.ssh.encode())[0].fingerprint for node in (NODE, OTHER))


class Shell:
    """The command line, with settings that name both files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys, self.quarantine = directory / "node-keys", directory / "quarantine"
        self.config = directory / "relay.yaml"
        self.settings: dict[str, Any] = {
            "listeners": [{"auth": {"accept": ["node_signature"]}}],
            "node_keys": {"allow": str(self.keys)},
            "quarantine": {"file": str(self.quarantine)},
            "admin": {"address": f"127.0.0.1:{free_port()}"},
        }
        self.code = 0

    def __call__(self, *words: str, given: str | None = None) -> str:
        """Run `flwr-relay nodes WORDS`; return what it printed, and keep the exit code."""
        self.config.write_text(yaml.safe_dump(self.settings))
        result = CliRunner().invoke(app, ["nodes", *words, "--config", str(self.config)], input=given)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        self.code = result.exit_code
        return result.output

    def file(self, name: str, text: str | bytes) -> str:
        path = self.directory / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


# -- keys -----------------------------------------------------------------------------------------------


def test_keys_are_allowed_listed_and_taken_back(shell: Shell) -> None:
    assert (
        shell("allow", shell.file("a.pub", f"{NODE.ssh} root@site-a\n")) == f"allowed {KEY} (root@site-a)\n"
    )
    pem = shell.file("b.pem", OTHER.pem)
    said = shell("allow", pem, "--name", "site b", "--tenant", "north", "--label", "room=1")
    assert said == f"allowed {OTHER_KEY} (site b)\n"
    known = allowed_keys.parse(shell.keys.read_text())
    assert known[KEY].name == "root@site-a"
    assert known[OTHER_KEY][1:] == ("site b", "north", (("room", "1"),))
    table = shell("allowed")
    assert [line.split() for line in table.splitlines()] == [
        ["KEY", "NAME", "TENANT", "LABELS"],
        [KEY, "root@site-a", "-"],
        [OTHER_KEY, "site", "b", "north", "room=1"],
    ]
    listed = json.loads(shell("allowed", "--json"))
    assert listed[1] == {
        "fingerprint": OTHER_KEY,
        "name": "site b",
        "tenant": "north",
        "labels": {"room": "1"},
    }
    assert shell("disallow", "site b") == f"no longer allowed: {OTHER_KEY} (site b)\n"
    assert [*allowed_keys.parse(shell.keys.read_text())] == [KEY]


@pytest.mark.parametrize("how", ["fingerprint", "name", "file"])
def test_a_key_is_taken_back_by_whatever_names_it(shell: Shell, how: str) -> None:
    shell.keys.write_text(f"# ours\n{NODE.ssh} a\n{OTHER.ssh} b\n")
    shell("disallow", {"fingerprint": KEY, "name": "a", "file": shell.file("a.pub", NODE.ssh)}[how])
    assert shell.code == 0
    assert shell.keys.read_text() == f"# ours\n{OTHER.ssh} b\n"


def test_the_last_key_is_not_taken_back(shell: Shell) -> None:
    shell.keys.write_text(f"{NODE.ssh} a\n")
    assert "it is the last key" in shell("disallow", "a")
    assert shell.code == 3
    assert shell.keys.read_text() == f"{NODE.ssh} a\n"


def test_a_key_comes_from_standard_input_too(shell: Shell) -> None:
    assert shell("allow", "-", given=NODE.ssh) == f"allowed {KEY} ({KEY})\n"


def test_what_is_no_public_key_is_refused(shell: Shell) -> None:
    private = NODE.pair[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for words, problem in (
        (("allow", shell.file("key", private)), "is a private key, which stays on its node"),
        (("allow", shell.file("x", "hello")), "must be a public key in PEM or OpenSSH format"),
        (("allow", str(shell.directory / "absent")), "No such file or directory"),
        (("allow", shell.file("a", NODE.ssh), "--name", "x" * 65), "name that is longer than 64"),
        (("allow", shell.file("a", NODE.ssh), "--tenant", "a b"), "cannot be written down"),
        (("allow", shell.file("a", NODE.ssh), "--label", "x"), "write key=value"),
    ):
        assert problem in shell(*words)
        assert shell.code == 2
    assert not shell.keys.exists()


def test_a_key_that_is_there_or_is_not_is_said_to_be(shell: Shell) -> None:
    shell("allow", shell.file("a.pub", f"{NODE.ssh} a"))
    assert "is allowed already" in shell("allow", shell.file("a.pub", f"{NODE.ssh} other"))
    assert shell.code == 3
    assert "is no key of" in shell("disallow", "nobody")
    assert shell.code == 3
    shell("allow", shell.file("b.pub", f"{OTHER.ssh} a"))
    assert "2 keys have the name a: use a fingerprint" in shell("disallow", "a")
    assert shell.code == 3


def test_a_broken_list_is_named_with_its_line_and_left_alone(shell: Shell) -> None:
    shell.keys.write_text("broken\n")
    for words in (("allowed",), ("allow", shell.file("a", NODE.ssh)), ("list",)):
        assert "line 1: must be a public key" in shell(*words)
        assert shell.code == 2
    assert shell.keys.read_text() == "broken\n"


def test_a_list_that_is_not_there_yet_is_said_to_be_none(shell: Shell) -> None:
    assert "is not there" in shell("allowed")
    assert shell.code == 1
    shell.settings = {}
    assert "set node_keys.allow" in shell("allowed")
    assert shell.code == 2
    assert "set quarantine.file" in shell("quarantined")
    assert shell.code == 2


def test_check_says_how_the_lists_are(shell: Shell) -> None:
    def check() -> str:
        shell.config.write_text(yaml.safe_dump(shell.settings))
        result = CliRunner().invoke(app, ["check", "--no-probe", "--config", str(shell.config)])
        assert result.exit_code == 0
        return result.output

    assert f"warning: {shell.keys} is not there: nodes are told to come back later" in check()
    shell.keys.write_text(f"{NODE.ssh}\n{OTHER.ssh}\n")
    shell.quarantine.write_text("node 17\n")
    said = check()
    assert f"node keys: ok ({shell.keys}: 2 allowed)" in said
    assert f"quarantine: ok ({shell.quarantine}: 1 in it)" in said


# -- quarantine -----------------------------------------------------------------------------------------


def test_nodes_go_into_quarantine_and_out_again(shell: Shell) -> None:
    assert shell("quarantined") == "KIND  WHO  SINCE  REASON\n"
    assert shell("quarantine", "17", "--reason", "sends\nNaN") == "in quarantine: node 17\n"
    assert shell("quarantine", KEY) == f"in quarantine: key {KEY}\n"
    assert shell("quarantine", "north/site b") == "in quarantine: identity north/site b\n"
    listed = quarantine_list.parse(shell.quarantine.read_text())
    assert listed.nodes[17].reason == "sends NaN"
    assert listed.nodes[17].since.endswith("+00:00")
    shown = json.loads(shell("quarantined", "--json"))
    assert [(entry["kind"], entry["value"]) for entry in shown] == [
        ("node", "17"),
        ("key", KEY),
        ("identity", "north/site b"),
    ]
    assert "sends NaN" in shell("quarantined")
    assert shell("release", "node:17") == "released: node 17\n"
    assert shell("release", "north/site b") == "released: identity north/site b\n"
    assert [*quarantine_list.parse(shell.quarantine.read_text()).keys] == [KEY]


SEPARATORS = ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_who_is_named_leaves_whatever_ends_a_line_elsewhere(shell: Shell, separator: str) -> None:
    shell.quarantine.write_bytes(f"node 1 a{separator}b\nnode 2\nnode 3\n".encode())
    assert shell("release", "2") == "released: node 2\n"
    assert shell.quarantine.read_bytes() == f"node 1 a{separator}b\nnode 3\n".encode()
    comment = f"# from{separator}the north\n"
    shell.keys.write_bytes(f"{comment}{NODE.ssh} a\n{OTHER.ssh} b\n".encode())
    shell("disallow", "b")
    assert shell.code == 0
    assert shell.keys.read_bytes() == f"{comment}{NODE.ssh} a\n".encode()


@pytest.mark.parametrize("separator", SEPARATORS)
def test_nothing_that_ends_a_line_is_written(shell: Shell, separator: str) -> None:
    shell("quarantine", "444", "--reason", f"a{separator}b")
    assert quarantine_list.parse(shell.quarantine.read_bytes().decode()).nodes[444].reason == "a b"
    said = shell("allow", shell.file("a.pub", NODE.ssh), "--name", f"a{separator}b")
    assert "up to 64 printable characters" in said
    assert shell.code == 2
    shell("allow", shell.file("a.pub", f"{NODE.ssh} a{separator}b"))
    assert shell.code == 2
    shell("allow", shell.file("a.pub", NODE.ssh), "--label", f"a=b{separator}c")
    assert shell.code == 2
    assert not shell.keys.exists()


def test_who_is_there_already_or_is_not_is_said_to_be(shell: Shell) -> None:
    shell("quarantine", "17")
    assert "is in quarantine already" in shell("quarantine", "node:017")
    assert shell.code == 3
    assert "is not in quarantine" in shell("release", "identity:17")
    assert shell.code == 3
    assert "must have a node id" in shell("quarantine", "node:x")
    assert shell.code == 2


def test_a_file_that_cannot_be_written_is_an_error(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("relay.stores.lists.tempfile.mkstemp", full)
    assert "No space left on device" in shell("quarantine", "17")
    assert shell.code == 1


# -- the relay ------------------------------------------------------------------------------------------

NODES = [
    {
        "node_id": "17", "accepted": True, "silent_for": 1.0, "last_method": "PullMessages", "calls": 5,
        "refusals": 1, "wire": "http_v1", "version": "1.42.0", "address": "192.0.2.7", "identity": "b",
        "tenant": "north", "key": KEY, "clock_skew": -0.31,
        "last_refusal": {"reason": "upstream_down", "method": "GetRun", "at": "2026-11-23T12:00:00+00:00"},
    },
    {
        "node_id": None, "accepted": False, "silent_for": 7300.0, "last_method": None, "calls": 1,
        "refusals": 0, "wire": None, "version": "\x1b[31mred", "address": "", "identity": "", "tenant": "",
        "key": OTHER_KEY, "clock_skew": None, "last_refusal": None,
    },
]  # fmt: skip


@contextmanager
def admin(shell: Shell, answers: dict[str, tuple[int, object]]) -> Iterator[list[str]]:
    """An admin port that gives these answers; yields what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, body = answers[self.path.partition("?")[0]]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    port = int(shell.settings["admin"]["address"].rpartition(":")[2])
    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def test_nodes_are_listed_the_latest_first(shell: Shell) -> None:
    shell.quarantine.write_text(f"key {OTHER_KEY}\n")
    with admin(shell, {"/nodes": (200, {"nodes": [*reversed(NODES)]})}):
        for words in ((), ("list",)):
            heading, first, second = shell(*words).splitlines()
            assert shell.code == 0
    assert heading.split()[:3] == ["NODE", "SEEN", "CALL"]
    assert first.split() == [
        *("17", "1s", "ago", "PullMessages", "http_v1", "1.42.0", "north/b", "192.0.2.7", "-0.3s", "5", "1"),
        *("upstream_down", "GetRun", "2026-11-23T12:00:00Z"),
    ]
    assert second.split()[:3] == [OTHER_KEY, "2h", "ago"]
    assert "(stranger)" in second
    assert second.endswith("IN QUARANTINE; -")
    assert "?[31mred" in second
    assert "\x1b" not in second, "what a stranger sends moves nobody's cursor"


def test_filters_are_passed_on_and_json_is_what_the_relay_says(shell: Shell) -> None:
    with admin(shell, {"/nodes": (200, {"nodes": NODES})}) as asked:
        words = (
            "--json --silent-for 60s --identity a&b --tenant t --version 1.4 --wire http_v1 --no-strangers"
        )
        assert json.loads(shell("list", *words.split())) == NODES
    assert asked == [
        "/nodes?silent_for=60s&identity=a%26b&tenant=t&version=1.4&wire=http_v1&accepted=true&limit=10000&offset=0"
    ]


def test_one_node_is_shown(shell: Shell) -> None:
    with admin(
        shell, {"/nodes/17": (200, NODES[0]), "/nodes/18%2F": (404, {"error": "no node 18 was seen"})}
    ):
        assert json.loads(shell("show", "17")) == NODES[0]
        assert "no node 18 was seen" in shell("show", "18/")
        assert shell.code == 3


def test_a_filter_that_the_relay_refuses_is_an_error(shell: Shell) -> None:
    with admin(shell, {"/nodes": (400, {"error": "silent_for must be a duration"})}):
        assert "silent_for must be a duration" in shell("list", "--silent-for", "x")
        assert shell.code == 2


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"nodes": 7}', b"null", b""])
def test_a_port_that_is_no_relays_is_an_error(shell: Shell, body: bytes) -> None:
    with admin(shell, {"/nodes": (200, body)}):
        assert "does not answer as a relay's" in shell("list")
        assert shell.code == 1


def test_a_relay_that_does_not_run_is_an_error(shell: Shell) -> None:
    assert "does not answer as a relay's" in shell("list")
    assert shell.code == 1


def test_settings_before_the_command_are_not_lost_silently(shell: Shell) -> None:
    shell("quarantined")
    result = CliRunner().invoke(app, ["nodes", "--config", str(shell.config), "quarantined"])
    assert result.exit_code == 2
    assert "write --config behind the command" in result.output
    result = CliRunner().invoke(app, ["nodes", "quarantined"], env={"RELAY_CONFIG": str(shell.config)})
    assert result.exit_code == 0
