"""The relay's own tree: defaults, what is refused and why, and what must fit together."""

import ipaddress
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from relay.call import Wire
from relay.settings import CARRIES, BaseUrl, HostPort, Listener, Settings, SettingsError, Upstream, load
from relay.settings_source import _holds, annotation_at, keys


def load_tree(tmp_path: Path, tree: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    path = tmp_path / "relay.yaml"
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    return load(path, environ or {})


def problems(tmp_path: Path, tree: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> list[str]:
    """What is said of `tree`, without the path of the file."""
    with pytest.raises(SettingsError) as caught:
        load_tree(tmp_path, tree, environ)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_the_defaults_are_loaded_without_any_source() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert 1 <= settings.workers <= 4
    assert settings.upstream.url == BaseUrl("http", "127.0.0.1", 8000)
    assert settings.listeners == (Listener(wires=(Wire.HTTP_V1,)),)
    assert settings.limits.max_body == 4 * 1024**3
    assert settings.drain.timeout == 120


def test_every_setting_can_be_given_in_the_file(tmp_path: Path) -> None:
    tree = {
        "workers": 3,
        "listeners": [
            {"address": ":80", "wires": ["http_v1"], "trusted_proxies": ["10.0.0.0/8"], "keepalive": "5m"},
            {"address": "[::1]:81"},
        ],
        "upstream": {
            "url": "https://superlink",
            "wire": "http_v1",
            "ca_file": certifi.where(),
            "connect_timeout": 1,
            "response_timeout": "29s",
            "heartbeat_timeout": "4900ms",
            "idle_timeout": "1m",
            "keepalive": 1.5,
            "max_connections": 1,
            "queue_timeout": "250ms",
        },
        "limits": {"max_body": "512MiB"},
        "admin": {"address": "0.0.0.0:9101"},
        "drain": {"timeout": "10s"},
        "log": {"level": "debug", "format": "json"},
    }
    settings = load_tree(tmp_path, tree)
    assert settings.workers == 3
    assert settings.listeners[0] == Listener(
        address=HostPort("0.0.0.0", 80),
        wires=(Wire.HTTP_V1,),
        trusted_proxies=(ipaddress.ip_network("10.0.0.0/8"),),
        keepalive=300.0,
    )
    assert settings.listeners[1].address == HostPort("::1", 81)
    assert settings.upstream == Upstream(
        url=BaseUrl("https", "superlink", 443),
        ca_file=Path(certifi.where()),
        connect_timeout=1.0,
        response_timeout=29.0,
        heartbeat_timeout=4.9,
        idle_timeout=60.0,
        keepalive=1.5,
        max_connections=1,
        queue_timeout=0.25,
    )
    assert settings.limits.max_body == 512 * 1024**2
    assert settings.admin.address == HostPort("0.0.0.0", 9101)
    assert (settings.drain.timeout, settings.log.level, settings.log.format) == (10.0, "debug", "json")


def test_every_setting_can_be_given_in_the_environment() -> None:
    environ = {
        "RELAY_WORKERS": "3",
        "RELAY_LISTENERS__0__ADDRESS": "[::1]:8080",
        "RELAY_LISTENERS__0__WIRES": "[rest_v0]",
        "RELAY_LISTENERS__0__TRUSTED_PROXIES__0": "10.0.0.0/8",
        "RELAY_UPSTREAM__URL": "http://superlink:9092",
        "RELAY_UPSTREAM__WIRE": "rest_v0",
        "RELAY_UPSTREAM__CA_FILE": "null",
        "RELAY_UPSTREAM__QUEUE_TIMEOUT": "500ms",
        "RELAY_LIMITS__MAX_BODY": "1GiB",
        "RELAY_ADMIN__ADDRESS": ":9100",
        "RELAY_LOG": "{level: warning}",
    }
    settings = load(None, environ)
    assert settings.workers == 3
    assert settings.listeners == (
        Listener(
            address=HostPort("::1", 8080),
            wires=(Wire.REST_V0,),
            trusted_proxies=(ipaddress.ip_network("10.0.0.0/8"),),
        ),
    )
    assert settings.upstream == Upstream(
        url=BaseUrl("http", "superlink", 9092), wire=Wire.REST_V0, queue_timeout=0.5
    )
    assert settings.limits.max_body == 1024**3
    assert settings.admin.address == HostPort("0.0.0.0", 9100)
    assert settings.log.level == "warning"


def test_a_listener_serves_all_that_the_upstream_carries_unless_told() -> None:
    assert set(CARRIES) == set(Wire)
    for wire, carried in CARRIES.items():
        assert load(None, {"RELAY_UPSTREAM__WIRE": wire.value}).listeners[0].wires == carried
        assert Settings(upstream=Upstream(wire=wire)).listeners[0].wires == carried


def test_a_section_or_a_listener_without_keys_has_the_defaults(tmp_path: Path) -> None:
    assert load_tree(tmp_path, {"upstream": None, "log": {}, "listeners": [None]}) == Settings()


def test_the_tree_is_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.workers = 2
    with pytest.raises(ValidationError, match="frozen"):
        settings.upstream.wire = Wire.REST_V0
    hash(settings)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"workers": 0}, "workers = 0: must be at least 1 (relay.yaml:1)"),
        ({"workers": 257}, "workers = 257: must be at most 256 (relay.yaml:1)"),
        ({"workers": True}, "workers = True: must be a whole number (relay.yaml:1)"),
        ({"workers": "all"}, "workers = 'all': must be a whole number (relay.yaml:1)"),
        ({"workers": None}, "workers = None: must be a whole number (relay.yaml:1)"),
        ({"listeners": []}, "listeners = []: must have at least one entry (relay.yaml:1)"),
        ({"listeners": {}}, "listeners = {}: must be a list (relay.yaml:1)"),
        (
            {"listeners": [7]},
            "listeners[0] = 7: must be a mapping with any of the keys address, wires, trusted_proxies",
        ),
        (
            {"listeners": [{"wires": []}]},
            "listeners[0].wires = []: must have at least one entry (relay.yaml:2)",
        ),
        (
            {"listeners": [{"wires": ["grpc"]}]},
            "listeners[0].wires[0] = 'grpc': must be 'http_v1' or 'rest_v0' (relay.yaml:3)",
        ),
        (
            {"listeners": [{"wires": ["http_v1", "http_v1"]}]},
            "listeners[0].wires = ['http_v1', 'http_v1']: must name each wire once (relay.yaml:2)",
        ),
        (
            {"listeners": [{"addres": ":80"}]},
            "listeners[0].addres: is not a setting; did you mean address? (relay.yaml:2)",
        ),
        ({"upstream": "http://a"}, "upstream = 'http://a': must be a mapping with any of the keys url, wire"),
        (
            {"upstream": {"wire": "grpc"}},
            "upstream.wire = 'grpc': must be 'http_v1' or 'rest_v0' (relay.yaml:2)",
        ),
        ({"upstream": {"ca_file": 5}}, "upstream.ca_file = 5: must be a path (relay.yaml:2)"),
        (
            {"upstream": {"response_timeout": 30}},
            "upstream.response_timeout = 30: must be shorter than 30s: an HTTP v1 node gives up on a call",
        ),
        (
            {"upstream": {"heartbeat_timeout": "5s"}},
            "upstream.heartbeat_timeout = '5s': must be shorter than 5s: a node gives up on a heartbeat",
        ),
        (
            {"upstream": {"keepalive": "5000ms"}},
            "upstream.keepalive = '5000ms': must be shorter than 5s: the SuperLink closes an idle",
        ),
        (
            {"upstream": {"max_connections": 0}},
            "upstream.max_connections = 0: must be at least 1 (relay.yaml:2)",
        ),
        (
            {"upstream": {"max_connections": 1.5}},
            "upstream.max_connections = 1.5: must be a whole number (relay.yaml:2)",
        ),
        (
            {"log": {"level": "warn"}},
            "log.level = 'warn': must be 'debug', 'info', 'warning' or 'error' (relay.yaml:2)",
        ),
        (
            {"log": {"format": "text"}},
            "log.format = 'text': must be 'json', 'console' or 'auto' (relay.yaml:2)",
        ),
        (
            {"limits": {"max_body": 0}},
            "limits.max_body = 0: must be above zero and finite: a number of bytes",
        ),
        ({"drain": {"timeout": float("inf")}}, "drain.timeout = inf: must be above zero and finite"),
        ({"upstrem": {}}, "upstrem: is not a setting; did you mean upstream? (relay.yaml:1)"),
        ({"token": "s3cret"}, "token: is not a setting; known here: workers, upstream, listeners, limits"),
        ({"a\nb": 1}, r"'a\nb': is not a setting; known here: "),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    tmp_path: Path, tree: dict[str, Any], said: str
) -> None:
    [line] = problems(tmp_path, tree)
    assert line.startswith(said)
    assert "s3cret" not in line


