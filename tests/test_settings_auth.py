"""Settings of who is let in: credentials that are accepted, and where keys are kept, must fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relay.settings import Auth, Keys, RedisUrl, load
from tests.test_settings import load_tree, problems

LISTENER = {"listeners": [{"auth": {"accept": ["api_key"]}}]}
PASSWORD = "hunter2"


def test_nobody_is_asked_by_default() -> None:
    settings = load(None, {})
    assert settings.listeners[0].auth == Auth(accept=(), strangers="refuse", forward=False, enforce=True)
    assert settings.keys == Keys(file=None, redis=None, pepper_file=None, stale=3600.0)


def test_every_setting_can_be_given_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_text("0123456789abcdef\n")
    tree = {
        "listeners": [
            {
                "address": ":80",
                "auth": {
                    "accept": ["api_key", "node_signature"],
                    "strangers": "drop",
                    "forward": True,
                    "enforce": False,
                },
            },
            {"address": ":81"},
        ],
        "keys": {"file": f"{tmp_path}/keys", "pepper_file": f"{tmp_path}/pepper"},
    }
    settings = load_tree(tmp_path, tree)
    assert settings.listeners[0].auth == Auth(
        accept=(("api_key",), ("node_signature",)),
        strangers="drop",
        forward=True,
        enforce=False,
    )
    assert settings.listeners[1].auth == Auth()
    assert settings.keys == Keys(file=tmp_path / "keys", pepper_file=tmp_path / "pepper")


def test_every_setting_can_be_given_in_the_environment() -> None:
    environ = {
        "RELAY_LISTENERS__0__AUTH__ACCEPT": "[api_key]",
        "RELAY_LISTENERS__0__AUTH__STRANGERS": "drop",
        "RELAY_KEYS__REDIS": f"redis://relay:{PASSWORD}@redis:6379/1",
        "RELAY_KEYS__STALE": "2h",
    }
    settings = load(None, environ)
    assert settings.listeners[0].auth.accept == (("api_key",),)
    assert settings.keys.redis == RedisUrl(f"redis://relay:{PASSWORD}@redis:6379/1")
    assert settings.keys.stale == 7200
    assert PASSWORD not in str(settings)
    assert PASSWORD not in repr(settings)


@pytest.mark.parametrize(
    ("accept", "said"),
    [
        ("api_key", "accept = 'api_key': must be a list"),
        (["key"], "accept[0] = 'key': must be one of api_key, certificate, node_signature, or several"),
        ([""], "accept[0] = '': must be one of"),
        (["api_key+"], "accept[0] = 'api_key+': must be one of"),
        ([5], "accept[0] = 5: must be one of"),
        (["api_key+api_key"], "accept[0] = 'api_key+api_key': must name each credential once"),
        (
            ["api_key+certificate", "api_key"],
            "needs no api_key+certificate, because api_key is accepted already",
        ),
        (["api_key", "api_key"], "needs no api_key, because api_key is accepted already"),
        (
            ["api_key+certificate", "certificate+api_key"],
            "needs no certificate+api_key, because api_key+certificate is accepted already",
        ),
    ],
)
def test_what_cannot_be_accepted_is_named(tmp_path: Path, accept: Any, said: str) -> None:
    [problem] = problems(tmp_path, {"listeners": [{"auth": {"accept": accept}}]})
    assert problem.startswith("listeners[0].auth.accept")
    assert said in problem


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            LISTENER,
            (
                "listeners[0].auth.accept = api_key: needs a place where keys are kept: set keys.file or"
                " keys.redis (relay.yaml:3)"
            ),
        ),
        (
            {"keys": {"file": "/tmp/keys"}},
            (
                "keys.file = '/tmp/keys': has no effect, because no listener asks for a key: add api_key to"
                " listeners[0].auth.accept (relay.yaml:2)"
            ),
        ),
        (
            {"keys": {"redis": f"redis://u:{PASSWORD}@h/"}},
            (
                "keys.redis = 'redis://***@h/': has no effect, because no listener asks for a key: add"
                " api_key to listeners[0].auth.accept (relay.yaml:2)"
            ),
        ),
        (
            {**LISTENER, "keys": {"file": "/tmp/keys", "redis": "redis://h"}},
            "keys.file = '/tmp/keys': cannot be used beside keys.redis: keep one of them (relay.yaml:6)",
        ),
        (
            {"keys": {"pepper_file": "{pepper}"}},
            (
                "keys.pepper_file = '{pepper}': has no effect without keys: set keys.file or keys.redis, or"
                " leave it out (relay.yaml:2)"
            ),
        ),
        (
            {**LISTENER, "keys": {"file": "/tmp"}},
            "keys.file = '/tmp': is a directory: write the path of a file in it, such as keys.jsonl",
        ),
        (
            {**LISTENER, "keys": {"file": "/nowhere/keys"}},
            "keys.file = '/nowhere/keys': is in no directory that exists: make /nowhere, or write another",
        ),
        (
            {**LISTENER, "keys": {"file": "/tmp/keys", "pepper_file": "/nowhere"}},
            "keys.pepper_file = '/nowhere': cannot be read: No such file or directory",
        ),
        (
            {**LISTENER, "keys": {"file": "/tmp/keys", "pepper_file": "/dev/null"}},
            "keys.pepper_file = '/dev/null': must hold at least 16 random bytes: make it with openssl rand",
        ),
        (
            {"listeners": [{"auth": {"accept": ["key"]}}], "keys": {"file": "/tmp/keys"}},
            "listeners[0].auth.accept[0] = 'key': must be one of",
        ),
        ({"listeners": [{"auth": {"strangers": "kill"}}]}, "auth.strangers = 'kill': must be 'refuse' or"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    pepper = tmp_path / "pepper"
    pepper.write_bytes(b"0123456789abcdef")
    for section in tree.values():
        if isinstance(section, dict) and section.get("pepper_file") == "{pepper}":
            section["pepper_file"] = str(pepper)
    [problem] = problems(tmp_path, tree)
    assert said.replace("{pepper}", "pepper") in problem


GOOD_URLS = {
    "redis://redis": "redis://redis",
    "redis://redis:6379": "redis://redis:6379",
    "redis://redis:6379/": "redis://redis:6379/",
    f"redis://:{PASSWORD}@redis:6379/0": "redis://***@redis:6379/0",
    f"rediss://relay:{PASSWORD}@[::1]:6380/15?ssl_ca_certs=/etc/ca.pem": "rediss://***@[::1]:6380/15",
    f"unix://:{PASSWORD}@/run/redis.sock?db=1": "unix://***@/run/redis.sock",
    "unix:///run/redis.sock": "unix:///run/redis.sock",
}


@pytest.mark.parametrize("url", GOOD_URLS)
def test_a_redis_is_shown_without_its_password(url: str) -> None:
    settings = load(None, {"RELAY_LISTENERS__0__AUTH__ACCEPT": "[api_key]", "RELAY_KEYS__REDIS": url})
    assert settings.keys.redis is not None
    assert settings.keys.redis.text == url
    assert str(settings.keys.redis) == GOOD_URLS[url]


@pytest.mark.parametrize(
    "url",
    [
        f"{PASSWORD}@redis",
        f"http://:{PASSWORD}@redis",
        f"redis:/{PASSWORD}@redis",
        f"redis://:{PASSWORD}/x@redis:6379",
        f"redis://:{PASSWORD}@redis:port",
        f"redis://:{PASSWORD}@redis:99999",
        f"redis://:{PASSWORD}@redis:0",
        f"redis://:{PASSWORD}@redis/0/1",
        f"redis://:{PASSWORD}@redis/keys",
        f"redis://:{PASSWORD}@redis#{PASSWORD}",
        f"redis://:{PASSWORD}@redis?password={PASSWORD}",
        f"redis://:{PASSWORD}@redis?{PASSWORD}",
        f"redis://:{PASSWORD}@[::1",
        f"unix://{PASSWORD}/run/redis.sock",
        f"[{PASSWORD}]",
        f"{{a: {PASSWORD}}}",
    ],
)
def test_a_redis_that_cannot_be_is_refused_and_nothing_of_it_is_repeated(url: str) -> None:
    with pytest.raises(Exception, match=r"keys\.redis: must be a URL: redis://redis:6379/0") as caught:
        load(None, {"RELAY_LISTENERS__0__AUTH__ACCEPT": "[api_key]", "RELAY_KEYS__REDIS": url})
    assert PASSWORD not in str(caught.value)
