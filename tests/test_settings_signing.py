"""When nodes that cannot sign are served, and what is said when they cannot be."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from relay.call import Wire
from relay.settings import SettingsError, load
from relay.settings_signing import Signing, asks

if TYPE_CHECKING:
    from pathlib import Path


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    given = {"SIGNING__DIRECTORY": str(tmp_path / "signing"), "LISTENERS__0__WIRES": "[http_v1, rest_v0]"}
    return {f"RELAY_{name}": value for name, value in (given | more).items() if value}


def problems(given: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(None, given)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("upstream", [Wire.HTTP_V1, Wire.GRPC])
def test_rest_nodes_are_served_before_other_superlinks(tmp_path: Path, upstream: Wire) -> None:
    settings = load(None, environ(tmp_path, SIGNING__UNAUTHENTICATED="true", UPSTREAM__WIRE=upstream.value))
    assert settings.listeners[0].wires == (Wire.HTTP_V1, Wire.REST_V0)
    assert settings.signing == Signing(directory=tmp_path / "signing", unauthenticated=True)
    assert settings.signing.forget_after == 30 * 24 * 3600
    assert not (tmp_path / "signing").exists()  # nothing is made by looking


@pytest.mark.parametrize("upstream", [Wire.HTTP_V1, Wire.GRPC])
def test_without_signatures_they_are_not(tmp_path: Path, upstream: Wire) -> None:
    given = environ(tmp_path, SIGNING__DIRECTORY="", UPSTREAM__WIRE=upstream.value)
    [line] = problems(given)
    assert line == (
        f"listeners[0].wires = rest_v0: cannot be served, because upstream.wire is {upstream.value}, whose"
        " SuperLink demands signatures that these nodes do not make: set signing.directory, or do not serve"
        " it (RELAY_LISTENERS__0__WIRES)"
    )


def test_callers_who_are_not_asked_are_not_signed_for_unless_it_is_said(tmp_path: Path) -> None:
    [line] = problems(environ(tmp_path))
    assert line.startswith("listeners[0].wires = rest_v0: cannot be served to callers who are not asked")
    assert "set listeners[0].auth.accept, or signing.unauthenticated: true in a closed network" in line


@pytest.mark.parametrize(
    ("auth", "right"),
    [
        ({"accept": ("api_key",), "enforce": True}, True),
        ({"accept": (), "enforce": True}, False),
        ({"accept": ("api_key",), "enforce": False}, False),
        (None, False),
    ],
)
def test_a_listener_asks_if_nobody_gets_in_without_a_credential(auth: Any, right: bool) -> None:
    listener: Any = SimpleNamespace()
    if auth is not None:
        listener.auth = SimpleNamespace(**auth)
    assert asks(listener) is right


def test_before_a_rest_superlink_there_is_nothing_to_sign(tmp_path: Path) -> None:
    given = environ(tmp_path, LISTENERS__0__WIRES="[rest_v0]", UPSTREAM__WIRE="rest_v0")
    [line] = problems(given)
    assert line.startswith(f"signing.directory = '{tmp_path}/signing': has no effect, because upstream.wire")
    load(None, _without(given))


def _without(given: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in given.items() if "SIGNING" not in name}


def _file(path: Path) -> None:
    path.touch()


def _open_secret(path: Path) -> None:
    path.mkdir()
    (path / "secret").write_text("11" * 32)
    (path / "secret").chmod(0o604)


def _bad_secret(path: Path) -> None:
    path.mkdir()
    (path / "secret").write_text("7")
    (path / "secret").chmod(0o600)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (_file, "must be a directory"),
        (_open_secret, "holds a secret that others can read: chmod 600 {path}/secret"),
        (_bad_secret, "cannot be used: {path}/secret is damaged: it must hold 64 hexadecimal digits"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path, prepare: Any, said: str) -> None:
    path = tmp_path / "signing"
    prepare(path)
    [line] = problems(environ(tmp_path, SIGNING__UNAUTHENTICATED="true"))
    assert said.format(path=path) in line


def test_a_directory_in_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "signing"
    [line] = problems(environ(tmp_path, SIGNING__DIRECTORY=str(path), SIGNING__UNAUTHENTICATED="true"))
    assert f"is in no directory that exists: make {path.parent}, or write another path" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for path, said in ((closed / "signing", "cannot be made"), (closed, "cannot be used")):
        [line] = problems(environ(tmp_path, SIGNING__DIRECTORY=str(path), SIGNING__UNAUTHENTICATED="true"))
        assert said in line
