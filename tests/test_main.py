"""The command line: what each command prints, and the exit code that scripts and init systems go by."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from relay import __version__, server
from relay.__main__ import app
from relay.fleet import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result

    from relay.settings import Settings


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs a command; its keywords are RELAY_ variables, the only ones there are."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **environ: str) -> Result:
        given: dict[str, str | None] = {f"RELAY_{name}": value for name, value in environ.items()}
        return CliRunner().invoke(app, arguments, env=given)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a settings file and gives its name."""

    def write(text: str) -> str:
        (tmp_path / "relay.yaml").write_text(text)
        return "relay.yaml"

    return write


class Healthy(http.server.BaseHTTPRequestHandler):
    """A SuperLink as far as a probe sees it."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def superlink() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def python(*arguments: str) -> str:
    """Return what a Python of its own prints."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


BAD = """\
upstrem: {}
listeners:
- address: nonsense
"""
PROBLEMS = [
    "upstrem: is not a setting; did you mean upstream? (relay.yaml:1)",
    "listeners[0].address = 'nonsense': has no port: write host:port, such as 0.0.0.0:8080 (relay.yaml:3)",
]

config_commands = pytest.mark.parametrize(
    "command", [("check", "--no-probe"), ("explain",), ("serve",)], ids=" ".join
)


# -- the program --------------------------------------------------------------------------------------


def test_the_version_is_printed_with_the_name(run: Callable[..., Result]) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"flwr-relay {__version__}\n")


def test_the_version_does_not_ask_for_settings(run: Callable[..., Result]) -> None:
    assert run("--version", NO_SUCH_KEY="1").exit_code == 0


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["bare", "help"])
def test_the_commands_are_listed(run: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert all(command in result.output for command in ("serve", "check", "explain", "demo"))


@pytest.mark.parametrize("arguments", [("no-such-command",), ("check", "--no-such-option")], ids=" ".join)
def test_what_is_no_command_or_option_is_an_error(
    run: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert arguments[-1] in result.stderr


def test_a_quick_command_imports_no_server() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from relay.__main__ import app;"
        "CliRunner().invoke(app, ['--version']); print({'gunicorn', 'aiohttp'} & set(sys.modules))"
    )
    assert python("-c", code) == "set()\n"


def test_it_runs_as_a_module() -> None:
    assert python("-m", "relay", "--version") == f"flwr-relay {__version__}\n"


# -- settings that are wrong --------------------------------------------------------------------------


@config_commands
def test_every_problem_of_the_settings_is_reported_at_once_and_nothing_else_happens(
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Result],
    config: Callable[[str], str],
    command: tuple[str, ...],
) -> None:
    monkeypatch.setattr(server, "serve", lambda _: pytest.fail("it served"))
    result = run(*command, "-c", config(BAD), UPSTREAM__KEEPALIVE="9")
    assert result.exit_code == 2
    assert result.stdout == ""
    reported = result.stderr.splitlines()
    assert set(PROBLEMS) < set(reported)
    assert any("RELAY_UPSTREAM__KEEPALIVE" in line for line in reported)


@config_commands
def test_a_settings_file_that_is_not_there_is_a_problem(
    run: Callable[..., Result], command: tuple[str, ...]
) -> None:
    result = run(*command, "--config", "missing.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "missing.yaml: cannot be read: No such file or directory\n"


@config_commands
def test_the_file_may_be_named_by_a_variable(
    run: Callable[..., Result], config: Callable[[str], str], command: tuple[str, ...]
) -> None:
    result = run(*command, CONFIG=config(BAD))
    assert result.exit_code == 2
    assert set(result.stderr.splitlines()) == set(PROBLEMS)


# -- check --------------------------------------------------------------------------------------------


def test_check_says_that_all_is_well(run: Callable[..., Result], superlink: str) -> None:
    result = run("check", UPSTREAM__URL=superlink)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        f"settings: ok (defaults)\nupstream: ok ({superlink} answers GET /health with 200)\n"
    )


def test_check_names_the_file_that_it_checked(
    run: Callable[..., Result], config: Callable[[str], str]
) -> None:
    result = run("check", "--no-probe", "-c", config("log: {level: debug}"))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "settings: ok (relay.yaml)\n", "")