def test_a_wrong_value_of_the_environment_is_named_with_its_variable() -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, {"RELAY_UPSTREAM__URL": "http://me:s3cret@superlink"})
    [problem] = caught.value.problems
    assert str(problem) == (
        "upstream.url = 'http://***@superlink': must not hold a user name or password: write http://host:port"
        " (RELAY_UPSTREAM__URL)"
    )


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    tree = {
        "workers": 0,
        "listeners": [{"address": ":9100", "wires": ["rest_v0"], "keepalive": "long"}, {"addres": ":80"}],
        "upstream": {"url": "superlink", "ca_file": "/nowhere", "idle_timeout": -1},
        "nonsense": True,
    }
    environ = {"RELAY_LOG__LEVEL": "loud", "RELAY_ADMIN__ADRESS": ":1", "RELAY_DRAIN__TIMEOUT": ""}
    said = [line.split(": ")[0] for line in problems(tmp_path, tree, environ)]
    assert sorted(said) == sorted(
        [
            "RELAY_ADMIN__ADRESS",
            "drain.timeout",
            "workers = 0",
            "listeners[0].keepalive = 'long'",
            "listeners[1].addres",
            "upstream.url = 'superlink'",
            "upstream.ca_file = '/nowhere'",
            "upstream.idle_timeout = -1",
            "log.level = 'loud'",
            "nonsense",
            "listeners[0].address = 0.0.0.0:9100",
            "listeners[0].wires = rest_v0",
        ]
    )


