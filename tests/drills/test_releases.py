from pathlib import Path

import pytest

from drills import releases
from drills.releases import ReleaseError, commands


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(releases, "_CACHE", tmp_path)
    return tmp_path


def fake_uv(monkeypatch: pytest.MonkeyPatch, path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(releases, "_UV", path)


def test_a_release_is_made_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fake_uv(
        monkeypatch,
        cache / "uv",
        f'[ "$1" = venv ] && mkdir -p "{cache}/flwr==1.0.0"; echo "$1" >> {cache}/asked',
    )
    assert commands("flwr==1.0.0") == cache / "flwr==1.0.0" / "bin"
    assert commands("flwr==1.0.0") == cache / "flwr==1.0.0" / "bin"
    assert (cache / "asked").read_text() == "venv\npip\n"


def test_without_uv_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(releases, "_UV", cache / "nowhere")
    with pytest.raises(ReleaseError, match="run scripts/check"):
        commands("flwr==1.0.0")


def test_a_failed_installation_says_why(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fake_uv(monkeypatch, cache / "uv", "echo no such release >&2; exit 1")
    with pytest.raises(ReleaseError, match="no such release"):
        commands("flwr==1.0.0")