@pytest.mark.parametrize(
    ("wire", "said"),
    [("rest_v0", "with 404, a SuperLink that speaks rest_v0 with 405"), ("http_v1", None)],
)
def test_check_fails_with_one_if_what_answers_is_no_superlink_of_the_wire(
    run: Callable[..., Result], superlink: str, wire: str, said: str | None
) -> None:
    result = run("check", UPSTREAM__URL=superlink, UPSTREAM__WIRE=wire)
    assert result.stdout.startswith("settings: ok (defaults)\n")
    assert result.exit_code == (1 if said else 0)
    if said:
        assert result.stderr.startswith(
            f"upstream: {superlink} answers GET /api/v0/fleet/pull-messages {said}"
        )


def test_check_fails_with_one_if_nobody_answers(run: Callable[..., Result]) -> None:
    result = run("check", UPSTREAM__URL="http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "settings: ok (defaults)\n")
    assert result.stderr.startswith("upstream: http://127.0.0.1:1 does not answer: ")


def test_check_asks_all_addresses_and_fails_for_any_but_one_that_stands_by(
    run: Callable[..., Result], superlink: str
) -> None:
    gone = "http://127.0.0.1:1"
    several = {"UPSTREAM__ADDRESSES": f"[{gone}]", "UPSTREAM__SHARED_STATE": "true"}
    result = run("check", UPSTREAM__URL=superlink, **several)
    assert (result.exit_code, result.stdout.count("upstream: ok")) == (1, 1)
    assert result.stderr.startswith(f"upstream: {gone} does not answer: ")
    result = run("check", UPSTREAM__URL=superlink, UPSTREAM__STANDBY=f"[{gone}]")
    assert (result.exit_code, result.stdout.count("upstream: ok")) == (0, 1)
    assert result.stderr.startswith(f"standby: {gone} does not answer: ")


def test_check_asks_nobody_if_it_is_told_not_to(run: Callable[..., Result]) -> None:
    result = run("check", "--no-probe", UPSTREAM__URL="http://127.0.0.1:1")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "settings: ok (defaults)\n", "")


# -- explain ------------------------------------------------------------------------------------------


def test_explain_prints_the_chain_of_every_method_under_its_listener_and_wire(
    run: Callable[..., Result], config: Callable[[str], str]
) -> None:
    text = "upstream: {url: 'https://superlink'}\nlisteners: [{address: ':80'}, {address: '[::1]:81'}]"
    result = run("explain", "-c", config(text))
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == ["0.0.0.0:80 http_v1", "[::1]:81 http_v1"]
    assert len(lines) == 2 * (1 + len(Method))
    for line, method in zip(lines[1:], Method, strict=False):
        name, _, steps = line.strip().partition(" ")
        assert name == method.rpc
        first, *between, last = steps.strip().split(" -> ")
        assert (first, last) == ("metrics", "http_v1 https://superlink")
        assert between[0] == "access_log"
        assert "validate" in between


def test_explain_asks_nobody(run: Callable[..., Result]) -> None:
    assert run("explain", UPSTREAM__URL="http://127.0.0.1:1").exit_code == 0


# -- serve --------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], Settings]]]:
    """What the server was given to read its settings with, instead of a server."""
    given: list[Callable[[], Settings]] = []
    monkeypatch.setattr(server, "serve", given.append)
    return given  # type: ignore[return-value]


def test_serve_reads_the_settings_again_at_each_reload(
    run: Callable[..., Result],
    config: Callable[[str], str],
    read: list[Callable[[], Settings]],
) -> None:
    assert run("serve", "-c", config("workers: 3")).exit_code == 0
    (again,) = read
    assert again().workers == 3
    config("workers: 5")
    assert again().workers == 5


def test_the_number_of_workers_on_the_command_line_wins_over_all_else(
    run: Callable[..., Result], config: Callable[[str], str], read: list[Callable[[], Settings]]
) -> None:
    result = run("serve", "--workers", "2", "-c", config("workers: 3"), WORKERS="4")
    assert result.exit_code == 0
    assert read[0]().workers == 2


def test_a_number_of_workers_that_cannot_be_is_a_problem_of_the_settings(
    run: Callable[..., Result], read: list[Callable[[], Settings]]
) -> None:
    result = run("serve", "--workers", "0")
    assert result.exit_code == 2
    assert result.stderr.startswith("workers = 0: must be at least 1")
    assert read == []
