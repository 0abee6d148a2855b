"""Loading the relay's own settings: what is refused and why, and what must fit together."""

import ipaddress
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml

from relay.call import Wire
from relay.settings import (
    BaseUrl,
    Drain,
    HostPort,
    Listener,
    Repair,
    Retry,
    Settings,
    SettingsError,
    Tls,
    Upstream,
    load,
)
from tests.certificates import make_pair


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
    assert settings.mode == "normal"
    assert settings.pid_file is None
    assert settings.listeners[0].tls is None
    assert settings.retry == Retry(enabled=True, base=0.1, cap=5.0, budget=0.2, floor=10.0)
    assert settings.repair == Repair(lost_answers=True, reactivate=True)
    assert settings.drain == Drain(delay=0.0, timeout=120.0, idle_grace=5.0)


def test_every_setting_can_be_given_in_the_file(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    tls = {"certificate": str(certificate), "key": str(key), "minimum_version": "1.3"}
    tree = {
        "workers": 3,
        "mode": "maintenance",
        "pid_file": str(tmp_path / "relay.pid"),
        "listeners": [
            {
                "address": ":80",
                "wires": ["http_v1"],
                "trusted_proxies": ["10.0.0.0/8"],
                "keepalive": "5m",
                "tls": tls,
            },
            {"address": "[::1]:81", "tls": {**tls, "minimum_version": 1.2}},
            {"address": "[::1]:82", "tls": None},
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
        "retry": {"enabled": False, "base": "1s", "cap": "1s", "budget": 0, "floor": 0.5},
        "repair": {"lost_answers": False, "reactivate": False},
        "drain": {"delay": "15s", "timeout": "10s", "idle_grace": "9s"},
        "log": {"level": "debug", "format": "json"},
    }
    settings = load_tree(tmp_path, tree)
    assert (settings.workers, settings.mode) == (3, "maintenance")
    assert settings.pid_file == tmp_path / "relay.pid"
    assert settings.listeners[0] == Listener(
        address=HostPort("0.0.0.0", 80),
        wires=(Wire.HTTP_V1,),
        trusted_proxies=(ipaddress.ip_network("10.0.0.0/8"),),
        keepalive=300.0,
        tls=Tls(certificate=certificate, key=key, minimum_version="1.3"),
    )
    assert settings.listeners[1].address == HostPort("::1", 81)
    assert settings.listeners[1].tls == Tls(certificate=certificate, key=key, minimum_version="1.2")
    assert settings.listeners[2].tls is None
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
    assert settings.retry == Retry(enabled=False, base=1.0, cap=1.0, budget=0.0, floor=0.5)
    assert settings.repair == Repair(lost_answers=False, reactivate=False)
    assert settings.drain == Drain(delay=15.0, timeout=10.0, idle_grace=9.0)
    assert (settings.log.level, settings.log.format) == ("debug", "json")


def test_every_setting_can_be_given_in_the_environment(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    environ = {
        "RELAY_WORKERS": "3",
        "RELAY_MODE": "pass_through",
        "RELAY_PID_FILE": str(tmp_path / "relay.pid"),
        "RELAY_LISTENERS__0__ADDRESS": "[::1]:8080",
        "RELAY_LISTENERS__0__WIRES": "[rest_v0]",
        "RELAY_LISTENERS__0__TRUSTED_PROXIES__0": "10.0.0.0/8",
        "RELAY_LISTENERS__0__TLS__CERTIFICATE": str(certificate),
        "RELAY_LISTENERS__0__TLS__KEY": str(key),
        "RELAY_LISTENERS__0__TLS__MINIMUM_VERSION": "1.3",
        "RELAY_UPSTREAM__URL": "http://superlink:9092",
        "RELAY_UPSTREAM__WIRE": "rest_v0",
        "RELAY_UPSTREAM__CA_FILE": "null",
        "RELAY_UPSTREAM__QUEUE_TIMEOUT": "500ms",
        "RELAY_LIMITS__MAX_BODY": "1GiB",
        "RELAY_RETRY__ENABLED": "false",
        "RELAY_RETRY__BUDGET": "1",
        "RELAY_REPAIR__REACTIVATE": "no",
        "RELAY_ADMIN__ADDRESS": ":9100",
        "RELAY_DRAIN__DELAY": "0",
        "RELAY_LOG": "{level: warning}",
    }
    settings = load(None, environ)
    assert (settings.workers, settings.mode) == (3, "pass_through")
    assert settings.pid_file == tmp_path / "relay.pid"
    assert settings.listeners == (
        Listener(
            address=HostPort("::1", 8080),
            wires=(Wire.REST_V0,),
            trusted_proxies=(ipaddress.ip_network("10.0.0.0/8"),),
            tls=Tls(certificate=certificate, key=key, minimum_version="1.3"),
        ),
    )
    assert settings.upstream == Upstream(
        url=BaseUrl("http", "superlink", 9092), wire=Wire.REST_V0, queue_timeout=0.5
    )
    assert settings.limits.max_body == 1024**3
    assert settings.admin.address == HostPort("0.0.0.0", 9100)
    assert settings.retry == Retry(enabled=False, budget=1.0)
    assert settings.repair == Repair(reactivate=False)
    assert settings.drain == Drain()
    assert settings.log.level == "warning"


def test_a_section_or_a_listener_without_keys_has_the_defaults(tmp_path: Path) -> None:
    assert load_tree(tmp_path, {"upstream": None, "log": {}, "listeners": [None]}) == Settings()


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
            {"listeners": [{"wires": ["http"]}]},
            "listeners[0].wires[0] = 'http': must be 'http_v1', 'rest_v0', 'grpc' or 'grpc_adapter' (relay",
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
            {"upstream": {"wire": "http"}},
            "upstream.wire = 'http': must be 'http_v1', 'rest_v0', 'grpc' or 'grpc_adapter' (relay.yaml:2)",
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
        ({"drain": {"timeout": 0}}, "drain.timeout = 0: must be above zero and finite"),
        ({"drain": {"delay": -1}}, "drain.delay = -1: must be at least zero and finite: a number of seconds"),
        ({"drain": {"idle_grace": 0}}, "drain.idle_grace = 0: must be above zero and finite"),
        (
            {"mode": "off"},
            "mode = 'off': must be 'normal', 'maintenance' or 'pass_through' (relay.yaml:1)",
        ),
        ({"pid_file": 5}, "pid_file = 5: must be a path (relay.yaml:1)"),
        ({"pid_file": "/nowhere/relay.pid"}, "pid_file = '/nowhere/relay.pid': is in no directory that"),
        ({"retry": {"enabled": 1}}, "retry.enabled = 1: must be true or false (relay.yaml:2)"),
        ({"redelivery": {"deliveries": 1}}, "redelivery.deliveries = 1: must be at least 2 (relay.yaml:2)"),
        (
            {"redelivery": {"max_size": 100}},
            "redelivery.max_size = 100: must be at least 1024 (relay.yaml:2)",
        ),
        (
            {"redelivery": {"memory": "1KiB"}},
            "redelivery.memory = '1KiB': must be at least 65536 (relay.yaml:2)",
        ),
        ({"retry": {"budget": -0.1}}, "retry.budget = -0.1: must be at least 0 (relay.yaml:2)"),
        ({"retry": {"budget": 1.5}}, "retry.budget = 1.5: must be at most 1 (relay.yaml:2)"),
        ({"retry": {"budget": "20%"}}, "retry.budget = '20%': must be a number (relay.yaml:2)"),
        ({"retry": {"floor": 0}}, "retry.floor = 0: must be above 0 (relay.yaml:2)"),
        (
            {"retry": {"floor": float("inf")}},
            "retry.floor = inf: must be a finite number (relay.yaml:2)",
        ),
        ({"repair": {"reactivate": None}}, "repair.reactivate = None: must be true or false (relay.yaml:2)"),
        (
            {"listeners": [{"tls": True}]},
            "listeners[0].tls = True: must be a mapping with any of the keys certificate, key, certificates",
        ),
        ({"upstrem": {}}, "upstrem: is not a setting; did you mean upstream? (relay.yaml:1)"),
        ({"token": "s3cret"}, "token: is not a setting; known here: workers, mode, pid_file, upstream"),
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


def test_redis_for_redelivery_needs_redelivery(tmp_path: Path) -> None:
    tree = {"redelivery": {"redis": "redis://relay:s3cret@redis/1", "enabled": False}}
    [line] = problems(tmp_path, tree)
    assert line.startswith(
        "redelivery.redis = 'redis://***@redis/1': has no effect while redelivery.enabled is false: leave one"
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


def test_a_superlink_is_not_reached_over_the_adapter(tmp_path: Path) -> None:
    [line] = problems(tmp_path, {"upstream": {"wire": "grpc_adapter"}})
    assert (
        "upstream.wire = 'grpc_adapter': is a wire of nodes alone: write one of http_v1, rest_v0, grpc"
        in line
    )


def test_a_port_speaks_http_or_grpc(tmp_path: Path) -> None:
    [line] = problems(tmp_path, {"listeners": [{"wires": ["http_v1", "grpc"]}]})
    assert line.startswith("listeners[0].wires = http_v1, grpc: cannot be served on one port")
    assert "add a listener" in line
    tree = {"listeners": [{"wires": ["http_v1"]}, {"address": ":8081", "wires": ["grpc", "grpc_adapter"]}]}
    assert [listener.speaks_grpc for listener in load_tree(tmp_path, tree).listeners] == [False, True]


@pytest.mark.parametrize("wire", ["grpc", "grpc_adapter"])
def test_a_grpc_port_is_no_free_one(tmp_path: Path, wire: str) -> None:
    [line] = problems(tmp_path, {"listeners": [{"wires": [wire], "address": "127.0.0.1:0"}]})
    assert line.startswith("listeners[0].address = 127.0.0.1:0: must have a port, because each worker opens")
    free = {"listeners": [{"wires": ["http_v1"], "address": "127.0.0.1:0"}]}
    assert load_tree(tmp_path, free).listeners[0].address.port == 0


@pytest.mark.parametrize("wires", [["http_v1"], ["grpc", "grpc_adapter"]])
@pytest.mark.parametrize("mode", ["wanted", "needed"])
def test_a_port_of_either_kind_may_ask_for_certificates_and_for_the_newest_tls(
    tmp_path: Path, wires: list[str], mode: str
) -> None:
    certificate, key = make_pair(tmp_path)
    tls = {
        "certificate": str(certificate),
        "key": str(key),
        "minimum_version": "1.3",
        "client_certificates": mode,
        "client_ca": str(certificate),
    }
    tree = {
        "listeners": [{"wires": wires, "tls": tls, "auth": {"accept": ["certificate"]}}],
        "client_certificates": {"allow": [{"match": "CN:site"}]},
    }
    section = load_tree(tmp_path, tree).listeners[0].tls
    assert section is not None
    assert (section.minimum_version, section.client_certificates) == ("1.3", mode)


def test_a_ca_file_needs_https(tmp_path: Path) -> None:
    [line] = problems(tmp_path, {"upstream": {"ca_file": certifi.where(), "url": "http://a:1"}})
    assert line.startswith(f"upstream.ca_file = '{certifi.where()}': has no effect, because upstream.url is")


def test_every_fault_of_the_files_of_a_listener_is_named(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    _, other = make_pair(tmp_path, "other")
    _, encrypted = make_pair(tmp_path, "encrypted", password=b"s3cret")
    files = [
        {"certificate": "missing.pem", "key": str(certificate), "minimum_version": 1.1},
        {"certificate": str(key), "key": str(encrypted)},
        {"certificate": str(certificate), "key": str(other)},
        {"certificate": str(certificate), "key": str(key)},
    ]
    tree = {"listeners": [{"address": f":{8080 + index}", "tls": tls} for index, tls in enumerate(files)]}
    no_file = "cannot be read: No such file or directory"
    no_certificate = "must be a file of PEM certificates, and this one holds none that can be read"
    no_key = "must be a file with a PEM private key, and this one holds none"
    no_password = "is encrypted, and nobody is there to type its password: give a key without one"
    no_pair = "is not the key of the first certificate in relay.pem: give the key that belongs to it"
    assert problems(tmp_path, tree) == [
        f"listeners[0].tls.certificate = 'missing.pem': {no_file} (relay.yaml:4)",
        f"listeners[0].tls.key = 'relay.pem': {no_key} (relay.yaml:5)",
        "listeners[0].tls.minimum_version = '1.1': must be '1.2' or '1.3' (relay.yaml:6)",
        f"listeners[1].tls.certificate = 'relay-key.pem': {no_certificate} (relay.yaml:9)",
        f"listeners[1].tls.key = 'encrypted-key.pem': {no_password} (relay.yaml:10)",
        f"listeners[2].tls.key = 'other-key.pem': {no_pair} (relay.yaml:14)",
    ]


def test_several_listeners_may_be_encrypted_with_the_same_files(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path, expired=True)
    tls = {"certificate": str(certificate), "key": str(key)}
    settings = load_tree(tmp_path, {"listeners": [{"tls": tls}, {"address": ":8443", "tls": tls}]})
    assert settings.listeners[0].tls == settings.listeners[1].tls == Tls(certificate=certificate, key=key)


def test_a_key_without_a_default_must_be_given(tmp_path: Path) -> None:
    tree = {"listeners": [{"address": ":9100", "tls": {}}]}
    said = "is missing, and has no default: listeners[0].tls needs it"
    conflict = "listeners[0].address = 0.0.0.0:9100: cannot be listened on beside admin.address"
    *missing, address = problems(tmp_path, tree)
    assert missing == [f"listeners[0].tls.{name}: {said} (relay.yaml:3)" for name in ("certificate", "key")]
    assert address.startswith(conflict)


def test_a_missing_key_is_traced_to_the_variable_beside_it(tmp_path: Path) -> None:
    certificate, _ = make_pair(tmp_path)
    with pytest.raises(SettingsError) as caught:
        load(None, {"RELAY_LISTENERS__0__TLS__CERTIFICATE": str(certificate)})
    assert str(caught.value) == (
        "listeners[0].tls.key: is missing, and has no default: listeners[0].tls needs it"
        " (RELAY_LISTENERS__0__TLS__CERTIFICATE)"
    )


def test_a_private_key_that_was_pasted_in_is_not_repeated(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    tree = {"listeners": [{"tls": {"certificate": str(certificate), "key": key.read_text()}}]}
    [line] = problems(tmp_path, tree)
    assert line.startswith("listeners[0].tls.key = '-----BEGIN PRIVATE KEY-----***: cannot be read: ")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"retry": {"base": "6s"}}, "retry.base = 6s: must be at most retry.cap, which is 5s (relay.yaml:2)"),
        (
            {"limits": {"header_size": "33KiB"}},
            "limits.header_size = 33KiB: must be at most limits.head_size, which is 32KiB (relay.yaml:2)",
        ),
        (
            {"retry": {"cap": "50ms"}},
            "retry.base = 100ms: must be at most retry.cap, which is 50ms (default)",
        ),
        (
            {"drain": {"timeout": "10s", "idle_grace": "10s"}},
            "drain.idle_grace = 10s: must be shorter than drain.timeout, which is 10s (relay.yaml:3)",
        ),
        (
            {"drain": {"timeout": "5s"}},
            "drain.idle_grace = 5s: must be shorter than drain.timeout, which is 5s (default)",
        ),
        (
            {"redelivery": {"memory": "1023KiB"}},
            "redelivery.max_size = 256KiB: must be at most redelivery.memory / 4, which is 261888B (default)",
        ),
        (
            {"redelivery": {"max_size": "8MiB"}},
            "redelivery.max_size = 8MiB: must be at most redelivery.memory / 4, which is 4MiB (relay.yaml:2)",
        ),
    ],
)
def test_durations_and_sizes_must_fit_together(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    assert problems(tmp_path, tree) == [said]


@pytest.mark.parametrize(
    "tree",
    [
        {"listeners": [{"wires": ["rest_v0"]}], "upstream": {"wire": "rest-v0"}},
        {"listeners": [{"wires": ["rest_v0"]}], "upstream": ["wire: rest_v0"]},
        {"listeners": [{"address": ":9100"}], "admin": {"address": 9101}},
        {"upstream": {"ca_file": certifi.where(), "url": "superlink"}},
        {"listeners": [{"address": ":9100"}, "none"]},
        {"retry": {"base": "1m", "cap": "long"}},
        {"drain": {"idle_grace": "1h", "timeout": -1}},
        {"listeners": [{"tls": {"certificate": certifi.where(), "key": "missing.pem"}}]},
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


def test_the_settings_are_read_without_the_libraries_that_serve() -> None:
    code = "import sys, relay.settings; print(sorted({'aiohttp', 'gunicorn', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