def test_addresses_must_not_overlap(tmp_path: Path) -> None:
    tree = {"listeners": [{"address": ":80"}, {"address": "127.0.0.1:80"}, {"address": "127.0.0.1:9100"}]}
    said = "listeners[{}].address = {}: cannot be listened on beside {}, which is {}: use another port"
    assert problems(tmp_path, tree) == [
        said.format(0, "0.0.0.0:80", "listeners[1].address", "127.0.0.1:80") + " (relay.yaml:2)",
        said.format(2, "127.0.0.1:9100", "admin.address", "127.0.0.1:9100") + " (relay.yaml:4)",
    ]


def test_a_conflict_with_a_default_says_so() -> None:
    with pytest.raises(
        SettingsError, match=r"^listeners\[0\]\.address = 0\.0\.0\.0:8080: .*admin.*\(default\)$"
    ):
        load(None, {"RELAY_ADMIN__ADDRESS": ":8080"})


def test_a_wire_must_be_carried_by_the_upstream(tmp_path: Path) -> None:
    tree = {"listeners": [{"wires": ["http_v1", "rest_v0"]}], "upstream": {"wire": "rest_v0"}}
    [line] = problems(tmp_path, tree)
    assert line == (
        "listeners[0].wires = http_v1: cannot be served, because upstream.wire is rest_v0 and"
        " bridging between them is not available: serve rest_v0, or change upstream.wire (relay.yaml:2)"
    )


def test_a_ca_file_needs_https(tmp_path: Path) -> None:
    [line] = problems(tmp_path, {"upstream": {"ca_file": certifi.where(), "url": "http://a:1"}})
    assert line.startswith(f"upstream.ca_file = '{certifi.where()}': has no effect, because upstream.url is")


@pytest.mark.parametrize(
    "tree",
    [
        {"listeners": [{"wires": ["rest_v0"]}], "upstream": {"wire": "rest-v0"}},
        {"listeners": [{"wires": ["rest_v0"]}], "upstream": ["wire: rest_v0"]},
        {"listeners": [{"address": ":9100"}], "admin": {"address": 9101}},
        {"upstream": {"ca_file": certifi.where(), "url": "superlink"}},
        {"listeners": [{"address": ":9100"}, "none"]},
    ],
)
def test_no_conflict_is_reported_with_a_value_that_is_wrong_itself(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    assert len(problems(tmp_path, tree)) == 1


def test_no_conflict_is_reported_when_the_file_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / "missing.yaml", {"RELAY_ADMIN__ADDRESS": ":8080", "RELAY_WORKERS": "0"})
    assert [problem.message for problem in caught.value.problems] == [
        "cannot be read: No such file or directory",
        "must be at least 1",
    ]


def test_every_key_says_what_it_means() -> None:
    for *section, name in keys(Settings):
        declared = annotation_at(Settings, tuple(section))
        assert issubclass(declared, BaseModel)
        assert (declared.model_fields[str(name)].description or "").endswith("."), (*section, name)


def test_the_settings_are_read_without_the_libraries_that_serve() -> None:
    code = "import sys, relay.settings; print(sorted({'aiohttp', 'gunicorn', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_example_holds_every_key_with_its_default(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "relay.example.yaml"
    assert load(example, {}) == Settings()
    # The keys whose default is no fixed value, or none, are commented out.
    text = re.sub(r"(?m)^( *)# (\w+: \S+)$", r"\1\2", example.read_text())
    path = tmp_path / "relay.yaml"
    path.write_text(text.replace("/etc/flwr-relay/superlink-ca.pem", "null"))
    assert load(path, {}) == Settings(workers=4)
    tree = yaml.safe_load(text)
    assert {key for key in keys(Settings) if _holds(tree, key)} == set(keys(Settings))
