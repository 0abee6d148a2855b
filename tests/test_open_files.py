"""The limit of open files is raised to what is allowed, and compared with what the settings need."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest
import structlog.testing

from relay.open_files import needs, raise_limit
from relay.settings import Settings, load

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBER = resource.RLIMIT_NOFILE


@pytest.fixture
def hard() -> Iterator[int]:
    """The limit that nobody can raise, with a lower one in force."""
    before = resource.getrlimit(NUMBER)
    resource.setrlimit(NUMBER, (200, before[1]))
    yield before[1]
    resource.setrlimit(NUMBER, before)


def settings(**environ: str) -> Settings:
    return load(None, {f"RELAY_{key}": value for key, value in environ.items()})


def test_it_is_raised_as_far_as_allowed_and_said(hard: int) -> None:
    with structlog.testing.capture_logs() as logs:
        assert raise_limit(settings()) == hard
    assert resource.getrlimit(NUMBER) == (hard, hard)
    assert [(line["log_level"], line["limit"]) for line in logs] == [("info", hard)]


def test_too_few_for_the_connections_that_are_allowed_is_a_warning_with_the_number(
    hard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    with structlog.testing.capture_logs() as logs:
        assert raise_limit(settings(LIMITS__CONNECTIONS="1000")) == 1000
    assert len(logs) == 1
    assert (logs[0]["log_level"], logs[0]["limit"], logs[0]["needed"]) == ("warning", 1000, 2356)
    assert "2356" in logs[0]["fix"]


def test_one_that_cannot_be_raised_is_said_and_no_end(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (500, 4096))
    with structlog.testing.capture_logs() as logs:
        assert raise_limit(settings()) == 500
    monkeypatch.undo()
    assert logs[0]["event"] == "the limit of open files stays"


@pytest.mark.parametrize(
    ("environ", "needed"),
    [
        ({}, 356),
        ({"UPSTREAM__MAX_CONNECTIONS": "10"}, 110),
        ({"LIMITS__CONNECTIONS": "50", "UPSTREAM__MAX_CONNECTIONS": "10"}, 210),
        ({"UPSTREAM__STANDBY": "[http://127.0.0.1:9]", "UPSTREAM__MAX_CONNECTIONS": "10"}, 120),
        ({"UPSTREAM__WIRE": "grpc"}, 100),
        ({"UPSTREAM__WIRE": "grpc", "LIMITS__CONNECTIONS": "50"}, 200),
        (
            {
                "LIMITS__CONNECTIONS": "50",
                "LISTENERS__0__WIRES": "[http_v1]",
                "LISTENERS__1__WIRES": "[grpc]",
                "LISTENERS__1__ADDRESS": ":8081",
            },
            556,
        ),
    ],
)
def test_what_the_settings_need(environ: dict[str, str], needed: int) -> None:
    assert needs(settings(**environ)) == needed
